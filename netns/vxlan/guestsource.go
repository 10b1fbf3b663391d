// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Priorities of the guest's two policies; the kernel takes the matching policy with
// the smallest. They also tell our policies from others.
const (
	priorityAllow = 28784
	priorityBlock = 28785
)

// ensureGuestSource lets UDP to s.Port in the caller's network namespace come from
// s.Remote only.
//
// The filter is two IPsec policies, one that allows and one that blocks, and no
// transformation. A policy is asked for when a datagram is about to be handed to its
// socket (net/ipv4/udp.c and net/ipv6/udp.c, *_queue_rcv_one_skb), which is after
// fragments were put together and holds for broadcast and multicast as well. FIB
// rules would see neither: the ports of a fragment are not known where routes are
// looked up, and a limited broadcast takes no such look-up. nftables would do, but its
// module is six times as large as xfrm_user, and loading modules is a good part of a
// pod VM's start.
func ensureGuestSource(s Source) error {
	h, err := netlink.NewHandle(unix.NETLINK_XFRM)
	if err != nil {
		return fmt.Errorf("open netlink socket for policies: %w", err)
	}
	defer h.Close()
	all := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	family := unix.AF_INET6
	if s.Remote.Is4() {
		all, family = netip.PrefixFrom(netip.IPv4Unspecified(), 0), unix.AF_INET
	}
	policy := func(src netip.Prefix, action netlink.PolicyAction, priority int) *netlink.XfrmPolicy {
		return &netlink.XfrmPolicy{Dst: ipNet(all), Src: ipNet(src), Proto: unix.IPPROTO_UDP, DstPort: int(s.Port),
			Dir: netlink.XFRM_DIR_IN, Action: action, Priority: priority}
	}
	remote := netip.PrefixFrom(s.Remote, s.Remote.BitLen())
	for _, p := range []*netlink.XfrmPolicy{
		policy(all, netlink.XFRM_POLICY_BLOCK, priorityBlock),
		policy(remote, netlink.XFRM_POLICY_ALLOW, priorityAllow),
	} {
		// An update makes what is missing.
		if err := h.XfrmPolicyUpdate(p); err != nil {
			return fmt.Errorf("set the policy for UDP port %d from %s: %w", s.Port, p.Src, err)
		}
	}
	return removeOtherSources(h, family, s)
}

// removeOtherSources removes what an earlier call allowed for another sender.
func removeOtherSources(h *netlink.Handle, family int, s Source) error {
	have, err := h.XfrmPolicyList(family)
	if err != nil {
		return fmt.Errorf("list policies: %w", err)
	}
	for _, p := range have {
		ours := p.Dir == netlink.XFRM_DIR_IN && p.Priority == priorityAllow && p.Proto == unix.IPPROTO_UDP && p.DstPort == int(s.Port)
		if !ours || p.Src != nil && addr(p.Src.IP) == s.Remote {
			continue
		}
		if err := h.XfrmPolicyDel(&p); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete the policy for UDP port %d from %s: %w", s.Port, p.Src, err)
		}
	}
	return nil
}
