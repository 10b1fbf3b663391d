// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

// policies lists the IPsec policies of ns as "action src dport".
func policies(t *testing.T, ns *nstest.NS) (out []string) {
	t.Helper()
	ns.Do(func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			have, err := netlink.XfrmPolicyList(family)
			if err != nil {
				return err
			}
			for _, p := range have {
				out = append(out, fmt.Sprintf("%s %s %d", p.Action, p.Src, p.DstPort))
			}
		}
		return nil
	})
	slices.Sort(out)
	return out
}

// TestGuestSourceWhole: what a filter that looks at single packets or at routes lets
// through does not get to the guest end either: fragments, and packets to everybody.
// Each way is open to the worker, so that it is the filter that closes it.
func TestGuestSourceWhole(t *testing.T) {
	for name, underlay6 := range map[string]bool{"underlay IPv4": false, "underlay IPv6": true} {
		t.Run(name, func(t *testing.T) {
			b := newTestbed(t, underlay6)
			b.up()
			vm, all := nstest.VMUnderlay4, addrOf("10.20.0.255")
			if underlay6 {
				vm = nstest.VMUnderlay6
			}
			toPod := sink(t, b.Guest, nstest.PodAddr4)
			podAddr := toPod.LocalAddr().(*net.UDPAddr).AddrPort()
			src, srcMAC := netip.AddrPortFrom(nstest.NodeCNI4, 4000), b.Node.Link("cni0").Attrs().HardwareAddr
			short := udpFrame(b.node.PodHWAddr, srcMAC, src, podAddr, "short")
			long := udpFrame(b.node.PodHWAddr, srcMAC, src, podAddr, strings.Repeat("long", 1000))
			for _, c := range []struct {
				name  string
				to    netip.Addr
				frame []byte
			}{
				{"one packet", vm, short},
				{"fragments", vm, long},
				{"broadcast", all, short},
				{"fragments to everybody", all, long},
			} {
				if underlay6 && c.to == all {
					continue // an IPv6 socket takes no IPv4, and multicast comes from a link-local address
				}
				for _, from := range []struct {
					name string
					ns   *nstest.NS
				}{{"the stranger", b.Stranger}, {"the worker", b.Node}} {
					forge(t, from.ns, c.to, testVNI, c.frame)
					arrives, within := from.ns == b.Node, silenceFor
					if arrives {
						within = answerWithin
					}
					_, err := receive(toPod, within)
					if got := err == nil; got != arrives {
						t.Errorf("%s from %s: arrived=%v (%v), want %v", c.name, from.name, got, err, arrives)
					}
				}
			}
			if underlay6 {
				everybody := addrOf("ff02::1").WithZone(fmt.Sprint(b.Stranger.Link("u0").Attrs().Index))
				forge(t, b.Stranger, everybody, testVNI, short)
				if _, err := receive(toPod, silenceFor); err == nil {
					t.Error("multicast from the stranger arrived")
				}
			}
			// Other ports are none of the filter's business.
			other := sink(t, b.VM, vm)
			b.Stranger.Do(func() error {
				c, err := net.DialUDP("udp", nil, other.LocalAddr().(*net.UDPAddr))
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("hello"))
				return err
			})
			if _, err := receive(other, answerWithin); err != nil {
				t.Errorf("another port: %v", err)
			}
		})
	}
}

// TestGuestSourceMoves: repeated calls add nothing, and with another worker the former
// one may send no longer.
func TestGuestSourceMoves(t *testing.T) {
	vm := nstest.New(t, "vm")
	// Somebody else's policy stays.
	vm.Do(func() error {
		return netlink.XfrmPolicyAdd(&netlink.XfrmPolicy{Src: ipNet(netip.MustParsePrefix("10.9.0.0/16")), Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0")),
			Dir: netlink.XFRM_DIR_IN, Priority: 7})
	})
	for _, c := range []struct {
		source Source
		want   []string
	}{
		{Source{addrOf("10.0.0.1"), 1, 9000}, []string{"allow 10.0.0.1/32 9000", "allow 10.9.0.0/16 0", "block 0.0.0.0/0 9000"}},
		{Source{addrOf("10.0.0.1"), 1, 9000}, []string{"allow 10.0.0.1/32 9000", "allow 10.9.0.0/16 0", "block 0.0.0.0/0 9000"}},
		{Source{addrOf("10.0.0.2"), 1, 9000}, []string{"allow 10.0.0.2/32 9000", "allow 10.9.0.0/16 0", "block 0.0.0.0/0 9000"}},
		{Source{addrOf("fd00::1"), 1, 9001}, []string{"allow 10.0.0.2/32 9000", "allow 10.9.0.0/16 0", "allow fd00::1/128 9001", "block 0.0.0.0/0 9000", "block ::/0 9001"}},
	} {
		vm.Do(func() error { return ensureGuestSource(c.source) })
		if d := cmp.Diff(c.want, policies(t, vm)); d != "" {
			t.Errorf("%v (-want +got):\n%s", c.source, d)
		}
	}
}
