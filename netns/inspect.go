// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Inspect reads the network of the pod's namespace at path as the CNI left it: every
// interface that has an address of its own, except lo and devices of ours, and the
// routing rules. Interfaces without an address, such as the sit0 or tunl0 that some
// kernels put into every namespace, are no part of the pod's network and are left out;
// so are rules with selectors or actions that Rule does not have.
//
// NotFound: nothing at path. InvalidArgument: not a network namespace, or no
// interface, or no address.
func Inspect(ctx context.Context, path string) (*Pod, error) {
	h, err := Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := retryDump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces of %s: %w", path, err)
	}
	slices.SortFunc(links, func(a, b netlink.Link) int { return a.Attrs().Index - b.Attrs().Index })
	pod := &Pod{}
	var found []inspected
	candidates := 0
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 || a.Group == LinkGroup {
			continue
		}
		candidates++
		one, err := inspectLink(h, l)
		if err != nil {
			return nil, fmt.Errorf("inspect %s in %s: %w", a.Name, path, err)
		}
		if len(one.Addrs) == 0 {
			pod.LeftOut = append(pod.LeftOut, fmt.Sprintf("interface %s (%s): it has no address", a.Name, l.Type()))
			continue
		}
		if on := stackedOn(l, found); on != "" {
			return nil, fmt.Errorf("interface %s in %s is a %s on %s in the same namespace: its frames would be carried with those of %s and never reach it; give it a parent outside the pod: %w",
				a.Name, path, l.Type(), on, on, errdefs.ErrInvalidArgument)
		}
		found = append(found, one)
	}
	if candidates == 0 {
		return nil, fmt.Errorf("network namespace %s has no interface besides lo, was the CNI run?: %w", path, errdefs.ErrInvalidArgument)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no interface in network namespace %s has an address, was the CNI run?: %w", path, errdefs.ErrInvalidArgument)
	}
	slices.SortStableFunc(found, func(a, b inspected) int { return a.rank() - b.rank() })
	for i := range found {
		pod.Interfaces = append(pod.Interfaces, found[i].Interface)
	}
	if err := pod.inspectRules(h); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return pod, nil
}

// inspected is an interface and which default routes it carries.
type inspected struct {
	Interface
	index              int
	default4, default6 bool
}

// stackedOn names the one of the interfaces below l that shares l's namespace, "" if
// none does. A parent is always older, and so has the smaller index.
func stackedOn(l netlink.Link, below []inspected) string {
	switch l.Type() {
	case "macvlan", "macvtap", "ipvlan", "ipvtap", "vlan":
	default:
		return "" // of a veth it is the peer
	}
	a := l.Attrs()
	for _, b := range below {
		if a.NetNsID < 0 && a.ParentIndex == b.index {
			return b.Name
		}
	}
	return ""
}

func (i inspected) rank() int {
	switch {
	case i.default4:
		return 0
	case i.default6:
		return 1
	}
	return 2
}

func inspectLink(h *netlink.Handle, l netlink.Link) (inspected, error) {
	a := l.Attrs()
	one := inspected{index: a.Index, Interface: Interface{Name: a.Name, HWAddr: slices.Clone(a.HardwareAddr), MTU: a.MTU}}
	for _, family := range families {
		addrs, err := retryDump(func() ([]netlink.Addr, error) { return h.AddrList(l, family) })
		if err != nil {
			return one, fmt.Errorf("list addresses: %w", err)
		}
		for _, addr := range addrs {
			if p, ok := prefix(addr.IPNet); ok && !linkLocal6(p.Addr()) {
				one.Addrs = append(one.Addrs, p)
			}
		}
		if err := one.inspectRoutes(h, l, family); err != nil {
			return one, err
		}
		neighbors, err := retryDump(func() ([]netlink.Neigh, error) { return h.NeighList(a.Index, family) })
		if err != nil {
			return one, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range neighbors {
			ip, ok := netip.AddrFromSlice(n.IP)
			if ok && n.State&netlink.NUD_PERMANENT != 0 && len(n.HardwareAddr) > 0 {
				one.Neighbors = append(one.Neighbors, Neighbor{IP: ip.Unmap(), HWAddr: n.HardwareAddr, State: StatePermanent})
			}
		}
	}
	slices.SortStableFunc(one.Routes, func(a, b Route) int {
		return cmp.Or(b2i(a.Gateway.IsValid())-b2i(b.Gateway.IsValid()), b2i(a.Table != 0)-b2i(b.Table != 0))
	})
	return one, nil
}

func (i *inspected) inspectRoutes(h *netlink.Handle, l netlink.Link, family int) error {
	routes, err := ListRoutes(h, l, family)
	if err != nil {
		return err
	}
	i.Routes = append(i.Routes, routes...)
	for _, r := range routes {
		if r.Dst.Bits() == 0 && r.Table == 0 {
			i.default4 = i.default4 || family == unix.AF_INET
			i.default6 = i.default6 || family == unix.AF_INET6
		}
	}
	return nil
}

// ListRoutes returns the unicast routes that leave through l, of every table but local,
// without the kernel's own for link-local IPv6, which follow from the interface being up.
// Of a multipath route the hop through l is returned as if it were the only one.
// family is AF_INET or AF_INET6.
func ListRoutes(h *netlink.Handle, l netlink.Link, family int) ([]Route, error) {
	index := l.Attrs().Index
	routes, err := retryDump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Type: unix.RTN_UNICAST},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []Route
	for _, r := range routes {
		if r.Table == unix.RT_TABLE_LOCAL {
			continue
		}
		hop, ok := hopThrough(r, index)
		if !ok {
			continue
		}
		protocol, known := protocolNames[int(r.Protocol)]
		dst, valid := routeDst(r.Dst, family)
		if !known || !valid || (linkLocal6(dst.Addr()) && protocol == "kernel") {
			continue
		}
		route := Route{Dst: dst, Protocol: protocol, Scope: scopeNames[int(r.Scope)], Metric: r.Priority, Table: r.Table}
		if family == unix.AF_INET6 && r.Priority == defaultMetric6 {
			route.Metric = 0
		}
		if r.Table == unix.RT_TABLE_MAIN {
			route.Table = 0
		}
		if gw, ok := netip.AddrFromSlice(hop); ok {
			route.Gateway = gw.Unmap()
		}
		if src, ok := netip.AddrFromSlice(r.Src); ok {
			route.Src = src.Unmap()
		}
		out = append(out, route)
	}
	return out, nil
}

