// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// watchMask is what may mean that a volume has changed: "..data" was renamed, or an
// owner, a mode or, by others than the kubelet's writer, a file changed in place.
const watchMask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_ATTRIB | unix.IN_CLOSE_WRITE |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// over says that a watch has ended or is of no more use: the directory is not at its
// path any more.
const over = unix.IN_IGNORED | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_UNMOUNT

// watcher is the pod's one inotify instance: a node has few of them
// (fs.inotify.max_user_instances). Without one, its subscriptions are never complete.
// A watch holds no mount: the kubelet may unmount a volume at any time.
type watcher struct {
	mu     sync.Mutex // guards the fields below and those of the subscriptions
	f      *os.File   // nil: not open
	fd     int        // f's; File.Fd might make it block
	closed bool
	byID   map[int32]*subscription
	done   chan struct{} // closed when read has returned
}

// subscription is a follower's directories.
type subscription struct {
	w      *watcher
	volume string // the volume's own directory
	notify func()
	ids    map[string]int32 // guarded by w.mu; by path
	failed bool             // guarded by w.mu; not all are watched
}

// subscribe returns a subscription without directories. notify is called when
// something has happened in one; it must not wait.
func (w *watcher) subscribe(volume string, notify func()) *subscription {
	return &subscription{w: w, volume: volume, notify: notify, ids: map[string]int32{}}
}

// open opens the instance. mu is held.
func (w *watcher) open() error {
	if w.closed {
		return os.ErrClosed
	}
	if w.f != nil {
		return nil
	}
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	w.f, w.fd = os.NewFile(uintptr(fd), "inotify"), fd
	w.byID = map[int32]*subscription{}
	w.done = make(chan struct{})
	go w.read(w.f)
	return nil
}

// close ends the watcher. Its subscriptions are of no use afterwards.
func (w *watcher) close() {
	w.mu.Lock()
	w.closed = true
	f := w.f
	w.mu.Unlock()
	if f != nil {
		f.Close()
		<-w.done
	}
}

// read hands out the kernel's events until the instance is closed.
func (w *watcher) read(f *os.File) {
	defer close(w.done)
	buf := make([]byte, 8<<10)
	for {
		n, err := f.Read(buf)
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return
		}
		w.dispatch(buf[:n])
	}
}

// dispatch tells the followers of their events, each once.
func (w *watcher) dispatch(b []byte) {
	tell := map[*subscription]bool{}
	w.mu.Lock()
	for len(b) >= unix.SizeofInotifyEvent {
		id, mask := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:end]), "\x00")
		b = b[end:]
		if mask&unix.IN_Q_OVERFLOW != 0 { // anything may have happened
			for _, s := range w.byID {
				tell[s] = true
			}
			continue
		}
		s := w.byID[id]
		if s == nil {
			continue
		}
		if mask&over != 0 {
			s.forget(id, mask&unix.IN_MOVE_SELF != 0)
		} else if id == s.ids[s.volume] && name != "" && name != "..data" {
			continue // the writer at work: "..data" will follow
		}
		tell[s] = true
	}
	w.mu.Unlock()
	for s := range tell {
		s.notify()
	}
}

// forget drops a watch. w.mu is held. One whose directory was moved away still is in
// the kernel.
func (s *subscription) forget(id int32, remove bool) {
	delete(s.w.byID, id)
	for path, have := range s.ids {
		if have == id {
			delete(s.ids, path)
		}
	}
	if remove && !s.w.closed {
		// EINVAL: the kernel was faster.
		_, _ = unix.InotifyRmWatch(s.w.fd, uint32(id))
	}
}

// ensure watches the directories that are not watched yet, and tells whether there
// were any. Given more than the volume's own, it drops those that are not named.
func (s *subscription) ensure(dirs []string) (added bool) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.failed = false
	if err := s.w.open(); err != nil {
		s.failed = true
		return false
	}
	if len(dirs) > 1 {
		for path, id := range s.ids {
			if !slices.Contains(dirs, path) {
				s.forget(id, true)
			}
		}
	}
	for _, path := range dirs {
		if _, ok := s.ids[path]; ok {
			continue
		}
		id, err := unix.InotifyAddWatch(s.w.fd, path, watchMask)
		if err != nil {
			// A directory that is gone has been replaced: reading will tell.
			s.failed = s.failed || !errors.Is(err, fs.ErrNotExist) || path == s.volume
			continue
		}
		if other := s.w.byID[int32(id)]; other != nil && other != s {
			// The same directory by another path. One of the two has to be enough.
			s.failed = true
			continue
		}
		s.w.byID[int32(id)] = s
		s.ids[path] = int32(id)
		added = true
	}
	return added
}

// complete tells whether the kernel reports every change of the volume.
func (s *subscription) complete() bool {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	_, ok := s.ids[s.volume]
	return ok && !s.failed
}

// close drops all watches.
func (s *subscription) close() {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	for _, id := range s.ids {
		s.forget(id, true)
	}
}
