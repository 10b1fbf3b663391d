// SPDX-License-Identifier: Apache-2.0

package sim_test

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/cloudtest"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func harness(cfg sim.Config) func(*testing.T) cloudtest.Harness {
	return func(t *testing.T) cloudtest.Harness {
		w := sim.NewWorld(cfg)
		t.Cleanup(w.Close)
		return cloudtest.Harness{
			New:     func(*testing.T) cloud.Provider { return w.NewProvider() },
			Leaks:   w.Leaks,
			Timeout: 10 * time.Minute,
			Poll:    time.Second / 4,
			Lag:     cfg.Lag,
		}
	}
}

func TestConformance(t *testing.T) {
	t.Run("fast", func(t *testing.T) { cloudtest.RunSynctest(t, harness(sim.Config{})) })
	t.Run("slow", func(t *testing.T) {
		cloudtest.RunSynctest(t, harness(sim.Config{Latency: 8 * time.Millisecond, BootTime: 40 * time.Second, DeleteTime: 30 * time.Second}))
	})
	t.Run("lagging", func(t *testing.T) {
		cloudtest.RunSynctest(t, harness(sim.Config{Latency: 20 * time.Millisecond, BootTime: 10 * time.Second, DeleteTime: 5 * time.Second, Lag: 7 * time.Second}))
	})
	t.Run("launched", func(t *testing.T) {
		cloudtest.RunSynctest(t, func(t *testing.T) cloudtest.Harness {
			l := &launcher{}
			h := harness(sim.Config{BootTime: time.Second, DeleteTime: time.Second, Launcher: l})(t)
			leaks := h.Leaks
			h.Leaks = func() []string {
				if n := l.count(); n != 0 {
					return append(leaks(), "machines run")
				}
				return leaks()
			}
			return h
		})
	})
}

type launcher struct {
	mu   sync.Mutex
	live map[*machine]bool // guarded by mu
}

type machine struct {
	l    *launcher
	done chan struct{}
}

func (l *launcher) Launch(context.Context, cloud.InstanceID, cloud.CreateRequest) (sim.Machine, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := &machine{l: l, done: make(chan struct{})}
	if l.live == nil {
		l.live = map[*machine]bool{}
	}
	l.live[m] = true
	return m, nil
}

func (l *launcher) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.live)
}

func (m *machine) Addrs() []netip.Addr   { return []netip.Addr{netip.MustParseAddr("192.0.2.1")} }
func (m *machine) Done() <-chan struct{} { return m.done }
func (m *machine) Stop() {
	m.l.mu.Lock()
	defer m.l.mu.Unlock()
	delete(m.l.live, m)
}

func request(t *testing.T, p cloud.Provider, token string, size cloud.Size) cloud.CreateRequest {
	t.Helper()
	plan, err := p.Plan(t.Context(), size)
	if err != nil {
		t.Fatal(err)
	}
	return cloud.CreateRequest{Token: token, Name: "podvm-" + token, SandboxID: "s-" + token, Owner: cloud.Owner{Cluster: "c", Node: "n"}, Plan: plan}
}

func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := sim.NewWorld(sim.Config{BootTime: time.Second})
		p := w.NewProvider()
		req := request(t, p, "a", cloud.Size{})
		for _, class := range []error{errdefs.ErrUnavailable, errdefs.ErrPermissionDenied, errdefs.ErrResourceExhausted} {
			w.Inject(sim.Fault{Op: sim.OpCreate, Err: class})
			if _, err := p.Create(t.Context(), req); !errors.Is(err, class) {
				t.Errorf("got %v, want %v", err, class)
			}
		}
		if n := len(w.Instances()); n != 0 {
			t.Fatalf("%d instances after refused calls", n)
		}

		w.Inject(sim.Fault{Op: sim.OpCreate, Err: errors.New("connection reset"), Committed: true})
		if _, err := p.Create(t.Context(), req); err == nil || errdefs.Resolve(err) != errdefs.ErrUnknown {
			t.Fatalf("lost reply: %v, want an unknown error", err)
		}
		if n := len(w.Instances()); n != 1 {
			t.Fatalf("%d instances after a lost reply, want 1", n)
		}
		inst, err := p.Create(t.Context(), req)
		if err != nil || inst.ID != w.Instances()[0].ID {
			t.Fatalf("the token again: %+v, %v", inst, err)
		}

		w.Inject(sim.Fault{Op: sim.OpDelete, Err: errdefs.ErrUnavailable, Count: -1})
		for range 5 {
			if err := p.Delete(t.Context(), inst.ID); !errdefs.IsUnavailable(err) {
				t.Fatalf("delete: %v", err)
			}
		}
		w.Heal()
		if err := p.Delete(t.Context(), inst.ID); err != nil {
			t.Fatal(err)
		}
		if l := w.Leaks(); len(l) != 0 {
			t.Fatal(l)
		}
		if n := w.Calls(sim.OpDelete); n != 6 {
			t.Errorf("%d deletes counted, want 6", n)
		}
	})
}

