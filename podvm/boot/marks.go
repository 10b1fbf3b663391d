// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"golang.org/x/sys/unix"
)

// sinceBootKey holds the time of a mark in milliseconds since the kernel started.
const sinceBootKey = "boot_ms"

// marks records when the steps of a start were done. They are logged together at
// its end: an emulated serial line takes a millisecond for a hundred characters, and
// nobody reads them sooner.
type marks struct {
	mu    sync.Mutex
	start time.Duration // since boot; guarded by mu, like all below
	steps []mark
}

type mark struct {
	name string
	at   time.Duration // since boot
}

func newMarks() *marks { return &marks{start: sinceBoot()} }

// done records that a step was done now.
func (m *marks) done(step string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.steps = append(m.steps, mark{name: step, at: sinceBoot()})
}

// log writes one record per step, in the order in which they ended. Their durations
// are since the program's start, because steps overlap.
func (m *marks) log(l *slog.Logger) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.steps {
		l.LogAttrs(context.Background(), slog.LevelInfo, "step done",
			slog.String(logkey.Step, s.name),
			slog.Float64(logkey.Duration, milliseconds(s.at-m.start)),
			slog.Float64(sinceBootKey, milliseconds(s.at)))
	}
	m.steps = nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// sinceBoot is the time since the kernel started its clock.
func sinceBoot() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
