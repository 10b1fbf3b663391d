// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/shim/volume/volumetest"
)

// seen waits until a volume in the guest has a content.
func (p *pod) seen(path string, want map[string]string) {
	p.t.Helper()
	p.eventually(func() error {
		have := p.content(path)
		if maps.Equal(want, have) {
			return nil
		}
		return fmt.Errorf("want %.200v, have %.200v", want, have)
	})
}

// TestFollow: a volume that two containers mount is sent once, follows the node, down
// to nothing and back, with owners and modes, and goes with the last of the two.
func TestFollow(t *testing.T) {
	k := newKubelet(t)
	w := k.writer("configmap", "cfg")
	k.must(w.Write(map[string]string{"colour": "blue", "sub/dir/deep": "x", "empty": ""}, 34), os.Chmod(w.Dir, os.ModeSetgid|0o777))
	p := newPod(t, ours())
	first := p.bring("one", bind(w.Dir, "/etc/cfg", "ro"))
	at := first.Volumes[0].GuestPath
	if second := p.bring("two", bind(w.Dir, "/other", "ro")); second.Volumes[0].GuestPath != at || !slices.Contains(second.Mounts()[0].Options, "ro") {
		t.Errorf("the second container has it at %s, the first at %s", second.Volumes[0].GuestPath, at)
	}
	files, revision := p.agent.Volume(at)
	if revision != 1 || p.count("PutVolume") != 1 {
		t.Errorf("revision %d after %d calls", revision, p.count("PutVolume"))
	}
	if f := files["."]; f.Mode != unix.S_IFDIR|0o2777 {
		t.Errorf("its directory: %+v", f)
	}
	if f := files["..2026_11_21_10_00_00.1/colour"]; string(f.Data) != "blue" || f.GID != 34 || f.Mode != unix.S_IFREG|0o644 {
		t.Errorf("a file: %+v", f)
	}
	if _, ok := files["..2026_11_21_10_00_00.1/sub/dir/deep"]; !ok || files["..data"].Target != "..2026_11_21_10_00_00.1" {
		t.Errorf("files: %v", slices.Sorted(maps.Keys(files)))
	}
	for _, content := range []map[string]string{{"colour": "red", "new": "1"}, {}, {"a/b/c": "2"}} {
		k.must(w.Write(content, 34))
		p.seen(at, content)
	}
	// Nothing of what follows moves "..data".
	data, _ := os.Readlink(filepath.Join(w.Dir, "..data"))
	k.must(os.Chmod(filepath.Join(w.Dir, data, "a/b/c"), 0o600))
	p.eventually(func() error {
		files, _ := p.agent.Volume(at)
		if f := files[data+"/a/b/c"]; f.Mode != unix.S_IFREG|0o600 {
			return fmt.Errorf("%+v", f)
		}
		return nil
	})
	p.set.Release("one")
	k.must(w.Write(map[string]string{"still": "followed"}, 0))
	p.seen(at, map[string]string{"still": "followed"})
	p.set.Release("two")
	p.eventually(func() error {
		if left := p.agent.Volumes(); len(left) > 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	calls := p.count("PutVolume")
	k.must(w.Write(map[string]string{"nobody": "looks"}, 0))
	if again := p.bring("three", bind(w.Dir, "/etc/cfg")).Volumes[0].GuestPath; again == at || p.count("PutVolume") != calls+1 {
		t.Errorf("for the third container: %s after %s, %d calls", again, at, p.count("PutVolume")-calls)
	}
}

// TestFollowHastyWriter: of 200 updates at full speed, by both generations of the
// kubelet's writer, while the connection breaks again and again, the guest gets only
// whole ones, none older than one before, and the last.
func TestFollowHastyWriter(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late owners %v", late), func(t *testing.T) {
			const updates = 200
			k := newKubelet(t)
			w := k.writer("projected", "token")
			w.Late = late
			k.must(w.Write(volumetest.Numbered(0), 1000))
			p := newPod(t, ours())
			at := p.bring("app", bind(w.Dir, "/token", "ro")).Volumes[0].GuestPath
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() {
				for last := 0; ; {
					select {
					case <-stop:
						return
					case <-time.After(time.Millisecond): // leaves the others a processor
					}
					n, err := volumetest.Whole(p.content(at))
					if err == nil && n < last {
						err = fmt.Errorf("revision %d after %d", n, last)
					}
					if err != nil {
						t.Error(err)
						return
					}
					last = n
				}
			})
			for n := 1; n <= updates; n++ {
				if err := w.Write(volumetest.Numbered(n), 1000+n); err != nil {
					t.Error(err)
				}
				if n%20 == 0 {
					p.adaptor.Cut()
				}
			}
			p.seen(at, volumetest.Numbered(updates))
			p.eventually(func() error { // the owners too
				files, _ := p.agent.Volume(at)
				if f := files[files["..data"].Target+"/sub/c"]; f.GID != 1000+updates {
					return fmt.Errorf("%+v", f)
				}
				return nil
			})
			close(stop)
			wg.Wait()
		})
	}
}

