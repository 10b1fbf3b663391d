// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// host is one whose machines take a second to start and to stop.
type host struct {
	mu       sync.Mutex
	machines map[string]emulation.Machine
	fail     error
}

func (h *host) Start(ctx context.Context, m emulation.Machine) error {
	time.Sleep(time.Second)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fail != nil {
		return h.fail
	}
	if _, ok := h.machines[m.ID]; ok {
		return errors.New("there is a machine " + m.ID)
	}
	h.machines[m.ID] = m
	return nil
}

func (h *host) Stop(ctx context.Context, id string) error {
	time.Sleep(time.Second)
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.machines, id)
	return nil
}

func (h *host) Console(id string) ([]byte, error) { return []byte("console of " + id), nil }

func (h *host) failWith(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail = err
}

func (h *host) running() []emulation.Machine {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []emulation.Machine
	for _, m := range h.machines {
		out = append(out, m)
	}
	return out
}

// hosted runs f with an emulation that has a host, on the bubble's clock.
func hosted(t *testing.T, f func(t *testing.T, c *client, h *host)) {
	synctest.Test(t, func(t *testing.T) {
		h := &host{machines: map[string]emulation.Machine{}}
		s := New(Config{Host: h, Timing: Timing{RetryAfter: -1}, Unthrottled: true,
			Images: []Image{{ID: Config{}.ImageID("", "", "1.0.0"), Path: "/images/podvm"}}})
		defer s.Close()
		c := &client{t: t, s: s}
		c.login()
		f(t, c, h)
	})
}

// TestHost: a machine behind an instance lives as long as that.
func TestHost(t *testing.T) {
	hosted(t, func(t *testing.T, c *client, h *host) {
		a := c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
		time.Sleep(3 * time.Second) // Timing.Start
		synctest.Wait()
		if len(h.running()) != 0 || c.power("a") != "starting" {
			t.Errorf("at its start: %v, %s", h.running(), c.power("a"))
		}
		time.Sleep(time.Second) // of the host
		synctest.Wait()
		m := h.running()[0]
		vm := c.s.VMs()[0]
		if m.ID != vm.MachineID || m.VCPUs != 2 || m.MemoryMiB != 8192 || m.Image != "/images/podvm" || m.MAC != vm.MAC || m.Addr.String() != "10.0.0.4/24" ||
			m.Gateway.String() != "10.0.0.1" || m.AssetTag != azureAssetTag || m.CDROM == nil {
			t.Errorf("machine: %+v", m)
		}
		if st, body := ask(m.Metadata, http.MethodGet, "/metadata/instance/compute/userData?api-version=2021-01-01&format=text", ""); st != 200 || body != "aGVsbG8=" {
			t.Errorf("its metadata: %d %s", st, body)
		}
		if out, err := c.s.Console(vm.ID); err != nil || string(out) != "console of "+m.ID {
			t.Errorf("console: %s %v", out, err)
		}
		time.Sleep(8 * time.Second) // Timing.Create
		if st := c.want(http.StatusOK, http.MethodGet, a.header.Get("Azure-AsyncOperation"), nil); text(st.body, "status") != "Succeeded" {
			t.Errorf("operation: %s", st.raw)
		}
		m.Exited()
		if p := c.power("a"); p != "stopped" {
			t.Errorf("after its end the machine is %s", p)
		}
		d := c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil)
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if st := c.want(http.StatusOK, http.MethodGet, d.header.Get("Azure-AsyncOperation"), nil); text(st.body, "status") != "Succeeded" || len(h.running()) != 0 {
			t.Errorf("deletion: %s, %v", st.raw, h.running())
		}
	})
}

// TestHostPreempted: a DELETE while the machine is being started stops it.
func TestHostPreempted(t *testing.T) {
	hosted(t, func(t *testing.T, c *client, h *host) {
		c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
		time.Sleep(3500 * time.Millisecond)
		c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil)
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if l := c.s.Leaks(nil); len(l) != 0 || len(h.running()) != 0 {
			t.Errorf("left: %q, %v", l, h.running())
		}
	})
}

// TestHostFails: a machine that does not start is a failed creation; one that is
// running when the emulation ends is stopped.
func TestHostFails(t *testing.T) {
	hosted(t, func(t *testing.T, c *client, h *host) {
		h.failWith(errors.New("no memory"))
		a := c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
		time.Sleep(time.Minute)
		if st := c.want(http.StatusOK, http.MethodGet, a.header.Get("Azure-AsyncOperation"), nil); text(st.body, "error.code") != "VMStartTimedOut" {
			t.Errorf("operation: %s", st.raw)
		}
		h.failWith(nil)
		c.want(http.StatusCreated, http.MethodPut, vmID("b"), vmBody("b"))
		time.Sleep(time.Minute)
		if len(h.running()) != 1 {
			t.Fatalf("machines: %v", h.running())
		}
		c.s.Close()
		if len(h.running()) != 0 {
			t.Errorf("after Close: %v", h.running())
		}
	})
}

// TestConcurrent: many clients at once, each with a machine of its own.
func TestConcurrent(t *testing.T) {
	hosted(t, func(t *testing.T, c *client, h *host) {
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				name := "m" + strconv.Itoa(i)
				a, err := c.try(c.request(http.MethodPut, vmID(name), vmBody(name)))
				if err != nil || a.status != http.StatusCreated {
					t.Errorf("PUT %s: %d %v %s", name, a.status, err, a.raw)
				}
				time.Sleep(time.Duration(i) * 500 * time.Millisecond)
				a, err = c.try(c.request(http.MethodDelete, vmID(name), nil))
				if err != nil || a.status != http.StatusAccepted {
					t.Errorf("DELETE %s: %d %v %s", name, a.status, err, a.raw)
				}
			})
		}
		time.Sleep(10 * time.Second)
		addrs := map[string]bool{}
		for _, m := range h.running() {
			addrs[m.Addr.String()+m.MAC] = true
		}
		if len(addrs) == 0 || len(addrs) != len(h.running()) {
			t.Errorf("%d machines with %d addresses", len(h.running()), len(addrs))
		}
		wg.Wait()
		time.Sleep(time.Minute)
		synctest.Wait()
		if l := c.s.Leaks(nil); len(l) != 0 || len(h.running()) != 0 {
			t.Errorf("left: %q, %v", l, h.running())
		}
	})
}
