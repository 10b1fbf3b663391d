// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/caa/podvmtest"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is everything outside the adaptor: the cloud with its VMs, the node's
// network, the disk. Managers come and go over it.
type world struct {
	t       testing.TB
	dir     string
	cloud   *sim.World
	vms     *podvmtest.VMs
	network *fakeNetwork
	log     *bytes.Buffer // everything every Manager logged, debug included
	logMu   sync.Mutex

	timeout time.Duration // ProxyTimeout
	lease   time.Duration
	limit   int
	fault   func(string)
	wrap    func(cloud.Provider) cloud.Provider // what Managers have of the cloud; nil: as it is
}

func (w *world) Write(p []byte) (int, error) {
	w.logMu.Lock()
	defer w.logMu.Unlock()
	return w.log.Write(p)
}

func (w *world) logged() string {
	w.logMu.Lock()
	defer w.logMu.Unlock()
	return w.log.String()
}

func newWorld(t testing.TB, cfg sim.Config) *world {
	t.Helper()
	w := &world{
		t: t, vms: podvmtest.New(t), network: &fakeNetwork{tunnels: map[string]fakeTunnel{}, spaces: map[string]bool{}},
		log: new(bytes.Buffer), timeout: 20 * time.Second, lease: time.Hour, limit: -1,
	}
	// Socket paths must be short; t.TempDir's are not.
	dir, err := os.MkdirTemp("", "caa")
	if err != nil {
		t.Fatal(err)
	}
	w.dir = dir
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg.Launcher = w.vms
	w.cloud = sim.NewWorld(cfg)
	t.Cleanup(func() {
		w.cloud.Heal()
		w.cloud.Close()
	})
	return w
}

// adaptor is one life of the adaptor.
type adaptor struct {
	*Manager
	w     *world
	store *store.Store
	once  sync.Once
}

// start makes a Manager over the world and lets it recover.
func (w *world) start() *adaptor {
	w.t.Helper()
	a, err := w.tryStart()
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func (w *world) tryStart() (*adaptor, error) {
	w.t.Helper()
	st, err := store.Open(w.t.Context(), filepath.Join(w.dir, "state"))
	if err != nil {
		return nil, err
	}
	a := &adaptor{w: w, store: st}
	var provider cloud.Provider = w.cloud.NewProvider()
	if w.wrap != nil {
		provider = w.wrap(provider)
	}
	a.Manager = New(Config{
		Records: st, Provider: provider, ProviderName: "sim", Owner: cloud.Owner{Cluster: "c", Node: "n"},
		Network: w.network, Underlay: func(context.Context) (cloud.Underlay, error) {
			return cloud.Underlay{Local: netip.MustParsePrefix("127.0.0.1/8"), MTU: 1500}, nil
		},
		PodsDir: filepath.Join(w.dir, "pods"), ForwarderPort: w.vms.Port, VXLANPort: 9000, VNIBase: 555000,
		ProxyTimeout: w.timeout, Limit: w.limit, Lease: w.lease, ListSettle: 30 * time.Millisecond,
		Log:        slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug})),
		FaultPoint: w.fault,
	})
	w.t.Cleanup(a.end)
	if err := a.Recover(w.t.Context()); err != nil {
		a.end()
		return nil, err
	}
	return a, nil
}

// end ends this life as SIGTERM would.
func (a *adaptor) end() {
	a.once.Do(func() {
		a.Close()
		a.store.Close()
	})
}

func (w *world) request(id string) Request {
	ns := filepath.Join(w.dir, "netns-"+id)
	w.network.mu.Lock()
	w.network.spaces[ns] = true
	w.network.mu.Unlock()
	return Request{ID: id, NetNS: ns, Annotations: map[string]string{
		annotation.SandboxName: "nginx", annotation.SandboxNamespace: "default",
		annotation.MachineType: "", annotation.Image: "", annotation.DefaultVCPUs: "0", annotation.DefaultMemory: "0",
		annotation.InitData: "", annotation.DefaultGPUs: "0", annotation.DefaultGPUModel: "",
	}}
}

func (a *adaptor) create(id string) string {
	a.w.t.Helper()
	path, err := a.Create(a.w.t.Context(), a.w.request(id))
	if err != nil {
		a.w.t.Fatal(err)
	}
	return path
}

func (a *adaptor) up(id string) string {
	a.w.t.Helper()
	path := a.create(id)
	if err := a.Start(a.w.t.Context(), id); err != nil {
		a.w.t.Fatal(err)
	}
	return path
}

func (a *adaptor) state(id string) store.State {
	sb, err := a.find(id)
	if err != nil {
		return StateGone
	}
	return sb.record().State
}