// TestFollowReplaced: the volume's directory is removed and made again, moved away
// with another in its place, and unmounted: it is followed by its path.
func TestFollowReplaced(t *testing.T) {
	k := newKubelet(t)
	w := k.writer("secret", "s")
	k.must(w.Write(map[string]string{"k": "1"}, 0))
	p := newPod(t, ours())
	at := p.bring("app", bind(w.Dir, "/s", "ro")).Volumes[0].GuestPath
	k.must(os.RemoveAll(w.Dir), os.Mkdir(w.Dir, 0o755), w.Write(map[string]string{"k": "2"}, 0))
	p.seen(at, map[string]string{"k": "2"})
	other := k.writer("secret", "other")
	k.must(other.Write(map[string]string{"k": "3"}, 0), unix.Renameat2(unix.AT_FDCWD, w.Dir, unix.AT_FDCWD, other.Dir, unix.RENAME_EXCHANGE))
	p.seen(at, map[string]string{"k": "3"})
	k.must(w.Write(map[string]string{"k": "4"}, 0))
	p.seen(at, map[string]string{"k": "4"})
	k.must(unix.Mount("tmpfs", w.Dir, "tmpfs", 0, ""))
	defer unix.Unmount(w.Dir, unix.MNT_DETACH)
	k.must(w.Write(map[string]string{"k": "5"}, 0))
	p.set.mu.Lock()
	f := p.set.followers[w.Dir]
	p.set.mu.Unlock()
	f.poke() // a mount on top is not reported, and the kubelet makes none
	p.seen(at, map[string]string{"k": "5"})
	k.must(unix.Unmount(w.Dir, 0))
	p.seen(at, map[string]string{"k": "4"})
	k.must(w.Write(map[string]string{"k": "6"}, 0))
	p.seen(at, map[string]string{"k": "6"})
}

// TestFollowBroken: the connection breaks between the pieces of an update, and in
// another the answer is lost after the switch. Nothing is lost, and what a container
// sees is the revision before until the new one is there.
func TestFollowBroken(t *testing.T) {
	agent := ours()
	var p *pod
	var at string
	var armed, puts atomic.Int32
	agent.Fault = func(_ context.Context, method string) error {
		if method == "PutVolume" {
			puts.Add(1)
			if armed.Load() > 0 && armed.Add(-1) == 0 {
				p.adaptor.Cut()
			}
		}
		return nil
	}
	k := newKubelet(t)
	w := k.writer("configmap", "cfg")
	big := func(c string) map[string]string {
		return map[string]string{"a": strings.Repeat(c, 1<<20), "b": strings.Repeat(c, 1<<20), "c": c}
	}
	k.must(w.Write(big("0"), 0))
	p = newPod(t, agent)
	at = p.bring("app", bind(w.Dir, "/cfg", "ro")).Volumes[0].GuestPath
	p.seen(at, big("0"))
	for n := 1; n <= 3; n++ { // the cut comes with the first, second or third piece
		armed.Store(int32(n))
		k.must(w.Write(big(fmt.Sprint(n)), 0))
		p.seen(at, big(fmt.Sprint(n)))
	}
	if armed.Load() != 0 {
		t.Error("the connection was not cut")
	}
}

