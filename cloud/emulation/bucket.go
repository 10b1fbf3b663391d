// SPDX-License-Identifier: Apache-2.0

package emulation

import (
	"sync"
	"time"
)

// Bucket is a token bucket, as clouds throttle with. The zero value holds nothing and
// never will. It is safe for concurrent use.
type Bucket struct {
	Max    float64 // tokens it holds at most, and at first
	Refill float64 // tokens a second

	mu    sync.Mutex
	level float64   // at the time of at; guarded by mu
	at    time.Time // zero: never asked, so full; guarded by mu
}

// Take takes n tokens as of now and tells whether there were as many; if not, none is
// taken, and wait is how long until there are (Refill 0: a negative time, never).
func (b *Bucket) Take(now time.Time, n float64) (ok bool, wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at.IsZero() {
		b.level = b.Max
	} else if d := now.Sub(b.at).Seconds(); d > 0 {
		b.level = min(b.Max, b.level+d*b.Refill)
	}
	b.at = now
	if b.level >= n {
		b.level -= n
		return true, 0
	}
	if b.Refill <= 0 || n > b.Max {
		return false, -1
	}
	return false, time.Duration((n - b.level) / b.Refill * float64(time.Second))
}
