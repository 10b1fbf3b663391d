// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// oomWatch collects kills by the kernel for want of memory. On cgroup v2 one inotify
// descriptor watches every container's memory.events; on v1 libcontainer has an
// eventfd for each.
type oomWatch struct {
	wg sync.WaitGroup

	mu      sync.Mutex
	inotify *os.File                   // guarded by mu; nil until the first container
	watched map[ContainerID]*oomSource // guarded by mu
	pending []ContainerID              // guarded by mu; not delivered, each once
	wake    chan struct{}              // guarded by mu; closed and replaced when pending grows
	poller  context.CancelCauseFunc    // guarded by mu; sends the poll under way home
	closed  bool                       // guarded by mu
}

// oomNotifier tells of kills in a cgroup v1: something comes with each, and the
// channel is closed when the cgroup is removed.
type oomNotifier interface {
	NotifyOOM() (<-chan struct{}, error)
}

// oomSource is one container's counter.
type oomSource struct {
	cgroup cgroups.Manager
	wd     int    // inotify's; -1 on v1
	seen   uint64 // kills that were reported
}

func newOOMWatch() *oomWatch {
	return &oomWatch{watched: make(map[ContainerID]*oomSource), wake: make(chan struct{})}
}

// add watches a container until forget is called.
func (w *oomWatch) add(id ContainerID, v1 oomNotifier, cg cgroups.Manager) (forget func(), err error) {
	src := &oomSource{cgroup: cg, wd: -1}
	w.mu.Lock()
	defer w.mu.Unlock()
	if cgroups.IsCgroup2UnifiedMode() {
		if err := w.openInotify(); err != nil {
			return nil, err
		}
		src.wd, err = unix.InotifyAddWatch(int(w.inotify.Fd()), filepath.Join(cg.Path(""), "memory.events"), unix.IN_MODIFY)
		if err != nil {
			return nil, fmt.Errorf("watch memory.events: %w", err)
		}
	} else {
		events, err := v1.NotifyOOM()
		if err != nil {
			return nil, err
		}
		w.wg.Go(func() { // ends when the cgroup is removed
			for range events {
				w.check(id)
			}
		})
	}
	w.watched[id] = src
	return func() { w.forget(id, src) }, nil
}

// openInotify opens the descriptor and starts its reader. mu is held.
func (w *oomWatch) openInotify() error {
	if w.inotify != nil {
		return nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("inotify_init1", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	w.inotify = f
	w.wg.Go(func() {
		buf := make([]byte, 64*unix.SizeofInotifyEvent)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return // closed
			}
			// Files, not directories, are watched: events have no name. Layout of
			// struct inotify_event: wd, mask, cookie, len.
			for at := 0; at+unix.SizeofInotifyEvent <= n; {
				w.changed(int(int32(binary.NativeEndian.Uint32(buf[at:]))))
				at += unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[at+12:]))
			}
		}
	})
	return nil
}

func (w *oomWatch) changed(wd int) {
	w.mu.Lock()
	var id ContainerID
	for k, s := range w.watched {
		if s.wd == wd {
			id = k
		}
	}
	w.mu.Unlock()
	if id != "" {
		w.check(id)
	}
}

// check reads a container's counter and reports what is new.
func (w *oomWatch) check(id ContainerID) {
	w.mu.Lock()
	src := w.watched[id]
	w.mu.Unlock()
	if src == nil {
		return
	}
	kills, err := src.cgroup.OOMKillCount()
	if err != nil {
		return // the cgroup is gone, and the container with it
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if kills <= src.seen || w.watched[id] != src {
		return
	}
	src.seen = kills
	if !slices.Contains(w.pending, id) {
		w.pending = append(w.pending, id)
		close(w.wake)
		w.wake = make(chan struct{})
	}
}

func (w *oomWatch) forget(id ContainerID, src *oomSource) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.watched[id] != src {
		return
	}
	delete(w.watched, id)
	if src.wd >= 0 && w.inotify != nil {
		// The kernel drops the watch by itself when the cgroup is removed first.
		_, _ = unix.InotifyRmWatch(int(w.inotify.Fd()), uint32(src.wd))
	}
}

// next waits for a container to have been hit. There is one poller: a new one sends
// the one before home with Aborted, because most likely its connection is dead.
func (w *oomWatch) next(ctx context.Context) (ContainerID, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w.mu.Lock()
	if w.poller != nil {
		w.poller(fmt.Errorf("another caller waits for out-of-memory events now: %w", errdefs.ErrAborted))
	}
	w.poller = cancel
	for {
		if err := context.Cause(ctx); err != nil {
			w.mu.Unlock()
			return "", err
		}
		if w.closed {
			w.mu.Unlock()
			return "", fmt.Errorf("the agent is ending: %w", errdefs.ErrUnavailable)
		}
		if len(w.pending) > 0 {
			id := w.pending[0]
			w.pending = w.pending[1:]
			w.mu.Unlock()
			return id, nil
		}
		wake := w.wake
		w.mu.Unlock()
		select {
		case <-wake:
		case <-ctx.Done():
		}
		w.mu.Lock()
	}
}

// close ends the watch and every poll.
func (w *oomWatch) close() {
	w.mu.Lock()
	f := w.inotify
	w.inotify, w.closed = nil, true
	close(w.wake)
	w.wake = make(chan struct{})
	w.mu.Unlock()
	if f != nil {
		_ = f.Close()
	}
	w.wg.Wait()
}
