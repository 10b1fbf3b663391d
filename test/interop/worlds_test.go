// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/cgroups"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/caa/api"
	"github.com/kata-remote/kata-remote/caa/sandbox"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
	"github.com/kata-remote/kata-remote/cloud/userdata"
	"github.com/kata-remote/kata-remote/podvm/agent"
	"github.com/kata-remote/kata-remote/podvm/forwarder"
)

func TestMain(m *testing.M) {
	agent.Init() // libcontainer starts this program again
	goleak.VerifyTestMain(m)
}

// backend serves the connections of a pod VM until ctx ends, and closes l.
type backend func(ctx context.Context, l net.Listener) error

// shortDir has a name that leaves room for sockets'.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "interop")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

var agents atomic.Int32

// realAgent is podvmd's agent, on libcontainer and this machine's kernel. It holds it to
// leaving nothing.
func realAgent(t *testing.T, dir string) backend {
	parent := fmt.Sprintf("/peerpod-interop-%d-%d", os.Getpid(), agents.Add(1))
	t.Cleanup(func() { checkClean(t, dir, parent) })
	return func(ctx context.Context, l net.Listener) error {
		a, err := agent.New(agent.Config{
			StateDir: filepath.Join(dir, "state"), CgroupParent: parent, Version: "test", Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			return errors.Join(err, l.Close())
		}
		srv, err := ttrpc.NewServer()
		if err != nil {
			return errors.Join(err, l.Close())
		}
		a.Register(srv)
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ctx, l) }()
		err = a.Run(ctx)
		srv.Close()
		l.Close()
		<-served
		// What a conversation has put there goes as with a machine: the next one is new.
		return errors.Join(err, os.RemoveAll(filepath.Join(dir, "state")))
	}
}

// stockAgent is a stock kata-agent behind our forwarder.
func stockAgent(a *agenttest.Stock) backend {
	return func(ctx context.Context, l net.Listener) error {
		served := make(chan error, 1)
		ctx, cancel := context.WithCancel(ctx)
		go func() { served <- a.Serve(ctx) }()
		err := forwarder.ServeAgent(ctx, l, forwarder.FrontConfig{
			Socket: a.Socket(), PodNetNS: podvmconfig.PodNetNS, Log: slog.New(slog.DiscardHandler),
		})
		a.Close()
		cancel()
		return errors.Join(err, <-served)
	}
}

func checkClean(t *testing.T, dir, parent string) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir+"/") {
			t.Errorf("left mounted: %s", line)
		}
	}
	roots, err := filepath.Glob("/sys/fs/cgroup/*" + parent)
	if cgroups.IsCgroup2UnifiedMode() {
		roots, err = []string{"/sys/fs/cgroup" + parent}, nil
	}
	if err != nil {
		t.Error(err)
	}
	for _, root := range roots {
		if err := os.Remove(root); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a container's cgroup is left in %s: %v", root, err)
		}
	}
}

// makeRoot makes a root file system out of busybox.
func makeRoot(dir string) error {
	for _, d := range []string{"bin", "proc", "dev", "tmp", "etc", "sys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), box, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"sh", "cat", "sleep", "echo", "hostname", "stty", "ls", "stat", "readlink", "tail", "wc", "kill", "df", "printf", "test", "mount", "grep", "id"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", name)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// direct is a world of an agent alone, without an adaptor.
type direct struct {
	dir   string
	named Names
}

func newDirect(t *testing.T) *direct {
	t.Helper()
	w := &direct{dir: shortDir(t)}
	l, err := net.Listen("unix", w.socket())
	if err != nil {
		t.Fatal(err)
	}
	serve := realAgent(t, w.dir)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *direct) socket() string           { return filepath.Join(w.dir, "agent.sock") }
func (w *direct) Agent() (net.Conn, error) { return net.Dial("unix", w.socket()) }
func (w *direct) Names() Names             { return w.named.in(w.dir) }

func (w *direct) Hypervisor() (net.Conn, error) {
	return nil, errors.New("there is no adaptor in this world")
}

// in are the names in a world whose directory is dir.
func (n Names) in(dir string) Names {
	n.StateDir = filepath.Join(dir, "state")
	return n
}

func (w *direct) Do(words []string) (bool, error) { return doGuest(w.Names(), words) }

// doGuest are the steps about the guest's files, which are this machine's:
//
//	rootfs PATH        what a guest pull leaves at PATH
//	absent PATH        there is nothing at PATH
func doGuest(n Names, words []string) (bool, error) {
	if len(words) != 2 {
		return false, nil
	}
	path := n.expand(words[1])
	switch words[0] {
	case "rootfs":
		return true, makeRoot(path)
	case "absent":
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			return true, fmt.Errorf("it is there: %v", err)
		}
		return true, nil
	}
	return false, nil
}

