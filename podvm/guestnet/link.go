// SPDX-License-Identifier: Apache-2.0

package guestnet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/kata-remote/kata-remote/podvm/bootconf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// linkWait bounds the wait for a network interface: it is there when its
	// driver's module has been loaded, or never.
	linkWait = 10 * time.Second
	linkPoll = 10 * time.Millisecond
)

// UpLoopback brings lo up in the caller's network namespace.
func UpLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// ConfigureLinks gives the VM's own interfaces, found by MAC address, what the
// network configuration says. The error names the interface by the document's id.
func ConfigureLinks(ctx context.Context, links []bootconf.Ethernet) error {
	for _, e := range links {
		link, err := findLink(ctx, e.HWAddr)
		if err == nil {
			err = configure(link, e)
		}
		if err != nil {
			return fmt.Errorf("network-config: ethernets.%s: %w", e.ID, err)
		}
	}
	return nil
}

// findLink waits for the interface with the MAC address.
func findLink(ctx context.Context, mac net.HardwareAddr) (netlink.Link, error) {
	ctx, cancel := context.WithTimeout(ctx, linkWait)
	defer cancel()
	tick := time.NewTicker(linkPoll)
	defer tick.Stop()
	for {
		links, err := netlink.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			if bytes.Equal(l.Attrs().HardwareAddr, mac) {
				return l, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("no interface with match.macaddress %s among the %d there are", mac, len(links))
		}
	}
}

func configure(link netlink.Link, e bootconf.Ethernet) error {
	if e.MTU != 0 {
		if err := netlink.LinkSetMTU(link, e.MTU); err != nil {
			return fmt.Errorf("set mtu %d of %s: %w", e.MTU, link.Attrs().Name, err)
		}
	}
	for _, p := range e.Addrs {
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			// The cloud assigned the address; waiting for duplicates only delays.
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, link.Attrs().Name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", link.Attrs().Name, err)
	}
	routes := e.Routes
	for _, gw := range []netip.Addr{e.Gateway, e.Gateway6} {
		if gw.IsValid() {
			routes = append(routes, bootconf.Route{Dst: netip.PrefixFrom(unspecified(gw), 0), Via: gw})
		}
	}
	for _, r := range routes {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(r.Dst), Scope: netlink.SCOPE_LINK}
		if r.Via.IsValid() {
			route.Gw, route.Scope = r.Via.AsSlice(), netlink.SCOPE_UNIVERSE
			if outside(r.Via, e.Addrs) {
				route.Flags = int(netlink.FLAG_ONLINK)
			}
		}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("add route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
