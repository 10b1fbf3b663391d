// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
)

// EnsureGuest makes or repairs the guest end: the device in NetNS under the name of
// the pod's interface, its UDP socket in the caller's namespace (the VM's root), the
// source filter there, and in NetNS the addresses, routes and permanent neighbours of
// Pod, exactly these, and lo up. The device's MTU is the smaller of Pod.MTU and what
// the route to Remote carries less Overhead. Link-local IPv6 is the kernel's own,
// from the MAC address. There is no duplicate address detection; all addresses can be
// bound when EnsureGuest returns.
//
// InvalidArgument: t is not valid, NetNS is not a network namespace, or the underlay
// is too small for a pod with IPv6. NotFound: NetNS does not exist. Unavailable: no
// route to Remote yet. FailedPrecondition: a device of that name is not ours.
func EnsureGuest(ctx context.Context, t GuestTunnel) error {
	if err := t.Validate(); err != nil {
		return err
	}
	p, err := openPlace(t.NetNS)
	if err != nil {
		return err
	}
	defer p.close()
	d, err := t.device(p.caller)
	if err != nil {
		return err
	}
	// The filter comes before the socket: no packet of a stranger ever meets it.
	if err := ensureGuestSource(Source{Remote: t.Remote.Unmap(), VNI: t.VNI, Port: t.Port}); err != nil {
		return err
	}
	// A rename waits for a grace period of the kernel, so it is done only where the
	// final name is taken in this namespace, by the VM's own eth0 for example.
	if taken, err := find(p.caller, t.Pod.Name); err != nil {
		return err
	} else if taken == nil {
		d.name = t.Pod.Name
	}
	l, _, _, err := d.ensure(p, t.Pod.Name, t.Device)
	if err != nil {
		return err
	}
	if err := t.quiet(ctx, l.Attrs().Name); err != nil {
		return err
	}
	if l.Attrs().Name != t.Pod.Name {
		if err := p.handle.LinkSetName(l, t.Pod.Name); err != nil {
			return fmt.Errorf("rename %s to %s: %w", l.Attrs().Name, t.Pod.Name, err)
		}
		l.Attrs().Name = t.Pod.Name
	}
	return t.configure(ctx, p.handle, l)
}

// device looks up the way to the worker and derives the device from it.
func (t GuestTunnel) device(h *netlink.Handle) (device, error) {
	routes, err := h.RouteGet(t.Remote.Unmap().AsSlice())
	if err != nil || len(routes) == 0 {
		return device{}, fmt.Errorf("find the route to the worker node %s: %v: %w", t.Remote, err, errdefs.ErrUnavailable)
	}
	l, err := h.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return device{}, fmt.Errorf("find the interface towards the worker node %s: %w", t.Remote, err)
	}
	local, ok := netip.AddrFromSlice(routes[0].Src)
	if !ok {
		return device{}, fmt.Errorf("the route to the worker node %s has no source address: %w", t.Remote, errdefs.ErrUnavailable)
	}
	underlay := l.Attrs().MTU
	if routes[0].MTU > 0 {
		underlay = min(underlay, routes[0].MTU)
	}
	mtu := min(t.Pod.MTU, underlay-Overhead(t.Remote))
	if err := checkMTU(mtu, t.Pod.Addrs); err != nil {
		return device{}, fmt.Errorf("underlay %s with MTU %d: %w", l.Attrs().Name, underlay, err)
	}
	return device{name: t.Device, vni: t.VNI, port: t.Port, local: local.Unmap(), remote: t.Remote, mtu: mtu, hwaddr: t.Pod.HWAddr}, nil
}

// quiet keeps IPv6 on the device from waiting and from configuring itself: the CNI
// has decided on the addresses, and has checked that nobody else uses them.
func (t GuestTunnel) quiet(ctx context.Context, dev string) error {
	return netns.Do(ctx, t.NetNS, func() error {
		for _, s := range [][2]string{
			{sysctl6(dev, "disable_ipv6"), "0"},
			{sysctl6(dev, "accept_dad"), "0"},
			{sysctl6(dev, "accept_ra"), "0"},
		} {
			if _, err := writeSysctl(s[0], s[1]); err != nil {
				return err
			}
		}
		return nil
	})
}

// configure brings addresses, routes and neighbours to what Pod says.
func (t GuestTunnel) configure(ctx context.Context, h *netlink.Handle, l netlink.Link) error {
	if err := t.ensureAddrs(h, l); err != nil {
		return err
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	for _, one := range []netlink.Link{lo, l} {
		if _, err := up(h, one); err != nil {
			return err
		}
	}
	if err := t.settle(ctx, h, l); err != nil {
		return err
	}
	if err := t.ensureRoutes(h, l); err != nil {
		return err
	}
	for _, n := range t.Pod.Neighbors {
		family := unix.AF_INET
		if n.IP.Is6() {
			family = unix.AF_INET6
		}
		err := h.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT,
			IP: n.IP.AsSlice(), HardwareAddr: n.HWAddr})
		if err != nil {
			return fmt.Errorf("set neighbour %s: %w", n.IP, err)
		}
	}
	return nil
}

// ensureAddrs sets the addresses without the prefix routes that the kernel would make
// for them: the CNI's routes hold those too, where the CNI left them in place.
func (t GuestTunnel) ensureAddrs(h *netlink.Handle, l netlink.Link) error {
	want := make([]netip.Prefix, 0, len(t.Pod.Addrs))
	for _, a := range t.Pod.Addrs {
		want = append(want, netip.PrefixFrom(a.Addr().Unmap(), a.Bits()))
	}
	var have []netip.Prefix
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		addrs, err := h.AddrList(l, family)
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		for _, a := range addrs {
			ones, _ := a.Mask.Size()
			prefix := netip.PrefixFrom(addr(a.IP), ones)
			switch {
			case prefix.Addr().Is6() && prefix.Addr().IsLinkLocalUnicast():
			case slices.Contains(want, prefix):
				have = append(have, prefix)
			default:
				if err := h.AddrDel(l, &a); err != nil {
					return fmt.Errorf("delete address %s of %s: %w", prefix, l.Attrs().Name, err)
				}
			}
		}
	}
	for _, prefix := range want {
		if slices.Contains(have, prefix) {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(prefix), Flags: unix.IFA_F_NOPREFIXROUTE}
		if prefix.Addr().Is6() {
			a.Flags |= unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(l, a); err != nil {
			return fmt.Errorf("add address %s to %s: %w", prefix, l.Attrs().Name, err)
		}
	}
	return nil
}

// settleBudget bounds settle. The kernel's work takes microseconds once it runs; two
// seconds are for a VM whose one CPU is emulated and busy booting.
const settleBudget = 2 * time.Second

// settle waits until the pod's IPv6 addresses may be bound and be the source of a
// route. Even without duplicate address detection the kernel ends their tentative
// state in a work queue, a moment after the interface came up (addrconf_dad_work).
func (t GuestTunnel) settle(ctx context.Context, h *netlink.Handle, l netlink.Link) error {
	if !slices.ContainsFunc(t.Pod.Addrs, func(p netip.Prefix) bool { return p.Addr().Unmap().Is6() }) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, settleBudget)
	defer cancel()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for {
		addrs, err := h.AddrList(l, unix.AF_INET6)
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
			return a.Flags&unix.IFA_F_TENTATIVE != 0 && !a.IP.IsLinkLocalUnicast()
		}) {
			return nil
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return fmt.Errorf("the IPv6 addresses of %s are still tentative after %v: %w", l.Attrs().Name, settleBudget, errdefs.ErrUnavailable)
		}
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
