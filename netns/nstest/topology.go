// SPDX-License-Identifier: Apache-2.0

package nstest

import (
	"net/netip"
	"testing"
)

// Topology is a worker node with two pods on a bridge, and two machines beside it:
//
//	Pod eth0 ─┐                       Fabric
//	Peer eth0 ┴─ cni0   Node   u0 ───┬─────┬──── u0  VM (a pod VM's root namespace)
//	                                 │     └──── u0  Stranger
//
// Nothing of a tunnel exists yet; Guest is where the VM's pod namespace is mounted,
// made and empty.
type Topology struct {
	Node, Pod, Peer, VM, Stranger *NS
	// Guest is the pod's namespace inside the VM.
	Guest *NS

	fabric *NS
}

// Addresses of the topology. IPv4 and IPv6 end in the same number.
var (
	NodeUnderlay4     = netip.MustParseAddr("10.20.0.1")
	NodeUnderlay6     = netip.MustParseAddr("fd20::1")
	VMUnderlay4       = netip.MustParseAddr("10.20.0.2")
	VMUnderlay6       = netip.MustParseAddr("fd20::2")
	StrangerUnderlay4 = netip.MustParseAddr("10.20.0.3")
	StrangerUnderlay6 = netip.MustParseAddr("fd20::3")
	NodeCNI4          = netip.MustParseAddr("10.30.0.1")
	NodeCNI6          = netip.MustParseAddr("fd30::1")
	PodAddr4          = netip.MustParseAddr("10.30.0.5")
	PodAddr6          = netip.MustParseAddr("fd30::5")
	PeerAddr4         = netip.MustParseAddr("10.30.0.6")
	PeerAddr6         = netip.MustParseAddr("fd30::6")
)

// UnderlayMTU sets the MTU of the network between the machines.
func (top *Topology) UnderlayMTU(mtu int) {
	for _, n := range []*NS{top.Node, top.VM, top.Stranger} {
		n.PairMTU("u0", top.fabric, mtu)
	}
}

// CNIMTU sets the MTU of the pods' network.
func (top *Topology) CNIMTU(mtu int) {
	for _, n := range []*NS{top.Pod, top.Peer} {
		n.PairMTU("eth0", top.Node, mtu)
	}
}

// NewTopology makes one. All MTUs are 1500.
func NewTopology(t testing.TB) *Topology {
	t.Helper()
	top := &Topology{
		Node:     New(t, "node"),
		Pod:      New(t, "pod"),
		Peer:     New(t, "peer"),
		VM:       New(t, "vm"),
		Stranger: New(t, "stranger"),
		Guest:    New(t, "guest"),
		fabric:   New(t, "fabric"),
	}
	top.fabric.Bridge("fabric")
	for _, m := range []struct {
		ns    *NS
		addrs []string
	}{
		{top.Node, []string{"10.20.0.1/24", "fd20::1/64"}},
		{top.VM, []string{"10.20.0.2/24", "fd20::2/64"}},
		{top.Stranger, []string{"10.20.0.3/24", "fd20::3/64"}},
	} {
		top.fabric.Plug("fabric", m.ns, "u0")
		m.ns.Addr("u0", m.addrs...)
	}
	top.Node.Bridge("cni0")
	top.Node.Addr("cni0", "10.30.0.1/24", "fd30::1/64")
	top.Node.Sysctl("ipv4/conf/all/forwarding", "1")
	top.Node.Sysctl("ipv6/conf/all/forwarding", "1")
	for _, p := range []struct {
		ns    *NS
		addrs []string
	}{
		{top.Pod, []string{"10.30.0.5/24", "fd30::5/64"}},
		{top.Peer, []string{"10.30.0.6/24", "fd30::6/64"}},
	} {
		top.Node.Plug("cni0", p.ns, "eth0")
		p.ns.Addr("eth0", p.addrs...)
		p.ns.Route("0.0.0.0/0", "10.30.0.1", "eth0")
		p.ns.Route("::/0", "fd30::1", "eth0")
	}
	for _, n := range []*NS{top.Node, top.VM, top.Stranger, top.Pod, top.Peer} {
		n.Settle()
	}
	return top
}
