// SPDX-License-Identifier: Apache-2.0

// Package redirect joins two interfaces of one network namespace by traffic control:
// what arrives at one leaves by the other. One is the CNI's interface of a pod, the
// other the pod's tunnel.
//
// Each gets an ingress qdisc, unless it has one (ingress or clsact), and u32 filters
// with mirred actions, because these exist on every kernel a node is likely to run;
// flower and matchall do not. Preferences 40001 to 40007 are ours; filters at others
// are not touched, and those at smaller ones keep the first word.
//
// Exceptions on the way into the tunnel, where Pair asks for them: IP packets larger
// than the tunnel's MTU, and copies of the answers of neighbour discovery, go up the
// namespace's IP stack; package vxlan tells why. So do IP packets in frames that bear
// the pod's own address as their sender's. A bridge that translates the destination of
// a pod's packet to the pod itself, as it does when a pod asks the service it is an
// endpoint of, sends them: it changes no sender. The tunnel's guest end has that
// address too, and vxlan drops what comes from its own (vxlan_set_mac in
// drivers/net/vxlan/vxlan_core.c; seen with Linux 6.1, 2026-11-21). The stack sends
// them on with the tunnel's address.
package redirect

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Pair is the wanted state.
type Pair struct {
	// Pod and Tunnel are the names of the interfaces.
	Pod, Tunnel string
	// MTU is the largest IP packet, in bytes, that is redirected from Pod to Tunnel.
	MTU int
	// IPv4 and IPv6 tell for which versions larger packets, and those that a bridge
	// sends back to the pod, go up the IP stack instead; without, they are redirected
	// too.
	IPv4, IPv6 bool
}

// Preferences of our filters, in the order in which the kernel asks them.
const (
	prefNeighbor4 = 40001 + iota // ARP replies: to the tunnel and up the stack
	prefNeighbor6                // neighbour and router advertisements: likewise
	prefDirect4                  // multicast and broadcast: redirected at any size
	prefLarge4                   // IPv4 above the MTU, or from the pod's own address: up the stack
	prefDirect6                  // multicast and link-local: redirected at any size
	prefLarge6                   // IPv6 likewise
	prefAll                      // everything else: redirected
)

// ingressParent is where ingress filters hang on both kinds of qdisc:
// TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS) of linux/pkt_sched.h.
const ingressParent = 0xfffffff2

// classID is given to filters without an action, which the kernel ends with
// TC_ACT_OK: up the stack. u32 calls a filter terminal only if it has one or the
// other. The value has no meaning on an ingress qdisc.
const classID = 1<<16 | 1

// HasQdisc reports whether l has an ingress or clsact qdisc. The caller records that
// before Ensure and tells Remove.
func HasQdisc(h *netlink.Handle, l netlink.Link) (bool, error) {
	qdiscs, err := h.QdiscList(l)
	if err != nil {
		return false, fmt.Errorf("list qdiscs of %s: %w", l.Attrs().Name, err)
	}
	for _, q := range qdiscs {
		if t := q.Type(); t == "ingress" || t == "clsact" {
			return true, nil
		}
	}
	return false, nil
}

// Ensure makes or repairs the redirect in the namespace of h and returns what it had
// to change, in words; nothing when all was as wanted.
//
// FailedPrecondition: one of the interfaces is missing.
func Ensure(ctx context.Context, h *netlink.Handle, p Pair) ([]string, error) {
	pod, err := link(h, p.Pod)
	if err != nil {
		return nil, err
	}
	tunnel, err := link(h, p.Tunnel)
	if err != nil {
		return nil, err
	}
	var changes []string
	// The tunnel's side first: the pod's first packet is answered.
	for _, side := range []struct {
		from netlink.Link
		want []rule
	}{
		{tunnel, []rule{{pref: prefAll, protocol: unix.ETH_P_ALL, keys: matchAll, verdict: redirect, to: pod.Attrs().Index}}},
		{pod, p.podRules(tunnel.Attrs().Index, pod.Attrs().HardwareAddr)},
	} {
		if err := ctx.Err(); err != nil {
			return changes, err
		}
		done, err := ensureSide(h, side.from, side.want)
		changes = append(changes, done...)
		if err != nil {
			return changes, err
		}
	}
	return changes, nil
}

