// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// The guest's clock starts from its machine's, by the kernel, and is kept by whoever
// calls SetGuestDateTime, at any time and as often as they like. A call tells the
// time at which it was sent. The clock being behind that is certain and it being ahead
// is not, since the call itself takes time; so it steps forward early and back late,
// and in between is slewed, which no program notices. Before the first container
// there is no program, and every difference is a step.
const (
	// clockNoise is what a call's own way through a busy guest makes of its time:
	// below it nothing is done.
	clockNoise = 10 * time.Millisecond
	// clockForward is how far behind the clock steps. The kernel slews by half a
	// millisecond per second: more would take over a quarter of an hour.
	clockForward = 500 * time.Millisecond
	// clockBack is how far ahead it steps: more than any call takes.
	clockBack = 2 * time.Second
)

// clock is how a machine's clock is read and set.
type clock struct {
	now func() time.Time
	// step sets it.
	step func(time.Time) error
	// slew lets it run faster or slower until it has gained by; zero ends an earlier
	// slew.
	slew func(by time.Duration) error
}

var kernelClock = clock{
	now: time.Now,
	step: func(to time.Time) error {
		ts := unix.NsecToTimespec(to.UnixNano())
		return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
	},
	slew: func(by time.Duration) error {
		// adjtimex(2): a single shot takes microseconds and replaces the one before.
		_, err := unix.Adjtimex(&unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: by.Microseconds()})
		return err
	},
}

// set brings the clock to a time. unused: nothing has looked at it yet.
func (c clock) set(to time.Time, unused bool) error {
	off := to.Sub(c.now().Round(0)) // by the wall clock: without the monotonic reading
	forward, back := clockForward, clockBack
	if unused {
		forward, back = clockNoise, clockNoise
	}
	switch {
	case off >= forward, off <= -back:
		if err := c.slew(0); err != nil {
			return err
		}
		return c.step(to)
	case off >= clockNoise, off <= -clockNoise:
		return c.slew(off)
	}
	return c.slew(0)
}

// SetGuestDateTime sets the guest's clock.
func (s *service) SetGuestDateTime(_ context.Context, req *agentpb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	if req.Sec < 0 || req.Usec < 0 || req.Usec >= 1_000_000 {
		return empty(fmt.Errorf("%d.%06d is no time: %w", req.Sec, req.Usec, errdefs.ErrInvalidArgument))
	}
	s.a.mu.Lock()
	unused := len(s.a.containers) == 0
	s.a.mu.Unlock()
	if err := s.a.clock.set(time.Unix(req.Sec, req.Usec*1000), unused); err != nil {
		return empty(fmt.Errorf("set the clock: %w", err))
	}
	return empty(nil)
}
