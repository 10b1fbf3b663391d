// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"context"
	"encoding/base64"
	"net/netip"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// machine is what runs behind an instance of a Server with a Host. A goroutine starts
// it and stops it; an instance that is stopped and started has one after another.
type machine struct {
	once   sync.Once
	stopCh chan string // the state in which the instance ends; buffered
}

// stop has the machine end and the instance be in state when it has. Only the first
// call counts.
func (m *machine) stop(state string) { m.once.Do(func() { m.stopCh <- state }) }

// startMachine starts a machine for a pending instance. s.mu is held.
func (s *Server) startMachine(i *instance) {
	m := &machine{stopCh: make(chan string, 1)}
	i.machine = m
	spec := emulation.Machine{ID: i.id, VCPUs: i.typ.VCPUs, MemoryMiB: i.typ.MemoryMiB, Image: i.image.file, MAC: i.enis[0].mac,
		Addr: netip.PrefixFrom(i.addr(), i.subnet.CIDR.Bits()), Gateway: i.subnet.Gateway,
		// What Nitro instances say of themselves (User Guide, "Detect whether a host
		// is an EC2 instance"): the asset tag is the instance's id.
		Vendor: "Amazon EC2", Product: i.typ.Name, AssetTag: i.id, Metadata: s.Metadata(i.id)}
	exited := make(chan struct{})
	spec.Exited = sync.OnceFunc(func() { close(exited) })
	s.wg.Go(func() { s.runMachine(i, m, spec, exited) })
}

// runMachine is a machine's life.
func (s *Server) runMachine(i *instance, m *machine, spec emulation.Machine, exited <-chan struct{}) {
	timer := time.NewTimer(s.cfg.StartTime)
	defer timer.Stop()
	end := ""
	select {
	case <-timer.C:
	case end = <-m.stopCh:
	case <-s.run.Done():
		end = terminated
	}
	started := false
	if end == "" {
		err := s.cfg.Host.Start(s.run, spec)
		started = true
		s.mu.Lock()
		now := s.cfg.Now()
		switch {
		case err != nil && i.state(now) == pending:
			s.end(i, now, "Server.InternalError", "Server.InternalError: Internal error on launch: "+err.Error())
		case i.state(now) == pending:
			s.enter(i, now, running)
		}
		s.mu.Unlock()
		select {
		case end = <-m.stopCh:
		case <-exited:
			end = s.exited(i, m)
		case <-s.run.Done():
		}
	}
	least := time.NewTimer(s.cfg.StopTime)
	defer least.Stop()
	if started {
		// Not s.run: what was started must be stopped, whatever ends it.
		_ = s.cfg.Host.Stop(context.WithoutCancel(s.run), spec.ID)
	}
	select {
	case <-least.C:
	case <-s.run.Done():
	}
	if end == "" {
		end = terminated
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i.machine == m {
		i.machine = nil // a stopped instance may be terminated, or get another
	}
	s.enter(i, s.cfg.Now(), end)
	s.settle(s.cfg.Now())
}

// exited is called when a machine has ended by itself: the instance is stopped or
// terminated, as its shutdown behaviour says. It returns the state in which it ends.
func (s *Server) exited(i *instance, m *machine) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shutdown(i, s.cfg.Now())
	return <-m.stopCh // shutdown has asked for it, or somebody before
}

// shutdown is a guest's own power-off. s.mu is held.
func (s *Server) shutdown(i *instance, now time.Time) {
	const code, text = "Client.InstanceInitiatedShutdown", "Client.InstanceInitiatedShutdown: Instance initiated shutdown"
	switch {
	case i.state(now) != running && i.state(now) != pending:
	case i.terminate:
		s.end(i, now, code, text)
	default:
		s.halt(i, now, code, text)
	}
}

// Shutdown has the instance power itself off, as a guest does.
func (s *Server) Shutdown(id string) error {
	return s.act(id, func(i *instance, now time.Time) { s.shutdown(i, now) })
}

// Fail terminates the instance as the service does when its host breaks, with code
// and message such as "Server.InternalError".
func (s *Server) Fail(id, code, message string) error {
	return s.act(id, func(i *instance, now time.Time) { s.end(i, now, code, message) })
}

func (s *Server) act(id string, f func(*instance, time.Time)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	s.settle(now)
	i := s.instances[id]
	if i == nil {
		return unknownID("i-", id)
	}
	f(i, now)
	return nil
}

// after calls f with s.mu held when d has passed, unless the Server is closed before.
func (s *Server) after(d time.Duration, f func()) {
	s.wg.Go(func() {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			s.mu.Lock()
			defer s.mu.Unlock()
			f()
		case <-s.run.Done():
		}
	})
}

func (s *Server) consoleOutput(c *call) (obj, error) {
	id := c.str("InstanceId")
	if err := wellFormed("i-", id); err != nil {
		return nil, err
	}
	i := s.instances[id]
	if i == nil || !i.seen(c.now) {
		return nil, unknownID("i-", id)
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	text := ""
	if s.cfg.Host != nil {
		s.mu.Unlock() // the Host is somebody else
		out, err := s.cfg.Host.Console(id)
		s.mu.Lock()
		if err == nil { // no machine: nothing was printed
			text = base64.StdEncoding.EncodeToString(out)
		}
	}
	return obj{"instanceId": id, "timestamp": c.now, "output": text}, nil
}