func TestCapacity(t *testing.T) {
	w := sim.NewWorld(sim.Config{Capacity: map[string]int{"sim.large": 1}})
	p := w.NewProvider()
	large := cloud.Size{Type: "sim.large"}
	first, err := p.Create(t.Context(), request(t, p, "a", large))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Create(t.Context(), request(t, p, "b", large)); !errdefs.IsResourceExhausted(err) {
		t.Fatalf("pool is full: %v, want ResourceExhausted", err)
	}
	if _, err := p.Create(t.Context(), request(t, p, "c", cloud.Size{})); err != nil {
		t.Fatalf("another pool: %v", err)
	}
	if err := p.Delete(t.Context(), first.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Create(t.Context(), request(t, p, "b", large)); err != nil {
		t.Fatalf("pool has room again: %v", err)
	}
}

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := sim.NewWorld(sim.Config{Rate: 2, Burst: 3}).NewProvider()
		for n := range 5 {
			_, err := p.List(t.Context(), cloud.Owner{Cluster: "c"})
			if throttled := errdefs.IsUnavailable(err); throttled != (n >= 3) {
				t.Errorf("call %d: %v", n, err)
			}
		}
		time.Sleep(time.Second)
		for n := range 3 {
			_, err := p.List(t.Context(), cloud.Owner{Cluster: "c"})
			if throttled := errdefs.IsUnavailable(err); throttled != (n >= 2) {
				t.Errorf("call %d a second later: %v", n, err)
			}
		}
	})
}

func TestLag(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := sim.NewWorld(sim.Config{Lag: 5 * time.Second, BootTime: time.Second, DeleteTime: time.Second})
		p := w.NewProvider()
		inst, err := p.Create(t.Context(), request(t, p, "a", cloud.Size{}))
		if err != nil {
			t.Fatal(err)
		}
		listed := func() int {
			l, err := p.List(t.Context(), cloud.Owner{Cluster: "c"})
			if err != nil {
				t.Fatal(err)
			}
			return len(l)
		}
		state := func() cloud.State {
			i, err := p.Get(t.Context(), inst.ID)
			if err != nil {
				t.Fatal(err)
			}
			return i.State
		}
		time.Sleep(2 * time.Second) // running in truth
		if n, s := listed(), state(); n != 0 || s != cloud.StatePending {
			t.Errorf("before the lag: %d listed, state %v; want none, pending", n, s)
		}
		time.Sleep(5 * time.Second)
		if n, s := listed(), state(); n != 1 || s != cloud.StateRunning {
			t.Errorf("after the lag: %d listed, state %v; want 1, running", n, s)
		}
		if err := p.Delete(t.Context(), inst.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		if _, err := p.Get(t.Context(), inst.ID); !errdefs.IsNotFound(err) {
			t.Errorf("Get of what is gone: %v", err)
		}
		if n := listed(); n != 1 {
			t.Errorf("%d listed just after the end, want the ghost", n)
		}
		time.Sleep(5 * time.Second)
		if n := listed(); n != 0 {
			t.Errorf("%d listed long after the end", n)
		}
	})
}

func TestMachineEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &launcher{}
		w := sim.NewWorld(sim.Config{Launcher: l})
		defer w.Close()
		p := w.NewProvider()
		inst, err := p.Create(t.Context(), request(t, p, "a", cloud.Size{}))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		l.mu.Lock()
		for m := range l.live {
			close(m.done)
		}
		l.mu.Unlock()
		synctest.Wait()
		if got, err := p.Get(t.Context(), inst.ID); err != nil || got.State != cloud.StateFailed || got.Detail == "" {
			t.Fatalf("got %+v, %v; want failed with a detail", got, err)
		}
		if err := w.Fail(inst.ID, "again"); err != nil {
			t.Fatal(err)
		}
		if err := p.Delete(t.Context(), inst.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if l := w.Leaks(); len(l) != 0 {
			t.Fatal(l)
		}
	})
}
