// SPDX-License-Identifier: Apache-2.0

// Package nstest makes network topologies for tests out of fresh namespaces: a worker
// node with a bridge as its CNI, pods, the machines beside it. All of it goes with the
// test that made it. It needs root. What fails, fails the test.
package nstest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
)

// NS is one network namespace.
type NS struct {
	// Path is where it is mounted.
	Path string
	// Handle is a netlink socket inside it.
	Handle *netlink.Handle

	t testing.TB
}

// New makes a namespace with lo up. Forwarding, rp_filter and accept_ra are off
// whatever this machine inherits to new namespaces, so that snapshots compare.
func New(t testing.TB, name string) *NS {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Errorf("remove namespace: %v", err)
		}
	})
	n := Open(t, path)
	for _, dev := range []string{"all", "default"} {
		n.Sysctl("ipv4/conf/"+dev+"/forwarding", "0")
		n.Sysctl("ipv4/conf/"+dev+"/rp_filter", "0")
		n.Sysctl("ipv6/conf/"+dev+"/accept_ra", "0")
		n.Sysctl("ipv6/conf/"+dev+"/accept_dad", "0")
	}
	n.Up("lo")
	return n
}

// Open returns the namespace at path, which somebody else owns.
func Open(t testing.TB, path string) *NS {
	t.Helper()
	h, err := netns.Open(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return &NS{Path: path, Handle: h, t: t}
}

// Try runs f inside the namespace and returns its error.
func (n *NS) Try(f func() error) error { return netns.Do(context.Background(), n.Path, f) }

// Do runs f inside the namespace; an error fails the test.
func (n *NS) Do(f func() error) {
	n.t.Helper()
	if err := n.Try(f); err != nil {
		n.t.Fatal(err)
	}
}

// Link returns the interface of that name.
func (n *NS) Link(name string) netlink.Link {
	n.t.Helper()
	l, err := n.Handle.LinkByName(name)
	if err != nil {
		n.t.Fatalf("find %s: %v", name, err)
	}
	return l
}

// Up brings the interface up.
func (n *NS) Up(name string) {
	n.t.Helper()
	if err := n.Handle.LinkSetUp(n.Link(name)); err != nil {
		n.t.Fatalf("bring %s up: %v", name, err)
	}
}

// Addr adds addresses to the interface, without duplicate address detection.
func (n *NS) Addr(dev string, cidrs ...string) {
	n.t.Helper()
	for _, c := range cidrs {
		p := netip.MustParsePrefix(c)
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := n.Handle.AddrAdd(n.Link(dev), a); err != nil {
			n.t.Fatalf("add %s to %s: %v", c, dev, err)
		}
	}
}

// Settle waits until no IPv6 address of the namespace is tentative and each has its
// route in table local. Without duplicate address detection, too, the kernel gets
// there in a work queue, and only once the interface has a carrier.
func (n *NS) Settle() {
	n.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !n.settled() {
		if time.Now().After(deadline) {
			n.t.Fatal("IPv6 addresses are still tentative")
		}
		time.Sleep(time.Millisecond)
	}
}

func (n *NS) settled() bool {
	n.t.Helper()
	addrs, err := n.Handle.AddrList(nil, unix.AF_INET6)
	if err != nil {
		n.t.Fatalf("list addresses: %v", err)
	}
	routes, err := n.Handle.RouteListFiltered(unix.AF_INET6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
	if err != nil {
		n.t.Fatalf("list routes: %v", err)
	}
	for _, a := range addrs {
		if a.IP.IsLinkLocalUnicast() {
			continue
		}
		if a.Flags&unix.IFA_F_TENTATIVE != 0 || !slices.ContainsFunc(routes, func(r netlink.Route) bool {
			return r.Dst != nil && r.Dst.IP.Equal(a.IP) && r.Type == unix.RTN_LOCAL
		}) {
			return false
		}
	}
	return true
}

// Route adds a route to dst through dev, via gw unless that is empty.
func (n *NS) Route(dst, gw, dev string) {
	n.t.Helper()
	r := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), LinkIndex: n.Link(dev).Attrs().Index}
	if gw != "" {
		r.Gw = net.ParseIP(gw)
	} else {
		r.Scope = unix.RT_SCOPE_LINK
	}
	if err := n.Handle.RouteAdd(r); err != nil {
		n.t.Fatalf("add route to %s: %v", dst, err)
	}
}

