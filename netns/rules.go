// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Priorities of the rules for tables main and default that every namespace has.
const (
	rulePrefMain    = 32766
	rulePrefDefault = 32767
)

// actionToTable is the action of a rule that leads to a table (FR_ACT_TO_TBL).
const actionToTable = unix.RTN_UNICAST

// inspectRules reads the routing rules.
func (p *Pod) inspectRules(h *netlink.Handle) error {
	for _, family := range families {
		rules, err := ListRules(h, family, func(why string) { p.LeftOut = append(p.LeftOut, why) })
		if err != nil {
			return err
		}
		for _, r := range rules {
			if why := r.unknownInterface(p.Interfaces); why != "" {
				p.LeftOut = append(p.LeftOut, why)
				continue
			}
			p.Rules = append(p.Rules, r)
		}
	}
	return nil
}

// ListRules returns the routing rules of one family in the kernel's order, without the
// kernel's own and ours. leftOut is told of each that Rule cannot express. A kernel
// without rules, or without the family, has none. family is AF_INET or AF_INET6.
func ListRules(h *netlink.Handle, family int, leftOut func(why string)) ([]Rule, error) {
	all, err := retryDump(func() ([]netlink.Rule, error) { return h.RuleList(family) })
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list routing rules: %w", err)
	}
	var out []Rule
	for _, k := range all {
		if k.Protocol == RuleProtocol || kernelRule(k) {
			continue
		}
		r, ok := ruleOf(k, family)
		if !ok {
			leftOut(fmt.Sprintf("routing rule %d: only from, to, iif, oif and fwmark to a table can be carried into a VM", k.Priority))
			continue
		}
		out = append(out, r)
	}
	slices.SortStableFunc(out, func(a, b Rule) int { return a.Priority - b.Priority })
	return out, nil
}

// kernelRule reports one of the three that every namespace has.
func kernelRule(k netlink.Rule) bool {
	if k.Src != nil || k.Dst != nil || k.IifName != "" || k.OifName != "" || k.Mark != 0 || k.Invert {
		return false
	}
	switch k.Priority {
	case 0:
		return k.Table == unix.RT_TABLE_LOCAL
	case rulePrefMain:
		return k.Table == unix.RT_TABLE_MAIN
	case rulePrefDefault:
		return k.Table == unix.RT_TABLE_DEFAULT
	}
	return false
}

func ruleOf(k netlink.Rule, family int) (Rule, bool) {
	if k.Invert || k.Goto > 0 || k.SuppressIfgroup >= 0 || k.SuppressPrefixlen >= 0 || k.Flow > 0 || k.Tos != 0 || k.TunID != 0 ||
		k.Dport != nil || k.Sport != nil || k.IPProto != 0 || k.UIDRange != nil || k.Table == 0 || (k.Type != 0 && k.Type != actionToTable) {
		return Rule{}, false
	}
	r := Rule{IPv6: family == unix.AF_INET6, Priority: k.Priority, IIF: k.IifName, OIF: k.OifName, Mark: k.Mark, Table: k.Table}
	if k.Mask != nil && (k.Mark != 0 || *k.Mask != 0) {
		r.Mask = *k.Mask
	}
	for _, c := range []struct {
		from *net.IPNet
		to   *netip.Prefix
	}{{k.Src, &r.Src}, {k.Dst, &r.Dst}} {
		if c.from == nil {
			continue
		}
		p, ok := prefix(c.from)
		if !ok {
			return Rule{}, false
		}
		*c.to = p
	}
	return r, true
}

// Kernel is r in the form of the netlink library.
func (r Rule) Kernel() *netlink.Rule {
	k := netlink.NewRule()
	k.Family = unix.AF_INET
	if r.IPv6 {
		k.Family = unix.AF_INET6
	}
	k.Priority, k.Table, k.IifName, k.OifName = r.Priority, r.Table, r.IIF, r.OIF
	if r.Mask != 0 {
		k.Mark, k.Mask = r.Mark, &r.Mask
	}
	for _, c := range []struct {
		from netip.Prefix
		to   **net.IPNet
	}{{r.Src, &k.Src}, {r.Dst, &k.Dst}} {
		if c.from.IsValid() {
			*c.to = &net.IPNet{IP: c.from.Addr().AsSlice(), Mask: net.CIDRMask(c.from.Bits(), c.from.Addr().BitLen())}
		}
	}
	return k
}

// unknownInterface tells why r cannot be made where only the given interfaces and lo
// are, "" if it can.
func (r Rule) unknownInterface(have []Interface) string {
	for _, name := range []string{r.IIF, r.OIF} {
		if name != "" && name != "lo" && !slices.ContainsFunc(have, func(i Interface) bool { return i.Name == name }) {
			return fmt.Sprintf("routing rule %d: it selects interface %s, which is left out", r.Priority, name)
		}
	}
	return ""
}
