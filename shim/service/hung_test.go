// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"context"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/shim/stdio"
)

// hang makes the agent answer nothing until the function that it returns is called.
func (e *env) hang() (recover func()) {
	back := make(chan struct{})
	e.hung.Store(&back)
	return func() {
		e.hung.Store(nil)
		close(back)
	}
}

// TestHungGuest has a guest that answers nothing any more. What the shim knows it still
// tells, SIGKILL ends processes and a deletion succeeds; once the guest is back, it
// is rid of what was given up meanwhile, and the pod goes on.
func TestHungGuest(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	out := e.fifo("out")
	out.collect()
	e.exec("app", "x", stdio.Config{Stdout: out.path}, "pause")
	e.start("app", "x")
	back := e.hang()
	if s, err := e.svc.State(e.ctx, &taskapi.StateRequest{ID: "app"}); err != nil || s.Status != task.Status_RUNNING {
		t.Errorf("state: %v, %v", s, err)
	}
	if r, err := e.svc.Pids(e.ctx, &taskapi.PidsRequest{ID: "app"}); err != nil || len(r.Processes) != 1 {
		t.Errorf("pids: %v, %v", r, err)
	}
	figures := make(chan error, 1)
	go func() {
		_, err := e.svc.Stats(e.ctx, &taskapi.StatsRequest{ID: "app"})
		figures <- err
	}()
	asked := make(chan error, 1)
	go func() {
		_, err := e.svc.Kill(e.ctx, &taskapi.KillRequest{ID: "app", Signal: uint32(syscall.SIGTERM)})
		asked <- err
	}()
	e.kill("app", "", syscall.SIGKILL)
	if got := e.wait("app", ""); got != 137 {
		t.Errorf("SIGKILL: status %d", got)
	}
	if got := e.wait("app", "x"); got != 137 {
		t.Errorf("exec: status %d", got)
	}
	for what, err := range map[string]error{"SIGTERM": <-asked, "figures": <-figures} {
		if !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	e.delete("app", "")
	<-out.done // closed, so that containerd sees the end
	e.checkTrace("app", "", "create", "start", "exit", "delete")
	e.checkTrace("app", "x", "exec-added", "exec-started", "exit")
	exits := []string{}
	for _, env := range e.sink.Events() {
		if env.Topic == "/tasks/exit" {
			var m events.TaskExit
			e.must(proto.Unmarshal(env.Event.Value, &m))
			exits = append(exits, m.ID)
		}
	}
	if !cmp.Equal(exits, []string{"x", "app"}) {
		t.Errorf("exits in the order %v", exits)
	}
	back()
	e.until("the guest is rid of the container", func() bool { return e.agent.Container("app") == nil })
	e.must(e.create("next", "pod", stdio.Config{}, "exit", "3"))
	e.start("next", "")
	if got := e.wait("next", ""); got != 3 {
		t.Errorf("the next container ended with %d", got)
	}
}

// TestHungPodIsRemoved removes a pod whose guest hangs and never comes back.
func TestHungPodIsRemoved(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	defer e.hang()()
	// As containerd does, one after the other.
	for _, id := range []string{"app", "pod"} {
		e.kill(id, "", syscall.SIGKILL)
		if got := e.wait(id, ""); got != 137 {
			t.Errorf("%s: status %d", id, got)
		}
		e.delete(id, "")
	}
	e.until("the pod VM is given back", func() bool { return cmp.Equal(e.adaptor.Stops(), []string{"pod"}) })
	e.checkTrace("pod", "", "create", "start", "exit", "delete")
}

func (e *env) until(what string, ok func() bool) {
	e.t.Helper()
	for !ok() {
		select {
		case <-time.After(time.Millisecond):
		case <-e.ctx.Done():
			e.t.Fatalf("waited in vain: %s", what)
		}
	}
}

// fault is the agent's: it hangs while the test says so.
func (e *env) fault(ctx context.Context, _ string) error {
	if back := e.hung.Load(); back != nil {
		select {
		case <-*back:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
