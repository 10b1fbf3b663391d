// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a registry and a guest that pulls from it.
type world struct {
	t     *testing.T
	host  string // of the registry
	store *Store
	dir   string

	mu    sync.Mutex
	front func(http.ResponseWriter, *http.Request, http.Handler) // guarded by mu; nil: the registry itself
	asked []string                                               // guarded by mu; method and path of requests
}

func newWorld(t *testing.T, change ...func(*Config)) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		front := w.front
		w.asked = append(w.asked, r.Method+" "+r.URL.Path)
		w.mu.Unlock()
		if front != nil {
			front(rw, r, inner)
			return
		}
		inner.ServeHTTP(rw, r)
	}))
	t.Cleanup(srv.Close)
	w.host = strings.TrimPrefix(srv.URL, "http://")
	cfg := Config{Dir: filepath.Join(w.dir, "image"), RootSize: 16 << 20, AuthFile: filepath.Join(w.dir, "auth.json"), Linger: -1}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	if w.store, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.store.Close(); err != nil {
			t.Error(err)
		}
		w.wantNothing()
	})
	return w
}

// between has a function answer in the registry's place.
func (w *world) between(f func(http.ResponseWriter, *http.Request, http.Handler)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.front = f
}

// requests returns those made since the last time, if their path has a word in it.
func (w *world) requests(word string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.asked {
		if strings.Contains(a, word) {
			n++
		}
	}
	w.asked = nil
	return n
}

// wantNothing holds the store to leaving no mount and no file.
func (w *world) wantNothing() {
	w.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, w.dir) {
			w.t.Errorf("left mounted: %s", line)
		}
	}
	if _, err := os.Stat(w.store.cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		w.t.Errorf("%s is left: %v", w.store.cfg.Dir, err)
	}
}

// root is a container's.
type root struct {
	path string
	undo func() error
}

func (w *world) mount(ctx context.Context, ref string) (root, error) {
	w.t.Helper()
	at, err := os.MkdirTemp(w.dir, "root")
	if err != nil {
		w.t.Fatal(err)
	}
	undo, err := w.store.Mount(ctx, ref, at, 0)
	return root{at, undo}, err
}

func (w *world) mustMount(ref string) root {
	w.t.Helper()
	r, err := w.mount(w.t.Context(), ref)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (r root) leave(t *testing.T) {
	t.Helper()
	if err := r.undo(); err != nil {
		t.Error(err)
	}
}

// push puts an image into the registry and returns its digest.
func (w *world) push(repository string, img v1.Image) v1.Hash {
	w.t.Helper()
	ref, err := name.ParseReference(w.host + "/" + repository)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		w.t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

// archived is a tar archive of entries; a size is that of the body.
func archived(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		h.Size = int64(len(e.body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type entry struct {
	tar.Header
	body string
}

func file(name, body string) entry { return entry{tar.Header{Name: name}, body} }

// layer is a layer whose two digests are what the test says they are.
type layer struct {
	v1.Layer
	diffID v1.Hash
}

func (l layer) DiffID() (v1.Hash, error) { return l.diffID, nil }

func sum(t *testing.T, b []byte) v1.Hash {
	t.Helper()
	h, _, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func gzipped(t *testing.T, b []byte) v1.Layer {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return layer{static.NewLayer(z.Bytes(), types.DockerLayer), sum(t, b)}
}

func zstandard(t *testing.T, b []byte) v1.Layer {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return layer{static.NewLayer(w.EncodeAll(b, nil), types.OCILayerZStd), sum(t, b)}
}

func plain(t *testing.T, b []byte) v1.Layer {
	t.Helper()
	return layer{static.NewLayer(b, types.OCIUncompressedLayer), sum(t, b)}
}

// imageOf is an image for this machine.
func imageOf(t *testing.T, layers ...v1.Layer) v1.Image {
	return imageFor(t, runtime.GOARCH, layers...)
}

func imageFor(t *testing.T, arch string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", arch
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	return img
}

func simple(t *testing.T, body string) v1.Image {
	t.Helper()
	return imageOf(t, gzipped(t, archived(t, file("etc/motd", body))))
}

func (r root) read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.path, name))
	if err != nil {
		t.Error(err)
	}
	return string(b)
}