// Remove takes our filters away from both interfaces, and the pod's ingress qdisc if
// dropQdisc says that it was not there before Ensure and no filter of others has come
// since. The tunnel's goes with the device. Missing interfaces and filters are not an
// error. It goes on after an error and joins them.
func Remove(h *netlink.Handle, p Pair, dropQdisc bool) error {
	var errs []error
	for _, name := range []string{p.Pod, p.Tunnel} {
		l, err := link(h, name)
		if errors.Is(err, errdefs.ErrFailedPrecondition) {
			continue
		}
		if err == nil {
			err = removeSide(h, l, dropQdisc || name == p.Tunnel)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func link(h *netlink.Handle, name string) (netlink.Link, error) {
	l, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, fmt.Errorf("interface %s does not exist in the pod's network namespace: %w", name, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", name, err)
	}
	return l, nil
}

func ensureSide(h *netlink.Handle, l netlink.Link, want []rule) ([]string, error) {
	name := l.Attrs().Name
	var changes []string
	has, err := HasQdisc(h, l)
	if err != nil {
		return nil, err
	}
	if !has {
		qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index,
			Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
		if err := h.QdiscAdd(qdisc); err != nil {
			return nil, fmt.Errorf("add ingress qdisc to %s: %w", name, err)
		}
		changes = append(changes, "add ingress qdisc to "+name)
	}
	have, _, err := rules(h, l)
	if err != nil {
		return changes, err
	}
	for pref := uint16(prefNeighbor4); pref <= prefAll; pref++ {
		w, g := atPref(want, pref), atPref(have, pref)
		if slices.EqualFunc(w, g, rule.equal) {
			continue
		}
		if len(g) > 0 {
			if err := deletePref(h, l, pref, g[0].protocol); err != nil {
				return changes, err
			}
		}
		for _, r := range w {
			if err := h.FilterAdd(r.filter(l)); err != nil {
				return changes, fmt.Errorf("add filter with preference %d to %s: %w", pref, name, err)
			}
		}
		changes = append(changes, fmt.Sprintf("set %d filters with preference %d on %s (%d before)", len(w), pref, name, len(g)))
	}
	return changes, nil
}

func removeSide(h *netlink.Handle, l netlink.Link, dropQdisc bool) error {
	has, err := HasQdisc(h, l)
	if err != nil || !has {
		return err
	}
	have, foreign, err := rules(h, l)
	if err != nil {
		return err
	}
	for pref := uint16(prefNeighbor4); pref <= prefAll; pref++ {
		if g := atPref(have, pref); len(g) > 0 {
			if err := deletePref(h, l, pref, g[0].protocol); err != nil {
				return err
			}
		}
	}
	if !dropQdisc || foreign {
		return nil
	}
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := h.QdiscDel(qdisc); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("delete ingress qdisc of %s: %w", l.Attrs().Name, err)
	}
	return nil
}

func deletePref(h *netlink.Handle, l netlink.Link, pref, protocol uint16) error {
	f := &netlink.U32{FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index,
		Parent: ingressParent, Priority: pref, Protocol: protocol}}
	if err := h.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete filters with preference %d of %s: %w", pref, l.Attrs().Name, err)
	}
	return nil
}

// rules returns our filters on l and whether there are others.
func rules(h *netlink.Handle, l netlink.Link) (ours []rule, foreign bool, err error) {
	filters, err := h.FilterList(l, ingressParent)
	if err != nil {
		return nil, false, fmt.Errorf("list ingress filters of %s: %w", l.Attrs().Name, err)
	}
	for _, f := range filters {
		pref := f.Attrs().Priority
		u, ok := f.(*netlink.U32)
		if !ok || pref < prefNeighbor4 || pref > prefAll {
			foreign = true
			continue
		}
		ours = append(ours, ruleOf(u))
	}
	return ours, foreign, nil
}

func atPref(rs []rule, pref uint16) []rule {
	var out []rule
	for _, r := range rs {
		if r.pref == pref {
			out = append(out, r)
		}
	}
	return out
}
