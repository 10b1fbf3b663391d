// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"slices"
	"sync"
	"time"
)

// limit is one of the throttles of a region: a token bucket of our own that is kept
// below the service's, so that a burst waits here, in order, and is not refused
// there. Other users of the account share the service's bucket; when it refuses all
// the same, the rate falls to half and comes back bit by bit.
type limit struct {
	burst float64
	top   float64 // calls a second, when nobody else is in the way

	mu    sync.Mutex
	rate  float64   // now; guarded by mu
	level float64   // at the time of at; guarded by mu
	at    time.Time // guarded by mu
	cut   time.Time // when rate was last halved; guarded by mu
	// waiting callers, the urgent ones and the others, first come first; guarded by mu
	queue [2][]*waiter
}

// waiter is a caller in the queue. turn tells it to look again.
type waiter struct{ turn chan struct{} }

// Numbers of the service, per account and region: bucket and refill per second (EC2
// Developer Guide, "Request throttling", 2026). Ours are a little less, which costs a
// burst of 200 launches 4 % of its time.
//
//	RunInstances             5   2
//	TerminateInstances     100   5
//	Describe*              100  20 (with filter or pagination, as all of ours)
//	DeleteVolume, DeleteNetworkInterface, other changes  100 or 50, 5
func newLimits() limits {
	return limits{run: newLimit(4, 1.92), terminate: newLimit(90, 4.8), describe: newLimit(90, 19), change: newLimit(45, 4.8)}
}

type limits struct{ run, terminate, describe, change *limit }

const (
	// minShare is how far the rate falls at most: to one part in this many.
	minShare = 16
	// regain is what each success gives back: one part in this many of the top rate.
	regain = 20
	// cutPause is between two cuts: refusals of one burst are one event.
	cutPause = time.Second
)

func newLimit(burst, rate float64) *limit {
	return &limit{burst: burst, top: rate, rate: rate, level: burst}
}

// wait takes a token, and waits for it if need be. Urgent callers go before others:
// what is deleted frees what others wait for.
func (l *limit) wait(ctx context.Context, urgent bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w := &waiter{turn: make(chan struct{}, 1)}
	lane := 1
	if urgent {
		lane = 0
	}
	l.mu.Lock()
	l.queue[lane] = append(l.queue[lane], w)
	for {
		var timer <-chan time.Time
		if l.head() == w {
			d := l.take(time.Now())
			if d == 0 {
				l.leave(lane, w)
				l.mu.Unlock()
				return nil
			}
			timer = time.After(d)
		}
		l.mu.Unlock()
		select {
		case <-timer:
		case <-w.turn:
		case <-ctx.Done():
			l.mu.Lock()
			l.leave(lane, w)
			l.mu.Unlock()
			return ctx.Err()
		}
		l.mu.Lock()
	}
}

// head needs mu.
func (l *limit) head() *waiter {
	for _, q := range l.queue {
		if len(q) > 0 {
			return q[0]
		}
	}
	return nil
}

// leave needs mu. It wakes who is first now.
func (l *limit) leave(lane int, w *waiter) {
	l.queue[lane] = slices.DeleteFunc(l.queue[lane], func(o *waiter) bool { return o == w })
	if h := l.head(); h != nil {
		select {
		case h.turn <- struct{}{}:
		default:
		}
	}
}

// take needs mu. It takes a token and returns 0, or returns how long until there is
// one.
func (l *limit) take(now time.Time) time.Duration {
	l.fill(now)
	if l.level >= 1 {
		l.level--
		return 0
	}
	// A nanosecond more than it takes, for what the division loses.
	return time.Duration((1-l.level)/l.rate*float64(time.Second)) + 1
}

// fill needs mu. It adds what has come in.
func (l *limit) fill(now time.Time) {
	if !l.at.IsZero() {
		l.level = min(l.burst, l.level+now.Sub(l.at).Seconds()*l.rate)
	}
	l.at = now
}

// refused tells that the service has throttled a call.
func (l *limit) refused() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if !l.cut.IsZero() && now.Sub(l.cut) < cutPause {
		return
	}
	l.cut = now
	l.at, l.level = now, 0
	l.rate = max(l.rate/2, l.top/minShare)
}

// passed tells that the service has let a call through.
func (l *limit) passed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rate < l.top {
		l.fill(time.Now()) // what has come in came at the old rate
		l.rate = min(l.top, l.rate+l.top/regain)
	}
}
