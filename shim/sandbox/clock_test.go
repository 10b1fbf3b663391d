// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/shim/config"
	"github.com/kata-remote/kata-remote/shim/shimtest"
	"github.com/kata-remote/kata-remote/shim/spec"
)

// started is a sandbox of an agent, with a clock that is told very often.
func started(t *testing.T, agent *agenttest.Agent) *Sandbox {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	adaptor := shimtest.NewAdaptor(t, agent)
	s := New(Config{ID: "pod", Bundle: t.TempDir(), OOM: func(string) {}, ClockInterval: time.Millisecond})
	t.Cleanup(func() { s.Close(context.Background()) })
	spc := shimtest.Spec(shimtest.NetNS(t), map[string]string{annotation.ContainerType: annotation.ContainerTypeSandbox, annotation.SandboxID: "pod"}, "pause")
	cfg := config.Config{Socket: adaptor.Socket, Timeout: time.Minute}
	if err := s.Start(ctx, spc, spec.RoleSandbox, cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// TestClock: the guest knows the time before it has a container, and is told again and
// again, also after calls that failed.
func TestClock(t *testing.T) {
	before := time.Now().Add(-time.Microsecond) // what is told has microseconds
	failed := make(chan struct{}, 1)
	agent := &agenttest.Agent{}
	agent.Fault = func(_ context.Context, method string) error {
		if method == "SetGuestDateTime" && len(agent.Times()) == 2 {
			select {
			case failed <- struct{}{}:
				return fmt.Errorf("busy: %w", errdefs.ErrInternal)
			default:
			}
		}
		return nil
	}
	s := started(t, agent)
	if len(agent.Times()) == 0 {
		t.Error("the sandbox is ready and the guest does not know the time")
	}
	until(t, "5 times", func() bool { return len(agent.Times()) >= 5 })
	s.Close(t.Context())
	last := before
	for i, at := range agent.Times() {
		if at.Before(last) || at.After(time.Now()) {
			t.Errorf("time %d is %v, after %v", i, at, last)
		}
		last = at
	}
	if len(failed) == 0 {
		t.Error("no call failed")
	}
}

// TestClockOfTheImage: an agent that does not take the time is not asked again.
func TestClockOfTheImage(t *testing.T) {
	calls := 0
	agent := &agenttest.Agent{Fault: func(_ context.Context, method string) error {
		if method == "SetGuestDateTime" {
			calls++ // one call at a time
			return fmt.Errorf("SetGuestDateTime: %w", errdefs.ErrNotImplemented)
		}
		return nil
	}}
	s := started(t, agent)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.keepTime(s.conn, fmt.Errorf("SetGuestDateTime: %w", errdefs.ErrNotImplemented))
	}()
	<-done // it does not wait for the sandbox's end
	s.Close(t.Context())
	if calls != 1 {
		t.Errorf("%d calls", calls)
	}
}
