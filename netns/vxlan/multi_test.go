// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
)

// newMultiTestbed is newTestbed with a pod that has three interfaces, as CNIs make them
// for pods with several networks:
//
//	eth0  a port of the bridge cni0, IPv4 and IPv6, the default routes
//	net1  a port of the bridge lan, IPv4 and IPv6, MTU 9000, a default route of a higher
//	      metric, and a table of its own for what comes from its address (as the
//	      plug-in sbr makes it)
//	net2  a macvlan on the node's u1, IPv4 and IPv6; LAN is the machine at the other end of u1
//
// The peer is on all three.
func newMultiTestbed(t *testing.T, underlay6 bool) (b *testbed, lan *nstest.NS) {
	t.Helper()
	b = newTestbed(t, underlay6)
	lan = nstest.New(t, "lan")
	b.Node.Bridge("lan")
	b.Node.Addr("lan", "10.40.0.1/24", "fd40::1/64")
	b.Node.Veth("u1", lan, "u1")
	lan.Addr("u1", "10.50.0.1/24", "fd50::1/64")
	for last, ns := range map[int]*nstest.NS{5: b.Pod, 6: b.Peer} {
		b.Node.Plug("lan", ns, "net1")
		ns.PairMTU("net1", b.Node, 9000)
		ns.Addr("net1", fmt.Sprintf("10.40.0.%d/24", last), fmt.Sprintf("fd40::%d/64", last))
		b.Node.Macvlan("u1", ns, "net2")
		ns.Addr("net2", fmt.Sprintf("10.50.0.%d/24", last), fmt.Sprintf("fd50::%d/64", last))
		ns.Settle()
	}
	index := b.Pod.Link("net1").Attrs().Index
	for _, r := range []*netlink.Route{
		{Dst: ipNet(prefixOf("0.0.0.0/0")), Gw: addrOf("10.40.0.1").AsSlice(), Priority: 200},
		{Dst: ipNet(prefixOf("0.0.0.0/0")), Gw: addrOf("10.40.0.1").AsSlice(), Table: 100},
		{Dst: ipNet(prefixOf("10.40.0.0/24")), Scope: unix.RT_SCOPE_LINK, Table: 100},
		{Dst: ipNet(prefixOf("::/0")), Gw: addrOf("fd40::1").AsSlice(), Priority: 2048},
	} {
		r.LinkIndex = index
		if err := b.Pod.Handle.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Pod.Handle.RuleAdd(fromNet1.Kernel()); err != nil {
		t.Fatal(err)
	}
	pod, err := netns.Inspect(t.Context(), b.Pod.Path)
	if err != nil {
		t.Fatal(err)
	}
	if len(pod.Interfaces) != 3 || len(pod.Rules) != 1 {
		t.Fatalf("the pod has %+v", pod)
	}
	for i, one := range pod.Interfaces[1:] {
		node, guest := b.node, b.guest
		node.Device, node.VNI = fmt.Sprintf("%s%d", testDev, i), testVNI+uint32(i)+1
		node.PodInterface, node.PodAddrs, node.PodHWAddr = one.Name, one.Addrs, one.HWAddr
		node.MTU = CarriedMTU(one.MTU, 1500, node.Remote, one.Addrs)
		guest.Device, guest.VNI, guest.Pod = fmt.Sprintf("vxlan%d", i+1), node.VNI, one
		b.moreNodes, b.moreGuests = append(b.moreNodes, node), append(b.moreGuests, guest)
	}
	return b, lan
}

var fromNet1 = netns.Rule{Priority: 1000, Src: netip.MustParsePrefix("10.40.0.5/32"), Table: 100}

func prefixOf(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// TestSeveralInterfaces: the pod in the VM has every interface of the CNI as it was on
// the node, and each works in both directions, through its own tunnel, at any size.
func TestSeveralInterfaces(t *testing.T) {
	for name, underlay6 := range map[string]bool{"underlay IPv4": false, "underlay IPv6": true} {
		t.Run(name, func(t *testing.T) {
			b, lan := newMultiTestbed(t, underlay6)
			want, err := netns.Inspect(t.Context(), b.Pod.Path)
			if err != nil {
				t.Fatal(err)
			}
			b.up()
			for range 2 {
				if err := EnsureGuestRules(t.Context(), b.Guest.Path, want.Rules); err != nil {
					t.Fatal(err)
				}
			}
			bulk := strings.Repeat("0123456789abcdef", 1<<20/16)
			for _, path := range []struct {
				name     string
				from, to *nstest.NS
				addr     string
			}{
				{"eth0: peer to pod", b.Peer, b.Guest, "10.30.0.5"},
				{"eth0: pod to peer", b.Guest, b.Peer, "fd30::6"},
				{"net1: peer to pod", b.Peer, b.Guest, "10.40.0.5"},
				{"net1: pod to peer", b.Guest, b.Peer, "10.40.0.6"},
				{"net1: peer to pod", b.Peer, b.Guest, "fd40::5"},
				{"net1: pod to peer", b.Guest, b.Peer, "fd40::6"},
				{"net1: node to pod", b.Node, b.Guest, "10.40.0.5"},
				{"net2: peer to pod", b.Peer, b.Guest, "10.50.0.5"},
				{"net2: pod to peer", b.Guest, b.Peer, "10.50.0.6"},
				{"net2: pod to LAN", b.Guest, lan, "10.50.0.1"},
				{"net2: LAN to pod", lan, b.Guest, "10.50.0.5"},
				{"net2: pod to LAN", b.Guest, lan, "fd50::1"},
				{"net2: LAN to pod", lan, b.Guest, "fd50::5"},
			} {
				if err := ping(t, path.from, addrOf(path.addr)); err != nil {
					t.Errorf("%s: ping: %v", path.name, err)
					continue
				}
				server := serve(t, path.to, addrOf(path.addr), bulk)
				got, err := get(path.from, server, bytes.NewReader([]byte(bulk)))
				if err != nil || got != bulk {
					t.Errorf("%s: HTTP: body of %d bytes, %v; want %d", path.name, len(got), err, len(bulk))
				}
			}
			multicast(t, b.Peer, b.Guest, "net2", "239.1.2.3", 100)
			multicast(t, b.Peer, b.Guest, "net2", "ff02::1:2:3", 100)
			guestSeesPod(t, b, want)
		})
	}
}

// guestSeesPod compares what the pod has in the VM with what the CNI made, MTUs apart.
func guestSeesPod(t *testing.T, b *testbed, want *netns.Pod) {
	t.Helper()
	for i := range want.Interfaces {
		one := &want.Interfaces[i]
		one.MTU = CarriedMTU(one.MTU, 1500, b.guest.Remote, one.Addrs)
		// Inspect leaves devices of ours out; in the VM they are the pod's own.
		if err := b.Guest.Handle.LinkSetGroup(b.Guest.Link(one.Name), 0); err != nil {
			t.Fatal(err)
		}
	}
	got, err := netns.Inspect(t.Context(), b.Guest.Path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.Comparer(equalAddr), cmp.Comparer(equalPrefix)); d != "" {
		t.Errorf("the VM's pod differs from the CNI's (-node +guest):\n%s", d)
	}
}

// TestSeveralTooBig: each interface answers what is too large for its own tunnel.
func TestSeveralTooBig(t *testing.T) {
	b, _ := newMultiTestbed(t, false)
	b.up()
	for addr, mtu := range map[string]int{"10.30.0.5": 1500, "fd30::5": 1500, "10.40.0.5": 9000, "fd40::5": 9000, "10.50.0.5": 1500} {
		a := addrOf(addr)
		s := sink(t, b.Guest, a)
		c := dialUDP(t, b.Peer, s, unix.IP_PMTUDISC_DO)
		if _, err := c.Write(make([]byte, mtu-udpHeaders(a))); err != nil {
			t.Fatal(err)
		}
		if _, err := receive(c, answerWithin); !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("%s: too large a datagram: %v, want %v", addr, err, unix.EMSGSIZE)
		}
		if got := pathMTU(t, c, a); got != b.node.MTU {
			t.Errorf("%s: path MTU %d, want %d", addr, got, b.node.MTU)
		}
	}
}

// TestSeveralEnsureRemove: as for one: nothing to do the second time, nothing left, and
// what the namespace was like is restored though the tunnels change the same values.
func TestSeveralEnsureRemove(t *testing.T) {
	for _, forwarding := range []string{"0", "1"} {
		t.Run("forwarding "+forwarding, func(t *testing.T) {
			b, _ := newMultiTestbed(t, false)
			b.Pod.Sysctl("ipv6/conf/all/forwarding", forwarding)
			b.Pod.Sysctl("ipv4/conf/net1/forwarding", "1")
			before := settled(b)
			if changes, err := b.ensureNode(); err != nil || len(changes) == 0 {
				t.Fatal(changes, err)
			}
			if changes, err := b.ensureNode(); err != nil || len(changes) != 0 {
				t.Errorf("second Ensure changed %q, %v", changes, err)
			}
			for range 2 {
				if err := b.removeNode(); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, settled(b)); d != "" {
					t.Errorf("after Remove (-before +after):\n%s", d)
				}
			}
		})
	}
}

