// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
)

var protocols = map[string]int{
	"":       unix.RTPROT_STATIC,
	"static": unix.RTPROT_STATIC,
	"boot":   unix.RTPROT_BOOT,
	"kernel": unix.RTPROT_KERNEL,
	"dhcp":   unix.RTPROT_DHCP,
	"ra":     unix.RTPROT_RA,
}

var scopes = map[string]int{
	"universe": unix.RT_SCOPE_UNIVERSE,
	"global":   unix.RT_SCOPE_UNIVERSE, // iproute2's name
	"site":     unix.RT_SCOPE_SITE,
	"link":     unix.RT_SCOPE_LINK,
	"host":     unix.RT_SCOPE_HOST,
	"nowhere":  unix.RT_SCOPE_NOWHERE,
}

// routeOf translates r, without its interface. InvalidArgument names the field.
func routeOf(r netns.Route) (netlink.Route, error) {
	if !r.Dst.IsValid() {
		return netlink.Route{}, invalid("a route has no destination")
	}
	protocol, ok := protocols[r.Protocol]
	if !ok {
		return netlink.Route{}, invalid("route to %s: unknown protocol %q", r.Dst, r.Protocol)
	}
	dst := netip.PrefixFrom(r.Dst.Addr().Unmap(), r.Dst.Bits()).Masked()
	out := netlink.Route{Dst: ipNet(dst), Table: cmp.Or(r.Table, unix.RT_TABLE_MAIN), Type: unix.RTN_UNICAST, Priority: r.Metric,
		Protocol: netlink.RouteProtocol(protocol), Family: unix.AF_INET6}
	if dst.Addr().Is4() {
		out.Family = unix.AF_INET
		if !r.Gateway.IsValid() {
			out.Scope = unix.RT_SCOPE_LINK
		}
	}
	if r.Scope != "" {
		scope, ok := scopes[r.Scope]
		if !ok {
			return netlink.Route{}, invalid("route to %s: unknown scope %q", r.Dst, r.Scope)
		}
		if out.Family == unix.AF_INET { // IPv6 routes have no scope
			out.Scope = netlink.Scope(scope)
		}
	}
	if r.Gateway.IsValid() {
		if gw := r.Gateway.Unmap(); gw.Is4() == dst.Addr().Is4() {
			out.Gw = gw.WithZone("").AsSlice()
		} else {
			out.Via = &netlink.Via{AddrFamily: unix.AF_INET6, Addr: gw.WithZone("").AsSlice()}
		}
	}
	if r.Src.IsValid() {
		out.Src = r.Src.Unmap().AsSlice()
	}
	return out, nil
}

// canonical is r in the form in which ListRoutes returns it.
func canonical(r netns.Route) netns.Route {
	r.Dst = netip.PrefixFrom(r.Dst.Addr().Unmap(), r.Dst.Bits()).Masked()
	r.Gateway, r.Src = r.Gateway.Unmap().WithZone(""), r.Src.Unmap().WithZone("")
	if r.Table == unix.RT_TABLE_MAIN {
		r.Table = 0
	}
	if r.Protocol == "" {
		r.Protocol = "static"
	}
	switch {
	case r.Dst.Addr().Is6() || r.Scope == "global":
		r.Scope = "universe"
	case r.Scope == "" && r.Gateway.IsValid():
		r.Scope = "universe"
	case r.Scope == "":
		r.Scope = "link"
	}
	return r
}

// ensureRoutes brings the routes through l to Pod.Routes: what is there
// and not wanted goes, what is missing is added, gateway-less ones first, because a
// gateway must be reachable when its route is added.
func (t GuestTunnel) ensureRoutes(h *netlink.Handle, l netlink.Link) error {
	want := make([]netns.Route, 0, len(t.Pod.Routes))
	for _, r := range t.Pod.Routes {
		want = append(want, canonical(r))
	}
	slices.SortStableFunc(want, func(a, b netns.Route) int {
		switch {
		case a.Gateway.IsValid() == b.Gateway.IsValid():
			return 0
		case b.Gateway.IsValid():
			return -1
		}
		return 1
	})
	var have []netns.Route
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := netns.ListRoutes(h, l, family)
		if err != nil {
			return fmt.Errorf("%s: %w", l.Attrs().Name, err)
		}
		have = append(have, routes...)
	}
	for _, r := range have {
		if slices.Contains(want, r) {
			continue
		}
		if err := t.deleteRoute(h, l, r); err != nil {
			return err
		}
	}
	for _, r := range want {
		if slices.Contains(have, r) {
			continue
		}
		if err := addRoute(h, l, r); err != nil {
			return err
		}
	}
	return nil
}

func (t GuestTunnel) deleteRoute(h *netlink.Handle, l netlink.Link, r netns.Route) error {
	route, err := routeOf(r)
	if err != nil {
		return err
	}
	route.LinkIndex = l.Attrs().Index
	if err := h.RouteDel(&route); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("delete route to %s through %s: %w", r.Dst, l.Attrs().Name, err)
	}
	return nil
}

// addRoute adds r. A gateway that no route on link covers was given on the node with
// the flag onlink, which Inspect does not record.
func addRoute(h *netlink.Handle, l netlink.Link, r netns.Route) error {
	route, err := routeOf(r)
	if err != nil {
		return err
	}
	route.LinkIndex = l.Attrs().Index
	err = h.RouteAdd(&route)
	if r.Gateway.IsValid() && (errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EINVAL)) {
		route.Flags |= int(netlink.FLAG_ONLINK)
		err = h.RouteAdd(&route)
	}
	// Another interface has a route to the same: the first one goes on to be used.
	if errors.Is(err, unix.EEXIST) {
		err = h.RouteAppend(&route)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add route to %s through %s: %w", r.Dst, l.Attrs().Name, err)
	}
	return nil
}
