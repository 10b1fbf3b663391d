// SPDX-License-Identifier: Apache-2.0

package guestnet

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/podvm/bootconf"
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

func TestTunnel(t *testing.T) {
	got, err := Tunnel("/run/netns/x", podNetwork())
	if err != nil {
		t.Fatal(err)
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
		"mac":          {func(n *podvmconfig.PodNetwork) { n.PodHWAddr = "x" }, "pod-network.pod-hw-addr"},
		"route dst":    {func(n *podvmconfig.PodNetwork) { n.Routes[1].Dst = "all" }, "pod-network.routes[1].dst"},
		"route gw":     {func(n *podvmconfig.PodNetwork) { n.Routes[1].GW = "x" }, "pod-network.routes[1].gw"},
		"neighbor ip":  {func(n *podvmconfig.PodNetwork) { n.Neighbors[0].IP = "" }, "pod-network.neighbors[0].ip"},
		"neighbor mac": {func(n *podvmconfig.PodNetwork) { n.Neighbors[0].HWAddr = "" }, "pod-network.neighbors[0].hw-addr"},
	} {
		t.Run(name, func(t *testing.T) {
			n := podNetwork()
			c.change(n)
			_, err := Tunnel("/run/netns/x", n)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want InvalidArgument with %q", err, c.want)
			}
		})
	}
}

// machine is the VM's namespace with one interface towards the node.
func machine(t *testing.T) (*nstest.NS, bootconf.Ethernet) {
	t.Helper()
	vm, node := nstest.New(t, "vm"), nstest.New(t, "node")
	node.Veth("tap0", vm, "ens3")
	return vm, bootconf.Ethernet{
		ID: "id0", HWAddr: vm.Link("ens3").Attrs().HardwareAddr, MTU: 9000,
		Addrs:    []netip.Prefix{netip.MustParsePrefix("192.168.213.5/24"), netip.MustParsePrefix("fd00::5/64")},
		Gateway:  netip.MustParseAddr("192.168.213.1"),
		Gateway6: netip.MustParseAddr("fd00::1"),
		Routes:   []bootconf.Route{{Dst: netip.MustParsePrefix("169.254.169.254/32")}},
	}
}

func TestConfigureLinks(t *testing.T) {
	vm, e := machine(t)
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
	vm, e := machine(t)
	e.HWAddr = net.HardwareAddr{2, 0xff, 0, 0, 0, 1}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := vm.Try(func() error { return ConfigureLinks(ctx, []bootconf.Ethernet{e}) })
	if err == nil || !strings.Contains(err.Error(), "ethernets.id0: no interface with match.macaddress 02:ff:00:00:00:01") {
		t.Errorf("got %v", err)
	}
}

func TestEnsure(t *testing.T) {
	vm, e := machine(t)
	pod := filepath.Join(t.TempDir(), "podns")
	t.Cleanup(func() {
		if err := netns.Remove(pod); err != nil {
			t.Error(err)
		}
	})
	vm.Do(UpLoopback)
	vm.Do(func() error { return ConfigureLinks(context.Background(), []bootconf.Ethernet{e}) })
	for range 2 {
		vm.Do(func() error { return Ensure(context.Background(), pod, podNetwork()) })
	}
	eth0 := nstest.Open(t, pod).Link("eth0")
	tunnel, ok := eth0.(*netlink.Vxlan)
	if !ok {
		t.Fatalf("eth0 is a %s", eth0.Type())
	}
	if tunnel.VxlanId != 555002 || tunnel.Port != 9000 || tunnel.Group.String() != "192.168.213.1" || tunnel.HardwareAddr.String() != "32:b9:59:6b:f0:d5" || tunnel.MTU != 1500 {
		t.Errorf("tunnel: vni %d port %d remote %s mac %s mtu %d", tunnel.VxlanId, tunnel.Port, tunnel.Group, tunnel.HardwareAddr, tunnel.MTU)
	}
	addrs, err := nstest.Open(t, pod).Handle.AddrList(eth0, unix.AF_INET)
	if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != "10.244.1.21/24" {
		t.Errorf("addresses %v, %v", addrs, err)
	}
}
