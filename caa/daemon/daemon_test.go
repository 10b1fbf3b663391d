// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/hypervisorpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/agent-protocol/vmnote"
	"github.com/kata-remote/kata-remote/caa/adminpb"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/caa/podvmtest"
	"github.com/kata-remote/kata-remote/caa/sandbox"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

func TestMain(m *testing.M) {
	if inside() { // see netns_test.go
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

// simulated is a provider that reports its network, as the local one does.
type simulated struct{ *sim.Provider }

func (simulated) Underlay(context.Context) (cloud.Underlay, error) {
	return cloud.Underlay{Local: netip.MustParsePrefix("127.0.0.1/8"), MTU: 9000}, nil
}

// stubNetwork is a node whose namespaces are all those that exist as files.
type stubNetwork struct {
	mu      sync.Mutex
	tunnels map[string]bool // by device; guarded by mu
}

func (n *stubNetwork) Inspect(_ context.Context, path string) (sandbox.PodNetworks, error) {
	if _, err := os.Stat(path); err != nil {
		return sandbox.PodNetworks{}, errdefs.ErrNotFound.WithMessage("network namespace " + path + " does not exist")
	}
	return sandbox.PodNetworks{Interfaces: []podvmconfig.PodNetwork{
		{PodIP: netip.MustParsePrefix("10.88.0.7/16"), PodHWAddr: "02:00:00:00:00:07", Interface: "eth0", MTU: 1500},
	}}, nil
}

func (n *stubNetwork) Ensure(_ context.Context, pod sandbox.NodeTunnels) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, t := range pod.Tunnels {
		n.tunnels[t.Device] = true
	}
	return nil
}

func (n *stubNetwork) Remove(_ context.Context, pod sandbox.NodeTunnels) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, t := range pod.Tunnels {
		delete(n.tunnels, t.Device)
	}
	return nil
}

// node is a worker node: its disk, its network, and the cloud around it.
type node struct {
	t       *testing.T
	dir     string
	world   *sim.World
	vms     *podvmtest.VMs
	network *stubNetwork
	cfg     config.Config
	log     logBuffer
}

// logBuffer is what the adaptors of a node have logged.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newNode(t *testing.T) *node {
	dir, err := os.MkdirTemp("", "caad") // t.TempDir's paths are too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	vms := podvmtest.New(t)
	n := &node{t: t, dir: dir, world: sim.NewWorld(sim.Config{Launcher: vms}), vms: vms, network: &stubNetwork{tunnels: map[string]bool{}}}
	t.Cleanup(n.world.Close)
	n.cfg = config.Config{
		StateDir: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "h.sock"), PodsDir: filepath.Join(dir, "pods"),
		Provider: "sim", Node: "n1", ProxyTimeout: 20 * time.Second, ForwarderPort: vms.Port,
		VXLANPort: 9000, VXLANMinID: 555000, Limit: 10, Warnings: []string{"X has no effect"},
	}
	if err := os.WriteFile(n.netns(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) netns() string { return filepath.Join(n.dir, "netns") }

// adaptor makes an adaptor of the node; Run runs it.
func (n *node) adaptor() *Daemon {
	cfg := n.cfg
	return &Daemon{cfg: &cfg, log: slog.New(slog.NewJSONHandler(&n.log, &slog.HandlerOptions{Level: slog.LevelDebug})), provider: simulated{n.world.NewProvider()}, network: n.network}
}

// run runs an adaptor and returns when its socket answers. stop ends it as SIGTERM
// does.
func (n *node) run() (stop func()) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(n.t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	d := n.adaptor()
	d.ready = func(*sandbox.Manager) { close(ready) }
	go func() { ended <- d.Run(ctx) }()
	select {
	case <-ready:
	case err := <-ended:
		cancel()
		n.t.Fatalf("the adaptor ended: %v", err)
	}
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				n.t.Errorf("Run = %v after it was stopped", err)
			}
		})
	}
	n.t.Cleanup(stop)
	return stop
}

// dial makes a ttrpc client of a socket.
func dial(t *testing.T, path string) *ttrpc.Client {
	t.Helper()
	c, err := relay.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(c)
	t.Cleanup(func() { client.Close() })
	return client
}

func (n *node) shim() hypervisorpb.HypervisorService {
	return hypervisorpb.NewHypervisorClient(dial(n.t, n.cfg.Socket))
}

func (n *node) create(id string) (*hypervisorpb.CreateVMResponse, error) {
	return n.shim().CreateVM(n.t.Context(), &hypervisorpb.CreateVMRequest{
		Id: id, NetworkNamespacePath: n.netns(), Annotations: map[string]string{annotation.SandboxName: "nginx", annotation.SandboxNamespace: "default"},
	})
}

