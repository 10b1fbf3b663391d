// SPDX-License-Identifier: Apache-2.0

// Package netns reads and makes network namespaces: what the CNI left in a pod's
// namespace on the worker node (Inspect), and the namespace that stands for it in
// the pod VM (Create). The tunnel between the two is package vxlan below it.
//
// Everything here is safe for concurrent use. Work on links goes through netlink
// sockets opened in the namespace; only what the kernel ties to the calling thread
// (sockets, /proc/sys/net) goes through Do.
//
// Errors carry the classes of containerd/errdefs.
package netns

import (
	"net"
	"net/netip"
)

// LinkGroup is the interface group (ip link show group) of every device that this
// project makes. The kernel sets it in the same step that makes the device, so a
// device of ours can be told from a stranger's at any moment. Inspect leaves such
// devices out.
const LinkGroup = 0x70706f64 // "ppod"

// RuleProtocol marks the routing rules and routes that this project makes in a pod's
// namespace on the node; no routing daemon uses it (iproute2 6.1, rt_protos). Inspect
// leaves them out.
const RuleProtocol = 0x70

// Pod is the network of a pod's namespace.
type Pod struct {
	// Interfaces are those with an address, at least one. The one that carries the
	// default route comes first (IPv4's before IPv6's), the others follow in the
	// order of their index.
	Interfaces []Interface
	// Rules are the routing rules besides the kernel's own, in order.
	Rules []Rule
	// LeftOut names, each with its reason, what is in the namespace and not above,
	// for a log.
	LeftOut []string
}

// Interface is one interface of a pod, with everything that must be made again in
// the pod VM.
type Interface struct {
	Name   string
	HWAddr net.HardwareAddr
	// MTU in bytes, as the CNI set it.
	MTU int
	// Addrs are the pod's addresses, IPv4 first; link-local IPv6 ones are left out.
	Addrs []netip.Prefix
	// Routes of every table that leave through this interface, gateway-less first, and
	// of those alike table main's first.
	Routes []Route
	// Neighbors are the permanent entries only.
	Neighbors []Neighbor
}

// Route is one unicast route.
type Route struct {
	// Dst is the destination; a default route has length 0.
	Dst netip.Prefix
	// Gateway is invalid (the zero Addr) for an on-link route.
	Gateway netip.Addr
	// Src is the preferred source address; invalid when the route names none.
	Src netip.Addr
	// Protocol is one of boot, static, kernel, dhcp, ra; empty means static.
	Protocol string
	// Scope is one of universe, site, link, host, nowhere; empty lets the kernel's
	// custom decide: link without a gateway, else universe. IPv6 has universe only.
	Scope string
	// Metric is the priority, 0 for the kernel's default: 0 for IPv4, 1024 for IPv6.
	Metric int
	// Table is 0 for table main.
	Table int
}

// Rule is one routing rule that leads to a table. Selectors that are zero match all.
type Rule struct {
	IPv6     bool
	Priority int
	Src, Dst netip.Prefix
	// IIF and OIF are names of interfaces.
	IIF, OIF string
	// Mark is compared under Mask; with Mask 0 there is no such selector.
	Mark, Mask uint32
	Table      int
}

// Neighbor is one permanent neighbour entry.
type Neighbor struct {
	IP     netip.Addr
	HWAddr net.HardwareAddr
	// State is the kernel's name, always permanent.
	State string
}
