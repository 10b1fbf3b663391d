// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"context"
	"encoding/base64"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host starts machines that are nothing.
type host struct {
	mu   sync.Mutex
	runs map[string]emulation.Machine // guarded by mu
	fail error                        // of Start; guarded by mu
}

func (h *host) Start(ctx context.Context, m emulation.Machine) error {
	select {
	case <-time.After(time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fail == nil {
		h.runs[m.ID] = m
	}
	return h.fail
}

func (h *host) Stop(_ context.Context, id string) error {
	time.Sleep(time.Second) // in the bubble's time
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.runs, id)
	return nil
}

func (h *host) Console(id string) ([]byte, error) { return []byte("console of " + id), nil }

func (h *host) get(id string) (emulation.Machine, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m, ok := h.runs[id]
	return m, ok
}

// TestMachines has machines behind instances, through all that can happen to them.
//
// Long: one host lives through all of it, and must have nothing left at the end.
func TestMachines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &host{runs: map[string]emulation.Machine{}}
		s := New(Config{Host: h, StartTime: 3 * time.Second, Images: []Image{{ID: DefaultImage, BootMode: "uefi", File: "/images/podvm.raw"}}})
		c := newClient(t, s)
		is := func(id, want string, up bool) {
			t.Helper()
			if got := c.state(id); got != want {
				t.Errorf("the instance is %s, want %s", got, want)
			}
			if _, ok := h.get(id); ok != up {
				t.Errorf("its machine is there: %v, want %v", ok, up)
			}
		}
		id := c.run("InstanceInitiatedShutdownBehavior", "terminate")
		is(id, pending, false)
		time.Sleep(5 * time.Second)
		is(id, running, true)
		m, _ := h.get(id)
		if m.VCPUs != 2 || m.MemoryMiB != 8192 || m.Image != "/images/podvm.raw" || m.Addr.String() != "10.0.0.4/24" || m.Gateway.String() != "10.0.0.1" ||
			m.Vendor != "Amazon EC2" || m.MAC != s.Instances()[0].MAC || m.Metadata == nil {
			t.Errorf("machine %+v", m)
		}
		if out := c.do("GetConsoleOutput", "InstanceId", id).at("output"); out != base64.StdEncoding.EncodeToString([]byte("console of "+id)) {
			t.Errorf("console %q", out)
		}
		// It powers itself off.
		m.Exited()
		synctest.Wait()
		is(id, shuttingDown, true)
		time.Sleep(2 * time.Second)
		is(id, terminated, false)
		if reason := c.do("DescribeInstances", "InstanceId.1", id).at("reservationSet/item/instancesSet/item/stateReason/code"); reason != "Client.InstanceInitiatedShutdown" {
			t.Errorf("it ended for %q", reason)
		}
		// It is stopped, started again, and terminated while it is stopped.
		id = c.run()
		time.Sleep(5 * time.Second)
		for range 2 {
			c.do("StopInstances", "InstanceId.1", id)
			is(id, stopping, true)
			time.Sleep(2 * time.Second)
			is(id, stopped, false)
			c.do("StartInstances", "InstanceId.1", id)
			time.Sleep(5 * time.Second)
			is(id, running, true)
		}
		c.do("StopInstances", "InstanceId.1", id)
		time.Sleep(2 * time.Second)
		c.do("TerminateInstances", "InstanceId.1", id)
		is(id, terminated, false)
		// It is terminated before it has started, and while it starts.
		for _, d := range []time.Duration{0, time.Second, 3500 * time.Millisecond} {
			id = c.run()
			time.Sleep(d)
			c.do("TerminateInstances", "InstanceId.1", id)
			time.Sleep(10 * time.Second)
			is(id, terminated, false)
		}
		// Its machine cannot be started.
		h.mu.Lock()
		h.fail = errors.New("no such file")
		h.mu.Unlock()
		id = c.run()
		time.Sleep(10 * time.Second)
		is(id, terminated, false)
		h.mu.Lock()
		h.fail = nil
		h.mu.Unlock()
		// Its host breaks; it is on the spot market, and interrupted.
		id = c.run()
		time.Sleep(5 * time.Second)
		if err := s.Fail(id, "Server.InternalError", "Server.InternalError: the host broke"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		is(id, terminated, false)
		id = c.run("InstanceMarketOptions.MarketType", "spot")
		time.Sleep(5 * time.Second)
		if err := s.Interrupt(id); err != nil {
			t.Fatal(err)
		}
		time.Sleep(119 * time.Second)
		is(id, running, true)
		time.Sleep(3 * time.Second)
		is(id, terminated, false)
		if l := s.Leaks(map[string]string{"owner": "test"}); len(l) != 0 {
			t.Errorf("left: %v", l)
		}
		// Close takes the machines along, those that start included.
		c.run()
		time.Sleep(5 * time.Second)
		c.run()
		time.Sleep(3500 * time.Millisecond)
		c.run()
		s.Close()
		if len(h.runs) != 0 {
			t.Errorf("machines are left: %v", h.runs)
		}
	})
}

// TestShutdown is a guest's own power-off without a machine.
func TestShutdown(t *testing.T) {
	s := New(Config{})
	c := newClient(t, s)
	stays, goes := c.run(), c.run("InstanceInitiatedShutdownBehavior", "terminate")
	for _, id := range []string{stays, goes} {
		if err := s.Shutdown(id); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := c.state(stays), c.state(goes); a != stopped || b != terminated {
		t.Errorf("after their power-off: %s and %s", a, b)
	}
	if err := s.Shutdown("i-00000000"); err == nil {
		t.Error("an instance that is not there was shut down")
	}
}
