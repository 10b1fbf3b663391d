// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

// noting is a provider that notes each attempt, of which the first ones fail.
type noting struct {
	cloud.Provider
	fail   error // what the first attempts come to
	fails  int
	record func() store.Record // as it is on disk

	mu     sync.Mutex
	got    []string // Progress of each call; guarded by mu
	onDisk []string // progress on disk after each note; guarded by mu
}

func (n *noting) Create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.got = append(n.got, req.Progress)
	if err := req.Note(ctx, fmt.Sprintf("attempt %d", len(n.got))); err != nil {
		return cloud.Instance{}, err
	}
	n.onDisk = append(n.onDisk, n.record().Instance.Progress)
	if len(n.got) <= n.fails {
		return cloud.Instance{}, fmt.Errorf("attempt %d: %w", len(n.got), n.fail)
	}
	return n.Provider.Create(ctx, req)
}

// What a provider notes is on disk before it goes on, and comes back to it when it is
// asked again.
func TestProgress(t *testing.T) {
	w := newWorld(t, sim.Config{})
	var a *adaptor
	var n *noting
	w.wrap = func(p cloud.Provider) cloud.Provider {
		n = &noting{Provider: p, fail: errdefs.ErrUnavailable, fails: 2, record: func() store.Record {
			recs, _, err := a.store.All()
			if err != nil || len(recs) != 1 {
				t.Errorf("records: %v, %v", recs, err)
				return store.Record{}
			}
			return recs[0]
		}}
		return n
	}
	a = w.start()
	a.up("s1")
	if want := []string{"", "attempt 1", "attempt 2"}; !slices.Equal(n.got, want) {
		t.Errorf("Create was given the progress %q, want %q", n.got, want)
	}
	if want := []string{"attempt 1", "attempt 2", "attempt 3"}; !slices.Equal(n.onDisk, want) {
		t.Errorf("on disk after each note: %q, want %q", n.onDisk, want)
	}
	a.Stop(t.Context(), "s1")
	a.gone("s1")
	w.wantNothing(a)
}

// asking is a cloud that has nothing to say of an instance until its machine answers.
type asking struct {
	cloud.Provider
	stranger netip.Addr // nobody is there
	strange  error      // what asking there came to
	err      error      // what asking the machine came to
}

func (p *asking) Create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	inst, err := p.Provider.Create(ctx, req)
	if err != nil {
		return inst, err
	}
	brief, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	p.strange = req.Answers(brief, p.stranger)
	for len(inst.Addrs) == 0 {
		if inst, err = p.Get(ctx, inst.ID); err != nil {
			return inst, err
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return inst, err
		}
	}
	p.err = req.Answers(ctx, inst.Addrs[0])
	return inst, nil
}

// TestAnswers: the forwarder's answer is there for a provider that waits, and nobody
// else's is taken for it.
func TestAnswers(t *testing.T) {
	w := newWorld(t, sim.Config{})
	var p *asking
	w.wrap = func(under cloud.Provider) cloud.Provider {
		p = &asking{Provider: under, stranger: netip.MustParseAddr("127.0.0.254")}
		return p
	}
	a := w.start()
	a.up("s1")
	if p.err != nil || p.strange == nil {
		t.Errorf("the machine: %v; nobody's address: %v", p.err, p.strange)
	}
	a.Stop(t.Context(), "s1")
	a.gone("s1")
	w.wantNothing(a)
}

// A note that cannot be written is the end of the attempt.
func TestProgressDiskFull(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.wrap = func(p cloud.Provider) cloud.Provider {
		return &noting{Provider: p, record: func() store.Record { t.Error("the provider went on without its note"); return store.Record{} }}
	}
	a := w.start()
	a.create("s1")
	asked := false
	a.cfg.FaultPoint = func(point string) {
		if point == StepInstance+":asked" {
			asked = true
			a.store.Close() // every write fails from now on
		}
	}
	if err := a.Start(t.Context(), "s1"); err == nil || !asked {
		t.Errorf("Start without a disk: %v", err)
	}
	if i := w.cloud.Instances(); len(i) != 0 {
		t.Errorf("made %+v", i)
	}
	a.end()
	a = w.start()
	a.gone("s1")
	w.wantNothing(a)
}

// late is a cloud that does not know a new instance for some answers.
type late struct {
	cloud.Provider
	mu   sync.Mutex
	left int // answers to come; guarded by mu
}

func (l *late) Delete(ctx context.Context, id cloud.InstanceID) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left > 0 {
		l.left--
		return fmt.Errorf("instance %s: %w", id, errdefs.ErrNotFound)
	}
	return l.Provider.Delete(ctx, id)
}

// An adaptor that ends just after an instance was made is followed by one to which
// the cloud says that there is none. The record does not go on the first such word.
func TestLateInstance(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	a.cfg.FaultPoint = func(point string) {
		if point == StepInstance+":after" {
			a.Manager.stop() // as SIGTERM: the steps after it do not come
		}
	}
	a.create("s1")
	if err := a.Start(t.Context(), "s1"); err == nil {
		t.Fatal("the start went on")
	}
	a.end()
	if n := len(w.cloud.Instances()); n != 1 {
		t.Fatalf("%d instances", n)
	}
	w.wrap = func(p cloud.Provider) cloud.Provider { return &late{Provider: p, left: 1} }
	a = w.start()
	a.gone("s1")
	w.until("the instance is gone", func() bool { return len(w.cloud.Instances()) == 0 })
	w.wantNothing(a)
}
