// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func archiveOf(t *testing.T, name, body string) func(context.Context) io.Reader {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, body); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return func(context.Context) io.Reader { return &buf }
}

func absent(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

func TestLifeOfATree(t *testing.T) {
	s := NewStore(t.TempDir(), 8<<20)
	path, err := s.Import(t.Context(), "one", archiveOf(t, "file", "text"), false, 0)
	if err != nil || path != s.Path("one") {
		t.Fatalf("%s, %v", path, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil || uint64(st.Blocks)*uint64(st.Bsize) != 8<<20 {
		t.Errorf("the default limit is not in force: %d blocks, %v", st.Blocks, err)
	}
	if used, err := s.Use("one"); err != nil || !used {
		t.Fatalf("%v, %v", used, err)
	}
	if _, err := s.Import(t.Context(), "one", archiveOf(t, "file", "text"), false, 0); !errdefs.IsAlreadyExists(err) {
		t.Errorf("import over a tree in use: %v", err)
	}
	s.Unuse("one")
	if _, err := s.Import(t.Context(), "one", archiveOf(t, "other", "text"), false, 4<<20); err != nil {
		t.Errorf("import over a tree that nobody uses: %v", err)
	}
	absent(t, filepath.Join(path, "file"))
	if was, err := s.Remove(t.Context(), "one"); err != nil || !was {
		t.Errorf("%v, %v", was, err)
	}
	absent(t, filepath.Dir(path))
	if was, err := s.Remove(t.Context(), "one"); err != nil || was {
		t.Errorf("removed twice: %v, %v", was, err)
	}
	if used, err := s.Use("one"); err != nil || used {
		t.Errorf("a tree that is gone: %v, %v", used, err)
	}
}

// A tree whose files are held open goes away all the same.
func TestRemoveOfABusyTree(t *testing.T) {
	s := NewStore(t.TempDir(), 8<<20)
	path, err := s.Import(t.Context(), "one", archiveOf(t, "file", "text"), false, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(path, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	absent(t, filepath.Dir(path))
	if _, err := s.Import(t.Context(), "two", archiveOf(t, "file", "text"), false, 0); !errdefs.IsUnavailable(err) {
		t.Errorf("import into a closed store: %v", err)
	}
}

type endless struct{ ctx context.Context }

func (e endless) Read([]byte) (int, error) {
	<-e.ctx.Done()
	return 0, e.ctx.Err()
}

func TestImportUnderWay(t *testing.T) {
	s := NewStore(t.TempDir(), 8<<20)
	reading := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		_, err := s.Import(context.Background(), "one", func(ctx context.Context) io.Reader {
			close(reading)
			return endless{ctx}
		}, false, 0)
		ended <- err
	}()
	<-reading
	if _, err := s.Use("one"); !errdefs.IsUnavailable(err) {
		t.Errorf("use of an unfinished tree: %v", err)
	}
	if was, err := s.Remove(t.Context(), "one"); err != nil || !was {
		t.Errorf("%v, %v", was, err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the import ended with %v", err)
	}
	absent(t, filepath.Dir(s.Path("one")))
}

// Files without content count too.
func TestNumberOfFilesIsBounded(t *testing.T) {
	s := NewStore(t.TempDir(), 8<<20)
	defer s.Close()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := range fewestInodes + 10 {
		if err := w.WriteHeader(&tar.Header{Name: "f" + string(rune('a'+i%26)) + "/" + string(rune('a'+i/26%26)) + string(rune('a'+i/676%26)) + string(rune('a'+i/17576)), Typeflag: tar.TypeReg, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := s.Import(t.Context(), "one", func(context.Context) io.Reader { return &buf }, false, 1<<20)
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("%v", err)
	}
}
