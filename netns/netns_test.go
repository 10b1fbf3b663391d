// SPDX-License-Identifier: Apache-2.0

package netns_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sameIP(a, b netip.Addr) bool       { return a == b }
func samePrefix(a, b netip.Prefix) bool { return a == b }

var compareIP = cmp.Options{cmp.Comparer(sameIP), cmp.Comparer(samePrefix)}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }

// id names the namespace of the calling thread.
func id(t *testing.T) string {
	t.Helper()
	h, err := vns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	return h.UniqueId()
}

// TestDo: f runs inside, its error comes back, and no other goroutine ever does.
func TestDo(t *testing.T) {
	ns := nstest.New(t, "a")
	want := errors.New("from f")
	outside := id(t)
	var inside string
	if err := netns.Do(t.Context(), ns.Path, func() error { inside = id(t); return want }); err != want {
		t.Errorf("error %v, want %v", err, want)
	}
	if inside == outside {
		t.Error("f ran outside")
	}
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			if err := netns.Do(t.Context(), ns.Path, func() error {
				if got := id(t); got != inside {
					t.Errorf("inside: %s, want %s", got, inside)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if got := id(t); got != outside {
				t.Errorf("outside: %s, want %s", got, outside)
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := netns.Do(ctx, ns.Path, func() error { t.Error("f ran"); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestBadPath: the classes of error of all that take a path.
func TestBadPath(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, is := range map[string]func(error) bool{
		filepath.Join(dir, "missing"): errdefs.IsNotFound,
		filepath.Join(plain, "below"): errdefs.IsNotFound,
		plain:                         errdefs.IsInvalidArgument,
		"/dev/null":                   errdefs.IsInvalidArgument,
		"/proc/self/ns/mnt":           errdefs.IsInvalidArgument,
		dir:                           errdefs.IsInvalidArgument,
	} {
		_, inspect := netns.Inspect(t.Context(), path)
		_, open := netns.Open(t.Context(), path)
		do := netns.Do(t.Context(), path, func() error { return nil })
		for what, err := range map[string]error{"Inspect": inspect, "Open": open, "Do": do} {
			if !is(err) || !strings.Contains(err.Error(), path) {
				t.Errorf("%s(%s): %v", what, path, err)
			}
		}
	}
}

// TestCreateRemove: twice each, after a crash in between, and of something else.
func TestCreateRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "netns", "podns")
	for range 2 {
		if err := netns.Create(path); err != nil {
			t.Fatal(err)
		}
		if err := netns.Create(path); !errdefs.IsAlreadyExists(err) {
			t.Errorf("second Create: %v, want AlreadyExists", err)
		}
		outside := id(t)
		if err := netns.Do(t.Context(), path, func() error {
			if id(t) == outside {
				t.Error("not a new namespace")
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := netns.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after Remove: %v", err)
		}
		// What a Create that was killed before its mount leaves.
		if err := os.WriteFile(path, nil, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	if err := netns.Remove(path); err != nil {
		t.Errorf("Remove of a bare mount point: %v", err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := netns.Remove(path); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Remove of a file: %v, want InvalidArgument", err)
	}
	if err := netns.Remove(filepath.Dir(path)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Remove of a directory: %v, want InvalidArgument", err)
	}
}

// TestInspectEmpty: a namespace that no CNI has been in.
func TestInspectEmpty(t *testing.T) {
	ns := nstest.New(t, "pod")
	if _, err := netns.Inspect(t.Context(), ns.Path); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no interface") {
		t.Errorf("only lo: %v", err)
	}
	ns.Bridge("eth0")
	if _, err := netns.Inspect(t.Context(), ns.Path); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "address") {
		t.Errorf("no address: %v", err)
	}
}

// inspected is a namespace with a bit of everything, and the MAC address of its gateway.
func inspected(t *testing.T) (ns *nstest.NS, gw net.HardwareAddr) {
	t.Helper()
	ns = nstest.New(t, "pod")
	far := nstest.New(t, "far")
	ns.Veth("net1", far, "b")
	ns.Veth("eth0", far, "a")
	ns.MTU("eth0", 1400)
	ns.Addr("net1", "192.168.7.2/24")
	ns.Addr("eth0", "10.1.2.3/24", "fd01::3/64", "10.1.2.4/32")
	ns.Addr("lo", "10.255.0.1/32")
	ns.Settle()
	ns.Route("169.254.1.1/32", "", "eth0")
	ns.Route("0.0.0.0/0", "169.254.1.1", "eth0")
	ns.Route("::/0", "fd01::1", "eth0")
	index := ns.Link("eth0").Attrs().Index
	_, dst, _ := net.ParseCIDR("10.77.0.0/16")
	for _, r := range []*netlink.Route{
		{Dst: dst, LinkIndex: index, Gw: net.IPv4(10, 1, 2, 9), Protocol: unix.RTPROT_STATIC, Src: net.IPv4(10, 1, 2, 4), Priority: 5},
		{Dst: dst, LinkIndex: index, Gw: net.IPv4(10, 1, 2, 8), Protocol: unix.RTPROT_BOOT, Table: 77},
		{Dst: dst, LinkIndex: index, Gw: net.IPv4(10, 1, 2, 7), Protocol: unix.RTPROT_BGP, Priority: 9},
	} {
		if err := ns.Handle.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	gw = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	for ip, state := range map[string]int{"169.254.1.1": netlink.NUD_PERMANENT, "10.1.2.7": netlink.NUD_REACHABLE, "fd01::1": netlink.NUD_PERMANENT} {
		if err := ns.Handle.NeighAdd(&netlink.Neigh{LinkIndex: index, State: state, IP: net.ParseIP(ip), HardwareAddr: gw}); err != nil {
			t.Fatal(err)
		}
	}
	ours := netlink.NewLinkAttrs()
	ours.Name, ours.Group = "ppvx1", netns.LinkGroup
	if err := ns.Handle.LinkAdd(&netlink.Vxlan{LinkAttrs: ours, VxlanId: 5, Port: 9000, Group: net.IPv4(10, 1, 2, 200)}); err != nil {
		t.Fatal(err)
	}
	ns.Addr("ppvx1", "10.66.0.1/24")
	ns.Veth("far0", far, "c")
	for _, r := range []netns.Rule{
		{Priority: 100, Src: prefix("10.1.2.4/32"), IIF: "lo", Mark: 0x10, Mask: 0xff, Table: 77},
		{IPv6: true, Priority: 101, Dst: prefix("fd77::/64"), OIF: "eth0", Table: 78},
		{Priority: 103, IIF: "far0", Table: 79},
	} {
		if err := ns.Handle.RuleAdd(r.Kernel()); err != nil {
			t.Fatal(err)
		}
	}
	inverted := netns.Rule{Priority: 102, Src: prefix("10.9.0.0/16"), Table: 80}.Kernel()
	inverted.Invert = true
	mine := netns.Rule{Priority: 104, Table: 81}.Kernel()
	mine.Protocol = netns.RuleProtocol
	for _, r := range []*netlink.Rule{inverted, mine} {
		if err := ns.Handle.RuleAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	return ns, gw
}

// TestInspect: two interfaces, the one with the default route first though it was
// made second; addresses, routes by protocol and scope, permanent neighbours; nothing
// of lo, of devices of ours, of link-local IPv6 or of routing daemons; the rules.
func TestInspect(t *testing.T) {
	ns, gw := inspected(t)
	got, err := netns.Inspect(t.Context(), ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	want := &netns.Pod{Interfaces: []netns.Interface{{
		Name: "eth0", MTU: 1400, HWAddr: ns.Link("eth0").Attrs().HardwareAddr,
		Addrs: []netip.Prefix{prefix("10.1.2.3/24"), prefix("10.1.2.4/32"), prefix("fd01::3/64")},
		Routes: []netns.Route{
			{Dst: prefix("10.1.2.0/24"), Src: addr("10.1.2.3"), Protocol: "kernel", Scope: "link"},
			{Dst: prefix("169.254.1.1/32"), Protocol: "boot", Scope: "link"},
			{Dst: prefix("fd01::/64"), Protocol: "kernel", Scope: "universe", Metric: 256},
			{Dst: prefix("0.0.0.0/0"), Gateway: addr("169.254.1.1"), Protocol: "boot", Scope: "universe"},
			{Dst: prefix("10.77.0.0/16"), Gateway: addr("10.1.2.9"), Src: addr("10.1.2.4"), Protocol: "static", Scope: "universe", Metric: 5},
			{Dst: prefix("::/0"), Gateway: addr("fd01::1"), Protocol: "boot", Scope: "universe"},
			{Dst: prefix("10.77.0.0/16"), Gateway: addr("10.1.2.8"), Protocol: "boot", Scope: "universe", Table: 77},
		},
		Neighbors: []netns.Neighbor{
			{IP: addr("169.254.1.1"), HWAddr: gw, State: "permanent"},
			{IP: addr("fd01::1"), HWAddr: gw, State: "permanent"},
		},
	}, {
		Name: "net1", MTU: 1500, HWAddr: ns.Link("net1").Attrs().HardwareAddr,
		Addrs:  []netip.Prefix{prefix("192.168.7.2/24")},
		Routes: []netns.Route{{Dst: prefix("192.168.7.0/24"), Src: addr("192.168.7.2"), Protocol: "kernel", Scope: "link"}},
	}}, Rules: []netns.Rule{
		{Priority: 100, Src: prefix("10.1.2.4/32"), IIF: "lo", Mark: 0x10, Mask: 0xff, Table: 77},
		{IPv6: true, Priority: 101, Dst: prefix("fd77::/64"), OIF: "eth0", Table: 78},
	}, LeftOut: []string{
		"interface far0 (veth): it has no address",
		"routing rule 102: only from, to, iif, oif and fwmark to a table can be carried into a VM",
		"routing rule 103: it selects interface far0, which is left out",
	}}
	if d := cmp.Diff(want, got, compareIP); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// TestDefaultRoute: IPv4 before IPv6, the smaller metric, the route's source and MTU.
func TestDefaultRoute(t *testing.T) {
	ns, far := nstest.New(t, "node"), nstest.New(t, "far")
	try := func() (p netip.Prefix, mtu int, err error) {
		err = ns.Try(func() error {
			p, mtu, err = netns.DefaultRoute(t.Context())
			return err
		})
		return p, mtu, err
	}
	check := func(want string, wantMTU int) {
		t.Helper()
		if p, mtu, err := try(); err != nil || p != prefix(want) || mtu != wantMTU {
			t.Errorf("%v, %d, %v; want %s, %d", p, mtu, err, want, wantMTU)
		}
	}
	if _, _, err := try(); !errdefs.IsNotFound(err) {
		t.Errorf("no route: %v, want NotFound", err)
	}
	ns.Veth("eth0", far, "a")
	ns.Veth("eth1", far, "b")
	ns.Addr("eth0", "10.1.0.2/24", "10.1.0.3/24", "fd01::2/64")
	ns.Addr("eth1", "10.2.0.2/24")
	ns.MTU("eth1", 1400)
	ns.Settle()
	ns.Route("::/0", "fd01::1", "eth0")
	check("fd01::2/64", 1500)
	_, all, _ := net.ParseCIDR("0.0.0.0/0")
	for _, r := range []struct {
		route *netlink.Route
		want  string
		mtu   int
	}{
		{&netlink.Route{Dst: all, Gw: net.IPv4(10, 1, 0, 1), Priority: 100}, "10.1.0.2/24", 1500},
		{&netlink.Route{Dst: all, Gw: net.IPv4(10, 2, 0, 1), Priority: 50}, "10.2.0.2/24", 1400},
		{&netlink.Route{Dst: all, Gw: net.IPv4(10, 1, 0, 1), Priority: 10, Src: net.IPv4(10, 1, 0, 3), MTU: 1300}, "10.1.0.3/24", 1300},
	} {
		if err := ns.Handle.RouteAdd(r.route); err != nil {
			t.Fatal(err)
		}
		check(r.want, r.mtu)
	}
}

// TestInspectStacked: an interface above another of the same namespace would get nothing.
func TestInspectStacked(t *testing.T) {
	ns, far := nstest.New(t, "pod"), nstest.New(t, "far")
	ns.Veth("eth0", far, "a")
	ns.Addr("eth0", "10.1.2.3/24")
	far.Macvlan("a", ns, "net1")
	ns.Addr("net1", "10.2.2.3/24")
	if got, err := netns.Inspect(t.Context(), ns.Path); err != nil || len(got.Interfaces) != 2 {
		t.Errorf("a macvlan on a parent outside: %+v, %v", got, err)
	}
	ns.Macvlan("eth0", ns, "net2")
	ns.Addr("net2", "10.3.2.3/24")
	_, err := netns.Inspect(t.Context(), ns.Path)
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "net2") || !strings.Contains(err.Error(), "eth0") {
		t.Errorf("a macvlan on an interface of the pod: %v, want InvalidArgument that names both", err)
	}
}