// node is a world with our adaptor, a simulated cloud, and pod VMs that are a real
// forwarder with something behind it.
type node struct {
	t       *testing.T
	dir     string
	lease   time.Duration
	backend backend
	port    uint16
	cloud   *sim.World
	network *fakeNetwork
	stock   *agenttest.Stock // where that is what is behind the forwarder
	named   Names
	hold    chan struct{} // VMs have no address before it is closed; nil: at once

	vms     atomic.Int32
	manager *sandbox.Manager
	stop    func()
}

func newNode(t *testing.T, lease time.Duration, behind func(dir string) backend) *node {
	t.Helper()
	l, err := net.Listen("tcp", "0.0.0.0:0") // a port that is free on every address
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n := &node{t: t, dir: shortDir(t), lease: lease, port: uint16(l.Addr().(*net.TCPAddr).Port), network: new(fakeNetwork)}
	n.backend = behind(n.dir)
	n.cloud = sim.NewWorld(sim.Config{Launcher: n})
	t.Cleanup(n.cloud.Close)
	n.start()
	t.Cleanup(func() { n.stop() })
	return n
}

// start is the start of the adaptor.
func (n *node) start() {
	n.t.Helper()
	st, err := store.Open(n.t.Context(), filepath.Join(n.dir, "db"))
	if err != nil {
		n.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	n.manager = sandbox.New(sandbox.Config{
		Records: st, Provider: n.cloud.NewProvider(), ProviderName: "sim", Owner: cloud.Owner{Cluster: "c", Node: "n"},
		Network: n.network, Underlay: func(context.Context) (cloud.Underlay, error) {
			return cloud.Underlay{Local: netip.MustParsePrefix("127.0.0.1/8"), MTU: 1500}, nil
		},
		PodsDir: filepath.Join(n.dir, "pods"), ForwarderPort: n.port, VXLANPort: 9000, VNIBase: 555000,
		ProxyTimeout: patience, Limit: -1, Lease: n.lease, ListSettle: 30 * time.Millisecond, Log: log,
	})
	if err := n.manager.Recover(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	_ = os.Remove(n.socket())
	l, err := net.Listen("unix", n.socket())
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := api.Serve(ctx, l, n.manager, log); err != nil {
			n.t.Error(err)
		}
	})
	wg.Go(func() { n.manager.Expire(ctx) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		n.manager.Close()
		st.Close()
	})
}

func (n *node) socket() string                { return filepath.Join(n.dir, "hypervisor.sock") }
func (n *node) Hypervisor() (net.Conn, error) { return net.Dial("unix", n.socket()) }
func (n *node) Names() Names                  { return n.named.in(n.dir) }

// Agent dials as kata does: again and again without a pause, for 30 s at most.
func (n *node) Agent() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		conn, err := relay.Dial(ctx, filepath.Join(n.dir, "pods", "pod", "agent.ttrpc"))
		if err == nil || ctx.Err() != nil {
			return conn, err
		}
	}
}

// Do:
//
//	netns NAME         the CNI has made the pod's network namespace
//	restart            the adaptor ends and another one starts
//	instances N        the cloud has N instances
//	hold, release      from hold on, instances boot only at release
//	asked ID           the cloud has been asked for the sandbox's instance
//	gone ID            nothing is left of the sandbox
//
// of a stock agent:
//
//	no-socket          nobody can connect to it any more
//	no-dns             it was asked for a sandbox without dns
//	network-namespace CONTAINER PATH
func (n *node) Do(words []string) (bool, error) {
	switch words[0] {
	case "netns":
		if err := os.MkdirAll(n.Names().StateDir, 0o755); err != nil {
			return true, err
		}
		return true, os.WriteFile(filepath.Join(n.Names().StateDir, words[1]), nil, 0o600)
	case "restart":
		n.stop()
		n.start()
		return true, nil
	case "instances":
		want, err := strconv.Atoi(words[1])
		if err != nil {
			return true, err
		}
		if got := n.cloud.Instances(); len(got) != want {
			return true, fmt.Errorf("there are %v", got)
		}
		return true, nil
	case "hold":
		n.hold = make(chan struct{})
		return true, nil
	case "release":
		close(n.hold)
		return true, nil
	case "asked":
		return true, n.until(func() (left []string) {
			for _, i := range n.cloud.Instances() {
				if i.SandboxID == words[1] {
					return nil
				}
			}
			return []string{"no instance"}
		})
	case "no-socket", "no-dns", "network-namespace":
		return true, n.doStock(words)
	case "gone":
		return true, n.until(func() []string { return n.left(words[1]) })
	}
	return doGuest(n.Names(), words)
}

