// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

func TestLife(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	path := a.create("s1")
	if len(path) > relay.MaxUnixPath || strings.Contains(path, ":") {
		t.Errorf("agent socket %q is not one a shim can use", path)
	}
	if n := len(w.cloud.Instances()); n != 0 {
		t.Errorf("%d instances after CreateVM, want none", n)
	}
	if err := a.Start(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := check(t, path); err != nil {
			t.Fatal(err)
		}
	}
	recs, _, err := a.store.All()
	if err != nil || len(recs) != 1 {
		t.Fatal(recs, err)
	}
	rec := recs[0]
	if rec.State != StateRunning || !rec.Lease.IsZero() {
		t.Errorf("record: state %s, lease %v", rec.State, rec.Lease)
	}
	var names []string
	for _, s := range rec.Steps {
		names = append(names, s.Name)
	}
	if strings.Join(names, " ") != strings.Join(Steps, " ") {
		t.Errorf("steps on record: %v, want %v", names, Steps)
	}
	cfg := w.vms.Configs()[0]
	if cfg.PodName != "nginx" || cfg.PodNamespace != "default" || cfg.SandboxID != "s1" {
		t.Errorf("the VM was told it is %s/%s, sandbox %s", cfg.PodNamespace, cfg.PodName, cfg.SandboxID)
	}
	told := cfg.Networks()
	if len(told) != 2 || len(rec.Tunnels) != 2 || told[0].Interface != "eth0" || len(told[0].Routes) != 1 || told[1].Interface != "net1" || told[1].MTU != 9000 {
		t.Fatalf("the VM was told of the networks: %+v", told)
	}
	if len(cfg.Rules) != 1 || cfg.Rules[0].From != "10.89.0.7/32" {
		t.Errorf("the VM was told of the rules: %+v", cfg.Rules)
	}
	for i, own := range rec.Tunnels {
		if n := told[i]; n.VXLANID != own.VNI || n.VXLANPort != 9000 || n.WorkerNodeIP != own.Local {
			t.Errorf("the VM was told of network %d: %+v", i, n)
		}
		if tun := w.network.tunnels[own.Device]; tun.remote != rec.Instance.Addr || tun.netNS != rec.NetNS || tun.Pod.Interface != told[i].Interface {
			t.Errorf("tunnel %+v", tun)
		}
	}
	if rec.Tunnels[0].VNI == rec.Tunnels[1].VNI {
		t.Errorf("both tunnels have VNI %d", rec.Tunnels[0].VNI)
	}
	if !strings.Contains(w.logged(), "tunl0") {
		t.Error("the log does not say what was left out")
	}
	const why = `"type":"sim.small","choice":"asked for nothing in particular: sim.small (2 vCPUs, 2048 MiB memory), the default`
	if strings.Count(w.logged(), why) != 1 {
		t.Error("the log does not say, once, why it is this instance type")
	}
	if err := a.Stop(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	if err := a.Stop(t.Context(), "s1"); err != nil {
		t.Errorf("second Stop: %v", err)
	}
	a.gone("s1")
	w.wantNothing(a)
	if err := a.Stop(t.Context(), "s1"); err != nil {
		t.Errorf("Stop of what is gone: %v", err)
	}
	if err := a.Start(t.Context(), "s1"); !errdefs.IsNotFound(err) {
		t.Errorf("Start of what is gone: %v", err)
	}
}

func TestNoSecretIsLogged(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.cloud.Inject(sim.Fault{Op: sim.OpCreate, Err: errdefs.ErrUnavailable})
	a := w.start()
	a.up("s1")
	rec := a.Infos()[0]
	a.end()
	a = w.start()
	a.Stop(t.Context(), "s1")
	a.gone("s1")
	cfg := w.vms.Configs()[0]
	log := w.logged()
	if !strings.Contains(log, "step done") {
		t.Fatalf("nothing in the log:\n%s", log)
	}
	for what, secret := range map[string]string{
		"client key": string(rec.TLS.ClientKey), "server key": string(cfg.TLSServerKey),
	} {
		// A line from its middle finds it in whatever form it is printed.
		lines := strings.Split(strings.TrimSpace(secret), "\n")
		if len(lines) < 3 {
			t.Fatalf("%s is not a key", what)
		}
		if strings.Contains(log, lines[1]) {
			t.Errorf("the %s is in the log", what)
		}
	}
	if strings.Contains(log, "PRIVATE KEY") {
		t.Error("a private key is in the log")
	}
	// The server's key is not on the disk, either.
	db, err := os.ReadFile(a.store.Path())
	if err != nil {
		t.Fatal(err)
	}
	if key := strings.Split(string(cfg.TLSServerKey), "\n")[1]; strings.Contains(string(db), key) {
		t.Error("the forwarder's key is in the state file")
	}
}

func TestSameRequestSameAnswer(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	path := a.create("s1")
	if again := a.create("s1"); again != path {
		t.Errorf("answers %q and %q", path, again)
	}
	other := w.request("s1")
	other.Annotations[annotation.DefaultVCPUs] = "2"
	if _, err := a.Create(t.Context(), other); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another request of the same id: %v", err)
	}
	if err := a.Start(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(t.Context(), "s1"); err != nil {
		t.Errorf("second Start: %v", err)
	}
	if again := a.create("s1"); again != path {
		t.Errorf("answer %q after the start", again)
	}
	if n := w.cloud.Calls(sim.OpCreate); n != 1 {
		t.Errorf("%d instances asked for, want 1", n)
	}
}

func TestIDCanBeUsedAgain(t *testing.T) {
	w := newWorld(t, sim.Config{DeleteTime: 100 * time.Millisecond})
	a := w.start()
	for range 2 {
		a.up("web")
		if err := a.Stop(t.Context(), "web"); err != nil {
			t.Fatal(err)
		}
	}
	a.gone("web")
	w.wantNothing(a)
}

func TestCreateRefuses(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.limit = 1
	a := w.start()
	noNetNS := w.request("s1")
	noNetNS.NetNS = "/run/netns/absent"
	tooBig := w.request("s1")
	tooBig.Annotations[annotation.DefaultVCPUs] = "1000"
	badType := w.request("s1")
	badType.Annotations[annotation.MachineType] = "sim.huge"
	long := w.request(strings.Repeat("x", 76))
	for name, c := range map[string]struct {
		r    Request
		is   func(error) bool
		want string
	}{
		"missing netns": {noNetNS, errdefs.IsNotFound, "/run/netns/absent"},
		"too big":       {tooBig, errdefs.IsInvalidArgument, "1000"},
		"unknown type":  {badType, errdefs.IsInvalidArgument, "sim.huge"},
	} {
		if _, err := a.Create(t.Context(), c.r); !c.is(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	a.cfg.PodsDir = "/" + strings.Repeat("p", 60)
	if _, err := a.Create(t.Context(), long); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "PODS_DIR") {
		t.Errorf("socket path too long: %v", err)
	}
	w.wantNothing(a)
}

func TestLimit(t *testing.T) {
	w := newWorld(t, sim.Config{DeleteTime: time.Hour})
	w.limit = 2
	a := w.start()
	a.create("s1")
	a.up("s2")
	if _, err := a.Create(t.Context(), w.request("s3")); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "PEERPODS_LIMIT_PER_NODE") {
		t.Errorf("third of two: %v", err)
	}
	// One that is on its way out makes room, however long it takes.
	if err := a.Stop(t.Context(), "s2"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Create(t.Context(), w.request("s3")); err != nil {
		t.Error(err)
	}
}

func TestVNIsAreUnique(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	seen := map[uint32]string{}
	note := func() {
		t.Helper()
		for _, i := range a.Infos() {
			for _, tun := range i.Tunnels {
				if id, ok := seen[tun.VNI]; ok && id != i.ID {
					t.Errorf("VNI %d of %s was that of %s", tun.VNI, i.ID, id)
				}
				seen[tun.VNI] = i.ID
			}
		}
	}
	a.create("s1")
	a.create("s2")
	a.Stop(t.Context(), "s1")
	a.gone("s1")
	a.create("s3")
	note()
	a.end()
	a = w.start()
	a.create("s4")
	note()
	if len(seen) != 6 {
		t.Errorf("VNIs %v, want two each of three sandboxes", seen)
	}
}

func TestStepsAreUndone(t *testing.T) {
	refused := errors.New("the kernel will not")
	for name, c := range map[string]struct {
		break_ func(*world)
		is     func(error) bool
		want   string
	}{
		"no capacity":       {func(w *world) { w.cloud.SetCapacity("sim.small", 0) }, errdefs.IsResourceExhausted, "sim.small"},
		"create refused":    {func(w *world) { w.cloud.Inject(sim.Fault{Op: sim.OpCreate, Err: errdefs.ErrPermissionDenied}) }, errdefs.IsPermissionDenied, "nginx"},
		"create reply lost": {func(w *world) { w.cloud.Inject(sim.Fault{Op: sim.OpCreate, Err: io.ErrUnexpectedEOF, Committed: true}) }, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }, "nginx"},
		"no tunnel":         {func(w *world) { w.network.fail = refused }, func(err error) bool { return errors.Is(err, refused) }, "tunnel of pod default/nginx"},
		"no second tunnel":  {func(w *world) { w.network.fail, w.network.made = refused, 1 }, func(err error) bool { return errors.Is(err, refused) }, "tunnel of pod default/nginx"},
		"VXLAN port in use": {func(w *world) { w.network.fail = fmt.Errorf("bring x up: %w", syscall.EADDRINUSE) }, errdefs.IsFailedPrecondition, "UDP port 9000 of this node is in use by another program: stop that program, or set VXLAN_PORT"},
		"forwarder silent":  {func(w *world) { w.vms.Mute.Store(true); w.timeout = 100 * time.Millisecond }, errdefs.IsUnavailable, "PROXY_TIMEOUT (100ms)"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, sim.Config{})
			c.break_(w)
			a := w.start()
			a.create("s1")
			err := a.Start(t.Context(), "s1")
			if !c.is(err) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Start = %v, want %q in it", err, c.want)
			}
			a.gone("s1")
			w.wantNothing(a)
		})
	}
}

