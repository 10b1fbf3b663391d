// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/netns"
)

func validNode() NodeTunnel {
	return NodeTunnel{
		NetNS: "/run/netns/x", Device: "ppvx1", VNI: 1, Port: 9000, Local: addrOf("10.0.0.1"), Remote: addrOf("10.0.0.2"),
		MTU: 1450, PodInterface: "eth0", PodAddrs: []netip.Prefix{netip.MustParsePrefix("10.1.0.5/24")}, PodHWAddr: mac("02:00:00:00:00:05"),
	}
}

// TestValidateNode: each mistake is InvalidArgument and named, several at once too.
func TestValidateNode(t *testing.T) {
	if err := validNode().Validate(); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(*NodeTunnel){
		"network namespace is missing":             func(n *NodeTunnel) { n.NetNS = "" },
		`device name "a-name-too-long-"`:           func(n *NodeTunnel) { n.Device = "a-name-too-long-" },
		`pod interface name ""`:                    func(n *NodeTunnel) { n.PodInterface = "" },
		`same name "eth0"`:                         func(n *NodeTunnel) { n.Device = "eth0" },
		"VNI 0":                                    func(n *NodeTunnel) { n.VNI = 0 },
		"VNI 16777216":                             func(n *NodeTunnel) { n.VNI = 1 << 24 },
		"UDP port":                                 func(n *NodeTunnel) { n.Port = 0 },
		"local address is missing":                 func(n *NodeTunnel) { n.Local = netip.Addr{} },
		"remote address 239.0.0.1 is not a host's": func(n *NodeTunnel) { n.Remote = addrOf("239.0.0.1") },
		"10.0.0.1 and remote address fd00::2 are not of one": func(n *NodeTunnel) { n.Remote = addrOf("fd00::2") },
		"MTU 500": func(n *NodeTunnel) { n.MTU = 500 },
		"MTU 1279 is not in 1280": func(n *NodeTunnel) {
			n.MTU, n.PodAddrs = 1279, []netip.Prefix{netip.MustParsePrefix("fd00::5/64")}
		},
		"no address":  func(n *NodeTunnel) { n.PodAddrs = nil },
		"MAC address": func(n *NodeTunnel) { n.PodHWAddr = mac("01:00:00:00:00:05") },
	} {
		n := validNode()
		spoil(&n)
		if err := n.Validate(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want InvalidArgument with %q", err, want)
		}
		if err := EnsureNode(t.Context(), n); !errdefs.IsInvalidArgument(err) {
			t.Errorf("EnsureNode: %v; want InvalidArgument with %q", err, want)
		}
	}
	n := validNode()
	n.VNI, n.Port = 0, 0
	if err := n.Validate(); err == nil || !strings.Contains(err.Error(), "VNI") || !strings.Contains(err.Error(), "UDP port") {
		t.Errorf("two mistakes: %v", err)
	}
}

// TestValidateGuest: what only the guest end has.
func TestValidateGuest(t *testing.T) {
	valid := func() GuestTunnel {
		n := validNode()
		return GuestTunnel{NetNS: n.NetNS, Device: "vxlan0", VNI: 1, Port: 9000, Remote: n.Local,
			Pod: netns.Interface{Name: "eth0", HWAddr: n.PodHWAddr, MTU: 1500, Addrs: n.PodAddrs}}
	}
	if err := valid().Validate(); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(*netns.Interface){
		"a route has no destination": func(i *netns.Interface) { i.Routes = []netns.Route{{}} },
		`unknown protocol "bgp"`: func(i *netns.Interface) {
			i.Routes = []netns.Route{{Dst: netip.MustParsePrefix("10.0.0.0/8"), Protocol: "bgp"}}
		},
		`unknown scope "galaxy"`: func(i *netns.Interface) {
			i.Routes = []netns.Route{{Dst: netip.MustParsePrefix("10.0.0.0/8"), Scope: "galaxy"}}
		},
		"neighbour": func(i *netns.Interface) { i.Neighbors = []netns.Neighbor{{IP: addrOf("10.0.0.1")}} },
	} {
		g := valid()
		spoil(&g.Pod)
		if err := EnsureGuest(t.Context(), g); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want InvalidArgument with %q", err, want)
		}
	}
}

// TestOverhead: outer Ethernet, IP, UDP and VXLAN headers (RFC 7348 §5).
func TestOverhead(t *testing.T) {
	for a, want := range map[string]int{"10.0.0.1": 50, "fd00::1": 70, "::ffff:10.0.0.1": 50} {
		if got := Overhead(addrOf(a)); got != want {
			t.Errorf("Overhead(%s) = %d, want %d", a, got, want)
		}
	}
}
