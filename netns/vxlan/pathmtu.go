// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
)

// What the pod's namespace on the node gets; the package comment tells why.
const (
	pathTable    = 0x7070 // 28784: of the pod's first tunnel; the next one's is one more
	pathProtocol = netns.RuleProtocol
	pathMark     = netns.LinkGroup

	prefNeighbor = 1 // marked neighbour discovery → local
	prefOversize = 2 // from a CNI's interface → its tunnel's table
	prefLocal    = 3 // everything else → local, moved here from 0

	neighborTable = "peerpod_nd"
)

// Next hops of the routes in pathTable. They stand for the VM and are never asked for
// on the wire: the neighbour entries are permanent.
var (
	nextHop4 = net.IPv4(169, 254, 112, 112)
	nextHop6 = net.ParseIP("fe80::7070:6f64")
)

// record is what the CNI's interface, and the namespace, were like before EnsureNode,
// kept as JSON in the alias of the device. Every device of a pod has its record before
// anything is changed for the first of them, because turning IPv6 forwarding on changes
// all interfaces.
type record struct {
	// Qdisc: the CNI's interface had an ingress qdisc.
	Qdisc bool `json:"qdisc"`
	// HearAll: all multicast is to be turned on at the CNI's interface, and was off. A
	// macvlan passes on only the groups that its own namespace has joined, and not those
	// of the pod in the VM.
	HearAll bool `json:"hear_all,omitempty"`
	// Sysctl values by their path below /proc/sys/net, in the order in which they are
	// put back: those of the namespace first.
	Sysctl [][2]string `json:"sysctl"`
}

// families returns which IP versions the pod has.
func (t NodeTunnel) families() (ipv4, ipv6 bool) {
	for _, a := range t.PodAddrs {
		ipv4 = ipv4 || a.Addr().Unmap().Is4()
		ipv6 = ipv6 || !a.Addr().Unmap().Is4()
	}
	return ipv4, ipv6
}

// readSysctls reads the present values; for use inside netns.Do. When the record is lost
// they are those of a new interface.
func (t NodeTunnel) readSysctls(lost bool) ([][2]string, error) {
	var out [][2]string
	for _, c := range []struct{ name, instead string }{
		{sysctl6("all", "forwarding"), ""}, // the default changed together with it
		{sysctl4(t.PodInterface, "forwarding"), sysctl4("default", "forwarding")},
		{sysctl6(t.PodInterface, "forwarding"), ""},
		{sysctl6(t.PodInterface, "accept_ra"), sysctl6("default", "accept_ra")},
	} {
		source := c.name
		if lost {
			source = c.instead
		}
		value := "0"
		if source != "" {
			var err error
			if value, err = readSysctl(source); err != nil {
				return nil, err
			}
		}
		if value != "" {
			out = append(out, [2]string{c.name, value})
		}
	}
	return out, nil
}

// hearAll does what HearAll asks for.
func (r record) hearAll(h *netlink.Handle, dev string) ([]string, error) {
	if !r.HearAll {
		return nil, nil
	}
	l, err := h.LinkByName(dev)
	if err != nil {
		return nil, fmt.Errorf("find pod interface %s: %w", dev, err)
	}
	if l.Attrs().RawFlags&unix.IFF_ALLMULTI != 0 {
		return nil, nil
	}
	if err := h.LinkSetAllmulticastOn(l); err != nil {
		return nil, fmt.Errorf("let %s receive all multicast: %w", dev, err)
	}
	return []string{"let " + dev + " receive all multicast"}, nil
}

// hearLess is the reverse. A missing interface is not an error.
func (r record) hearLess(h *netlink.Handle, dev string) error {
	if !r.HearAll {
		return nil
	}
	l, err := find(h, dev)
	if err != nil || l == nil {
		return err
	}
	if err := h.LinkSetAllmulticastOff(l); err != nil {
		return fmt.Errorf("let %s receive less multicast: %w", dev, err)
	}
	return nil
}

// String is the alias. It fits the kernel's 255 bytes: the interface name appears
// three times with at most 15.
func (r record) String() string {
	b, err := json.Marshal(r)
	if err != nil { // strings and booleans always marshal
		return ""
	}
	return string(b)
}

func parseRecord(alias string) (record, bool) {
	var r record
	if alias == "" || json.Unmarshal([]byte(alias), &r) != nil {
		return record{}, false
	}
	return r, true
}

