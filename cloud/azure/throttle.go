// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/kata-remote/kata-remote/cloud"
)

// family is a group of requests that Azure counts together.
type family string

const (
	familyPut       family = "create"    // PUT of a VM
	familyDelete    family = "delete"    // DELETE of a VM
	familyGet       family = "read"      // GET of a VM
	familyOperation family = "operation" // GET of a long-running operation's state
	familyList      family = "list"
	familyNetRead   family = "network read"
	familyNetWrite  family = "network write"
	familyOther     family = "other"
)

// limit is a token bucket by the minute, as Azure writes them.
type limit struct{ refill, burst float64 }

// What Azure allows in a region and subscription, and for one VM in it, per minute
// (learn.microsoft.com, "Compute throttling limits", read 2026-11). We stay at 80 %
// of it: other nodes and people use the same subscription, and a request that is
// refused costs more than one that waits.
var (
	wholeLimits = map[family]limit{
		familyPut: {400, 1200}, familyDelete: {400, 1200}, familyGet: {6400, 19200}, familyList: {240, 720},
	}
	eachLimits = map[family]limit{
		familyPut: {9, 9}, familyDelete: {9, 9}, familyGet: {9.6, 28.8}, familyOperation: {12, 36},
	}
)

// longestWait is how long a request may be held back before it ends as Unavailable:
// its caller has better to do, or another place to ask. A create has not.
func (f family) longestWait() time.Duration {
	if f == familyPut {
		return 2 * time.Minute
	}
	return 5 * time.Second
}

// subject is what a request counts for: a family, and the resource within it.
type subject struct {
	family   family
	resource string
}

// throttle holds requests back so that the service need not refuse them. Safe for
// concurrent use.
type throttle struct {
	mu     sync.Mutex
	whole  map[family]*rate.Limiter
	each   map[subject]*rate.Limiter
	closed map[subject]time.Time // not before; guarded by mu, like the maps above
}

// tidyAbove is how many buckets of single resources are kept before the full ones,
// which is how one starts, are dropped.
const tidyAbove = 512

func newThrottle() *throttle {
	t := &throttle{whole: map[family]*rate.Limiter{}, each: map[subject]*rate.Limiter{}, closed: map[subject]time.Time{}}
	for f, l := range wholeLimits {
		t.whole[f] = l.bucket()
	}
	return t
}

func (l limit) bucket() *rate.Limiter {
	return rate.NewLimiter(rate.Limit(l.refill/60), int(l.burst))
}

// wait returns when the request may be sent. Unavailable: that is too far off.
func (t *throttle) wait(ctx context.Context, s subject) error {
	for {
		d, until := t.reserve(s)
		if d <= 0 {
			return ctx.Err()
		}
		if d > s.family.longestWait() {
			return &apiError{status: http.StatusTooManyRequests, code: "TooManyRequests", after: until,
				message: fmt.Sprintf("%s requests are held back for another %s", s.family, d.Round(time.Second))}
		}
		if err := cloud.Pause(ctx, d); err != nil {
			return err
		}
	}
}

// reserve takes a token and returns zero, or how long until there may be one.
func (t *throttle) reserve(s subject) (time.Duration, time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	for _, k := range []subject{{s.family, ""}, s} {
		if until := t.closed[k]; until.After(now) {
			return until.Sub(now), until
		}
		delete(t.closed, k)
	}
	var taken []*rate.Reservation
	var d time.Duration
	for _, b := range []*rate.Limiter{t.whole[s.family], t.bucketOf(s)} {
		if b == nil {
			continue
		}
		r := b.ReserveN(now, 1)
		taken = append(taken, r)
		d = max(d, r.DelayFrom(now))
	}
	if d > 0 {
		for _, r := range taken {
			r.CancelAt(now)
		}
	}
	return d, now.Add(d)
}

// bucketOf needs mu.
func (t *throttle) bucketOf(s subject) *rate.Limiter {
	l, ok := eachLimits[s.family]
	if !ok || s.resource == "" {
		return nil
	}
	if b := t.each[s]; b != nil {
		return b
	}
	if len(t.each) >= tidyAbove {
		for k, b := range t.each {
			if b.Tokens() >= float64(b.Burst()) {
				delete(t.each, k)
			}
		}
	}
	b := l.bucket()
	t.each[s] = b
	return b
}

// refused takes note of a 429. Azure says for how long and not for what: a family
// that is counted for each resource is taken to be over for that one.
func (t *throttle) refused(s subject, until time.Time) {
	if _, ok := eachLimits[s.family]; !ok || s.family == familyPut || s.family == familyDelete {
		s.resource = ""
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if until.After(t.closed[s]) {
		t.closed[s] = until
	}
}

// retryAfter is when a reply wants to be followed by another request; zero: it does
// not say. RFC 9110 §10.2.3.
func retryAfter(resp *http.Response, now time.Time) time.Time {
	v := resp.Header.Get("Retry-After")
	if v == "" {
		return time.Time{}
	}
	if n, err := strconv.ParseFloat(v, 64); err == nil && n >= 0 && n < 1e6 {
		return now.Add(time.Duration(n * float64(time.Second)))
	}
	if at, err := http.ParseTime(v); err == nil && at.After(now) {
		return at
	}
	return time.Time{}
}

// scarce remembers what there was no capacity for. Safe for concurrent use.
type scarce struct {
	mu    sync.Mutex
	until map[candidate]shortage // guarded by mu
}

type shortage struct {
	until time.Time
	why   error
}

// scarceFor: capacity comes back within minutes, and asking sooner costs the next pod
// the time of a refusal, or of an operation that fails at its end.
const scarceFor = 3 * time.Minute

func (s *scarce) add(c candidate, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for k, v := range s.until {
		if !v.until.After(now) {
			delete(s.until, k)
		}
	}
	s.until[c] = shortage{now.Add(scarceFor), why}
}

func (s *scarce) why(c candidate) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for _, k := range []candidate{c, c.anyZone()} {
		if v, ok := s.until[k]; ok && v.until.After(now) {
			return fmt.Errorf("not asked again before %s: %w", v.until.UTC().Format(time.TimeOnly), v.why)
		}
	}
	return nil
}

// keyed orders the work on one thing. Waiting ends with the context.
type keyed struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed when given back; guarded by mu
}

func (k *keyed) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		busy := k.held[key]
		if busy == nil {
			unlock = k.take(key)
			k.mu.Unlock()
			return unlock, nil
		}
		k.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// try is lock for those who need not wait.
func (k *keyed) try(key string) (unlock func(), ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.held[key] != nil {
		return nil, false
	}
	return k.take(key), true
}

// take needs mu, and the key to be free.
func (k *keyed) take(key string) (unlock func()) {
	mine := make(chan struct{})
	k.held[key] = mine
	return func() {
		k.mu.Lock()
		delete(k.held, key)
		k.mu.Unlock()
		close(mine)
	}
}
