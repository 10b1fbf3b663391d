// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/redirect"
)

// EnsureNode makes or repairs the node end: the source filter in the caller's network
// namespace, the device in the pod's with its UDP socket in the caller's, path MTU
// handling, and the redirect between device and PodInterface. Nothing that is as
// wanted is touched.
//
// InvalidArgument: t is not valid, or NetNS is not a network namespace. NotFound:
// NetNS does not exist. FailedPrecondition: PodInterface is missing, or Device or the
// VNI is in use by something that is not ours; the message names it and the
// difference.
func EnsureNode(ctx context.Context, t NodeTunnel) error {
	_, err := ReconcileNode(ctx, t)
	return err
}

// ReconcileNode is EnsureNode that tells what it had to change, in words for a log:
// none when all was as wanted; "recreate device …" gives the reason.
func ReconcileNode(ctx context.Context, t NodeTunnel) (changes []string, err error) {
	if err := t.Validate(); err != nil {
		return nil, err
	}
	p, err := openPlace(t.NetNS)
	if err != nil {
		return nil, err
	}
	defer p.close()
	if l, err := find(p.handle, t.PodInterface); err != nil {
		return nil, err
	} else if l == nil {
		return nil, fmt.Errorf("pod interface %s does not exist in network namespace %s: %w", t.PodInterface, t.NetNS, errdefs.ErrFailedPrecondition)
	}
	// A foreign device is refused before anything is changed.
	if l, err := find(p.handle, t.Device); err != nil {
		return nil, err
	} else if l != nil {
		if why := foreign(l); why != "" {
			return nil, refuse(t.Device, t.NetNS, why)
		}
	}
	// The filter comes before the socket: no packet of a stranger ever meets it.
	changed, err := allowSource(ctx, t.source())
	if err != nil {
		return nil, err
	}
	if changed {
		changes = append(changes, fmt.Sprintf("allow VXLAN source %s VNI %d", t.Remote, t.VNI))
	}
	done, err := t.ensureInPod(ctx, p)
	return append(changes, done...), err
}

func (t NodeTunnel) source() Source {
	return Source{Remote: t.Remote.Unmap(), VNI: t.VNI, Port: t.Port}
}

func (t NodeTunnel) pair() redirect.Pair {
	p := redirect.Pair{Pod: t.PodInterface, Tunnel: t.Device, MTU: t.MTU}
	p.IPv4, p.IPv6 = t.families()
	return p
}

// ensureInPod does the part of EnsureNode that lies in the pod's namespace.
func (t NodeTunnel) ensureInPod(ctx context.Context, p *place) ([]string, error) {
	d := device{name: t.Device, vni: t.VNI, port: t.Port, local: t.Local, remote: t.Remote, mtu: t.MTU}
	l, changes, alias, err := d.ensure(p, t.Device)
	if err != nil {
		return changes, err
	}
	add := func(more []string, err error) error {
		changes = append(changes, more...)
		return err
	}
	if err := t.ensureRecord(ctx, p, l.Attrs().Alias, alias); err != nil {
		return changes, err
	}
	if err := netns.Do(ctx, t.NetNS, func() error { return add(t.setSysctls()) }); err != nil {
		return changes, err
	}
	if wasDown, err := up(p.handle, l); err != nil {
		return changes, err
	} else if wasDown {
		changes = append(changes, "bring device up")
	}
	if _, ipv6 := t.families(); ipv6 {
		if err := add(withNFT(ctx, func() (bool, error) { return ensureNeighborMarks(p, t.PodInterface) })); err != nil {
			return changes, err
		}
	}
	if err := add(t.ensurePath(p.handle, l)); err != nil {
		return changes, err
	}
	return changes, add(redirect.Ensure(ctx, p.handle, t.pair()))
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

// ensureRecord writes the record into the device's alias unless one is there. have is
// the device's alias now, before the one of its predecessor.
func (t NodeTunnel) ensureRecord(ctx context.Context, p *place, have, before string) error {
	if _, ok := parseRecord(have); ok {
		return nil
	}
	r, ok := parseRecord(before)
	if !ok {
		pod, err := p.handle.LinkByName(t.PodInterface)
		if err != nil {
			return fmt.Errorf("find pod interface %s: %w", t.PodInterface, err)
		}
		qdisc, err := redirect.HasQdisc(p.handle, pod)
		if err != nil {
			return err
		}
		lost, err := hasOurRules(p.handle)
		if err != nil {
			return err
		}
		err = netns.Do(ctx, t.NetNS, func() error {
			r, err = t.takeRecord(qdisc, lost)
			return err
		})
		if err != nil {
			return err
		}
	}
	l, err := p.handle.LinkByName(t.Device)
	if err != nil {
		return fmt.Errorf("find VXLAN device %s: %w", t.Device, err)
	}
	if err := p.handle.LinkSetAlias(l, r.String()); err != nil {
		return fmt.Errorf("record the former state in the alias of %s: %w", t.Device, err)
	}
	return nil
}

// RemoveNode undoes EnsureNode, whatever part of it was done. An absent part, an
// absent network namespace and a device under our name that is not ours are not an
// error. Inside the pod's namespace it goes on after an error and joins them all; the
// device and the source filter's element go only when the rest is undone, so that it
// can be called again. Of t it uses NetNS, Device, PodInterface, Remote, VNI and Port;
// with NetNS empty only the filter's element is removed.
func RemoveNode(ctx context.Context, t NodeTunnel) error {
	if t.NetNS != "" {
		// While the device lives, its socket stays guarded.
		if err := t.removeInPod(ctx); err != nil {
			return err
		}
	}
	return disallowSource(ctx, t.source())
}

func (t NodeTunnel) removeInPod(ctx context.Context) error {
	p, err := openPlace(t.NetNS)
	// A plain file where a namespace was mounted means that it was unmounted.
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	l, err := find(p.handle, t.Device)
	if err != nil {
		return err
	}
	if l != nil && foreign(l) != "" {
		l = nil
	}
	ours, err := hasOurRules(p.handle)
	if err != nil {
		return err
	}
	var r record
	known := false
	if l != nil {
		r, known = parseRecord(l.Attrs().Alias)
	}
	if !known && ours {
		err := netns.Do(ctx, t.NetNS, func() error {
			r, err = t.takeRecord(false, true)
			return err
		})
		if err != nil {
			return err
		}
		known = true
	}
	var errs []error
	if known {
		errs = append(errs,
			redirect.Remove(p.handle, t.pair(), !r.Qdisc),
			removeRules(p.handle, unix.AF_INET),
			removeRules(p.handle, unix.AF_INET6),
			netns.Do(ctx, t.NetNS, r.restoreSysctls),
			t.removeMarks(ctx, p))
	}
	// The record goes with the device, so the device goes only when all is undone.
	if err := errors.Join(errs...); err != nil || l == nil {
		return err
	}
	if err := p.handle.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete VXLAN device %s: %w", t.Device, err)
	}
	return nil
}

func (t NodeTunnel) removeMarks(ctx context.Context, p *place) error {
	unlock, err := lockNFT(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return removeNeighborMarks(p)
}
