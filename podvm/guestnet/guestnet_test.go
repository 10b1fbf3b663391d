// SPDX-License-Identifier: Apache-2.0

package guestnet

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/podvm/bootconf"
	"github.com/kata-remote/kata-remote/podvm/dhcp/dhcptest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func podNetwork() *podvmconfig.PodNetwork {
	return &podvmconfig.PodNetwork{
		PodIP: netip.MustParsePrefix("10.244.1.21/24"), PodHWAddr: "32:b9:59:6b:f0:d5", Interface: "eth0",
		WorkerNodeIP: netip.MustParsePrefix("192.168.213.1/24"), TunnelType: podvmconfig.TunnelVXLAN,
		MTU: 1500, VXLANPort: 9000, VXLANID: 555002,
		Routes: []podvmconfig.Route{
			{Dst: "10.244.1.0/24", Dev: "eth0", Protocol: "kernel", Scope: "link"},
			{Dst: "0.0.0.0/0", GW: "10.244.1.1", Dev: "eth0", Protocol: "boot", Scope: "universe"},
			{Dst: "10.9.0.0/16", Dev: "net1"},
		},
		Neighbors: []podvmconfig.Neighbor{
			{IP: "10.244.1.1", HWAddr: "02:00:00:00:00:09", Dev: "eth0", State: "permanent"},
			{IP: "10.9.0.1", HWAddr: "02:00:00:00:00:08", Dev: "net1", State: "permanent"},
		},
	}
}

// podConfig has a second network, with a table of its own.
func podConfig() *podvmconfig.Config {
	return &podvmconfig.Config{
		PodNetwork: podNetwork(),
		MorePodNetworks: []podvmconfig.PodNetwork{{
			PodIP: netip.MustParsePrefix("10.9.0.5/16"), PodHWAddr: "32:b9:59:6b:f0:d6", Interface: "net1",
			WorkerNodeIP: netip.MustParsePrefix("192.168.213.1/24"), TunnelType: podvmconfig.TunnelVXLAN,
			MTU: 9000, VXLANPort: 9000, VXLANID: 555003,
			Routes: []podvmconfig.Route{
				{Dst: "10.9.0.0/16", Dev: "net1", Src: "10.9.0.5"},
				{Dst: "0.0.0.0/0", GW: "10.9.0.1", Dev: "net1", Metric: 200},
			},
			TableRoutes: []podvmconfig.Route{{Dst: "0.0.0.0/0", GW: "10.9.0.1", Dev: "net1", Table: 100}},
		}},
		Rules: []podvmconfig.Rule{{Priority: 1000, From: "10.9.0.5/32", Table: 100}},
	}
}

func TestTunnels(t *testing.T) {
	all, err := Tunnels("/run/netns/x", podConfig())
	if err != nil || len(all) != 2 {
		t.Fatal(all, err)
	}
	got, more := all[0], all[1]
	if more.VNI != 555003 || more.Pod.Name != "net1" || more.Device == got.Device || len(more.Pod.Routes) != 3 ||
		more.Pod.Routes[0].Src != netip.MustParseAddr("10.9.0.5") || more.Pod.Routes[1].Metric != 200 || more.Pod.Routes[2].Table != 100 {
		t.Errorf("the second: %+v", more)
	}
	if got.NetNS != "/run/netns/x" || got.VNI != 555002 || got.Port != 9000 || got.Remote != netip.MustParseAddr("192.168.213.1") {
		t.Errorf("got %+v", got)
	}
	want := netns.Interface{
		Name: "eth0", HWAddr: net.HardwareAddr{0x32, 0xb9, 0x59, 0x6b, 0xf0, 0xd5}, MTU: 1500,
		Addrs: []netip.Prefix{netip.MustParsePrefix("10.244.1.21/24")},
		Routes: []netns.Route{
			{Dst: netip.MustParsePrefix("10.244.1.0/24"), Protocol: "kernel", Scope: "link"},
			{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("10.244.1.1"), Protocol: "boot", Scope: "universe"},
		},
		Neighbors: []netns.Neighbor{{IP: netip.MustParseAddr("10.244.1.1"), HWAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}, State: "permanent"}},
	}
	if d := cmp.Diff(want, got.Pod, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

func TestTunnelRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*podvmconfig.PodNetwork)
		want   string
	}{
		"route src":    {func(n *podvmconfig.PodNetwork) { n.Routes[1].Src = "x" }, "pod-network.routes[1].src"},
		"table route":  {func(n *podvmconfig.PodNetwork) { n.TableRoutes = []podvmconfig.Route{{Dst: "x"}} }, "pod-network.table-routes[0].dst"},
		"mac":          {func(n *podvmconfig.PodNetwork) { n.PodHWAddr = "x" }, "pod-network.pod-hw-addr"},
		"route dst":    {func(n *podvmconfig.PodNetwork) { n.Routes[1].Dst = "all" }, "pod-network.routes[1].dst"},
		"route gw":     {func(n *podvmconfig.PodNetwork) { n.Routes[1].GW = "x" }, "pod-network.routes[1].gw"},
		"neighbor ip":  {func(n *podvmconfig.PodNetwork) { n.Neighbors[0].IP = "" }, "pod-network.neighbors[0].ip"},
		"neighbor mac": {func(n *podvmconfig.PodNetwork) { n.Neighbors[0].HWAddr = "" }, "pod-network.neighbors[0].hw-addr"},
	} {
		t.Run(name, func(t *testing.T) {
			// The same mistake in the first network and in a further one.
			for i, want := range []string{c.want, strings.Replace(c.want, "pod-network", "more-pod-networks[0]", 1)} {
				cfg := podConfig()
				wrong := podNetwork()
				c.change(wrong)
				if i == 0 {
					cfg.PodNetwork = wrong
				} else {
					cfg.MorePodNetworks[0] = *wrong
				}
				_, err := Tunnels("/run/netns/x", cfg)
				if !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), want) {
					t.Errorf("got %v, want InvalidArgument with %q", err, want)
				}
			}
		})
	}
	for key, change := range map[string]func(*podvmconfig.Rule){
		"rules[0].from": func(r *podvmconfig.Rule) { r.From = "x" },
		"rules[0].to":   func(r *podvmconfig.Rule) { r.To = "fd00::/8" },
	} {
		cfg := podConfig()
		change(&cfg.Rules[0])
		if _, err := Rules(cfg); !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), key) {
			t.Errorf("got %v, want InvalidArgument with %q", err, key)
		}
	}
}