// MTU sets the interface's MTU in bytes.
func (n *NS) MTU(dev string, mtu int) {
	n.t.Helper()
	if err := n.Handle.LinkSetMTU(n.Link(dev), mtu); err != nil {
		n.t.Fatalf("set MTU of %s: %v", dev, err)
	}
}

// PairMTU sets the MTU of an interface and of its veth peer, which is in other.
func (n *NS) PairMTU(dev string, other *NS, mtu int) {
	n.t.Helper()
	n.MTU(dev, mtu)
	peer, err := other.Handle.LinkByIndex(n.Link(dev).Attrs().ParentIndex)
	if err != nil {
		n.t.Fatalf("find the peer of %s: %v", dev, err)
	}
	other.MTU(peer.Attrs().Name, mtu)
}

// Bridge makes a bridge, up.
func (n *NS) Bridge(name string) {
	n.t.Helper()
	a := netlink.NewLinkAttrs()
	a.Name = name
	if err := n.Handle.LinkAdd(&netlink.Bridge{LinkAttrs: a}); err != nil {
		n.t.Fatalf("make bridge %s: %v", name, err)
	}
	n.Up(name)
}

// Veth makes a pair of interfaces, name in n and peer in other, both up.
func (n *NS) Veth(name string, other *NS, peer string) {
	n.t.Helper()
	f, err := netns.OpenFile(other.Path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	a := netlink.NewLinkAttrs()
	a.Name = name
	err = n.Handle.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: peer, PeerNamespace: netlink.NsFd(f.Fd())})
	if err != nil {
		n.t.Fatalf("make veth %s: %v", name, err)
	}
	n.Up(name)
	other.Up(peer)
}

// Plug connects dev of other to the bridge in n.
func (n *NS) Plug(bridge string, other *NS, dev string) {
	n.t.Helper()
	port := fmt.Sprintf("port%d", n.Link(bridge).Attrs().Index*100+len(n.links()))
	n.Veth(port, other, dev)
	if err := n.Handle.LinkSetMaster(n.Link(port), n.Link(bridge)); err != nil {
		n.t.Fatalf("plug %s into %s: %v", dev, bridge, err)
	}
}

// Macvlan makes an interface in other on top of parent of n, up, in bridge mode.
func (n *NS) Macvlan(parent string, other *NS, dev string) {
	n.t.Helper()
	f, err := netns.OpenFile(other.Path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	a := netlink.NewLinkAttrs()
	a.Name, a.ParentIndex, a.Namespace = dev, n.Link(parent).Attrs().Index, netlink.NsFd(f.Fd())
	if err := n.Handle.LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
		n.t.Fatalf("make macvlan %s on %s: %v", dev, parent, err)
	}
	other.Up(dev)
}

// Sysctl sets a file below /proc/sys/net.
func (n *NS) Sysctl(name, value string) {
	n.t.Helper()
	n.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0) })
}

