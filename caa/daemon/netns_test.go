// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/caa/sandbox"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
)

const insideEnv = "CAA_DAEMON_TEST_INSIDE"

// inside tells whether this process was started by TestNodeNetwork in a network
// namespace of its own.
func inside() bool { return os.Getenv(insideEnv) != "" }

// TestNodeNetwork does with the kernel what the adaptor does with it, in a process
// whose network namespace is fresh: what is "this node's" there is nobody else's.
func TestNodeNetwork(t *testing.T) {
	if inside() {
		nodeNetworkInside(t)
		return
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestNodeNetwork$", "-test.v")
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestNodeNetwork") {
		t.Fatalf("in a fresh namespace: %v\n%s", err, out)
	}
}

// twoNetworks is what CNIs leave: eth0 with the default routes, net1 with a table of its
// own, and net2 without an address.
func twoNetworks(t *testing.T, node, pod *nstest.NS) {
	t.Helper()
	node.Up("lo")
	node.Bridge("cni0")
	node.Addr("cni0", "10.30.0.1/24", "fd30::1/64")
	node.Plug("cni0", pod, "eth0")
	pod.Addr("eth0", "10.30.0.5/24", "fd30::5/64")
	pod.Route("0.0.0.0/0", "10.30.0.1", "eth0")
	pod.Route("::/0", "fd30::1", "eth0")
	pod.MTU("eth0", 1400)
	node.Bridge("lan")
	node.Plug("lan", pod, "net1")
	pod.Addr("net1", "10.40.0.5/24")
	node.Plug("lan", pod, "net2") // no address
	if err := pod.Handle.RuleAdd((netns.Rule{Priority: 100, Src: netip.MustParsePrefix("10.40.0.5/32"), Table: 100}).Kernel()); err != nil {
		t.Fatal(err)
	}
	_, all, _ := net.ParseCIDR("0.0.0.0/0")
	if err := pod.Handle.RouteAdd(&netlink.Route{Dst: all, Gw: net.IPv4(10, 40, 0, 1), Table: 100, LinkIndex: pod.Link("net1").Attrs().Index}); err != nil {
		t.Fatal(err)
	}
}

func nodeNetworkInside(t *testing.T) {
	node := nstest.Open(t, "/proc/self/ns/net")
	pod := nstest.New(t, "pod")
	twoNetworks(t, node, pod)

	var n nodeNetwork
	found, err := n.Inspect(t.Context(), pod.Path)
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Interfaces) != 2 || len(found.LeftOut) != 1 || !strings.Contains(found.LeftOut[0], "net2") {
		t.Fatalf("Inspect = %+v", found)
	}
	if more := found.Interfaces[1]; more.Interface != "net1" || more.PodIP.String() != "10.40.0.5/24" || len(more.TableRoutes) != 1 || more.TableRoutes[0].Table != 100 {
		t.Errorf("Inspect = %+v", more)
	}
	if want := []podvmconfig.Rule{{Priority: 100, From: "10.40.0.5/32", Table: 100}}; !slices.Equal(found.Rules, want) {
		t.Errorf("rules %+v, want %+v", found.Rules, want)
	}
	got := found.Interfaces[0]
	if got.PodIP != netip.MustParsePrefix("10.30.0.5/24") || len(got.PodIPs) != 2 || got.Interface != "eth0" || got.MTU != 1400 ||
		got.PodHWAddr != pod.Link("eth0").Attrs().HardwareAddr.String() {
		t.Errorf("Inspect = %+v", got)
	}
	defaults := 0
	for _, r := range got.Routes {
		if r.Dst == "0.0.0.0/0" && r.GW == "10.30.0.1" || r.Dst == "::/0" && r.GW == "fd30::1" {
			defaults++
		}
	}
	if defaults != 2 {
		t.Errorf("routes %+v lack a default route", got.Routes)
	}
	if _, err := n.Inspect(t.Context(), "/run/netns/absent-"+filepath.Base(pod.Path)); !errdefs.IsNotFound(err) {
		t.Errorf("Inspect of a path that is not there: %v", err)
	}

	// The kernel makes IPv6's local routes a moment after the address.
	until(t, "the address's own route", func() bool { return strings.Contains(pod.Snapshot(), "Dst: fd30::5/128") })
	before := pod.Snapshot()
	tun := sandbox.NodeTunnels{NetNS: pod.Path, Remote: netip.MustParseAddr("127.0.0.2")}
	for i, one := range found.Interfaces {
		tun.Tunnels = append(tun.Tunnels, store.Tunnel{VNI: 555000 + uint32(i), Port: 9000, Device: fmt.Sprintf("ppvx55500%d", i),
			Local: netip.MustParsePrefix("127.0.0.1/8"), MTU: 1500, Pod: one})
	}
	for range 2 {
		if err := n.Ensure(t.Context(), tun); err != nil {
			t.Fatal(err)
		}
	}
	for dev, mtu := range map[string]int{"ppvx555000": 1400, "ppvx555001": 1450} {
		if got := pod.Link(dev).Attrs().MTU; got != mtu {
			t.Errorf("%s has MTU %d, want %d", dev, got, mtu)
		}
	}
	for range 2 {
		if err := n.Remove(t.Context(), tun); err != nil {
			t.Fatal(err)
		}
	}
	// And takes back the anycast route of a namespace that forwards a moment after
	// it stops to.
	for range 1000 {
		if pod.Snapshot() == before {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("left in the pod's namespace:\n%s", cmp.Diff(before, pod.Snapshot()))
}

func TestDescribe(t *testing.T) {
	hw := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	got, err := describe(netns.Interface{
		Name: "eth0", HWAddr: hw, MTU: 1450, Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.5/32")},
		Routes: []netns.Route{
			{Dst: netip.MustParsePrefix("169.254.1.1/32"), Protocol: "boot", Scope: "link"},
			{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("169.254.1.1"), Protocol: "ra", Scope: "universe"},
		},
		Neighbors: []netns.Neighbor{{IP: netip.MustParseAddr("169.254.1.1"), HWAddr: hw, State: "permanent"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := podvmconfig.PodNetwork{
		PodIP: netip.MustParsePrefix("10.0.0.5/32"), PodHWAddr: "02:00:00:00:00:01", Interface: "eth0", MTU: 1450,
		Routes: []podvmconfig.Route{
			{Dst: "169.254.1.1/32", Dev: "eth0", Protocol: "boot", Scope: "link"},
			{Dst: "0.0.0.0/0", GW: "169.254.1.1", Dev: "eth0", Protocol: "static", Scope: "universe"},
		},
		Neighbors: []podvmconfig.Neighbor{{IP: "169.254.1.1", HWAddr: "02:00:00:00:00:01", Dev: "eth0", State: "permanent"}},
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Error(d)
	}
	if _, err := describe(netns.Interface{Name: "tun0", Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.5/32")}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an interface without hardware address: %v", err)
	}
}
