// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"errors"
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

// EnsureGuest makes or repairs the guest ends of a pod's tunnels: each device in NetNS
// under the name of its pod interface, its UDP socket in the caller's namespace (the VM's
// root), the source filter there, and in NetNS the addresses, routes and permanent
// neighbours of Pod, exactly these, and lo up. A device's MTU is the smaller of Pod.MTU
// and what the route to Remote carries less Overhead (see CarriedMTU). Link-local IPv6 is the kernel's own, from the MAC address. There is no duplicate
// address detection; all addresses can be bound when EnsureGuest returns.
//
// InvalidArgument: one is not valid, NetNS is not a network namespace, or the underlay
// is too small. NotFound: NetNS does not exist. Unavailable: no route to Remote yet.
// FailedPrecondition: a device of that name is not ours.
func EnsureGuest(ctx context.Context, ts ...GuestTunnel) error {
	for i, t := range ts {
		if err := t.Validate(); err != nil {
			return err
		}
		if t.NetNS != ts[0].NetNS {
			return invalid("tunnels of two network namespaces, %s and %s, at once", ts[0].NetNS, t.NetNS)
		}
		if slices.ContainsFunc(ts[:i], func(o GuestTunnel) bool { return o.Pod.Name == t.Pod.Name || o.VNI == t.VNI }) {
			return invalid("two tunnels have VNI %d or the pod's interface %s", t.VNI, t.Pod.Name)
		}
	}
	if len(ts) == 0 {
		return invalid("a pod has at least one tunnel")
	}
	p, err := openPlace(ts[0].NetNS)
	if err != nil {
		return err
	}
	defer p.close()
	links := make([]netlink.Link, len(ts))
	for i, t := range ts {
		if links[i], err = t.ensureDevice(ctx, p); err != nil {
			return err
		}
	}
	// A route may name the address or the gateway of another interface as its own.
	for i, t := range ts {
		if err := t.ensureRoutes(p.handle, links[i]); err != nil {
			return err
		}
		if err := t.ensureNeighbors(p.handle, links[i]); err != nil {
			return err
		}
	}
	return nil
}

// EnsureGuestRules makes the routing rules in the namespace at path that are missing.
// Errors are those of EnsureGuest.
func EnsureGuestRules(ctx context.Context, path string, rules []netns.Rule) error {
	h, err := netns.Open(ctx, path)
	if err != nil {
		return err
	}
	defer h.Close()
	for _, r := range rules {
		if err := h.RuleAdd(r.Kernel()); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add routing rule %d to table %d: %w", r.Priority, r.Table, err)
		}
	}
	return nil
}

// ensureDevice makes the device and brings it up with its addresses.
func (t GuestTunnel) ensureDevice(ctx context.Context, p *place) (netlink.Link, error) {
	d, err := t.device(p.caller)
	if err != nil {
		return nil, err
	}
	// The filter comes before the socket: no packet of a stranger ever meets it.
	if err := ensureGuestSource(Source{Remote: t.Remote.Unmap(), VNI: t.VNI, Port: t.Port}); err != nil {
		return nil, err
	}
	// A rename waits for a grace period of the kernel, so it is done only where the
	// final name is taken in this namespace, by the VM's own eth0 for example.
	if taken, err := find(p.caller, t.Pod.Name); err != nil {
		return nil, err
	} else if taken == nil {
		d.name = t.Pod.Name
	}
	l, _, _, err := d.ensure(p, t.Pod.Name, t.Device)
	if err != nil {
		return nil, err
	}
	if err := t.quiet(ctx, l.Attrs().Name); err != nil {
		return nil, err
	}
	if l.Attrs().Name != t.Pod.Name {
		if err := p.handle.LinkSetName(l, t.Pod.Name); err != nil {
			return nil, fmt.Errorf("rename %s to %s: %w", l.Attrs().Name, t.Pod.Name, err)
		}
		l.Attrs().Name = t.Pod.Name
	}
	return l, t.start(ctx, p.handle, l)
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
	mtu := CarriedMTU(t.Pod.MTU, underlay, t.Remote, t.Pod.Addrs)
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

// start brings the interface and lo up with the addresses Pod says.
func (t GuestTunnel) start(ctx context.Context, h *netlink.Handle, l netlink.Link) error {
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
	return t.settle(ctx, h, l)
}

func (t GuestTunnel) ensureNeighbors(h *netlink.Handle, l netlink.Link) error {
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