func (n *NS) links() []netlink.Link {
	n.t.Helper()
	links, err := n.Handle.LinkList()
	if err != nil {
		n.t.Fatalf("list interfaces: %v", err)
	}
	return links
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Snapshot describes what a tunnel could leave behind in the namespace, one fact per
// line: interfaces with their index, addresses, routes of all tables, rules,
// permanent neighbours, qdiscs, ingress filters, nftables tables, and the sysctls of
// each interface that the tunnel changes. Link-local IPv6 addresses, the kernel's
// routes for them and for multicast, and the flag RUNNING are left out: the kernel sets
// them when it has the time.
func (n *NS) Snapshot() string {
	n.t.Helper()
	s := &snapshot{n: n}
	for _, f := range []func() error{s.links, s.routes, func() error { return n.Try(s.tables) }, func() error { return n.Try(s.sysctls) }} {
		if err := f(); err != nil {
			n.t.Fatalf("snapshot: %v", err)
		}
	}
	slices.Sort(s.lines)
	return strings.Join(s.lines, "\n")
}

// snapshot collects the lines of Snapshot.
type snapshot struct {
	n     *NS
	lines []string
}

func (s *snapshot) add(format string, args ...any) {
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

func (s *snapshot) links() error {
	h := s.n.Handle
	for _, l := range s.n.links() {
		a := l.Attrs()
		s.add("link %d %s %s mtu %d %s allmulti %v group %d alias %q mac %s", a.Index, a.Name, l.Type(), a.MTU, a.Flags&^net.FlagRunning,
			a.RawFlags&unix.IFF_ALLMULTI != 0, a.Group, a.Alias, a.HardwareAddr)
		addrs, err := h.AddrList(l, unix.AF_UNSPEC)
		if err != nil {
			return err
		}
		for _, addr := range addrs {
			if addr.IP.To4() != nil || !addr.IP.IsLinkLocalUnicast() {
				s.add("addr %s %s flags %d", a.Name, addr.IPNet, addr.Flags)
			}
		}
		neighbors, err := h.NeighList(a.Index, unix.AF_UNSPEC)
		if err != nil {
			return err
		}
		for _, nb := range neighbors {
			if nb.State == netlink.NUD_PERMANENT {
				s.add("neigh %s %s %s", a.Name, nb.IP, nb.HardwareAddr)
			}
		}
		qdiscs, err := h.QdiscList(l)
		if err != nil {
			return err
		}
		for _, q := range qdiscs {
			s.add("qdisc %s %s", a.Name, q.Type())
		}
		filters, err := h.FilterList(l, 0xfffffff2)
		if err != nil {
			return err
		}
		for _, f := range filters {
			s.add("filter %s %d %d %s %s", a.Name, f.Attrs().Priority, f.Attrs().Protocol, f.Type(), filterDetail(f))
		}
	}
	return nil
}

func (s *snapshot) routes() error {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := s.n.Handle.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_KERNEL && r.Dst != nil && r.Dst.IP.To4() == nil &&
				(r.Dst.IP.IsLinkLocalUnicast() || r.Dst.IP.IsMulticast()) {
				continue
			}
			s.add("route %s table %d type %d proto %d", r, r.Table, r.Type, r.Protocol)
		}
		rules, err := s.n.Handle.RuleList(family)
		if err != nil {
			return err
		}
		for _, r := range rules {
			s.add("rule %d family %d table %d iif %q mark %d proto %d", r.Priority, family, r.Table, r.IifName, r.Mark, r.Protocol)
		}
	}
	return nil
}

// tables is for use inside the namespace, as is sysctls.
func (s *snapshot) tables() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	for _, t := range tables {
		s.add("nft %d %s", t.Family, t.Name)
	}
	return err
}

func (s *snapshot) sysctls() error {
	names := []string{"all", "default"}
	for _, l := range s.n.links() {
		names = append(names, l.Attrs().Name)
	}
	for _, dev := range names {
		for _, f := range []string{"ipv4/conf/%s/forwarding", "ipv6/conf/%s/forwarding", "ipv6/conf/%s/accept_ra", "ipv6/conf/%s/disable_ipv6"} {
			name := fmt.Sprintf(f, dev)
			b, err := os.ReadFile(filepath.Join("/proc/sys/net", name))
			if err != nil {
				return err
			}
			s.add("sysctl %s %s", name, strings.TrimSpace(string(b)))
		}
	}
	return nil
}

// filterDetail is what a filter does, without counters and kernel-made numbers.
func filterDetail(f netlink.Filter) string {
	u, ok := f.(*netlink.U32)
	if !ok {
		return ""
	}
	var out []string
	for _, k := range u.Sel.Keys {
		out = append(out, fmt.Sprintf("%08x/%08x@%d", k.Val, k.Mask, k.Off))
	}
	for _, a := range u.Actions {
		if m, ok := a.(*netlink.MirredAction); ok {
			out = append(out, fmt.Sprintf("mirred %d to %d then %d", m.MirredAction, m.Ifindex, m.Action))
		} else {
			out = append(out, a.Type())
		}
	}
	return strings.Join(out, " ")
}