// defaultMetric6 is what the kernel gives an IPv6 route without a metric (IP6_RT_PRIO_USER).
const defaultMetric6 = 1024

// hopThrough returns the gateway (nil: on link) by which r leaves through the
// interface with the given index.
func hopThrough(r netlink.Route, index int) (net.IP, bool) {
	if r.LinkIndex == index {
		return gateway(r.Gw, r.Via), true
	}
	for _, hop := range r.MultiPath {
		if hop.LinkIndex == index {
			return gateway(hop.Gw, hop.Via), true
		}
	}
	return nil, false
}

func gateway(gw net.IP, via netlink.Destination) net.IP {
	if v, ok := via.(*netlink.Via); ok && gw == nil {
		return v.Addr
	}
	return gw
}

func routeDst(dst *net.IPNet, family int) (netip.Prefix, bool) {
	if dst == nil {
		if family == unix.AF_INET {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
	}
	p, ok := prefix(dst)
	return p.Masked(), ok
}

// Open returns a netlink handle inside the namespace at path, which the caller
// closes. Errors are those of Do.
func Open(ctx context.Context, path string) (*netlink.Handle, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := OpenFile(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return HandleOf(f)
}

// HandleOf is Open for a namespace that OpenFile has opened.
func HandleOf(f *os.File) (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(vns.NsHandle(f.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket in %s: %w", f.Name(), err)
	}
	return h, nil
}

// DefaultRoute returns the address of the interface that carries the default route
// of the caller's namespace, and that interface's MTU in bytes. IPv4 is preferred to
// IPv6, a smaller metric to a larger, and the route's own source address and MTU to
// the interface's.
//
// NotFound: no default route, or its interface has no address of that family.
func DefaultRoute(ctx context.Context) (netip.Prefix, int, error) {
	if err := ctx.Err(); err != nil {
		return netip.Prefix{}, 0, err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return netip.Prefix{}, 0, fmt.Errorf("open netlink socket: %w", err)
	}
	defer h.Close()
	for _, family := range families {
		addr, mtu, err := defaultRoute(h, family)
		if err == nil || !errors.Is(err, errdefs.ErrNotFound) {
			return addr, mtu, err
		}
	}
	return netip.Prefix{}, 0, fmt.Errorf("this network namespace has no default route with an address: %w", errdefs.ErrNotFound)
}

func defaultRoute(h *netlink.Handle, family int) (netip.Prefix, int, error) {
	none := fmt.Errorf("no default route: %w", errdefs.ErrNotFound)
	routes, err := retryDump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	})
	if err != nil {
		return netip.Prefix{}, 0, fmt.Errorf("list routes: %w", err)
	}
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return a.Priority - b.Priority })
	for _, r := range routes {
		dst, ok := routeDst(r.Dst, family)
		if !ok || dst.Bits() != 0 {
			continue
		}
		index := r.LinkIndex
		if index == 0 && len(r.MultiPath) > 0 {
			index = r.MultiPath[0].LinkIndex
		}
		l, err := h.LinkByIndex(index)
		if err != nil {
			return netip.Prefix{}, 0, fmt.Errorf("find interface of the default route: %w", err)
		}
		addrs, err := retryDump(func() ([]netlink.Addr, error) { return h.AddrList(l, family) })
		if err != nil {
			return netip.Prefix{}, 0, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		if p, ok := pick(addrs, r.Src); ok {
			mtu := l.Attrs().MTU
			if r.MTU > 0 {
				mtu = min(mtu, r.MTU)
			}
			return p, mtu, nil
		}
	}
	return netip.Prefix{}, 0, none
}

// pick chooses the address equal to src, else the first that is no secondary,
// link-local or otherwise unfit one.
func pick(addrs []netlink.Addr, src net.IP) (netip.Prefix, bool) {
	const unfit = unix.IFA_F_SECONDARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	var first netip.Prefix
	for _, a := range addrs {
		p, ok := prefix(a.IPNet)
		if !ok || linkLocal6(p.Addr()) {
			continue
		}
		if src != nil && src.Equal(a.IP) {
			return p, true
		}
		if !first.IsValid() && a.Flags&unfit == 0 {
			first = p
		}
	}
	return first, first.IsValid()
}