// gone waits until nothing is left of a sandbox.
func (a *adaptor) gone(id string) {
	a.w.t.Helper()
	ctx, cancel := context.WithTimeout(a.w.t.Context(), 30*time.Second)
	defer cancel()
	if err := a.Wait(ctx, id); err != nil {
		a.w.t.Fatalf("sandbox %s is not gone: %v\n%s", id, err, a.w.logged())
	}
}

// until waits for a condition.
func (w *world) until(what string, f func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			w.t.Fatalf("waited too long for: %s\n%s", what, w.logged())
		}
		time.Sleep(time.Millisecond)
	}
}

// leaks lists everything that is there and should not be: instances, tunnels,
// records, socket directories.
func (w *world) leaks(a *adaptor) []string {
	var l []string
	for _, i := range w.cloud.Instances() {
		l = append(l, fmt.Sprintf("instance %s of sandbox %s", i.ID, i.SandboxID))
	}
	w.network.mu.Lock()
	for _, dev := range slices.Sorted(maps.Keys(w.network.tunnels)) {
		l = append(l, "tunnel "+dev)
	}
	w.network.mu.Unlock()
	recs, broken, err := a.store.All()
	if err != nil {
		l = append(l, err.Error())
	}
	for _, r := range recs {
		l = append(l, "record of "+r.ID)
	}
	for id := range broken {
		l = append(l, "broken record of "+id)
	}
	files, _ := filepath.Glob(filepath.Join(w.dir, "pods", "*"))
	l = append(l, files...)
	a.mu.Lock()
	for vni, id := range a.vnis {
		l = append(l, fmt.Sprintf("VNI %d of %s", vni, id))
	}
	a.mu.Unlock()
	return l
}

func (w *world) wantNothing(a *adaptor) {
	w.t.Helper()
	if l := w.leaks(a); len(l) > 0 {
		w.t.Errorf("left behind: %v\n%s", l, w.logged())
	}
}

// check calls the agent through the node's socket.
func check(t testing.TB, path string) error {
	t.Helper()
	c, err := relay.Dial(t.Context(), path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(c)
	defer client.Close()
	_, err = agentpb.NewHealthClient(client).Check(t.Context(), &agentpb.CheckRequest{})
	return err
}

// fakeNetwork holds the tunnels there are.
type fakeNetwork struct {
	mu      sync.Mutex
	spaces  map[string]bool       // namespaces there are; guarded by mu
	tunnels map[string]fakeTunnel // by device; guarded by mu
	fail    error                 // what Ensure returns; guarded by mu
	made    int                   // how many tunnels Ensure makes before it fails; guarded by mu
}

// fakeTunnel is one node end.
type fakeTunnel struct {
	store.Tunnel
	netNS  string
	remote netip.Addr
}

func (n *fakeNetwork) Inspect(_ context.Context, path string) (PodNetworks, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.spaces[path] {
		return PodNetworks{}, errdefs.ErrNotFound.WithMessage("network namespace " + path + " does not exist")
	}
	return PodNetworks{
		Interfaces: []podvmconfig.PodNetwork{{
			PodIP: netip.MustParsePrefix("10.88.0.7/16"), PodHWAddr: "02:00:00:00:00:07", Interface: "eth0", MTU: 1500,
			Routes: []podvmconfig.Route{{Dst: "0.0.0.0/0", GW: "10.88.0.1", Dev: "eth0", Protocol: "boot", Scope: "universe"}},
		}, {
			PodIP: netip.MustParsePrefix("10.89.0.7/16"), PodHWAddr: "02:00:00:00:01:07", Interface: "net1", MTU: 9000,
		}},
		Rules:   []podvmconfig.Rule{{Priority: 100, From: "10.89.0.7/32", Table: 100}},
		LeftOut: []string{"interface tunl0 (ipip): it has no address"},
	}, nil
}

func (n *fakeNetwork) Ensure(_ context.Context, pod NodeTunnels) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, t := range pod.Tunnels {
		if n.fail != nil && i == n.made {
			return n.fail
		}
		if !n.spaces[pod.NetNS] {
			return errdefs.ErrNotFound.WithMessage("network namespace " + pod.NetNS + " does not exist")
		}
		for dev, o := range n.tunnels {
			if dev != t.Device && o.VNI == t.VNI {
				return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf("VNI %d is in use by %s", t.VNI, dev))
			}
		}
		n.tunnels[t.Device] = fakeTunnel{t, pod.NetNS, pod.Remote}
	}
	return nil
}

func (n *fakeNetwork) Remove(_ context.Context, pod NodeTunnels) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, t := range pod.Tunnels {
		delete(n.tunnels, t.Device)
	}
	return nil
}
