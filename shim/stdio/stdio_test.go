// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "log-to" { // run as a logging binary
		os.Exit(logTo(os.Args[2]))
	}
	goleak.VerifyTestMain(m)
}

// logTo is a logging binary: it copies fd 3 and 4 to files once it said it was ready.
func logTo(dir string) int {
	if os.Getenv("CONTAINER_ID") != "c" || os.Getenv("CONTAINER_NAMESPACE") != "ns" {
		return 1
	}
	os.NewFile(5, "ready").Close()
	done := make(chan error, 2)
	for fd, name := range map[uintptr]string{3: "out", 4: "err"} {
		go func() {
			b, err := io.ReadAll(os.NewFile(fd, name))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
			}
			done <- err
		}()
	}
	if errors.Join(<-done, <-done) != nil {
		return 1
	}
	return 0
}

func fifo(t *testing.T) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(p, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestSinkSurvivesItsReader has the reader of a FIFO, containerd, go away and come
// back: nothing fails, and what was written meanwhile is there.
func TestSinkSurvivesItsReader(t *testing.T) {
	path := fifo(t)
	f, err := Open(Config{Stdout: path})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := func() string {
		r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		b := make([]byte, 16)
		n, err := r.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	for _, s := range []string{"one", "two"} {
		if _, err := io.WriteString(f.Stdout, s); err != nil {
			t.Fatal(err)
		}
		if got := read(); got != s {
			t.Errorf("read %q, want %q", got, s)
		}
	}
}

// TestStdin has writers come and go: the end is what CloseWrite says, after what was
// written before.
func TestStdin(t *testing.T) {
	path := fifo(t)
	f, err := Open(Config{Stdin: path})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b, err := io.ReadAll(f.Stdin)
		done <- result{b, err}
	}()
	for _, s := range []string{"one ", "two ", "three"} {
		w, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, s)
		w.Close()
	}
	select {
	case r := <-done:
		t.Fatalf("ended before CloseWrite: %q, %v", r.b, r.err)
	default:
	}
	f.Stdin.CloseWrite()
	if r := <-done; string(r.b) != "one two three" || r.err != nil {
		t.Errorf("%q, %v", r.b, r.err)
	}
}

// TestCloseUnblocks has a reader and a writer that wait for nobody.
func TestCloseUnblocks(t *testing.T) {
	in, out := fifo(t), fifo(t)
	f, err := Open(Config{Stdin: in, Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 2)
	go func() {
		_, err := f.Stdin.Read(make([]byte, 1))
		done <- err
	}()
	go func() {
		_, err := f.Stdout.Write(make([]byte, 1<<20))
		done <- err
	}()
	time.Sleep(time.Millisecond) // either order of the calls is right, the other one is more interesting
	f.Close()
	for range 2 {
		if err := <-done; !ended(err) {
			t.Errorf("got %v", err)
		}
	}
	f.Close()
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "logs", "out")
	for range 2 {
		f, err := Open(Config{Stdout: "file://" + path, Terminal: true})
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(f.Stdout, "line\n")
		f.Close()
	}
	fi, err := os.Stat(path)
	if b, _ := os.ReadFile(path); err != nil || string(b) != "line\nline\n" || fi.Mode().Perm() != 0o640 {
		t.Errorf("%q, %v, %v", b, fi, err)
	}
}

func TestLogger(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f, err := Open(Config{Stdout: fmt.Sprintf("binary://%s?log-to=%s", self, dir), Namespace: "ns", Container: "c"})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(f.Stdout, "out")
	io.WriteString(f.Stderr, "err")
	l := f.Stdout.(*loggerPipe).l
	f.Close()
	select {
	case <-l.done:
	case <-time.After(time.Minute):
		t.Fatal("logging binary did not end with its input")
	}
	for _, name := range []string{"out", "err"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != name {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if _, err := Open(Config{Stdout: "binary:///nonesuch"}); err == nil || !strings.Contains(err.Error(), "/nonesuch") {
		t.Errorf("missing binary: %v", err)
	}
}

func TestValidate(t *testing.T) {
	for s, ok := range map[string]bool{"": true, "/run/fifo": true, "fifo:///run/fifo": true, "file:///log": true, "binary:///logger": true, "stream://x": false, "ttrpc+unix:///x?streaming_id=1": false} {
		if err := (Config{Stdout: s}).Validate(); (err == nil) != ok || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if _, err := Open(Config{Stdout: "/nonesuch/fifo"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing FIFO: %v", err)
	}
}
