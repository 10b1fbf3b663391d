// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/redirect"
)

// EnsureNode makes or repairs the node ends of all of a pod's tunnels: the source filter
// in the caller's network namespace, the devices in the pod's with their UDP sockets in
// the caller's, path MTU handling, and the redirect between each device and its
// PodInterface. Nothing that is as wanted is touched. It is always given all tunnels of
// the pod, in the same order; their place in it chooses their routing table.
//
// InvalidArgument: one is not valid, they are not of one pod, or NetNS is not a network
// namespace. NotFound: NetNS does not exist. FailedPrecondition: PodInterface is missing,
// or Device or the VNI is in use by something that is not ours; the message names it and
// the difference.
func EnsureNode(ctx context.Context, ts ...NodeTunnel) error {
	_, err := ReconcileNode(ctx, ts...)
	return err
}

// ReconcileNode is EnsureNode that tells what it had to change, in words for a log:
// none when all was as wanted; "recreate device …" gives the reason.
func ReconcileNode(ctx context.Context, ts ...NodeTunnel) (changes []string, err error) {
	if err := validateNode(ts); err != nil {
		return nil, err
	}
	p, err := openPlace(ts[0].NetNS)
	if err != nil {
		return nil, err
	}
	defer p.close()
	for _, t := range ts {
		if err := t.precheck(p); err != nil {
			return nil, err
		}
	}
	// The filter comes before the socket: no packet of a stranger ever meets it.
	for _, t := range ts {
		changed, err := allowSource(ctx, t.source())
		if err != nil {
			return changes, err
		}
		if changed {
			changes = append(changes, fmt.Sprintf("allow VXLAN source %s VNI %d", t.Remote, t.VNI))
		}
	}
	done, err := ensureInPod(ctx, p, ts)
	return append(changes, done...), err
}

// precheck refuses before anything is changed.
func (t NodeTunnel) precheck(p *place) error {
	if l, err := find(p.handle, t.PodInterface); err != nil {
		return err
	} else if l == nil {
		return fmt.Errorf("pod interface %s does not exist in network namespace %s: %w", t.PodInterface, t.NetNS, errdefs.ErrFailedPrecondition)
	}
	l, err := find(p.handle, t.Device)
	if err != nil || l == nil {
		return err
	}
	if why := foreign(l); why != "" {
		return refuse(t.Device, t.NetNS, why)
	}
	return nil
}

func (t NodeTunnel) source() Source {
	return Source{Remote: t.Remote.Unmap(), VNI: t.VNI, Port: t.Port}
}

func (t NodeTunnel) pair() redirect.Pair {
	p := redirect.Pair{Pod: t.PodInterface, Tunnel: t.Device, MTU: t.MTU}
	p.IPv4, p.IPv6 = t.families()
	return p
}

// ensureInPod does the part of EnsureNode that lies in the pod's namespace: first all
// devices with their records, then what changes anything else.
func ensureInPod(ctx context.Context, p *place, ts []NodeTunnel) (changes []string, err error) {
	add := func(more []string, err error) error {
		changes = append(changes, more...)
		return err
	}
	devices, records := make([]netlink.Link, len(ts)), make([]record, len(ts))
	for i, t := range ts {
		d := device{name: t.Device, vni: t.VNI, port: t.Port, local: t.Local, remote: t.Remote, mtu: t.MTU}
		l, done, alias, err := d.ensure(p, t.Device)
		if err := add(done, err); err != nil {
			return changes, err
		}
		if records[i], err = t.ensureRecord(ctx, p, l.Attrs().Alias, alias); err != nil {
			return changes, err
		}
		devices[i] = l
	}
	var ipv6 []string
	for i, t := range ts {
		if err := add(records[i].hearAll(p.handle, t.PodInterface)); err != nil {
			return changes, err
		}
		if err := netns.Do(ctx, t.NetNS, func() error { return add(t.setSysctls()) }); err != nil {
			return changes, err
		}
		wasDown, err := up(p.handle, devices[i])
		if err != nil {
			return changes, err
		}
		if wasDown {
			changes = append(changes, "bring device "+t.Device+" up")
		}
		if _, has := t.families(); has {
			ipv6 = append(ipv6, t.PodInterface)
		}
	}
	if len(ipv6) > 0 {
		if err := add(withNFT(ctx, func() (bool, error) { return ensureNeighborMarks(p, ipv6) })); err != nil {
			return changes, err
		}
	}
	for i, t := range ts {
		if err := add(t.ensurePath(p.handle, devices[i], i)); err != nil {
			return changes, err
		}
		if err := add(redirect.Ensure(ctx, p.handle, t.pair())); err != nil {
			return changes, err
		}
	}
	return changes, nil
}

