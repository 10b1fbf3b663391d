// SPDX-License-Identifier: Apache-2.0

package guestnet

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/podvm/dhcp/dhcptest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fakeSys is a /sys in which some interfaces have devices, with drivers.
func fakeSys(t *testing.T, drivers map[string]string) string {
	t.Helper()
	sys := t.TempDir()
	for name, driver := range drivers {
		dir := filepath.Join(sys, "class", "net", name, "device")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(sys, "drivers", driver), filepath.Join(dir, "driver")); err != nil {
			t.Fatal(err)
		}
	}
	return sys
}

func serveDHCP(t *testing.T, ns *nstest.NS, dev string, cfg dhcptest.Config) *dhcptest.Server {
	t.Helper()
	var s *dhcptest.Server
	ns.Do(func() (err error) {
		s, err = dhcptest.Start(dev, cfg)
		return err
	})
	t.Cleanup(s.Close)
	return s
}

// routesOf lists the interface's IPv4 routes, sorted.
func routesOf(t *testing.T, ns *nstest.NS, dev string) []string {
	t.Helper()
	routes, err := ns.Handle.RouteList(ns.Link(dev), unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range routes {
		s := r.Dst.String()
		if r.Gw != nil {
			s += " via " + r.Gw.String()
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

// acquireIn is acquirePrimary in a namespace, whose sockets are there.
func acquireIn(ns *nstest.NS, sys string) (p *Primary, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = ns.Try(func() (err error) {
		p, err = acquirePrimary(ctx, sys)
		return err
	})
	return p, err
}

func TestAcquirePrimary(t *testing.T) {
	route := func(dst, via string) *dhcpv4.Route {
		_, n, err := net.ParseCIDR(dst)
		if err != nil {
			t.Fatal(err)
		}
		return &dhcpv4.Route{Dest: n, Router: net.ParseIP(via)}
	}
	for name, c := range map[string]struct {
		options []dhcpv4.Option
		addr    string
		mtu     int
		routes  []string
	}{
		"as on EC2": {
			[]dhcpv4.Option{dhcpv4.OptSubnetMask(net.CIDRMask(20, 32)), dhcpv4.OptRouter(net.IP{10, 0, 0, 1}), dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{0x05, 0x78})},
			"10.0.0.5/20", 1400,
			[]string{"0.0.0.0/0 via 10.0.0.1", "10.0.0.0/20"},
		},
		"as on Azure": {
			[]dhcpv4.Option{
				dhcpv4.OptSubnetMask(net.CIDRMask(24, 32)), dhcpv4.OptRouter(net.IP{10, 0, 0, 99}),
				dhcpv4.OptClasslessStaticRoute(route("0.0.0.0/0", "10.0.0.1"), route("168.63.129.16/32", "10.0.0.1"), route("169.254.169.254/32", "10.0.0.1")),
			},
			"10.0.0.5/24", 1500,
			[]string{"0.0.0.0/0 via 10.0.0.1", "10.0.0.0/24", "168.63.129.16/32 via 10.0.0.1", "169.254.169.254/32 via 10.0.0.1"},
		},
		"a single address": {
			[]dhcpv4.Option{dhcpv4.OptSubnetMask(net.CIDRMask(32, 32)), dhcpv4.OptRouter(net.IP{10, 128, 0, 1})},
			"10.0.0.5/32", 1500,
			[]string{"0.0.0.0/0 via 10.128.0.1"},
		},
		"a route to the gateway first": {
			[]dhcpv4.Option{dhcpv4.OptSubnetMask(net.CIDRMask(32, 32)), dhcpv4.OptClasslessStaticRoute(route("10.128.0.1/32", "0.0.0.0"), route("0.0.0.0/0", "10.128.0.1"))},
			"10.0.0.5/32", 1500,
			[]string{"0.0.0.0/0 via 10.128.0.1", "10.128.0.1/32"},
		},
		"no router": {
			[]dhcpv4.Option{dhcpv4.OptSubnetMask(net.CIDRMask(24, 32))},
			"10.0.0.5/24", 1500,
			[]string{"10.0.0.0/24", "169.254.169.254/32"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			vm, cloud := nstest.New(t, "vm"), nstest.New(t, "cloud")
			cloud.Veth("tap0", vm, "ens5")
			cloud.Addr("tap0", "10.0.0.1/24")
			serveDHCP(t, cloud, "tap0", dhcptest.Config{Addr: netip.MustParseAddr("10.0.0.5"), Server: netip.MustParseAddr("10.0.0.1"), Options: c.options})
			p, err := acquireIn(vm, fakeSys(t, map[string]string{"ens5": "ena"}))
			if err != nil {
				t.Fatal(err)
			}
			if p.Name() != "ens5" {
				t.Errorf("took %s", p.Name())
			}
			addrs, err := vm.Handle.AddrList(vm.Link("ens5"), unix.AF_INET)
			if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != c.addr {
				t.Errorf("addresses %v, %v; want %s", addrs, err, c.addr)
			}
			if mtu := vm.Link("ens5").Attrs().MTU; mtu != c.mtu {
				t.Errorf("mtu %d, want %d", mtu, c.mtu)
			}
			if got := routesOf(t, vm, "ens5"); !slices.Equal(got, c.routes) {
				t.Errorf("routes %q, want %q", got, c.routes)
			}
		})
	}
}

// TestPrimaryLink: the first interface of a device, and on Azure not the fast half of a
// pair, whichever is first.
func TestPrimaryLink(t *testing.T) {
	vm, cloud := nstest.New(t, "vm"), nstest.New(t, "cloud")
	cloud.Veth("tap0", vm, "veth9")
	cloud.Veth("tap1", vm, "enP1")
	cloud.Veth("tap2", vm, "eth0")
	cloud.Veth("tap3", vm, "eth1")
	azure := fakeSys(t, map[string]string{"enP1": "mlx5_core", "eth0": "hv_netvsc", "eth1": "hv_netvsc"})
	if err := os.MkdirAll(filepath.Join(azure, "bus", "vmbus", "devices", "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ sys, want string }{
		"Azure":         {azure, "eth0"},
		"bare hardware": {fakeSys(t, map[string]string{"enP1": "mlx5_core", "eth0": "ena"}), "enP1"},
		"one":           {fakeSys(t, map[string]string{"eth1": "virtio_net"}), "eth1"},
	} {
		var got netlink.Link
		vm.Do(func() (err error) {
			got, err = primaryLink(context.Background(), c.sys)
			return err
		})
		if got.Attrs().Name != c.want {
			t.Errorf("%s: %s, want %s", name, got.Attrs().Name, c.want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := vm.Try(func() error {
		_, err := primaryLink(ctx, t.TempDir())
		return err
	})
	if err == nil {
		t.Error("took an interface that is none of a device")
	}
}

// TestKeep: a lease is renewed on real sockets, and what the server changes is set: the
// MTU, and then the address.
func TestKeep(t *testing.T) {
	vm, cloud := nstest.New(t, "vm"), nstest.New(t, "cloud")
	cloud.Veth("tap0", vm, "ens5")
	cloud.Addr("tap0", "10.0.0.1/24")
	var address atomic.Value
	address.Store(net.IP{10, 0, 0, 5})
	serveDHCP(t, cloud, "tap0", dhcptest.Config{
		Addr: netip.MustParseAddr("10.0.0.5"), Server: netip.MustParseAddr("10.0.0.1"),
		Options: []dhcpv4.Option{dhcpv4.OptSubnetMask(net.CIDRMask(24, 32)), dhcpv4.OptRouter(net.IP{10, 0, 0, 1}), dhcpv4.OptIPAddressLeaseTime(2 * time.Second)},
		Reply: func(n int, request, reply *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
			reply.YourIPAddr = address.Load().(net.IP)
			if !request.ClientIPAddr.IsUnspecified() {
				if !request.ClientIPAddr.Equal(reply.YourIPAddr) {
					reply.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeNak))
				}
				reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{0x05, 0x78})) // 1400
			}
			return reply
		},
	})
	p, err := acquireIn(vm, fakeSys(t, map[string]string{"ens5": "ena"}))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- vm.Try(func() error {
			p.Keep(ctx, slog.New(slog.DiscardHandler))
			return nil
		})
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	until := func(what string, f func() bool) {
		t.Helper()
		deadline := time.After(time.Minute)
		for tick := time.NewTicker(20 * time.Millisecond); !f(); {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatal("no " + what)
			}
		}
	}
	addrs := func() (out []string) {
		list, err := vm.Handle.AddrList(vm.Link("ens5"), unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range list {
			out = append(out, a.IPNet.String())
		}
		return out
	}
	until("renewed lease", func() bool { return vm.Link("ens5").Attrs().MTU == 1400 })
	if got := addrs(); !slices.Equal(got, []string{"10.0.0.5/24"}) {
		t.Errorf("addresses %q", got)
	}
	address.Store(net.IP{10, 0, 0, 6})
	until("new address", func() bool { return slices.Equal(addrs(), []string{"10.0.0.6/24"}) })
	if got := routesOf(t, vm, "ens5"); !slices.Equal(got, []string{"0.0.0.0/0 via 10.0.0.1", "10.0.0.0/24"}) {
		t.Errorf("routes %q", got)
	}
}
