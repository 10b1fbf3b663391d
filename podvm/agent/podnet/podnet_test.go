// SPDX-License-Identifier: Apache-2.0

package podnet

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const mac = "02:00:00:00:00:11"

// pod is a network namespace with eth0, which has a peer, and what is in it as the
// kernel says.
type pod struct {
	*Network
	t  *testing.T
	ns *nstest.NS
}

func newPod(t *testing.T) *pod {
	t.Helper()
	ns, other := nstest.New(t, "pod"), nstest.New(t, "other")
	ns.Veth("eth0", other, "peer0")
	hw, err := net.ParseMAC(mac)
	if err == nil {
		err = ns.Handle.LinkSetHardwareAddr(ns.Link("eth0"), hw)
	}
	if err != nil {
		t.Fatal(err)
	}
	return &pod{New(ns.Path), t, ns}
}

func (p *pod) addrs(dev string) (out []string) {
	p.t.Helper()
	list, err := p.ns.Handle.AddrList(p.ns.Link(dev), netlink.FAMILY_ALL)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, a := range list {
		if !a.IP.IsLinkLocalUnicast() {
			out = append(out, a.IPNet.String())
		}
	}
	slices.Sort(out)
	return out
}

// routes are those somebody set, as "destination gateway".
func (p *pod) routes() (out []string) {
	p.t.Helper()
	list, err := own(p.ns.Handle)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, r := range list {
		line := r.Dst.String()
		if r.Gw != nil {
			line += " " + r.Gw.String()
		}
		out = append(out, line)
	}
	slices.Sort(out)
	return out
}

func address(ip, mask string) *typespb.IPAddress { return &typespb.IPAddress{Address: ip, Mask: mask} }

func (p *pod) update(req *typespb.Interface) *typespb.Interface {
	p.t.Helper()
	req.HwAddr = mac
	got, err := p.UpdateInterface(req)
	if err != nil {
		p.t.Fatal(err)
	}
	return got
}

func TestUpdateInterface(t *testing.T) {
	p := newPod(t)
	got := p.update(&typespb.Interface{Name: "net1", Mtu: 1400, RawFlags: unix.IFF_NOARP, IPAddresses: []*typespb.IPAddress{
		address("10.1.0.2", "24"), address("10.1.0.3", "24"), address("fd00::2", "64"),
	}})
	l := p.ns.Link("net1").Attrs()
	if l.MTU != 1400 || l.RawFlags&unix.IFF_NOARP == 0 || l.RawFlags&unix.IFF_UP == 0 {
		t.Errorf("interface: %+v", l)
	}
	if want := []string{"10.1.0.2/24", "10.1.0.3/24", "fd00::2/64"}; !slices.Equal(p.addrs("net1"), want) {
		t.Errorf("addresses %v, want %v", p.addrs("net1"), want)
	}
	if got.Name != "net1" || got.Mtu != 1400 || got.HwAddr != mac || len(got.IPAddresses) < 3 {
		t.Errorf("the answer: %v", got)
	}
	// The first address of a network goes and takes the second with it, which stays
	// wanted. Name and MTU are not said and stay.
	p.update(&typespb.Interface{IPAddresses: []*typespb.IPAddress{address("10.1.0.3", "24"), address("10.2.0.1", "16")}})
	if want := []string{"10.1.0.3/24", "10.2.0.1/16"}; !slices.Equal(p.addrs("net1"), want) {
		t.Errorf("addresses %v, want %v", p.addrs("net1"), want)
	}
	if l := p.ns.Link("net1").Attrs(); l.MTU != 1400 {
		t.Errorf("mtu %d", l.MTU)
	}
}

// What is as it should be is not touched: a route over the interface stays.
func TestUpdateInterfaceToWhatItIs(t *testing.T) {
	p := newPod(t)
	req := &typespb.Interface{Name: "eth0", Mtu: 1400, IPAddresses: []*typespb.IPAddress{address("10.1.0.2", "24")}}
	p.update(req)
	p.ns.Route("0.0.0.0/0", "10.1.0.1", "eth0")
	p.update(req)
	if got := p.routes(); !slices.Equal(got, []string{"0.0.0.0/0 10.1.0.1"}) {
		t.Errorf("routes %v", got)
	}
}

