// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
)

// TestTraffic: ping and HTTP both ways through the tunnel, small and in bulk, for
// both IP versions of the pod over both of the underlay, with the node and with
// another pod.
func TestTraffic(t *testing.T) {
	for name, underlay6 := range map[string]bool{"underlay IPv4": false, "underlay IPv6": true} {
		t.Run(name, func(t *testing.T) {
			b := newTestbed(t, underlay6)
			b.up()
			bulk := strings.Repeat("0123456789abcdef", 4<<20/16)
			for _, path := range []struct {
				name     string
				from, to *nstest.NS
				addrs    [2]string
			}{
				{"node to pod", b.Node, b.Guest, [2]string{nstest.PodAddr4.String(), nstest.PodAddr6.String()}},
				{"pod to node", b.Guest, b.Node, [2]string{nstest.NodeCNI4.String(), nstest.NodeCNI6.String()}},
				{"peer to pod", b.Peer, b.Guest, [2]string{nstest.PodAddr4.String(), nstest.PodAddr6.String()}},
				{"pod to peer", b.Guest, b.Peer, [2]string{nstest.PeerAddr4.String(), nstest.PeerAddr6.String()}},
			} {
				for _, a := range path.addrs {
					addr := addrOf(a)
					if err := ping(t, path.from, addr); err != nil {
						t.Errorf("%s: ping: %v", path.name, err)
						continue
					}
					server := serve(t, path.to, addr, bulk)
					got, err := get(path.from, server, bytes.NewReader([]byte(bulk)))
					if err != nil {
						t.Errorf("%s: HTTP: %v", path.name, err)
					} else if got != bulk {
						t.Errorf("%s: HTTP: body of %d bytes is not what was sent (%d)", path.name, len(got), len(bulk))
					}
				}
			}
		})
	}
}

// TestPodSeesWhatCNIMade: Inspect on the guest end gives what it gave on the node,
// but for the MTU.
func TestPodSeesWhatCNIMade(t *testing.T) {
	b := newTestbed(t, false)
	b.Pod.Route("10.99.0.0/16", "", "eth0")
	b.Pod.Route("10.98.0.0/16", "10.99.0.1", "eth0")
	index := b.Pod.Link("eth0").Attrs().Index
	for _, r := range []*netlink.Route{
		{Dst: ipNet(netip.MustParsePrefix("10.97.0.0/16")), Gw: net.IPv4(172, 16, 0, 1), Flags: int(netlink.FLAG_ONLINK)},
		{Dst: ipNet(netip.MustParsePrefix("fd97::/64")), Gw: net.ParseIP("fd97:1::1"), Flags: int(netlink.FLAG_ONLINK)},
		{Dst: ipNet(netip.MustParsePrefix("fd96::/64")), Src: nstest.PodAddr6.AsSlice()},
	} {
		r.LinkIndex = index
		if err := b.Pod.Handle.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	b.VM.Bridge("eth0") // as the VM's own interface may be called
	want, err := netns.Inspect(t.Context(), b.Pod.Path)
	if err != nil {
		t.Fatal(err)
	}
	want.Interfaces[0].Neighbors = []netns.Neighbor{{IP: nstest.NodeCNI4, HWAddr: mac("02:00:00:00:00:01"), State: netns.StatePermanent}}
	b.guest.Pod = want.Interfaces[0]
	for range 2 {
		if err := b.ensureGuest(); err != nil {
			t.Fatal(err)
		}
	}
	// Inspect leaves devices of ours out; in the VM the device is the pod's own.
	l := b.Guest.Link("eth0")
	if err := b.Guest.Handle.LinkSetGroup(l, 0); err != nil {
		t.Fatal(err)
	}
	got, err := netns.Inspect(t.Context(), b.Guest.Path)
	if err != nil {
		t.Fatal(err)
	}
	want.Interfaces[0].MTU = 1450
	if d := cmp.Diff(want, got, cmp.Comparer(equalAddr), cmp.Comparer(equalPrefix)); d != "" {
		t.Errorf("guest differs from the CNI's interface (-node +guest):\n%s", d)
	}
}

// TestLinkLocal: the pod has one link-local address, that of its MAC address, which
// nobody's duplicate address detection takes away, though the interface on the node has
// the same one and the bridge sends the pod's own packets back (hairpin). Neighbours find
// each other by it, both ways.
func TestLinkLocal(t *testing.T) {
	b := newTestbed(t, false)
	port, err := b.Node.Handle.LinkByIndex(b.Pod.Link("eth0").Attrs().ParentIndex)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Node.Handle.LinkSetHairpin(port, true); err != nil {
		t.Fatal(err)
	}
	b.up()
	own := linkLocalOf(t, b.Guest, "eth0")
	if want := linkLocalOf(t, b.Pod, "eth0"); own != want {
		t.Errorf("the guest has %s, the CNI's interface %s", own, want)
	}
	for _, p := range []struct {
		from *nstest.NS
		by   string
		to   *nstest.NS
		at   netip.Addr
	}{
		{b.Node, "cni0", b.Guest, own},
		{b.Peer, "eth0", b.Guest, own},
		{b.Guest, "eth0", b.Node, linkLocalOf(t, b.Node, "cni0")},
		{b.Guest, "eth0", b.Peer, linkLocalOf(t, b.Peer, "eth0")},
	} {
		// By number: package net remembers names' numbers for the whole process.
		zone := strconv.Itoa(p.from.Link(p.by).Attrs().Index)
		_, listening, err := net.SplitHostPort(serve(t, p.to, netip.IPv6Unspecified(), "here"))
		if err != nil {
			t.Fatal(err)
		}
		if err := reach(p.from, net.JoinHostPort(p.at.WithZone(zone).String(), listening), answerWithin); err != nil {
			t.Errorf("%s: %v", p.at, err)
		}
	}
	if again := linkLocalOf(t, b.Guest, "eth0"); again != own {
		t.Errorf("the guest had %s and has %s", own, again)
	}
}

// linkLocalOf waits until an interface has its one link-local address, fit for use.
func linkLocalOf(t *testing.T, ns *nstest.NS, dev string) netip.Addr {
	t.Helper()
	var addrs []netlink.Addr
	for deadline := time.Now().Add(answerWithin); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		all, err := ns.Handle.AddrList(ns.Link(dev), unix.AF_INET6)
		if err != nil {
			t.Fatal(err)
		}
		addrs = slices.DeleteFunc(all, func(a netlink.Addr) bool { return !a.IP.IsLinkLocalUnicast() })
		if len(addrs) == 1 && addrs[0].Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 {
			return addr(addrs[0].IP)
		}
	}
	t.Fatalf("%s has link-local addresses %v", dev, addrs)
	return netip.Addr{}
}