func TestSilentVMIsNamed(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.vms.Mute.Store(true)
	w.timeout = 50 * time.Millisecond
	a := w.start()
	a.create("s1")
	err := a.Start(t.Context(), "s1")
	for _, want := range []string{"default/nginx", "127.1.0.1", "PROXY_TIMEOUT", "50ms", "refused"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %q is not in it", err, want)
		}
	}
	a.gone("s1")
}

func TestUnavailableProviderIsAskedAgain(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.cloud.Inject(sim.Fault{Op: sim.OpCreate, Err: errdefs.ErrUnavailable})
	w.cloud.Inject(sim.Fault{Op: sim.OpCreate, Err: errdefs.ErrUnavailable, Committed: true})
	a := w.start()
	a.up("s1")
	if n := len(w.cloud.Instances()); n != 1 {
		t.Errorf("%d instances, want 1: the token is to find the one that was made", n)
	}
}

func TestDyingVMEndsTheWait(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.vms.Mute.Store(true)
	a := w.start()
	a.create("s1")
	done := make(chan error, 1)
	go func() { done <- a.Start(t.Context(), "s1") }()
	w.until("an instance with an address", func() bool {
		l := w.cloud.Instances()
		return len(l) == 1 && len(l[0].Addrs) > 0
	})
	if err := w.cloud.Fail(w.cloud.Instances()[0].ID, "kernel panic"); err != nil {
		t.Fatal(err)
	}
	err := <-done
	if err == nil || !strings.Contains(err.Error(), "kernel panic") || !strings.Contains(err.Error(), "failed") {
		t.Errorf("Start = %v, want what the provider says of the instance", err)
	}
	a.gone("s1")
	w.wantNothing(a)
}