// setSysctls turns forwarding on for oversized packets and IPv6 off or quiet on the
// device; for use inside netns.Do.
func (t NodeTunnel) setSysctls() ([]string, error) {
	ipv4, ipv6 := t.families()
	var want [][2]string
	if ipv4 {
		want = append(want, [2]string{sysctl4(t.PodInterface, "forwarding"), "1"})
	}
	if ipv6 {
		want = append(want,
			// Before forwarding: turning that on drops default routes from router
			// advertisements unless accept_ra is 2 (rt6_purge_dflt_routers).
			[2]string{sysctl6(t.PodInterface, "accept_ra"), "2"},
			[2]string{sysctl6("all", "forwarding"), "1"},
			[2]string{sysctl6(t.Device, "disable_ipv6"), "0"},
			[2]string{sysctl6(t.Device, "addr_gen_mode"), "1"}) // no link-local address
	} else {
		want = append(want, [2]string{sysctl6(t.Device, "disable_ipv6"), "1"})
	}
	var changes []string
	for _, s := range want {
		changed, err := writeSysctl(s[0], s[1])
		if err != nil {
			return changes, err
		}
		if changed {
			changes = append(changes, "set "+s[0]+" to "+s[1])
		}
	}
	return changes, nil
}

// restoreSysctls puts back what the records of a pod's devices hold; for use inside
// netns.Do. The namespace's value goes first, because it changes those of interfaces. A
// record that was made when its predecessor was lost guesses 0 for it, so 1 is the truth
// where two differ.
func restoreSysctls(records []record) error {
	all := sysctl6("all", "forwarding")
	shared := ""
	for _, r := range records {
		for _, s := range r.Sysctl {
			if s[0] == all {
				shared = max(shared, s[1])
			}
		}
	}
	var errs []error
	if shared != "" {
		_, err := writeSysctl(all, shared)
		errs = append(errs, err)
	}
	for _, r := range records {
		for _, s := range r.Sysctl {
			if s[0] != all {
				_, err := writeSysctl(s[0], s[1])
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// ensurePath makes rules, routes and next hops for the IP versions of t, the n-th of its
// pod's tunnels.
func (t NodeTunnel) ensurePath(h *netlink.Handle, l netlink.Link, n int) ([]string, error) {
	ipv4, ipv6 := t.families()
	var changes []string
	for _, v := range []struct {
		on      bool
		family  int
		nextHop net.IP
	}{{ipv4, unix.AF_INET, nextHop4}, {ipv6, unix.AF_INET6, nextHop6}} {
		if !v.on {
			continue
		}
		routed, err := ensureNextHop(h, l, v.family, pathTable+n, v.nextHop, t.PodHWAddr)
		changes = append(changes, routed...)
		if err != nil {
			return changes, err
		}
		ruled, err := ensureRules(h, v.family, pathTable+n, t.PodInterface)
		changes = append(changes, ruled...)
		if err != nil {
			return changes, err
		}
	}
	return changes, nil
}

func ensureNextHop(h *netlink.Handle, l netlink.Link, family, table int, ip net.IP, hwaddr net.HardwareAddr) ([]string, error) {
	var changes []string
	index := l.Attrs().Index
	neighbors, err := h.NeighList(index, family)
	if err != nil {
		return nil, fmt.Errorf("list neighbours on %s: %w", l.Attrs().Name, err)
	}
	if !slices.ContainsFunc(neighbors, func(n netlink.Neigh) bool {
		return n.IP.Equal(ip) && n.State == netlink.NUD_PERMANENT && n.HardwareAddr.String() == hwaddr.String()
	}) {
		err := h.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: hwaddr})
		if err != nil {
			return nil, fmt.Errorf("set neighbour %s on %s: %w", ip, l.Attrs().Name, err)
		}
		changes = append(changes, fmt.Sprintf("set neighbour %s %s", ip, hwaddr))
	}
	routes, err := h.RouteListFiltered(family, &netlink.Route{Table: table, LinkIndex: index},
		netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF)
	if err != nil {
		return changes, fmt.Errorf("list routes of table %d: %w", table, err)
	}
	if slices.ContainsFunc(routes, func(r netlink.Route) bool {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		return ones == 0 && r.Gw.Equal(ip)
	}) {
		return changes, nil
	}
	all := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if family == unix.AF_INET6 {
		all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	err = h.RouteReplace(&netlink.Route{LinkIndex: index, Family: family, Table: table, Dst: all, Gw: ip,
		Protocol: pathProtocol, Flags: int(netlink.FLAG_ONLINK)})
	if err != nil {
		return changes, fmt.Errorf("add route to table %d: %w", table, err)
	}
	return append(changes, fmt.Sprintf("add default route via %s to table %d", ip, table)), nil
}

// wantedRules are our rules for one IP version, in the order in which they are added:
// the rule for table local stands at prefLocal before the one at 0 goes.
func wantedRules(family, table int, iif string) []*netlink.Rule {
	base := func(pref, table int) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.Protocol = family, pref, table, pathProtocol
		return r
	}
	oversize := base(prefOversize, table)
	oversize.IifName = iif
	out := []*netlink.Rule{oversize, base(prefLocal, unix.RT_TABLE_LOCAL)}
	if family == unix.AF_INET6 {
		mask := uint32(0xffffffff)
		nd := base(prefNeighbor, unix.RT_TABLE_LOCAL)
		nd.Mark, nd.Mask = pathMark, &mask
		out = append(out, nd)
	}
	return out
}

// firstLocal is the kernel's own rule for table local.
func firstLocal(family int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = family, 0, unix.RT_TABLE_LOCAL, unix.RTPROT_KERNEL
	return r
}

// sameRule compares what we set. Others have selectors that we never use; a rule with
// one of those at a preference of ours is not ours by its protocol.
func sameRule(a, b *netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.IifName == b.IifName && a.Mark == b.Mark &&
		a.Protocol == b.Protocol && a.Src == nil && a.Dst == nil && a.OifName == "" && !a.Invert
}

func hasRule(have []netlink.Rule, want *netlink.Rule) bool {
	return slices.ContainsFunc(have, func(r netlink.Rule) bool { return sameRule(&r, want) })
}

func ensureRules(h *netlink.Handle, family, table int, iif string) ([]string, error) {
	have, err := h.RuleList(family)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	var changes []string
	for _, want := range wantedRules(family, table, iif) {
		if hasRule(have, want) {
			continue
		}
		if err := h.RuleAdd(want); err != nil && !errors.Is(err, unix.EEXIST) {
			return changes, fmt.Errorf("add rule with preference %d: %w", want.Priority, err)
		}
		changes = append(changes, fmt.Sprintf("add rule with preference %d to table %d", want.Priority, want.Table))
	}
	if first := firstLocal(family); hasRule(have, first) {
		if err := h.RuleDel(first); err != nil {
			return changes, fmt.Errorf("delete rule with preference 0: %w", err)
		}
		changes = append(changes, "delete rule with preference 0")
	}
	return changes, nil
}

// hasOurRules reports whether ensureRules has ever run to its end or part of it.
func hasOurRules(h *netlink.Handle) (bool, error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := h.RuleList(family)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return false, fmt.Errorf("list rules: %w", err)
		}
		if slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Protocol == pathProtocol }) {
			return true, nil
		}
	}
	return false, nil
}

