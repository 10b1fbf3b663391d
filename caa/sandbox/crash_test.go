// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud/sim"
)

// crash makes the adaptor end at a fault point, as if it were killed there: its
// state file takes no more writes and the goroutine does no more work. It returns a
// channel that is closed when that has happened.
func (w *world) crash(point string, a **adaptor) <-chan struct{} {
	crashed := make(chan struct{})
	var once atomic.Bool
	w.fault = func(p string) {
		if p == point && once.CompareAndSwap(false, true) {
			(*a).store.Close()
			close(crashed)
			runtime.Goexit()
		}
	}
	return crashed
}

// points are where a life can end, in order, and what the next life makes of it.
var points = []struct {
	point string
	after string // "nothing", "reserved" or "running", before anybody asks for anything
}{
	{StepReserve + ":before", "nothing"},
	{StepReserve + ":after", "reserved"},
	{StepInstance + ":before", "nothing"},
	{StepInstance + ":asked", "nothing"},
	{StepInstance + ":created", "nothing"},
	{StepInstance + ":after", "nothing"},
	{StepTunnel + ":before", "nothing"},
	{StepTunnel + ":after", "nothing"},
	{StepAgent + ":before", "nothing"},
	{StepAgent + ":after", "nothing"},
	{"undo " + StepAgent + ":before", "nothing"},
	{"undo " + StepAgent + ":after", "nothing"},
	{"undo " + StepTunnel + ":before", "nothing"},
	{"undo " + StepTunnel + ":after", "nothing"},
	{"undo " + StepInstance + ":before", "nothing"},
	{"undo " + StepInstance + ":after", "nothing"},
	{"undo " + StepReserve + ":before", "nothing"},
	{"undo " + StepReserve + ":after", "nothing"},
}

// TestCrash ends the adaptor at every fault point of a sandbox's life and looks at
// what the next one makes of it: every sandbox is as it should be or gone, and
// nothing is left of those that are gone.
func TestCrash(t *testing.T) {
	for _, c := range points {
		t.Run(c.point, func(t *testing.T) {
			w := newWorld(t, sim.Config{})
			var a *adaptor
			crashed := w.crash(c.point, &a)
			a = w.start()
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if _, err := a.Create(ctx, w.request("s1")); err != nil {
					return
				}
				if err := a.Start(ctx, "s1"); err != nil {
					return
				}
				a.Stop(ctx, "s1")
			}()
			<-crashed
			cancel() // the connection breaks, as it does when a process dies
			<-ended
			a.end()

			w.fault = nil
			a = w.start()
			switch c.after {
			case "nothing":
				a.gone("s1")
				w.wantNothing(a)
			case "reserved":
				if s := a.state("s1"); s != StateReserved {
					t.Fatalf("the sandbox is %s, want reserved", s)
				}
			}
			// Whatever was, the same pod can be had now.
			if err := check(t, a.up("s1")); err != nil {
				t.Fatal(err)
			}
			if n := len(w.cloud.Instances()); n != 1 {
				t.Errorf("%d instances for one sandbox", n)
			}
			a.Stop(t.Context(), "s1")
			a.gone("s1")
			w.wantNothing(a)
		})
	}
}

// TestCrashWithEveryAnswerLost is the same where the cloud's reply to Create is lost
// just before the crash, so that no record knows the instance's id.
func TestCrashWithEveryAnswerLost(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.cloud.Inject(sim.Fault{Op: sim.OpCreate, Err: errors.New("connection reset"), Committed: true})
	var a *adaptor
	crashed := w.crash("undo "+StepInstance+":before", &a)
	a = w.start()
	a.create("s1")
	if err := a.Start(t.Context(), "s1"); err == nil || errdefs.IsUnavailable(err) {
		t.Fatalf("Start = %v", err)
	}
	<-crashed
	a.end()
	if n := len(w.cloud.Instances()); n != 1 {
		t.Fatalf("%d instances, want the one whose answer was lost", n)
	}
	w.fault = nil
	a = w.start()
	a.gone("s1")
	w.wantNothing(a)
}

// TestUnwritableState: a write that fails fails the step, and a StopVM whose intent cannot
// be written is not answered with success.
func TestUnwritableState(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	path := a.up("s1")
	a.store.Close()
	if err := a.Stop(t.Context(), "s1"); err == nil {
		t.Error("StopVM succeeded without anything being written")
	}
	if _, err := a.Create(t.Context(), w.request("s2")); err == nil {
		t.Error("CreateVM succeeded without anything being written")
	}
	if err := check(t, path); err != nil {
		t.Errorf("the pod was harmed: %v", err)
	}
}