func TestCallerThatLeavesOrphansNothing(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.vms.Hold = make(chan struct{})
	a := w.start()
	path := a.create("s1")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Start(ctx, "s1") }()
	w.until("an instance", func() bool { return len(w.cloud.Instances()) == 1 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("Start of a caller that left: %v", err)
	}
	close(w.vms.Hold)
	w.until("the start to end", func() bool { return a.state("s1") == StateRunning })
	if a.Infos()[0].Lease.IsZero() {
		t.Error("nobody was told and there is no lease")
	}
	if err := a.Start(t.Context(), "s1"); err != nil { // it comes back
		t.Fatal(err)
	}
	if !a.Infos()[0].Lease.IsZero() {
		t.Error("a claimed sandbox has a lease")
	}
	if err := check(t, path); err != nil {
		t.Error(err)
	}
	if n := w.cloud.Calls(sim.OpCreate); n != 1 {
		t.Errorf("%d instances asked for, want 1", n)
	}
}

func TestUnclaimedIsDeleted(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.lease = 40 * time.Millisecond
	w.vms.Hold = make(chan struct{})
	a := w.start()
	background, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan struct{})
	go func() { defer close(ended); a.Expire(background) }()
	defer func() { stop(); <-ended }()

	a.create("never-started")
	a.create("left")
	kept := a.up2(t, "kept")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Start(ctx, "left") }()
	w.until("the start", func() bool { return a.state("left") == StateStarting || a.state("left") == StateGone })
	cancel()
	<-done
	close(w.vms.Hold)
	a.gone("never-started")
	a.gone("left")
	if err := <-kept; err != nil {
		t.Fatal(err)
	}
	sb, err := a.find("kept")
	if err == nil {
		err = sb.expire()
	}
	if err != nil {
		t.Fatal(err)
	}
	if s := a.state("kept"); s != StateRunning {
		t.Errorf("a sandbox with a caller is %s", s)
	}
}