// removeRules takes every rule with our protocol away and puts the kernel's own for
// table local back first, if we had moved it.
func removeRules(h *netlink.Handle, family int) error {
	have, err := h.RuleList(family)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	moved := func(r netlink.Rule) bool {
		return r.Protocol == pathProtocol && r.Priority == prefLocal && r.Table == unix.RT_TABLE_LOCAL
	}
	if first := firstLocal(family); slices.ContainsFunc(have, moved) && !hasRule(have, first) {
		if err := h.RuleAdd(first); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("put rule with preference 0 back: %w", err)
		}
	}
	var errs []error
	for i := range have {
		if have[i].Protocol != pathProtocol {
			continue
		}
		if err := h.RuleDel(&have[i]); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("delete rule with preference %d: %w", have[i].Priority, err))
		}
	}
	return errors.Join(errs...)
}

// ensureNeighborMarks makes the table that marks copies of neighbour and router
// advertisements which arrive at the given interfaces. The caller holds nftLock.
func ensureNeighborMarks(p *place, iifs []string) (bool, error) {
	conn, table, exists, err := openNeighborTable(p)
	if err != nil {
		return false, err
	}
	chain := &nftables.Chain{Name: "prerouting", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw}
	var rules [][]expr.Any
	for _, iif := range iifs {
		rules = append(rules, markRule(iif, 136), markRule(iif, 134))
	}
	if exists {
		if current, err := rulesCurrent(conn, chain, len(rules)); err != nil || current {
			return false, err
		}
	}
	conn.AddTable(table)
	conn.AddChain(chain)
	conn.FlushChain(chain)
	addRules(conn, chain, rules)
	if err := conn.Flush(); err != nil {
		return false, fmt.Errorf("make nftables table %s in %s: %w", neighborTable, p.path, err)
	}
	return true, nil
}

// removeNeighborMarks is the reverse. The caller holds nftLock.
func removeNeighborMarks(p *place) error {
	conn, table, exists, err := openNeighborTable(p)
	if err != nil || !exists {
		return err
	}
	conn.DelTable(table)
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("delete nftables table %s in %s: %w", neighborTable, p.path, err)
	}
	return nil
}

func openNeighborTable(p *place) (*nftables.Conn, *nftables.Table, bool, error) {
	conn, err := nftables.New(nftables.WithNetNSFd(int(p.file.Fd())))
	if err != nil {
		return nil, nil, false, fmt.Errorf("open nftables socket in %s: %w", p.path, err)
	}
	table := &nftables.Table{Name: neighborTable, Family: nftables.TableFamilyIPv6}
	exists, err := hasTable(conn, table)
	return conn, table, exists, err
}

// markRule marks ICMPv6 messages of one type that arrive at iif. Hop limit 255 says
// that nobody has forwarded them (RFC 4861 §7.1.2).
func markRule(iif string, icmpType byte) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, iif)
	field := func(offset uint32, want byte) []expr.Any {
		return []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{want}},
		}
	}
	out := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
	}
	out = append(out, field(6, unix.IPPROTO_ICMPV6)...)
	out = append(out, field(7, 255)...)
	out = append(out, field(40, icmpType)...)
	return append(out,
		&expr.Immediate{Register: 1, Data: markBytes(pathMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1})
}
