// SPDX-License-Identifier: Apache-2.0

// Package cloudtest holds providers to the contract of cloud.Provider. Run is the
// conformance suite; a provider's own test calls it with a Harness.
package cloudtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Harness is one empty cloud to test against. Each case gets its own.
type Harness struct {
	// New returns another provider over the same cloud, as after a restart of the
	// adaptor. Required.
	New func(t *testing.T) cloud.Provider
	// Size that the cloud can certainly make. Zero: whatever is the default.
	Size cloud.Size
	// UserData of the requests; nil takes a small cloud-config.
	UserData []byte
	// Leaks says what the cloud still holds beyond List: instances, disks, links,
	// processes, files. Called when all instances were deleted. Required.
	Leaks func() []string
	// Max is how many instances at once the cloud can carry; 0 is 3. With less,
	// fewer owners are told apart.
	Max int
	// Timeout for an instance to run or be gone; 0 is a minute.
	Timeout time.Duration
	// Poll is the pause between looks at the cloud; 0 is 10 ms.
	Poll time.Duration
	// CancelAfter are the moments at which a Create is abandoned; nil takes a
	// spread from at once to 100 ms.
	CancelAfter []time.Duration
	// Lag is the longest that List may be behind; 0 is none.
	Lag time.Duration
}

// Run runs the suite as subtests of t.
func Run(t *testing.T, harness func(t *testing.T) Harness) {
	run(t, harness, func(t *testing.T, f func(*testing.T)) { f(t) })
}

// RunSynctest is Run with each case in a testing/synctest bubble, for clouds whose
// time is the bubble's.
func RunSynctest(t *testing.T, harness func(t *testing.T) Harness) {
	run(t, harness, synctest.Test)
}

func run(t *testing.T, harness func(t *testing.T) Harness, in func(*testing.T, func(*testing.T))) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				s := newSuite(t, harness(t))
				defer s.sweep()
				c.run(s)
			})
		})
	}
}

// suite is one case at work.
type suite struct {
	*testing.T
	Harness
	ctx context.Context
	p   cloud.Provider
	run string // part of each token: a real cloud remembers those of earlier runs
	n   int    // requests made
}

// The cluster of all requests, and one whose instances nobody may touch.
const cluster = "cloudtest"

func newSuite(t *testing.T, h Harness) *suite {
	if h.New == nil || h.Leaks == nil {
		t.Fatal("cloudtest: Harness needs New and Leaks")
	}
	if h.UserData == nil {
		h.UserData = []byte("#cloud-config\nwrite_files:\n- path: /run/peerpod/apf.json\n  content: |\n      {}\n")
	}
	if h.Max == 0 {
		h.Max = 3
	}
	if h.Timeout == 0 {
		h.Timeout = time.Minute
	}
	if h.Poll == 0 {
		h.Poll = 10 * time.Millisecond
	}
	if h.CancelAfter == nil {
		h.CancelAfter = []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond}
	}
	return &suite{T: t, Harness: h, ctx: t.Context(), p: h.New(t), run: rand.Text()}
}

// request makes a valid request that differs from all before it.
func (s *suite) request() cloud.CreateRequest {
	s.Helper()
	plan, err := s.p.Plan(s.ctx, s.Size)
	if err != nil {
		s.Fatalf("Plan(%+v): %v", s.Size, err)
	}
	s.n++
	return cloud.CreateRequest{
		Token:     fmt.Sprintf("%s-%d", s.run, s.n),
		Name:      fmt.Sprintf("podvm-cloudtest-%d", s.n),
		SandboxID: fmt.Sprintf("sandbox-%d", s.n),
		Owner:     cloud.Owner{Cluster: cluster, Node: "node-a"},
		Plan:      plan,
		UserData:  s.UserData,
		Tags:      map[string]string{"team": "cloudtest"},
	}
}

func (s *suite) create(req cloud.CreateRequest) cloud.Instance {
	s.Helper()
	inst, err := s.p.Create(s.ctx, req)
	if err != nil {
		s.Fatalf("Create: %v", err)
	}
	if inst.ID == "" {
		s.Fatal("Create returned an instance without an ID")
	}
	return inst
}

// until polls f until it is true or the harness' Timeout is over.
func (s *suite) until(ctx context.Context, what string, f func() bool) {
	s.Helper()
	deadline := time.Now().Add(s.Timeout)
	for !f() {
		if time.Now().After(deadline) {
			s.Fatalf("not within %v: %s", s.Timeout, what)
		}
		pause(ctx, s.Poll)
	}
}

func (s *suite) running(id cloud.InstanceID) cloud.Instance {
	s.Helper()
	var inst cloud.Instance
	s.until(s.ctx, fmt.Sprintf("instance %s is running and has an address", id), func() bool {
		var err error
		if inst, err = s.p.Get(s.ctx, id); err != nil {
			s.Fatalf("Get(%s): %v", id, err)
		}
		if inst.State == cloud.StateFailed {
			s.Fatalf("instance %s failed: %s", id, inst.Detail)
		}
		return inst.State == cloud.StateRunning && len(inst.Addrs) > 0
	})
	return inst
}

func (s *suite) list(p cloud.Provider, owner cloud.Owner) map[cloud.InstanceID]cloud.Instance {
	s.Helper()
	l, err := p.List(s.ctx, owner)
	if err != nil {
		s.Fatalf("List(%+v): %v", owner, err)
	}
	out := map[cloud.InstanceID]cloud.Instance{}
	for _, i := range l {
		if _, twice := out[i.ID]; twice {
			s.Fatalf("List(%+v) shows %s twice", owner, i.ID)
		}
		out[i.ID] = i
	}
	return out
}

// listed polls List until it shows exactly the wanted IDs.
func (s *suite) listed(p cloud.Provider, owner cloud.Owner, want ...cloud.InstanceID) {
	s.Helper()
	var got map[cloud.InstanceID]cloud.Instance
	deadline := time.Now().Add(s.Timeout)
	for {
		got = s.list(p, owner)
		same := len(got) == len(want)
		for _, id := range want {
			_, ok := got[id]
			same = same && ok
		}
		if same {
			return
		}
		if time.Now().After(deadline) {
			s.Fatalf("List(%+v) shows %v, want %v", owner, got, want)
		}
		pause(s.ctx, s.Poll)
	}
}

// gone deletes until NotFound.
func (s *suite) gone(ctx context.Context, id cloud.InstanceID) {
	s.Helper()
	s.until(ctx, fmt.Sprintf("instance %s is gone", id), func() bool {
		err := s.p.Delete(ctx, id)
		if err != nil && !errdefs.IsNotFound(err) {
			s.Fatalf("Delete(%s): %v, want nil or NotFound", id, err)
		}
		return err != nil
	})
}

// sweep deletes all that the case left and asks the oracle.
func (s *suite) sweep() {
	s.Helper()
	ctx := context.WithoutCancel(s.ctx)
	pause(ctx, s.Lag)
	for _, c := range []string{cluster, otherCluster} {
		l, err := s.p.List(ctx, cloud.Owner{Cluster: c})
		if err != nil {
			s.Fatalf("List: %v", err)
		}
		for _, i := range l {
			s.gone(ctx, i.ID)
		}
	}
	s.until(ctx, "List is empty after all was deleted", func() bool {
		l, err := s.p.List(ctx, cloud.Owner{Cluster: cluster})
		if err != nil {
			s.Fatalf("List: %v", err)
		}
		return len(l) == 0
	})
	for _, l := range s.Leaks() {
		s.Errorf("left behind: %s", l)
	}
}

func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