// up2 creates a sandbox and starts it in the background.
func (a *adaptor) up2(t *testing.T, id string) <-chan error {
	a.create(id)
	done := make(chan error, 1)
	go func() { done <- a.Start(t.Context(), id) }()
	a.w.until("the start", func() bool { return a.state(id) == StateStarting })
	return done
}

func TestStopEndsAStart(t *testing.T) {
	for _, at := range []string{"before the address", "while dialling"} {
		t.Run(at, func(t *testing.T) {
			w := newWorld(t, sim.Config{})
			if at == "while dialling" {
				w.vms.Mute.Store(true)
			} else {
				w.vms.Hold = make(chan struct{})
			}
			a := w.start()
			done := a.up2(t, "s1")
			w.until("an instance", func() bool {
				l := w.cloud.Instances()
				return len(l) == 1 && (len(l[0].Addrs) > 0) == (at == "while dialling")
			})
			if err := a.Stop(t.Context(), "s1"); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !errdefs.IsAborted(err) || !strings.Contains(err.Error(), "StopVM") {
				t.Errorf("Start = %v", err)
			}
			a.gone("s1")
			w.wantNothing(a)
		})
	}
}

func TestStopAnswersWhileTheProviderIsDown(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	path := a.up("s1")
	w.cloud.Inject(sim.Fault{Op: sim.OpDelete, Err: errdefs.ErrUnavailable, Count: -1})
	if err := a.Stop(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	// Tunnel and socket do not wait for the cloud.
	w.until("socket and tunnel to go", func() bool {
		w.network.mu.Lock()
		defer w.network.mu.Unlock()
		_, err := os.Stat(path)
		return errors.Is(err, os.ErrNotExist) && len(w.network.tunnels) == 0
	})
	if s := a.state("s1"); s != StateDeleting {
		t.Errorf("the sandbox is %s while its instance is there", s)
	}
	w.cloud.Heal()
	a.gone("s1")
	w.wantNothing(a)
}

func TestStopWaitsForNotFound(t *testing.T) {
	w := newWorld(t, sim.Config{DeleteTime: 150 * time.Millisecond})
	a := w.start()
	a.up("s1")
	a.Stop(t.Context(), "s1")
	w.until("the deletion in the cloud", func() bool {
		l := w.cloud.Instances()
		return len(l) == 1 && l[0].State == cloud.StateDeleting
	})
	if recs, _, _ := a.store.All(); len(recs) != 1 {
		t.Error("the record went before the instance")
	}
	a.gone("s1")
	w.wantNothing(a)
}

func TestHungSandboxBlocksNobodyElse(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.vms.Mute.Store(true)
	a := w.start()
	done := a.up2(t, "hung")
	w.until("its VM", func() bool { l := w.cloud.Instances(); return len(l) == 1 && len(l[0].Addrs) > 0 })
	w.vms.Mute.Store(false)
	if err := check(t, a.up("other")); err != nil {
		t.Error(err)
	}
	a.Stop(t.Context(), "hung")
	<-done
	a.gone("hung")
}

// TestCallerThatLeavesAtTheEnd: the start has ended, and at the same moment its only
// caller left without being told.
func TestCallerThatLeavesAtTheEnd(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	a.up("s1")
	sb, err := a.find("s1")
	if err != nil {
		t.Fatal(err)
	}
	if err := sb.leave(&startOp{waiters: 2}); err != nil || !sb.record().Lease.IsZero() {
		t.Errorf("one of two left: lease %v, %v", sb.record().Lease, err)
	}
	if err := sb.leave(&startOp{waiters: 1}); err != nil || sb.record().Lease.IsZero() {
		t.Errorf("the only one left: lease %v, %v", sb.record().Lease, err)
	}
}
