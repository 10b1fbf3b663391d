// SPDX-License-Identifier: Apache-2.0

package sweep

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var owner = cloud.Owner{Cluster: "c", Node: "n"}

func instance(t *testing.T, w *sim.World, o cloud.Owner, sandbox string) cloud.InstanceID {
	t.Helper()
	p := w.NewProvider()
	plan, err := p.Plan(t.Context(), cloud.Size{})
	if err != nil {
		t.Fatal(err)
	}
	i, err := p.Create(t.Context(), cloud.CreateRequest{
		Token: "token-" + sandbox, Name: "podvm-" + sandbox, SandboxID: sandbox, Owner: o, Plan: plan, UserData: []byte("#cloud-config\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return i.ID
}

func ids(w *sim.World) (l []cloud.InstanceID) {
	for _, i := range w.Instances() {
		l = append(l, i.ID)
	}
	return l
}

func TestSweepTakesOrphansOnly(t *testing.T) {
	w := sim.NewWorld(sim.Config{})
	defer w.Close()
	known := instance(t, w, owner, "known")
	orphan := instance(t, w, owner, "orphan")
	late := instance(t, w, owner, "late") // its record is written after the first look
	otherNode := instance(t, w, cloud.Owner{Cluster: "c", Node: "other"}, "other-node")
	otherCluster := instance(t, w, cloud.Owner{Cluster: "d", Node: "n"}, "other-cluster")

	records := []string{"known"}
	s := &Sweeper{
		Provider: w.NewProvider(), Owner: owner, Grace: time.Minute, Log: slog.New(slog.DiscardHandler),
		Known: func(i cloud.Instance) bool { return slices.Contains(records, i.SandboxID) },
	}
	all := []cloud.InstanceID{known, orphan, late, otherNode, otherCluster}
	now := time.Now()
	steps := []struct {
		at   time.Duration
		want []cloud.InstanceID
	}{
		{0, all},                // the first look
		{30 * time.Second, all}, // unknown twice, within the grace time
		{2 * time.Minute, []cloud.InstanceID{known, late, otherNode, otherCluster}},
		{3 * time.Minute, []cloud.InstanceID{known, late, otherNode, otherCluster}},
	}
	for _, step := range steps {
		s.Sweep(t.Context(), now.Add(step.at))
		if got := ids(w); !slices.Equal(got, step.want) {
			t.Errorf("after %s there are %v, want %v", step.at, got, step.want)
		}
		if step.at == 0 {
			records = append(records, "late")
		}
	}
	if len(s.unknown) != 0 {
		t.Errorf("still on the list: %v", s.unknown)
	}
}

func TestSweepSurvivesTheProvider(t *testing.T) {
	w := sim.NewWorld(sim.Config{})
	defer w.Close()
	instance(t, w, owner, "orphan")
	s := &Sweeper{
		Provider: w.NewProvider(), Owner: owner, Grace: time.Minute, Log: slog.New(slog.DiscardHandler),
		Known: func(cloud.Instance) bool { return false },
	}
	now := time.Now()
	s.Sweep(t.Context(), now)
	// A look that failed must not make the next one the first.
	w.Inject(sim.Fault{Op: sim.OpList, Err: errdefs.ErrUnavailable})
	s.Sweep(t.Context(), now.Add(time.Minute))
	w.Inject(sim.Fault{Op: sim.OpDelete, Err: errdefs.ErrUnavailable})
	s.Sweep(t.Context(), now.Add(2*time.Minute))
	if n := len(ids(w)); n != 1 {
		t.Fatalf("%d instances while the provider was down", n)
	}
	s.Sweep(t.Context(), now.Add(3*time.Minute))
	if l := ids(w); len(l) != 0 {
		t.Errorf("left: %v", l)
	}
}

func TestRunEnds(t *testing.T) {
	w := sim.NewWorld(sim.Config{})
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	s := &Sweeper{Provider: w.NewProvider(), Owner: owner, Interval: time.Millisecond, Log: slog.New(slog.DiscardHandler), Known: func(cloud.Instance) bool { return true }}
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	for w.Calls(sim.OpList) < 3 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-done
}
