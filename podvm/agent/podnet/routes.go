// SPDX-License-Identifier: Apache-2.0

package podnet

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Routes lists the main routing table of the pod, IPv4 before IPv6.
func (n *Network) Routes() ([]*typespb.Route, error) {
	h, err := n.open()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return list(h)
}

func list(h *netlink.Handle) ([]*typespb.Route, error) {
	routes, err := table(h)
	if err != nil {
		return nil, err
	}
	var out []*typespb.Route
	for _, r := range routes {
		one := &typespb.Route{Scope: uint32(r.Scope), Flags: uint32(r.Flags), Mtu: uint32(r.MTU)}
		if r.Family == netlink.FAMILY_V6 {
			one.Family = typespb.IPFamily_v6
		}
		if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
			one.Device = l.Attrs().Name
		}
		if r.Dst != nil && !isDefault(r.Dst) {
			one.Dest = r.Dst.String()
		}
		if r.Gw != nil {
			one.Gateway = r.Gw.String()
		}
		if r.Src != nil {
			one.Source = r.Src.String()
		}
		out = append(out, one)
	}
	return out, nil
}

func isDefault(p *net.IPNet) bool {
	ones, _ := p.Mask.Size()
	return ones == 0
}

// table reads the main table of both families.
func table(h *netlink.Handle) ([]netlink.Route, error) {
	var out []netlink.Route
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := h.RouteList(nil, fam)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list the pod's routes: %w", err)
		}
		for i := range routes {
			routes[i].Family = fam
		}
		out = append(out, routes...)
	}
	return out, nil
}

// UpdateRoutes makes the pod's main routing table hold the given routes and those the
// kernel keeps itself, and returns all of them. After an error the table is as it was.
// "Link not found": a route names an interface the pod does not have.
func (n *Network) UpdateRoutes(in []*typespb.Route) ([]*typespb.Route, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.change()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var want []netlink.Route
	for _, r := range in {
		one, err := parse(h, r)
		if err != nil {
			return nil, err
		}
		want = append(want, *one)
	}
	// A gateway is found over the routes without one.
	slices.SortStableFunc(want, func(a, b netlink.Route) int { return min(len(a.Gw), 1) - min(len(b.Gw), 1) })
	before, err := own(h)
	if err != nil {
		return nil, err
	}
	if err := replace(h, before, want); err != nil {
		now, listErr := own(h)
		return nil, errors.Join(err, listErr, replace(h, now, before))
	}
	return list(h)
}

// own are the routes that somebody set, and not the kernel.
func own(h *netlink.Handle) ([]netlink.Route, error) {
	all, err := table(h)
	return slices.DeleteFunc(all, func(r netlink.Route) bool {
		return r.Protocol == unix.RTPROT_KERNEL || r.Protocol == unix.RTPROT_RA || r.Protocol == unix.RTPROT_REDIRECT
	}), err
}

// replace puts routes in force and removes those that were there and are not wanted.
func replace(h *netlink.Handle, have, want []netlink.Route) error {
	for _, r := range want {
		if err := h.RouteReplace(&r); err != nil {
			return fmt.Errorf("set route %s: %w", r, classed(err))
		}
	}
	for _, r := range have {
		if slices.ContainsFunc(want, func(w netlink.Route) bool { return same(r, w) }) {
			continue
		}
		// One to the same destination was replaced above.
		if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route %s: %w", r, err)
		}
	}
	return nil
}

// same tells whether two routes lead to the same destination the same way.
func same(a, b netlink.Route) bool {
	return a.Family == b.Family && a.Dst.String() == b.Dst.String() && a.Gw.Equal(b.Gw) && a.LinkIndex == b.LinkIndex && a.Priority == b.Priority
}

// ipv6Metric is the kernel's priority of IPv6 routes that name none (Linux,
// include/net/ip6_route.h, IP6_RT_PRIO_USER).
const ipv6Metric = 1024

func parse(h *netlink.Handle, r *typespb.Route) (*netlink.Route, error) {
	bad := func(what, value string) error {
		return fmt.Errorf("route to %q: %s %q is not an address: %w", r.Dest, what, value, errdefs.ErrInvalidArgument)
	}
	link, err := byName(h, r.Device)
	if err != nil {
		return nil, fmt.Errorf("route to %q: %w", r.Dest, err)
	}
	out := &netlink.Route{
		LinkIndex: link.Attrs().Index, Scope: netlink.Scope(r.Scope), Flags: int(r.Flags), MTU: int(r.Mtu),
		Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT, Family: netlink.FAMILY_V4,
	}
	bits := 32
	if r.Family == typespb.IPFamily_v6 {
		out.Family, out.Priority, bits = netlink.FAMILY_V6, ipv6Metric, 128
	}
	out.Dst = &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
	if r.Dest != "" && r.Dest != "default" {
		_, dst, err := net.ParseCIDR(r.Dest)
		if err != nil {
			ip := net.ParseIP(r.Dest)
			if ip == nil {
				return nil, bad("dest", r.Dest)
			}
			dst = &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}
		}
		if (dst.IP.To4() != nil) != (bits == 32) {
			return nil, bad("dest (of the family)", r.Dest)
		}
		out.Dst = dst
	}
	for _, f := range []struct {
		name, value string
		to          *net.IP
	}{{"gateway", r.Gateway, &out.Gw}, {"source", r.Source, &out.Src}} {
		if f.value == "" {
			continue
		}
		if *f.to = net.ParseIP(f.value); *f.to == nil {
			return nil, bad(f.name, f.value)
		}
	}
	if out.Gw != nil && out.Scope == netlink.SCOPE_LINK {
		return nil, fmt.Errorf("route to %q: scope link and a gateway exclude each other: %w", r.Dest, errdefs.ErrInvalidArgument)
	}
	return out, nil
}