func (n *node) up(id string) string {
	n.t.Helper()
	r, err := n.create(id)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.shim().StartVM(n.t.Context(), &hypervisorpb.StartVMRequest{Id: id}); err != nil {
		n.t.Fatal(err)
	}
	return r.AgentSocketPath
}

func check(t *testing.T, path string) {
	t.Helper()
	if _, err := agentpb.NewHealthClient(dial(t, path)).Check(t.Context(), &agentpb.CheckRequest{}); err != nil {
		t.Errorf("agent at %s: %v", path, err)
	}
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

func TestPodOverARestart(t *testing.T) {
	n := newNode(t)
	stop := n.run()
	if fi, err := os.Stat(n.cfg.Socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi, err)
	}
	path := n.up("s1")
	check(t, path)
	stop()
	if _, err := os.Stat(n.cfg.Socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket of a stopped adaptor: %v", err)
	}
	if len(n.world.Instances()) != 1 || len(n.network.tunnels) != 1 {
		t.Error("stopping the adaptor stopped a pod")
	}
	stop = n.run()
	check(t, path)
	if _, err := n.shim().StopVM(t.Context(), &hypervisorpb.StopVMRequest{Id: "s1"}); err != nil {
		t.Fatal(err)
	}
	until(t, "the pod to go", func() bool {
		resp, err := adminpb.NewAdminClient(dial(t, n.cfg.Socket)).ListSandboxes(t.Context(), &adminpb.ListSandboxesRequest{})
		return err == nil && len(resp.Sandboxes) == 0
	})
	stop()
	if l := n.world.Instances(); len(l) > 0 || len(n.network.tunnels) > 0 {
		t.Errorf("left: %v, %v", l, n.network.tunnels)
	}
	if !strings.Contains(n.log.String(), "X has no effect") {
		t.Error("the configuration's warnings are not in the log")
	}
}

// TestNotes: a stop that a shim could not deliver is found at the start, and one that
// comes just after it too: the shim's call broke with the adaptor before.
func TestNotes(t *testing.T) {
	for name, up := range map[string]bool{"left while nobody ran": false, "left for one that runs": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			stop := n.run()
			n.up("s1")
			note := vmnote.Note{Sandbox: "s1", Socket: n.cfg.Socket}
			if !up {
				stop()
			}
			if err := note.Leave(); err != nil {
				t.Fatal(err)
			}
			if !up {
				n.run()
			}
			until(t, "the instance and the note to go", func() bool {
				left, _ := filepath.Glob(filepath.Join(n.dir, "stop", "*"))
				return len(n.world.Instances()) == 0 && len(left) == 0
			})
		})
	}
}

// TestLostInstance: a pod VM that died is noticed by the first client that has to
// wait, and its sandbox goes.
func TestLostInstance(t *testing.T) {
	n := newNode(t)
	n.run()
	path := n.up("s1")
	check(t, path)
	n.world.Fail(n.world.Instances()[0].ID, "the host is on fire")
	until(t, "the sandbox to go", func() bool {
		if c, err := relay.Dial(t.Context(), path); err == nil {
			go func() { io.Copy(io.Discard, c); c.Close() }() // ends with the socket
		}
		return len(n.world.Instances()) == 0
	})
	if !strings.Contains(n.log.String(), "the host is on fire") {
		t.Error("the log does not say why")
	}
}

func TestOwnerWithoutACluster(t *testing.T) {
	n := newNode(t)
	n.run()
	n.up("s1")
	o := n.world.Instances()[0].Owner
	if o.Node != "n1" || len(o.Cluster) != 32 {
		t.Errorf("owner %+v, want node n1 and the state file's id", o)
	}
}