// settled is a snapshot without the anycast routes of a namespace that forwards, which
// come and go a moment after it begins and ends to.
func settled(b *testbed) string {
	var lines []string
	for line := range strings.Lines(b.snapshots()) {
		if !strings.Contains(line, fmt.Sprintf(" type %d ", unix.RTN_ANYCAST)) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// TestSeveralCutShort: Ensure of all tunnels is cut short at each place where it looks at
// its context; then Remove leaves nothing.
func TestSeveralCutShort(t *testing.T) {
	b, _ := newMultiTestbed(t, false)
	before := settled(b)
	cuts := 0
	for n := 0; ; n++ {
		err := b.Node.Try(func() error { return EnsureNode(&countdown{t.Context(), n}, b.nodes()...) })
		if err == nil {
			break
		}
		cuts++
		if !errors.Is(err, unix.ECANCELED) && !strings.Contains(err.Error(), "canceled") {
			t.Fatalf("cut %d: %v", n, err)
		}
		if n%2 == 0 { // and go on from there, as a restart of the adaptor does
			if _, err := b.ensureNode(); err != nil {
				t.Fatalf("cut %d: %v", n, err)
			}
		}
		if err := b.removeNode(); err != nil {
			t.Fatalf("cut %d: %v", n, err)
		}
		if d := cmp.Diff(before, settled(b)); d != "" {
			t.Errorf("cut %d and Remove (-before +after):\n%s", n, d)
		}
	}
	if cuts < 12 {
		t.Errorf("only %d cuts: the test does not reach into EnsureNode", cuts)
	}
}

// TestSeveralRepair: a device that somebody deleted is made again, and the others are
// not touched.
func TestSeveralRepair(t *testing.T) {
	for i := range 3 {
		b, _ := newMultiTestbed(t, false)
		before := settled(b)
		b.up()
		for _, repair := range []bool{true, false} {
			lost := b.nodes()[i].Device
			if err := b.Pod.Handle.LinkDel(b.Pod.Link(lost)); err != nil {
				t.Fatal(err)
			}
			if !repair {
				break
			}
			changes, err := b.ensureNode()
			if err != nil || len(changes) == 0 {
				t.Fatal(changes, err)
			}
			for j, n := range b.nodes() {
				if text := strings.Join(changes, "\n"); j != i && strings.Contains(text, "device "+n.Device+"\n") {
					t.Errorf("%s was lost and %s made anew: %s", lost, n.Device, text)
				}
			}
			for _, a := range []string{"10.30.0.5", "10.40.0.5", "fd40::5", "10.50.0.5"} {
				if err := ping(t, b.Peer, addrOf(a)); err != nil {
					t.Error(err)
				}
			}
		}
		if err := b.removeNode(); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, settled(b)); d != "" {
			t.Errorf("device %d lost, and Remove (-before +after):\n%s", i, d)
		}
	}
}

// TestSeveralRefused: tunnels that share what must be their own.
func TestSeveralRefused(t *testing.T) {
	for name, change := range map[string]func(b *testbed){
		"device":    func(b *testbed) { b.moreNodes[0].Device = b.node.Device },
		"interface": func(b *testbed) { b.moreNodes[0].PodInterface = b.node.PodInterface },
		"VNI":       func(b *testbed) { b.moreNodes[0].VNI = b.node.VNI },
		"namespace": func(b *testbed) { b.moreNodes[0].NetNS = b.Peer.Path },
	} {
		b, _ := newMultiTestbed(t, false)
		before := b.snapshots()
		change(b)
		if _, err := b.ensureNode(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
		if d := cmp.Diff(before, b.snapshots()); d != "" {
			t.Errorf("%s (-before +after):\n%s", name, d)
		}
	}
	b, _ := newMultiTestbed(t, false)
	b.moreGuests[0].Pod.Name = "eth0"
	if err := b.ensureGuest(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("two guest ends of one name: %v, want InvalidArgument", err)
	}
}