func (n *node) doStock(words []string) error {
	switch words[0] {
	case "no-socket":
		if _, err := os.Lstat(n.stock.Socket()); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("its socket is there: %v", err)
		}
	case "no-dns":
		if sb := n.stock.Sandbox(); sb == nil || len(sb.Dns) > 0 {
			return fmt.Errorf("it was asked for %v", sb)
		}
	default:
		ns := n.stock.Container(words[1]).GetOCI().GetLinux().GetNamespaces()
		if i := slices.IndexFunc(ns, func(x *agentpb.LinuxNamespace) bool { return x.Type == "network" }); i < 0 || ns[i].Path != words[2] {
			return fmt.Errorf("its namespaces are %v", ns)
		}
	}
	return nil
}

// left is what there is of a sandbox.
func (n *node) left(id string) (left []string) {
	for _, i := range n.cloud.Instances() {
		if i.SandboxID == id {
			left = append(left, "instance "+string(i.ID))
		}
	}
	for _, i := range n.manager.Infos() {
		if i.ID == id {
			left = append(left, "record, "+string(i.State))
		}
	}
	if _, err := os.Lstat(filepath.Join(n.dir, "pods", id)); err == nil {
		left = append(left, "socket")
	}
	return left
}

// until waits until nothing is left.
func (n *node) until(left func() []string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		l := left()
		switch {
		case len(l) == 0:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("it has %s", strings.Join(l, ", "))
		}
	}
}

// Launch implements sim.Launcher.
func (n *node) Launch(ctx context.Context, _ cloud.InstanceID, req cloud.CreateRequest) (sim.Machine, error) {
	if n.hold != nil {
		select {
		case <-n.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	files, err := userdata.Parse(req.UserData)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 || files[0].Path != podvmconfig.Path {
		return nil, fmt.Errorf("user data has %d files, want %s alone", len(files), podvmconfig.Path)
	}
	cfg, err := podvmconfig.Parse(files[0].Content)
	if err != nil {
		return nil, err
	}
	serial := n.vms.Add(1)
	m := &machine{addr: netip.AddrFrom4([4]byte{127, 2, byte(serial >> 8), byte(serial)}), done: make(chan struct{})}
	creds := forwarder.Credentials{Key: []byte(string(cfg.TLSServerKey)), Cert: []byte(cfg.TLSServerCert), ClientCA: []byte(cfg.TLSClientCA)}
	tlsConfig, err := creds.TLSConfig()
	if err != nil {
		return nil, err
	}
	inner, err := forwarder.Listen(ctx, netip.AddrPortFrom(m.addr, n.port).String())
	if err != nil {
		return nil, err
	}
	l, err := forwarder.NewListener(inner, tlsConfig)
	if err != nil {
		return nil, errors.Join(err, inner.Close())
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	m.stop = stop
	go func() {
		defer close(m.done)
		if err := n.backend(run, l); err != nil {
			n.t.Error(err)
		}
	}()
	return m, nil
}

// machine is a pod VM.
type machine struct {
	addr netip.Addr
	done chan struct{}
	stop context.CancelFunc
}

func (m *machine) Addrs() []netip.Addr   { return []netip.Addr{m.addr} }
func (m *machine) Done() <-chan struct{} { return m.done }
func (m *machine) Stop() {
	m.stop()
	<-m.done
}

// fakeNetwork is a node's network on which every path of a file is a pod's namespace.
// What is done to real ones is tested elsewhere.
type fakeNetwork struct{}

func (*fakeNetwork) Inspect(_ context.Context, path string) (sandbox.PodNetworks, error) {
	if _, err := os.Stat(path); err != nil {
		return sandbox.PodNetworks{}, fmt.Errorf("network namespace %s: %w: %w", path, err, errdefs.ErrNotFound)
	}
	return sandbox.PodNetworks{Interfaces: []podvmconfig.PodNetwork{{
		PodIP: netip.MustParsePrefix("10.88.0.7/16"), PodHWAddr: "02:00:00:00:00:07", Interface: "eth0", MTU: 1500,
		Routes: []podvmconfig.Route{{Dst: "0.0.0.0/0", GW: "10.88.0.1", Dev: "eth0", Protocol: "boot", Scope: "universe"}},
	}}}, nil
}

func (*fakeNetwork) Ensure(context.Context, sandbox.NodeTunnels) error { return nil }
func (*fakeNetwork) Remove(context.Context, sandbox.NodeTunnels) error { return nil }