func TestCallerThatDisappears(t *testing.T) {
	n := newNode(t)
	n.vms.Hold = make(chan struct{})
	n.run()
	if _, err := n.create("s1"); err != nil {
		t.Fatal(err)
	}
	conn, err := relay.Dial(t.Context(), n.cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	done := make(chan struct{})
	go func() {
		defer close(done)
		hypervisorpb.NewHypervisorClient(client).StartVM(t.Context(), &hypervisorpb.StartVMRequest{Id: "s1"})
	}()
	until(t, "an instance", func() bool { return len(n.world.Instances()) == 1 })
	client.Close() // as when a shim is killed
	<-done
	until(t, "the adaptor to notice", func() bool { return strings.Contains(n.log.String(), "its start goes on") })
	close(n.vms.Hold)
	until(t, "the pod to run without anybody to tell", func() bool {
		r, err := adminpb.NewAdminClient(dial(t, n.cfg.Socket)).ListSandboxes(t.Context(), &adminpb.ListSandboxesRequest{Id: "s1"})
		return err == nil && r.Sandboxes[0].State == "running" && r.Sandboxes[0].LeaseUnixNano != 0
	})
	if _, err := n.shim().StartVM(t.Context(), &hypervisorpb.StartVMRequest{Id: "s1"}); err != nil {
		t.Errorf("the next caller: %v", err)
	}
	if c := n.world.Calls(sim.OpCreate); c != 1 {
		t.Errorf("%d instances asked for", c)
	}
	if _, err := n.shim().StopVM(t.Context(), &hypervisorpb.StopVMRequest{Id: "s1"}); err != nil {
		t.Fatal(err)
	}
	until(t, "the instance to go", func() bool { return len(n.world.Instances()) == 0 })
}

func TestErrorsOnTheWire(t *testing.T) {
	n := newNode(t)
	n.run()
	_, err := n.shim().CreateVM(t.Context(), &hypervisorpb.CreateVMRequest{Id: "s1", NetworkNamespacePath: "/run/netns/absent"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/run/netns/absent") {
		t.Errorf("missing netns: %v", err)
	}
	_, err = n.shim().CreateVM(t.Context(), &hypervisorpb.CreateVMRequest{
		Id: "s1", NetworkNamespacePath: n.netns(), Annotations: map[string]string{annotation.DefaultVCPUs: "lots"},
	})
	if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), annotation.DefaultVCPUs) || !strings.Contains(err.Error(), "lots") {
		t.Errorf("bad annotation: %v", err)
	}
	_, err = n.shim().StartVM(t.Context(), &hypervisorpb.StartVMRequest{Id: "unknown"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
		t.Errorf("StartVM of an unknown sandbox: %v", err)
	}
	if _, err := n.shim().StopVM(t.Context(), &hypervisorpb.StopVMRequest{Id: "unknown"}); err != nil {
		t.Errorf("StopVM of an unknown sandbox: %v", err)
	}
	v, err := n.shim().Version(t.Context(), &hypervisorpb.VersionRequest{Version: "1"})
	if err != nil || v.Version != "0.0.0" {
		t.Errorf("Version = %v, %v", v, err)
	}
}

func TestSecondAdaptor(t *testing.T) {
	n := newNode(t)
	n.run()
	err := n.adaptor().Run(t.Context())
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "--state-dir") || strings.Contains(err.Error(), "\n") {
		t.Errorf("on the same state directory: %v", err)
	}
	other := n.adaptor()
	other.cfg.StateDir = filepath.Join(n.dir, "other")
	if err := other.Run(t.Context()); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), n.cfg.Socket) {
		t.Errorf("on the same socket: %v", err)
	}
	if _, err := n.create("s1"); err != nil {
		t.Errorf("the first adaptor was harmed: %v", err)
	}
}

func TestCorruptState(t *testing.T) {
	n := newNode(t)
	if err := os.MkdirAll(n.cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.cfg.StateDir, store.FileName)
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	err := n.adaptor().Run(t.Context())
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "\n") {
		t.Errorf("Run = %v", err)
	}
}

func TestUnknownProvider(t *testing.T) {
	if _, err := New(&config.Config{Provider: "moon"}, slog.New(slog.DiscardHandler)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "CLOUD_PROVIDER") {
		t.Errorf("New = %v", err)
	}
}

func TestAdmin(t *testing.T) {
	n := newNode(t)
	n.run()
	n.up("abc-1")
	if _, err := n.create("abd-2"); err != nil {
		t.Fatal(err)
	}
	admin := adminpb.NewAdminClient(dial(t, n.cfg.Socket))
	all, err := admin.ListSandboxes(t.Context(), &adminpb.ListSandboxesRequest{})
	if err != nil || len(all.Sandboxes) != 2 || all.Sandboxes[0].Id != "abc-1" {
		t.Fatalf("%v, %v; want both, oldest first", all, err)
	}
	one, err := admin.ListSandboxes(t.Context(), &adminpb.ListSandboxesRequest{Id: "abc"})
	if err != nil || len(one.Sandboxes) != 1 {
		t.Fatal(one, err)
	}
	s := one.Sandboxes[0]
	if s.State != "running" || s.PodName != "nginx" || s.Address == "" || s.Vni != 555000 || len(s.Steps) != len(sandbox.Steps) || s.LeaseUnixNano != 0 {
		t.Errorf("%+v", s)
	}
	if strings.Contains(s.String(), "PRIVATE KEY") {
		t.Error("a key is shown")
	}
	_, err = admin.ListSandboxes(t.Context(), &adminpb.ListSandboxesRequest{Id: "ab"})
	if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an id that fits two: %v", err)
	}
	_, err = admin.ListSandboxes(t.Context(), &adminpb.ListSandboxesRequest{Id: "x"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
		t.Errorf("an id that fits none: %v", err)
	}
}