// machine is the VM's namespace with one interface towards the node.
func machine(t *testing.T) (vm, node *nstest.NS, e bootconf.Ethernet) {
	t.Helper()
	vm, node = nstest.New(t, "vm"), nstest.New(t, "node")
	node.Veth("tap0", vm, "ens3")
	return vm, node, bootconf.Ethernet{
		ID: "id0", HWAddr: vm.Link("ens3").Attrs().HardwareAddr, MTU: 9000,
		Addrs:    []netip.Prefix{netip.MustParsePrefix("192.168.213.5/24"), netip.MustParsePrefix("fd00::5/64")},
		Gateway:  netip.MustParseAddr("192.168.213.1"),
		Gateway6: netip.MustParseAddr("fd00::1"),
		Routes:   []bootconf.Route{{Dst: netip.MustParsePrefix("169.254.169.254/32")}},
	}
}

func TestConfigureLinks(t *testing.T) {
	vm, _, e := machine(t)
	for range 2 { // a second time changes nothing and is no error
		vm.Do(func() error { return ConfigureLinks(context.Background(), []bootconf.Ethernet{e}) })
	}
	l := vm.Link("ens3")
	if l.Attrs().MTU != 9000 || l.Attrs().Flags&net.FlagUp == 0 {
		t.Errorf("link %+v", l.Attrs())
	}
	var got []string
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := vm.Handle.RouteList(l, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			if r.Dst.IP.IsLinkLocalUnicast() && r.Dst.IP.To4() == nil {
				continue
			}
			s := r.Dst.String()
			if r.Gw != nil {
				s += " via " + r.Gw.String()
			}
			got = append(got, s)
		}
	}
	want := []string{"0.0.0.0/0 via 192.168.213.1", "169.254.169.254/32", "192.168.213.0/24", "fd00::/64", "::/0 via fd00::1"}
	if d := cmp.Diff(want, got, cmp.Transformer("sorted", func(in []string) map[string]bool {
		out := map[string]bool{}
		for _, s := range in {
			out[s] = true
		}
		return out
	})); d != "" {
		t.Error(d)
	}
}

func TestConfigureLinksRefuses(t *testing.T) {
	vm, _, e := machine(t)
	e.HWAddr = net.HardwareAddr{2, 0xff, 0, 0, 0, 1}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := vm.Try(func() error { return ConfigureLinks(ctx, []bootconf.Ethernet{e}) })
	if err == nil || !strings.Contains(err.Error(), "ethernets.id0: no interface with match.macaddress 02:ff:00:00:00:01") {
		t.Errorf("got %v", err)
	}
}

