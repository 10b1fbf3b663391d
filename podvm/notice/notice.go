// SPDX-License-Identifier: Apache-2.0

// Package notice learns from the cloud what it will do to the machine: that it takes a
// spot instance back, for one. It asks the metadata service again and again; there is no
// other way to be told.
package notice

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// interval is between two questions. EC2 advises 5 s, of the 2 minutes that it gives;
// Azure, which gives 30 s, advises every second, which we do not do: a question wakes the
// machine, and 25 s are enough to end in.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
const interval = 5 * time.Second

// Notice is one announcement.
type Notice struct {
	ID       string // tells it from others of the machine
	Kind     podvmpb.NoticeKind
	Deadline time.Time // zero: the cloud gave no time
	Reason   string    // what the cloud calls it
}

// source is a cloud.
type source interface {
	// subject tells whether the machine is one that is taken back.
	subject(context.Context) (bool, error)
	// poll returns what is announced at present.
	poll(context.Context) ([]Notice, error)
	close()
}

// Watch keeps what was announced. It is safe for concurrent use.
type Watch struct {
	src source

	mu      sync.Mutex
	notices []Notice      // in the order in which they came; guarded by mu
	none    bool          // there will be none; guarded by mu
	changed chan struct{} // closed and replaced when one of the above changes; guarded by mu
}

func newWatch(s source) *Watch { return &Watch{src: s, changed: make(chan struct{})} }

// Run asks until ctx ends. On a machine that is not taken back it returns at once.
func (w *Watch) Run(ctx context.Context) {
	defer w.src.close()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for known := false; ; {
		if !known {
			subject, err := w.src.subject(ctx)
			if err == nil && !subject || errdefs.IsNotFound(err) {
				w.update(nil, true)
				return
			}
			known = err == nil
		}
		if known {
			// A question that fails is put again. Nobody could do anything about it.
			if found, err := w.src.poll(ctx); err == nil {
				w.update(found, false)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// update adds what is new.
func (w *Watch) update(found []Notice, none bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	news := none
	for _, n := range found {
		if w.index(n.ID) < 0 {
			w.notices = append(w.notices, n)
			news = true
		}
	}
	w.none = none
	if news {
		close(w.changed)
		w.changed = make(chan struct{})
	}
}

// index finds a notice; negative: there is none. The caller holds mu.
func (w *Watch) index(id string) int {
	for i, n := range w.notices {
		if n.ID == id {
			return i
		}
	}
	return -1
}

// Next waits for the notice after the one that the caller has seen; "" or one that is not
// known: the first. NotFound: the machine gets none.
func (w *Watch) Next(ctx context.Context, seen string) (Notice, error) {
	for {
		w.mu.Lock()
		next, none, changed := w.index(seen)+1, w.none, w.changed
		if next < len(w.notices) {
			defer w.mu.Unlock()
			return w.notices[next], nil
		}
		w.mu.Unlock()
		if none {
			return Notice{}, fmt.Errorf("the cloud does not take this machine back before it is deleted: %w", errdefs.ErrNotFound)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Notice{}, ctx.Err()
		}
	}
}
