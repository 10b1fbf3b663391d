// SPDX-License-Identifier: Apache-2.0

package fakeec2

import "time"

// Fault makes calls go wrong. It is due for the calls it matches; empty fields match
// all.
type Fault struct {
	Action string // such as "RunInstances"
	Type   string // instance type of a RunInstances
	Zone   string // zone of a RunInstances, explicit or its subnet's
	Market string // "spot" or "on-demand", of a RunInstances
	// Skip lets so many matching calls pass first; Times is how many are then hit. 0: all.
	Skip, Times int

	// What happens, in this order. Delay is waited before anything else, on the time
	// package's clock.
	Delay time.Duration
	Err   *Error // instead of the effect
	// Partial has RunInstances fail with this error after volume and network
	// interface were made, which stay.
	Partial *Error
	// Dies has RunInstances succeed, and the instance terminated with this code and
	// message where it would have been running.
	Dies *Error
	// Lost closes the connection after the effect; Hang answers nothing until the
	// caller leaves; Malformed cuts the reply's XML short; Slow writes the reply's
	// body one byte at a time, so long apart.
	Lost, Hang, Malformed bool
	Slow                  time.Duration
}

type fault struct {
	Fault
	seen, hit int
}

// Inject adds a fault and returns how many calls it has hit so far. Of several that
// match a call, the first one that is due acts, and the later ones do not count it.
func (s *Server) Inject(f Fault) (hits func() int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := &fault{Fault: f}
	s.faults = append(s.faults, x)
	return func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return x.hit
	}
}

// ClearFaults ends all faults.
func (s *Server) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// faultFor finds the fault for a call; s.mu is held.
func (s *Server) faultFor(action string, p *params) Fault {
	typ, zone, market := "", "", ""
	if action == "RunInstances" {
		typ, zone, market = p.str("InstanceType"), s.zoneOf(p), marketOf(p)
	}
	for _, f := range s.faults {
		if f.Action != "" && f.Action != action || f.Type != "" && f.Type != typ ||
			f.Zone != "" && f.Zone != zone || f.Market != "" && f.Market != market {
			continue
		}
		f.seen++
		if f.seen <= f.Skip || f.Times > 0 && f.seen > f.Skip+f.Times {
			continue
		}
		f.hit++
		return f.Fault
	}
	return Fault{}
}