// ensured is a VM with the pod's networks, and the namespace of the pod in it. The VM's own
// interface is configured as documents say, or by DHCP.
func ensured(t *testing.T, leased bool) (vm, node, pod *nstest.NS) {
	t.Helper()
	vm, node, e := machine(t)
	path := filepath.Join(t.TempDir(), "podns")
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	vm.Do(UpLoopback)
	if leased {
		server := netip.MustParseAddr("192.168.213.1")
		node.Addr("tap0", "192.168.213.1/24")
		serveDHCP(t, node, "tap0", dhcptest.Config{
			Addr: netip.MustParseAddr("192.168.213.5"), Server: server,
			Options: []dhcpv4.Option{dhcpv4.OptSubnetMask(net.CIDRMask(24, 32)), dhcpv4.OptRouter(server.AsSlice())},
		})
		if _, err := acquireIn(vm, fakeSys(t, map[string]string{"ens3": "virtio_net"})); err != nil {
			t.Fatal(err)
		}
	} else {
		vm.Do(func() error { return ConfigureLinks(context.Background(), []bootconf.Ethernet{e}) })
	}
	for range 2 {
		vm.Do(func() error { return Ensure(context.Background(), path, podConfig()) })
	}
	return vm, node, nstest.Open(t, path)
}

func TestEnsure(t *testing.T) {
	_, _, pod := ensured(t, false)
	for _, want := range []struct {
		dev, mac, addr string
		vni, mtu       int
	}{
		{"eth0", "32:b9:59:6b:f0:d5", "10.244.1.21/24", 555002, 1500},
		{"net1", "32:b9:59:6b:f0:d6", "10.9.0.5/16", 555003, 8950},
	} {
		l := pod.Link(want.dev)
		tunnel, ok := l.(*netlink.Vxlan)
		if !ok {
			t.Fatalf("%s is a %s", want.dev, l.Type())
		}
		if tunnel.VxlanId != want.vni || tunnel.Port != 9000 || tunnel.Group.String() != "192.168.213.1" || tunnel.HardwareAddr.String() != want.mac || tunnel.MTU != want.mtu {
			t.Errorf("%s: vni %d port %d remote %s mac %s mtu %d", want.dev, tunnel.VxlanId, tunnel.Port, tunnel.Group, tunnel.HardwareAddr, tunnel.MTU)
		}
		addrs, err := pod.Handle.AddrList(l, unix.AF_INET)
		if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != want.addr {
			t.Errorf("%s: addresses %v, %v", want.dev, addrs, err)
		}
	}
	for dst, want := range map[string]struct{ from, dev string }{
		"8.8.8.8":   {"", "eth0"},            // the default route of the smaller metric
		"8.8.4.4":   {"10.9.0.5", "net1"},    // by the rule
		"10.9.0.77": {"", "net1"},            // on link
		"8.8.0.8":   {"10.244.1.21", "eth0"}, // no rule of its own
	} {
		routes, err := pod.Handle.RouteGetWithOptions(net.ParseIP(dst), &netlink.RouteGetOptions{SrcAddr: net.ParseIP(want.from)})
		if err != nil || len(routes) != 1 || routes[0].LinkIndex != pod.Link(want.dev).Attrs().Index {
			t.Errorf("way to %s from %q: %v, %v; want %s", dst, want.from, routes, err, want.dev)
		}
	}
}

// TestPodIsApart: the pod's namespace has the tunnels and lo and nothing else, and what
// the VM itself reaches over its own interface, a metadata service for one, the pod
// does not, whatever route it makes.
func TestPodIsApart(t *testing.T) {
	t.Run("as documents say", func(t *testing.T) { testPodIsApart(t, false) })
	t.Run("by DHCP", func(t *testing.T) { testPodIsApart(t, true) })
}

func testPodIsApart(t *testing.T, leased bool) {
	vm, cloud, pod := ensured(t, leased)
	links, err := pod.Handle.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		a := l.Attrs()
		if l.Type() != "vxlan" && a.Flags&net.FlagLoopback == 0 && a.Flags&net.FlagUp != 0 {
			t.Errorf("the pod has %s, a %s, up", a.Name, l.Type())
		}
	}
	// At the other end of the VM's interface there is a metadata service.
	cloud.Addr("tap0", "169.254.169.254/32")
	if !leased {
		cloud.Addr("tap0", "192.168.213.1/24")
	}
	var asked atomic.Int32
	var service net.Listener
	cloud.Do(func() (err error) {
		service, err = net.Listen("tcp4", ":80")
		return err
	})
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := service.Accept()
			if err != nil {
				return
			}
			asked.Add(1)
			c.Close()
		}
	}()
	defer func() { service.Close(); <-served }()
	dial := func(ns *nstest.NS, to string, patience time.Duration) error {
		return ns.Try(func() error {
			c, err := (&net.Dialer{Timeout: patience}).Dial("tcp", to)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	if err := dial(vm, "169.254.169.254:80", 10*time.Second); err != nil {
		t.Fatalf("the VM itself: %v", err)
	}
	pod.Route("169.254.0.0/16", "", "eth0")
	for _, to := range []string{"169.254.169.254:80", "192.168.213.1:80", "192.168.213.5:15150"} {
		if err := dial(pod, to, 300*time.Millisecond); err == nil {
			t.Errorf("the pod reaches %s", to)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the metadata service was asked %d times, want only by the VM", n)
	}
}
