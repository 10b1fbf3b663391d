// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func details(ctx context.Context, c *guest.Conn) error {
	_, err := guest.Agent(ctx, c, agentpb.AgentServiceService.GetGuestDetails, &agentpb.GuestDetailsRequest{})
	return err
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// TestReconnect has calls wait for a connection that breaks, and succeed on the next.
func TestReconnect(t *testing.T) {
	ctx := testContext(t)
	a := shimtest.NewAdaptor(t, &agenttest.Agent{})
	c := guest.New(guest.Config{Socket: a.AgentSocket})
	defer c.Close()
	for i := range 20 {
		if err := details(ctx, c); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			a.Cut()
		} else {
			a.Break()
			time.AfterFunc(10*time.Millisecond, a.Connect)
		}
	}
	if err := details(ctx, c); err != nil {
		t.Fatal(err)
	}
}

// TestHungCall has the connection break under a call that is being served: the call
// is made again.
func TestHungCall(t *testing.T) {
	ctx := testContext(t)
	var calls atomic.Int32
	entered := make(chan struct{})
	a := shimtest.NewAdaptor(t, &agenttest.Agent{Fault: func(ctx context.Context, method string) error {
		if method == "GetGuestDetails" && calls.Add(1) == 1 {
			close(entered)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}})
	c := guest.New(guest.Config{Socket: a.AgentSocket})
	defer c.Close()
	done := make(chan error, 1)
	go func() { done <- details(ctx, c) }()
	<-entered
	a.Cut()
	if err := <-done; err != nil || calls.Load() != 2 {
		t.Errorf("%v after %d calls", err, calls.Load())
	}
}

// TestBudget has a guest that is out of reach for longer than the budget: it is dead
// for good, and every call says so.
func TestBudget(t *testing.T) {
	ctx := testContext(t)
	a := shimtest.NewAdaptor(t, &agenttest.Agent{})
	c := guest.New(guest.Config{Socket: a.AgentSocket, Budget: 100 * time.Millisecond})
	defer c.Close()
	if err := details(ctx, c); err != nil {
		t.Fatal(err)
	}
	a.Break()
	if err := details(ctx, c); !errors.Is(err, guest.ErrDead) || !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
	<-c.Dead()
	a.Connect()
	if err := details(ctx, c); !errors.Is(err, guest.ErrDead) {
		t.Errorf("a dead guest answered: %v", err)
	}
}

// TestGone has an adaptor that answers and has removed the agent's socket.
func TestGone(t *testing.T) {
	var asked atomic.Int32
	c := guest.New(guest.Config{
		Socket: filepath.Join(t.TempDir(), "none"), Budget: 2 * time.Second,
		Gone: func(context.Context) bool { asked.Add(1); return true },
	})
	defer c.Close()
	if err := details(testContext(t), c); !errors.Is(err, guest.ErrDead) || asked.Load() == 0 {
		t.Errorf("%v, asked %d times", err, asked.Load())
	}
}

// TestErrors has the agent's codes come out as classes, at once.
func TestErrors(t *testing.T) {
	ctx := testContext(t)
	a := shimtest.NewAdaptor(t, &agenttest.Agent{Fault: func(_ context.Context, method string) error {
		if method == "GetGuestDetails" {
			return fmt.Errorf("policy: %w", errdefs.ErrPermissionDenied)
		}
		return nil
	}})
	c := guest.New(guest.Config{Socket: a.AgentSocket})
	defer c.Close()
	if err := details(ctx, c); !errdefs.IsPermissionDenied(err) {
		t.Errorf("got %v", err)
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	if err := details(short, c); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestRetriedOnce has an effect whose reply was lost: the second attempt finds it
// done, and that is a success.
func TestRetriedOnce(t *testing.T) {
	ctx := testContext(t)
	var a *shimtest.Adaptor
	var calls atomic.Int32
	agent := &agenttest.Agent{Fault: func(ctx context.Context, method string) error {
		if method != "StartContainer" {
			return nil
		}
		if calls.Add(1) == 1 {
			a.Cut()
			<-ctx.Done()
			return ctx.Err()
		}
		return fmt.Errorf("it runs: %w", errdefs.ErrFailedPrecondition)
	}}
	a = shimtest.NewAdaptor(t, agent)
	c := guest.New(guest.Config{Socket: a.AgentSocket})
	defer c.Close()
	start := func() error {
		return guest.AgentOnce(ctx, c, errdefs.IsFailedPrecondition, agentpb.AgentServiceService.StartContainer, &agentpb.StartContainerRequest{ContainerId: "x"})
	}
	if err := start(); err != nil {
		t.Errorf("got %v", err)
	}
	if err := start(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a first attempt: got %v", err)
	}
	if _, err := os.Stat(a.AgentSocket); err != nil {
		t.Error(err)
	}
}