// TestFollowFull: the guest has no room for an update; the volume follows again with
// one that fits. A container for which there never was room is told.
func TestFollowFull(t *testing.T) {
	agent := ours()
	var full atomic.Bool
	var refused atomic.Int32
	agent.Fault = func(_ context.Context, method string) error {
		if method == "PutVolume" && full.Load() {
			refused.Add(1)
			return errdefs.ErrResourceExhausted.WithMessage("no space left")
		}
		return nil
	}
	k := newKubelet(t)
	w := k.writer("configmap", "cfg")
	k.must(w.Write(map[string]string{"k": "1"}, 0))
	p := newPod(t, agent)
	at := p.bring("app", bind(w.Dir, "/cfg", "ro")).Volumes[0].GuestPath
	full.Store(true)
	k.must(w.Write(map[string]string{"k": "2"}, 0))
	p.eventually(func() error {
		if refused.Load() == 0 {
			return errors.New("no update was sent")
		}
		return nil
	})
	p.seen(at, map[string]string{"k": "1"})
	plan, err := p.plan("other", bind(w.Dir, "/cfg", "ro"))
	if err == nil {
		err = plan.Bring(p.context(), p.conn)
	}
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "volume at /cfg") {
		t.Errorf("a container that needs the update: %v", err)
	}
	p.set.Release("other")
	full.Store(false)
	k.must(w.Write(map[string]string{"k": "3"}, 0))
	p.seen(at, map[string]string{"k": "3"})
}

// TestFollowUnwatched: without inotify a volume is looked at again and again.
func TestFollowUnwatched(t *testing.T) {
	k := newKubelet(t)
	w := k.writer("configmap", "cfg")
	k.must(w.Write(map[string]string{"k": "1"}, 0))
	p := newPod(t, ours())
	p.set.watcher.close()
	at := p.bring("app", bind(w.Dir, "/cfg", "ro")).Volumes[0].GuestPath
	k.must(w.Write(map[string]string{"k": "2"}, 0))
	p.seen(at, map[string]string{"k": "2"})
}

// TestFollowDead: a guest that is gone ends the following, and those who wait for it.
func TestFollowDead(t *testing.T) {
	k := newKubelet(t)
	w := k.writer("configmap", "cfg")
	k.must(w.Write(map[string]string{"k": "1"}, 0))
	p := newPod(t, ours())
	p.bring("app", bind(w.Dir, "/cfg", "ro"))
	p.conn.Close()
	k.must(w.Write(map[string]string{"k": "2"}, 0))
	plan, err := p.plan("other", bind(w.Dir, "/cfg", "ro"))
	if err == nil {
		err = plan.Bring(p.context(), p.conn)
	}
	if !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	p.set.Release("app")
	p.set.Release("other")
	p.set.Close()
	if plan, err := p.plan("late", bind(w.Dir, "/cfg", "ro")); err != nil || plan.Bring(p.context(), p.conn) == nil {
		t.Errorf("after the end: %v", err)
	}
}

// TestFollowStock: a stock agent gets every entry, and "..data" after what it names.
func TestFollowStock(t *testing.T) {
	k := newKubelet(t)
	w := k.writer("configmap", "cfg")
	k.must(w.Write(map[string]string{"colour": "blue", "sub/x": "1"}, 34))
	p := newPod(t, &agenttest.Agent{})
	at := p.bring("app", bind(w.Dir, "/cfg", "ro")).Volumes[0].GuestPath
	if !strings.HasPrefix(at, "/run/kata-containers/shared/containers/pod-") {
		t.Errorf("path %s", at)
	}
	check := func(dir, colour string) error {
		files := p.agent.Files()
		f := files[at+"/"+dir+"/colour"]
		if string(f.Data) != colour || f.GID != 34 || files[at+"/..data"].Target != dir || files[at+"/colour"].Target != "..data/colour" || files[at+"/sub"].Target != "..data/sub" {
			return fmt.Errorf("%v", files)
		}
		return nil
	}
	if err := check("..2026_11_21_10_00_00.1", "blue"); err != nil {
		t.Error(err)
	}
	k.must(w.Write(map[string]string{"colour": "red", "sub/x": "1", "more": ""}, 34))
	p.eventually(func() error { return check("..2026_11_21_10_00_00.2", "red") })
	p.eventually(func() error {
		if f := p.agent.Files()[at+"/..2026_11_21_10_00_00.1"]; f.Mode != unix.S_IFREG {
			return fmt.Errorf("the revision before: %+v", f)
		}
		return nil
	})
}