func TestUpdateInterfaceRefusals(t *testing.T) {
	p := newPod(t)
	for name, tc := range map[string]struct {
		req  *typespb.Interface
		want error
		says string
	}{
		"unknown":      {&typespb.Interface{HwAddr: "02:00:00:00:00:99"}, nil, "Link not found"},
		"no MAC":       {&typespb.Interface{HwAddr: "x"}, errdefs.ErrInvalidArgument, "hwAddr"},
		"nothing":      {nil, errdefs.ErrInvalidArgument, "hwAddr"},
		"address":      {&typespb.Interface{HwAddr: mac, IPAddresses: []*typespb.IPAddress{address("10.1.0", "24")}}, errdefs.ErrInvalidArgument, "10.1.0/24"},
		"taken":        {&typespb.Interface{HwAddr: mac, Name: "lo"}, errdefs.ErrAlreadyExists, "lo"},
		"small mtu":    {&typespb.Interface{HwAddr: mac, Mtu: 1}, errdefs.ErrInvalidArgument, "mtu 1"},
		"a long name":  {&typespb.Interface{HwAddr: mac, Name: "a-name-longer-than-any"}, nil, "a-name-longer-than-any"},
		"a large mask": {&typespb.Interface{HwAddr: mac, IPAddresses: []*typespb.IPAddress{address("10.1.0.1", "33")}}, errdefs.ErrInvalidArgument, "33"},
	} {
		_, err := p.UpdateInterface(tc.req)
		if err == nil || !strings.Contains(err.Error(), tc.says) || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New("").UpdateInterface(&typespb.Interface{HwAddr: mac}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the guest's own network: %v", err)
	}
}

func TestUpdateRoutes(t *testing.T) {
	p := newPod(t)
	p.update(&typespb.Interface{Name: "eth0", IPAddresses: []*typespb.IPAddress{address("10.1.0.2", "24"), address("fd00::2", "64")}})
	p.ns.Settle()
	p.ns.Route("10.5.0.0/16", "10.1.0.1", "eth0")
	v6 := typespb.IPFamily_v6
	// The gateway of the first is reached over the second.
	got, err := p.UpdateRoutes([]*typespb.Route{
		{Gateway: "10.9.0.1", Device: "eth0", Mtu: 1300},
		{Dest: "10.9.0.1", Device: "eth0", Scope: unix.RT_SCOPE_LINK},
		{Dest: "10.7.0.0/16", Gateway: "10.1.0.1", Device: "eth0", Source: "10.1.0.2"},
		{Dest: "::/0", Gateway: "fd00::1", Device: "eth0", Family: v6},
		{Dest: "fd07::/32", Gateway: "fd00::1", Device: "eth0", Family: v6},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"0.0.0.0/0 10.9.0.1", "10.7.0.0/16 10.1.0.1", "10.9.0.1/32", "::/0 fd00::1", "fd07::/32 fd00::1"}
	if have := p.routes(); !slices.Equal(have, want) {
		t.Errorf("routes %v, want %v", have, want)
	}
	var connected, dflt bool
	for _, r := range got {
		connected = connected || r.Dest == "10.1.0.0/24" && r.Device == "eth0" && r.Family == typespb.IPFamily_v4
		dflt = dflt || r.Dest == "" && r.Gateway == "10.9.0.1" && r.Mtu == 1300
	}
	if !connected || !dflt {
		t.Errorf("the answer: %v", got)
	}
	// To other gateways, and fewer.
	want = []string{"0.0.0.0/0 10.1.0.9", "::/0 fd00::9"}
	if _, err := p.UpdateRoutes([]*typespb.Route{{Gateway: "10.1.0.9", Device: "eth0"}, {Gateway: "fd00::9", Device: "eth0", Family: v6}}); err != nil {
		t.Fatal(err)
	}
	if have := p.routes(); !slices.Equal(have, want) {
		t.Errorf("routes %v, want %v", have, want)
	}
	// What cannot be leaves the table as it is.
	for name, tc := range map[string]struct {
		bad  *typespb.Route
		says string
	}{
		"device":      {&typespb.Route{Dest: "10.8.0.0/16", Device: "eth7"}, "Link not found"},
		"destination": {&typespb.Route{Dest: "10.8", Device: "eth0"}, "10.8"},
		"family":      {&typespb.Route{Dest: "fd08::/64", Device: "eth0"}, "fd08::/64"},
		"gateway":     {&typespb.Route{Dest: "10.8.0.0/16", Device: "eth0", Gateway: "x"}, `gateway "x"`},
		"unreachable": {&typespb.Route{Dest: "10.8.0.0/16", Device: "eth0", Gateway: "192.0.2.1"}, "192.0.2.1"},
		"scope":       {&typespb.Route{Dest: "10.8.0.0/16", Device: "eth0", Gateway: "10.1.0.1", Scope: unix.RT_SCOPE_LINK}, "scope"},
	} {
		_, err := p.UpdateRoutes([]*typespb.Route{{Dest: "10.6.0.0/16", Gateway: "10.1.0.1", Device: "eth0"}, tc.bad})
		if err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v", name, err)
		}
		if have := p.routes(); !slices.Equal(have, want) {
			t.Errorf("after %s: routes %v, want %v", name, have, want)
		}
	}
	if _, err := New("").UpdateRoutes(nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the guest's own network: %v", err)
	}
}

func TestAddNeighbors(t *testing.T) {
	p := newPod(t)
	p.update(&typespb.Interface{Name: "eth0", IPAddresses: []*typespb.IPAddress{address("10.1.0.2", "24"), address("fd00::2", "64")}})
	peer := "02:00:00:00:00:22"
	if err := p.AddNeighbors([]*typespb.ARPNeighbor{
		{ToIPAddress: address("10.1.0.1", ""), Device: "eth0", Lladdr: peer},
		{ToIPAddress: address("10.1.0.9", ""), Device: "eth0", Lladdr: peer, State: netlink.NUD_NOARP},
		{ToIPAddress: address("fd00::1", ""), Device: "eth0", Lladdr: peer},
	}); err != nil {
		t.Fatal(err)
	}
	states := map[string]int{}
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := p.ns.Handle.NeighList(p.ns.Link("eth0").Attrs().Index, fam)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range list {
			if n.HardwareAddr.String() == peer {
				states[n.IP.String()] = n.State
			}
		}
	}
	if states["10.1.0.1"] != netlink.NUD_PERMANENT || states["10.1.0.9"] != netlink.NUD_NOARP || states["fd00::1"] != netlink.NUD_PERMANENT {
		t.Errorf("neighbors: %v", states)
	}
	for says, bad := range map[string]*typespb.ARPNeighbor{
		"not an IP":      {Device: "eth0"},
		"Link not found": {ToIPAddress: address("10.1.0.1", ""), Device: "eth7"},
		"lladdr":         {ToIPAddress: address("10.1.0.1", ""), Device: "eth0", Lladdr: "x"},
	} {
		if err := p.AddNeighbors([]*typespb.ARPNeighbor{bad}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestInterfacesAndStats(t *testing.T) {
	p := newPod(t)
	p.ns.Addr("eth0", "10.1.0.2/24")
	list, err := p.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(i *typespb.Interface) bool { return i.Name == "eth0" })
	if i < 0 || list[i].HwAddr != mac || list[i].Type != "veth" || len(list[i].IPAddresses) == 0 || list[i].IPAddresses[0].Address != "10.1.0.2" || list[i].IPAddresses[0].Mask != "24" {
		t.Errorf("interfaces: %v", list)
	}
	stats, err := p.Stats()
	if err != nil || len(stats) != 1 || stats[0].Name != "eth0" {
		t.Errorf("statistics: %v, %v", stats, err)
	}
	if stats, err := New("").Stats(); err != nil || stats != nil {
		t.Errorf("statistics of the guest's own network: %v, %v", stats, err)
	}
}

// The programs run in the pod's namespace, and what one wrote the other reads.
func TestIPTables(t *testing.T) {
	p := newPod(t)
	ctx := context.Background()
	rules := "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -s 192.0.2.7/32 -j DROP\nCOMMIT\n"
	if _, err := p.SetIPTables(ctx, false, []byte(rules)); err != nil {
		t.Fatal(err)
	}
	got, err := p.IPTables(ctx, false)
	if err != nil || !strings.Contains(string(got), ":FORWARD DROP") || !strings.Contains(string(got), "-A INPUT -s 192.0.2.7/32 -j DROP") {
		t.Errorf("%s, %v", got, err)
	}
	if got, err := p.IPTables(ctx, true); err != nil || strings.Contains(string(got), "192.0.2.7") {
		t.Errorf("IPv6: %s, %v", got, err)
	}
	if got, err := newPod(t).IPTables(ctx, false); err != nil || strings.Contains(string(got), "192.0.2.7") {
		t.Errorf("another pod: %s, %v", got, err)
	}
	if _, err := p.SetIPTables(ctx, false, []byte("nonsense\n")); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "iptables-restore") {
		t.Errorf("nonsense: %v", err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := p.IPTables(gone, false); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that left: %v", err)
	}
	if _, err := New("").IPTables(ctx, false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the guest's own network: %v", err)
	}
}

// A guest without the programs says so, and which.
func TestIPTablesAbsent(t *testing.T) {
	p := newPod(t)
	p.tools = []string{t.TempDir()}
	if err := os.WriteFile(filepath.Join(p.tools[0], "ip6tables-restore"), nil, 0o644); err != nil { // cannot be run
		t.Fatal(err)
	}
	if _, err := p.IPTables(context.Background(), false); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "no program iptables-save") {
		t.Errorf("%v", err)
	}
	if _, err := p.SetIPTables(context.Background(), true, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "no program ip6tables-restore") {
		t.Errorf("%v", err)
	}
}
