// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"archive/tar"
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"
)

func dir(name string) entry { return entry{tar.Header{Name: name, Typeflag: tar.TypeDir}, ""} }

// Layers in three compressions become one tree, with all that a file system has.
func TestWholeImage(t *testing.T) {
	const capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	w := newWorld(t)
	w.push("team/app:1", imageOf(t,
		gzipped(t, archived(t,
			dir("bin/"), dir("gone/"), file("gone/file", "x"), dir("opaque/"), file("opaque/old", "x"), file("removed", "x"),
			entry{tar.Header{Name: "bin/su", Mode: 0o4755, Uid: 0, Gid: 42}, "su"},
			entry{tar.Header{Name: "bin/ping", PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capability}}, "ping"},
			entry{tar.Header{Name: "bin/hard", Typeflag: tar.TypeLink, Linkname: "bin/su", Mode: 0o4755, Gid: 42}, ""},
			entry{tar.Header{Name: "bin/soft", Typeflag: tar.TypeSymlink, Linkname: "/bin/su"}, ""},
			entry{tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, ""},
			entry{tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600}, ""},
			entry{tar.Header{Name: "home/", Typeflag: tar.TypeDir, Mode: 0o2750, Uid: 1000, Gid: 1001}, ""},
			file("changed", "old"),
		)),
		zstandard(t, archived(t, file(".wh.removed", ""), file(".wh.gone", ""), file("opaque/new", "n"), file("opaque/.wh..wh..opq", ""))),
		plain(t, archived(t, file("changed", "new"), file("later/deep/file", "l"))),
	))
	r := w.mustMount(w.host + "/team/app:1")
	defer r.leave(t)
	for name, want := range map[string]string{"bin/su": "su", "bin/hard": "su", "changed": "new", "opaque/new": "n", "later/deep/file": "l"} {
		if got := r.read(t, name); got != want {
			t.Errorf("%s has %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"removed", "gone", "opaque/old", "opaque/.wh..wh..opq", ".wh.removed"} {
		if _, err := os.Lstat(filepath.Join(r.path, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	stat := func(name string) (st unix.Stat_t) {
		if err := unix.Lstat(filepath.Join(r.path, name), &st); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return st
	}
	if st := stat("bin/su"); st.Mode != unix.S_IFREG|0o4755 || st.Gid != 42 || st.Ino != stat("bin/hard").Ino {
		t.Errorf("bin/su: mode %o, group %d", st.Mode, st.Gid)
	}
	if st := stat("null"); st.Mode != unix.S_IFCHR|0o666 || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("null: mode %o, device %d", st.Mode, st.Rdev)
	}
	if st := stat("pipe"); st.Mode != unix.S_IFIFO|0o600 {
		t.Errorf("pipe: mode %o", st.Mode)
	}
	if st := stat("home"); st.Mode != unix.S_IFDIR|0o2750 || st.Uid != 1000 || st.Gid != 1001 {
		t.Errorf("home: mode %o, owner %d:%d", st.Mode, st.Uid, st.Gid)
	}
	if target, err := os.Readlink(filepath.Join(r.path, "bin/soft")); err != nil || target != "/bin/su" {
		t.Errorf("bin/soft: %s, %v", target, err)
	}
	got := make([]byte, 64)
	if n, err := unix.Lgetxattr(filepath.Join(r.path, "bin/ping"), "security.capability", got); err != nil || string(got[:n]) != capability {
		t.Errorf("capability of bin/ping: %q, %v", got[:max(n, 0)], err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(r.path, &fs); err != nil || fs.Blocks*uint64(fs.Bsize) > 16<<20 {
		t.Errorf("the root is not bounded: %d blocks, %v", fs.Blocks, err)
	}
}

// By digest, by tag and through an index; one tree serves all.
func TestOneTreeForAContainersOfAnImage(t *testing.T) {
	w := newWorld(t)
	img := simple(t, "hello")
	digest := w.push("app:1", img)
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: imageFor(t, "s390x", gzipped(t, archived(t, file("wrong", "")))), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &platform}})
	ref, err := name.ParseReference(w.host + "/app:many")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	indexDigest, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	w.requests("")
	refs := []string{"/app:1", "/app@" + digest.String(), "/app:many", "/app@" + indexDigest.String(), "/app:many@" + indexDigest.String()}
	var roots []root
	for _, r := range refs {
		one := w.mustMount(w.host + r)
		if got := one.read(t, "etc/motd"); got != "hello" {
			t.Errorf("%s: %q", r, got)
		}
		roots = append(roots, one)
	}
	if n := w.requests("/blobs/"); n != 2 {
		t.Errorf("%d requests for configuration and layer, want one each", n)
	}
	if err := os.WriteFile(filepath.Join(roots[0].path, "etc/motd"), []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	for i, r := range roots {
		if got := r.read(t, "etc/motd"); (got == "mine") != (i == 0) {
			t.Errorf("root %d: %q after the first one's write", i, got)
		}
		r.leave(t)
	}
}

// A container that is started again finds its image; another image takes its place.
func TestImageStaysUntilAnotherComes(t *testing.T) {
	w := newWorld(t)
	digest := w.push("app:1", simple(t, "one"))
	w.push("other:1", simple(t, "two"))
	w.mustMount(w.host + "/app:1").leave(t)
	w.requests("")
	w.mustMount(w.host + "/app:1").leave(t)
	if n := w.requests("/blobs/"); n != 0 {
		t.Errorf("%d requests for what is here", n)
	}
	w.mustMount(w.host + "/app@" + digest.String()).leave(t)
	w.requests("")
	w.between(func(rw http.ResponseWriter, _ *http.Request, _ http.Handler) {
		rw.WriteHeader(http.StatusInsufficientStorage)
	})
	w.mustMount(w.host + "/app@" + digest.String()).leave(t)
	if n := w.requests(""); n != 0 {
		t.Errorf("%d requests for a digest that is here", n)
	}
	w.mustMount(w.host + "/app:1").leave(t) // what it was before the registry failed
	w.between(nil)
	r := w.mustMount(w.host + "/other:1")
	w.requests("")
	w.mustMount(w.host + "/app:1").leave(t)
	if n := w.requests("/blobs/"); n != 2 {
		t.Errorf("%d requests for an image whose place another took, want 2", n)
	}
	if got := r.read(t, "etc/motd"); got != "two" {
		t.Errorf("the root in use: %q", got)
	}
	r.leave(t)
}

// stalled answers a layer's request with its beginning and then nothing until it is
// told to go on.
func (w *world) stalled() (began chan struct{}, goOn func()) {
	began = make(chan struct{}, 8)
	free := make(chan struct{})
	w.between(func(rw http.ResponseWriter, r *http.Request, inner http.Handler) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			began <- struct{}{}
			select {
			case <-free:
			case <-r.Context().Done():
				return
			}
		}
		inner.ServeHTTP(rw, r)
	})
	return began, func() { close(free) }
}

// mountLater mounts in the background.
func (w *world) mountLater(ctx context.Context, ref string) chan error {
	done := make(chan error, 1)
	at, err := os.MkdirTemp(w.dir, "root")
	if err != nil {
		w.t.Fatal(err)
	}
	go func() {
		undo, err := w.store.Mount(ctx, ref, at, 0)
		if err == nil {
			err = undo()
		}
		done <- err
	}()
	return done
}

func TestCancelledPullLeavesNothing(t *testing.T) {
	w := newWorld(t)
	w.push("app:1", simple(t, "hello"))
	began, goOn := w.stalled()
	ctx, cancel := context.WithCancel(t.Context())
	done := w.mountLater(ctx, w.host+"/app:1")
	<-began
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	w.store.wg.Wait() // for the pull itself
	w.wantNothing()
	goOn()
	w.mustMount(w.host + "/app:1").leave(t)
}

// A pull goes on without its caller for a while, so that the next one need not begin
// anew.
func TestPullOutlivesItsCaller(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Linger = time.Hour })
	w.push("app:1", simple(t, "hello"))
	began, goOn := w.stalled()
	ctx, cancel := context.WithCancel(t.Context())
	done := w.mountLater(ctx, w.host+"/app:1")
	<-began
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	again := w.mountLater(t.Context(), w.host+"/app:1")
	goOn()
	if err := <-again; err != nil {
		t.Error(err)
	}
	if n := w.requests("GET /v2/app/blobs/"); n != 2 {
		t.Errorf("%d requests for blobs, want one for the configuration and one for the layer", n)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := w.mount(ctx, w.host+"/app:1"); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that has left: %v", err)
	}
}

// Who waits for a pull that is abandoned in the same moment pulls anew, and a store
// that ends refuses.
func TestStoreThatEnds(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Linger = time.Hour })
	w.push("app:1", simple(t, "hello"))
	began, goOn := w.stalled()
	done := w.mountLater(t.Context(), w.host+"/app:1")
	<-began
	if err := w.store.RemoveAll(); err != nil {
		t.Error(err)
	}
	<-began // it is pulled again
	goOn()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := w.store.Close(); err != nil {
		t.Error(err)
	}
	if _, err := w.mount(t.Context(), w.host+"/app:1"); !errdefs.IsUnavailable(err) {
		t.Errorf("after Close: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"relative directory": {Dir: "image"},
		"comma":              {Dir: "/run/a,b"},
		"no certificate":     {Dir: "/run/image", CA: "not PEM"},
	} {
		if _, err := New(cfg); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