func withNFT(ctx context.Context, f func() (bool, error)) ([]string, error) {
	unlock, err := lockNFT(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	changed, err := f()
	if changed {
		return []string{"make nftables table " + neighborTable}, err
	}
	return nil, err
}

// ensureRecord writes the record into the device's alias unless one is there, and returns
// it. have is the device's alias now, before the one of its predecessor.
func (t NodeTunnel) ensureRecord(ctx context.Context, p *place, have, before string) (record, error) {
	if r, ok := parseRecord(have); ok {
		return r, nil
	}
	r, ok := parseRecord(before)
	if !ok {
		lost, err := hasOurRules(p.handle)
		if err != nil {
			return r, err
		}
		if r, err = t.newRecord(ctx, p, lost); err != nil {
			return r, err
		}
	}
	l, err := p.handle.LinkByName(t.Device)
	if err != nil {
		return r, fmt.Errorf("find VXLAN device %s: %w", t.Device, err)
	}
	if err := p.handle.LinkSetAlias(l, r.String()); err != nil {
		return r, fmt.Errorf("record the former state in the alias of %s: %w", t.Device, err)
	}
	return r, nil
}

// newRecord is what there is now. lost means that our marks are in the namespace but the
// record is gone with its device, which somebody deleted: then what we change is taken
// for ours.
func (t NodeTunnel) newRecord(ctx context.Context, p *place, lost bool) (r record, err error) {
	err = netns.Do(ctx, t.NetNS, func() error {
		r.Sysctl, err = t.readSysctls(lost)
		return err
	})
	if err != nil {
		return r, err
	}
	pod, err := find(p.handle, t.PodInterface)
	if err != nil || pod == nil {
		return r, err
	}
	r.HearAll = pod.Type() == "macvlan" && (lost || pod.Attrs().RawFlags&unix.IFF_ALLMULTI == 0)
	if !lost {
		r.Qdisc, err = redirect.HasQdisc(p.handle, pod)
	}
	return r, err
}

// RemoveNode undoes EnsureNode, whatever part of it was done. It is given all tunnels of
// the pod. An absent part, an absent network namespace and a device under our name that
// is not ours are not an error. Inside the pod's namespace it goes on after an error and
// joins them all; the devices and the source filter's elements go only when the rest is
// undone, so that it can be called again. Of each it uses NetNS, Device, PodInterface,
// Remote, VNI and Port; with NetNS empty only the filter's elements are removed.
func RemoveNode(ctx context.Context, ts ...NodeTunnel) error {
	if len(ts) > 0 && ts[0].NetNS != "" {
		// While the devices live, their sockets stay guarded.
		if err := removeInPod(ctx, ts); err != nil {
			return err
		}
	}
	var errs []error
	for _, t := range ts {
		errs = append(errs, disallowSource(ctx, t.source()))
	}
	return errors.Join(errs...)
}

func removeInPod(ctx context.Context, ts []NodeTunnel) error {
	path := ts[0].NetNS
	p, err := openPlace(path)
	// A plain file where a namespace was mounted means that it was unmounted.
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	ours, err := hasOurRules(p.handle)
	if err != nil {
		return err
	}
	var devices []netlink.Link
	var records []record
	var errs []error
	for _, t := range ts {
		l, err := find(p.handle, t.Device)
		if err != nil {
			return err
		}
		var r record
		known := false
		if l != nil && foreign(l) == "" {
			devices = append(devices, l)
			r, known = parseRecord(l.Attrs().Alias)
		}
		if !known && ours {
			if r, err = t.newRecord(ctx, p, true); err != nil {
				return err
			}
			known = true
		}
		if known {
			records = append(records, r)
			errs = append(errs, redirect.Remove(p.handle, t.pair(), !r.Qdisc), r.hearLess(p.handle, t.PodInterface))
		}
	}
	if len(records) > 0 {
		errs = append(errs, removeRules(p.handle, unix.AF_INET), removeRules(p.handle, unix.AF_INET6),
			netns.Do(ctx, path, func() error { return restoreSysctls(records) }),
			removeMarks(ctx, p))
	}
	// The records go with the devices, so the devices go only when all is undone.
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, l := range devices {
		if err := p.handle.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("delete VXLAN device %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

func removeMarks(ctx context.Context, p *place) error {
	unlock, err := lockNFT(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return removeNeighborMarks(p)
}
