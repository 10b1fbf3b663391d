// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// A follower keeps one volume in the guest as it is on the node, for all containers
// that use it. It is one goroutine:
//
//	        kicked: the node changed it, or a container wants it
//	waiting ------------------------------------------------------> watching
//	   ^                                                               | every directory is watched
//	   |                      nothing new                              v
//	   +------------------------------------------------------------ reading
//	   |                      done, or tried again after a pause       | another digest
//	   +------------------------------------------------------------ sending
//
// It watches before it reads, and reads again while there was something new to watch:
// no change goes between the two. What it sent counts only when the agent has said
// so; a broken connection is the sender's to repeat.

const (
	// pollInterval is how often a volume is looked at that cannot be watched: it is
	// missing, or the node has no more inotify watches (fs.inotify.max_user_watches).
	// A container is to see an update within 2 s.
	pollInterval = time.Second
	// retryMin is the first pause after a revision that did not arrive; it doubles up to
	// pollInterval. retryMax is that after one that the agent will not take, because it
	// has no room: only time or another revision helps.
	retryMin = 100 * time.Millisecond
	retryMax = 10 * time.Second
	// maxWatched bounds the directories of one volume that are watched: the kubelet's
	// writer changes "..data", and what else can change is their mode and owner.
	maxWatched = 64
)

// follower follows one volume.
type follower struct {
	source, path string // on the node, in the guest
	kick         chan struct{}
	ended        chan struct{} // closed when run has returned

	// guarded by Set.mu
	refs int
	stop context.CancelFunc // nil: not running

	mu      sync.Mutex   // guards waiters
	waiters []chan error // of sync, since the last look

	// The goroutine's own.
	number   uint64 // of the last revision that was sent
	sent     [sha256.Size]byte
	failures int
}

func newFollower(source, path string) *follower {
	return &follower{source: source, path: path, kick: make(chan struct{}, 1), ended: make(chan struct{})}
}

// sync returns when the guest has the volume as it is on the node now, or why not.
func (f *follower) sync(ctx context.Context) error {
	done := make(chan error, 1)
	f.mu.Lock()
	f.waiters = append(f.waiters, done)
	f.mu.Unlock()
	f.poke()
	select {
	case err := <-done:
		return err
	case <-f.ended:
		return guest.ErrDead
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (f *follower) poke() {
	select {
	case f.kick <- struct{}{}:
	default:
	}
}

// run follows the volume until ctx ends or the guest is gone.
func (f *follower) run(ctx context.Context, w *watcher, out sender) {
	defer close(f.ended)
	watch := w.subscribe(f.source, f.poke)
	defer watch.close()
	for {
		f.mu.Lock()
		waiters := f.waiters
		f.waiters = nil
		f.mu.Unlock()
		watched, err := f.update(ctx, watch, out)
		for _, done := range waiters {
			done <- err
		}
		if ctx.Err() != nil || errors.Is(err, guest.ErrDead) {
			return
		}
		var again <-chan time.Time
		switch {
		case err != nil:
			again = time.After(f.failed(ctx, err, len(waiters) > 0))
		case !watched:
			again = time.After(pollInterval)
			f.failures = 0
		default:
			f.failures = 0
		}
		select {
		case <-f.kick:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

// failed returns the pause before the next attempt. The first failure in a row is
// logged, unless a container's creation failed with it.
func (f *follower) failed(ctx context.Context, err error, told bool) time.Duration {
	f.failures++
	if f.failures == 1 && !told {
		log.G(ctx).WithError(err).WithField(logkey.Volume, f.source).Warn("volume in the pod VM is not up to date, trying again")
	}
	if errdefs.IsResourceExhausted(err) || errdefs.IsInvalidArgument(err) {
		return retryMax
	}
	return min(retryMin<<min(f.failures-1, 10), pollInterval)
}

// update looks at the volume and sends what the guest does not have. watched tells
// whether the kernel will report the next change.
func (f *follower) update(ctx context.Context, watch *subscription, out sender) (watched bool, err error) {
	var r *revision
	for range maxLooks {
		added := watch.ensure([]string{f.source})
		if r, err = readRevision(ctx, f.source); err != nil {
			return false, err
		}
		if more := watch.ensure(r.dirs[:min(len(r.dirs), maxWatched)]); !added && !more {
			break
		}
	}
	if r.digest == f.sent {
		return watch.complete(), nil
	}
	f.number++
	start := time.Now()
	if err := out.send(ctx, f.number, r.archive); err != nil {
		return false, err
	}
	log.G(ctx).WithField(logkey.Volume, f.source).WithField(logkey.Duration, time.Since(start).Milliseconds()).Debugf("revision %d is in the pod VM", f.number)
	f.sent = r.digest
	return watch.complete(), nil
}
