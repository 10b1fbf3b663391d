// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// fakeClock is a machine's clock that stands still.
type fakeClock struct {
	at      time.Time
	slewing time.Duration
	stepped bool
}

func (f *fakeClock) clock() clock {
	return clock{
		now:  func() time.Time { return f.at },
		step: func(to time.Time) error { f.at, f.stepped = to, true; return nil },
		slew: func(by time.Duration) error { f.slewing = by; return nil },
	}
}

func TestSetGuestDateTime(t *testing.T) {
	g := newGuest(t)
	now := time.Unix(1_700_000_000, 123456000)
	set := func(f *fakeClock, to time.Time) {
		t.Helper()
		g.agent.clock = f.clock()
		must[any](t)(g.SetGuestDateTime(g.ctx(), &agentpb.SetGuestDateTimeRequest{Sec: to.Unix(), Usec: int64(to.Nanosecond() / 1000)}))
	}
	check := func(off time.Duration, step bool, slew time.Duration) {
		t.Helper()
		f := &fakeClock{at: now, slewing: time.Hour}
		set(f, now.Add(off))
		want := now
		if step {
			want = now.Add(off)
		}
		if f.stepped != step || !f.at.Equal(want) || f.slewing != slew {
			t.Errorf("off by %v: stepped %v to %v, slews %v; want %v, %v, %v", off, f.stepped, f.at, f.slewing, step, want, slew)
		}
	}
	// Before the first container.
	check(0, false, 0)
	check(9*time.Millisecond, false, 0)
	check(20*time.Millisecond, true, 0)
	check(-20*time.Millisecond, true, 0)
	g.sandbox()
	g.create("main", g.spec("true"))
	for _, tc := range []struct {
		off  time.Duration
		step bool
		slew time.Duration
	}{
		{0, false, 0}, {-9 * time.Millisecond, false, 0},
		{20 * time.Millisecond, false, 20 * time.Millisecond}, {-20 * time.Millisecond, false, -20 * time.Millisecond},
		{499 * time.Millisecond, false, 499 * time.Millisecond}, {500 * time.Millisecond, true, 0}, {24 * time.Hour, true, 0},
		{-1999 * time.Millisecond, false, -1999 * time.Millisecond}, {-2 * time.Second, true, 0}, {-24 * time.Hour, true, 0},
	} {
		check(tc.off, tc.step, tc.slew)
	}
}

func TestSetGuestDateTimeFails(t *testing.T) {
	g := newGuest(t)
	g.agent.clock = (&fakeClock{at: time.Unix(1_000, 0)}).clock()
	g.agent.clock.step = func(time.Time) error { return errors.New("no right to") }
	_, err := g.SetGuestDateTime(g.ctx(), &agentpb.SetGuestDateTimeRequest{Sec: 1_700_000_000})
	wantClass(t, "a clock that cannot be set", err, errdefs.ErrInternal)
	for _, bad := range []*agentpb.SetGuestDateTimeRequest{{Sec: -1}, {Sec: 1, Usec: -1}, {Sec: 1, Usec: 1_000_000}} {
		_, err := g.SetGuestDateTime(g.ctx(), bad)
		wantClass(t, bad.String(), err, errdefs.ErrInvalidArgument)
	}
}
