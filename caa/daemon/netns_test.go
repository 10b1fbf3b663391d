// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

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

func nodeNetworkInside(t *testing.T) {
	node := nstest.Open(t, "/proc/self/ns/net")
	pod := nstest.New(t, "pod")
	node.Up("lo")
	node.Bridge("cni0")
	node.Addr("cni0", "10.30.0.1/24", "fd30::1/64")
	node.Plug("cni0", pod, "eth0")
	pod.Addr("eth0", "10.30.0.5/24", "fd30::5/64")
	pod.Route("0.0.0.0/0", "10.30.0.1", "eth0")
	pod.Route("::/0", "fd30::1", "eth0")
	pod.MTU("eth0", 1400)

	var n nodeNetwork
	got, err := n.Inspect(t.Context(), pod.Path)
	if err != nil {
		t.Fatal(err)
	}
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
	tun := sandbox.NodeTunnel{
		Tunnel: store.Tunnel{VNI: 555000, Port: 9000, Device: "ppvx555000", Local: netip.MustParsePrefix("127.0.0.1/8"), MTU: 1500, Pod: got},
		NetNS:  pod.Path, Remote: netip.MustParseAddr("127.0.0.2"),
	}
	for range 2 {
		if err := n.Ensure(t.Context(), tun); err != nil {
			t.Fatal(err)
		}
	}
	if pod.Link("ppvx555000") == nil {
		t.Error("no device")
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
	want := podNetwork{
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
