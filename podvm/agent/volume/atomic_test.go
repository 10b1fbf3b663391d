// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

const updates = 200

// names are the keys of a revision: some are always there, others come and go.
func names(n int) []string {
	return []string{"a", "b", "c", fmt.Sprintf("of-%d", n%3), fmt.Sprintf("only-%d", n)}
}

func numbered(t *testing.T, n int) []byte {
	var files []file
	for _, name := range names(n) {
		files = append(files, regular(name, fmt.Sprint(n)))
	}
	return revision(t, fmt.Sprintf("..%d", n), files...)
}

// look reads a volume as a process does that means to see one revision: it opens
// "..data" once. fs.ErrNotExist: the revision was replaced meanwhile.
func look(dir string) (map[string]string, error) {
	data := filepath.Join(dir, "..data")
	root, err := os.OpenRoot(data)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	list, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, err
	}
	seen := map[string]string{}
	for _, e := range list {
		b, err := root.ReadFile(e.Name())
		if err != nil {
			return nil, err
		}
		seen[e.Name()] = string(b)
	}
	// It is removed only after it is out of place: in place now, it was whole.
	opened, err := root.Stat(".")
	if err != nil {
		return nil, err
	}
	if now, err := os.Stat(data); err != nil || !os.SameFile(opened, now) {
		return nil, fs.ErrNotExist
	}
	return seen, nil
}

// whole tells which revision was seen, and what is wrong with it.
func whole(seen map[string]string) (int, error) {
	var n int
	if _, err := fmt.Sscan(seen["a"], &n); err != nil {
		return 0, fmt.Errorf("%v: %w", seen, err)
	}
	want := names(n)
	for _, name := range want {
		if seen[name] != fmt.Sprint(n) {
			return n, fmt.Errorf("revision %d has %q = %q: %v", n, name, seen[name], seen)
		}
	}
	if len(seen) != len(want) {
		return n, fmt.Errorf("revision %d has more than its own: %v", n, seen)
	}
	return n, nil
}

// TestAtomic: while a volume is updated 200 times, and updates of it fail in between,
// no reader sees two revisions at once, or an older one after a newer one.
func TestAtomic(t *testing.T) {
	b := newBed(t, 8<<20)
	dir := b.path("v")
	b.put("v", 1, numbered(t, 1))
	swaps := watchSwaps(t, dir)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			last, looks := 0, 0
			for {
				select {
				case <-stop:
					if looks == 0 {
						t.Error("the reader saw nothing")
					}
					return
				default:
				}
				seen, err := look(dir)
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				var n int
				if err == nil {
					n, err = whole(seen)
				}
				if err == nil && n < last {
					err = fmt.Errorf("revision %d after %d", n, last)
				}
				if err != nil {
					t.Error(err)
					return
				}
				last, looks = n, looks+1
			}
		})
	}
	for n := 2; n <= updates+1; n++ {
		archive := numbered(t, n)
		if _, _, err := b.Put(Piece{Path: dir, Revision: uint64(n), Data: archive[:len(archive)/2]}); err != nil {
			t.Error(err)
		}
		if n%10 == 0 { // the connection breaks, and another sends rubbish
			if _, _, err := b.Put(Piece{Path: dir, Revision: uint64(n), Data: []byte("rubbish"), EOF: true}); err == nil {
				t.Error("rubbish was taken")
			}
		}
		b.put("v", uint64(n), archive)
	}
	seen, err := look(dir)
	if n, werr := whole(seen); err != nil || werr != nil || n != updates+1 {
		t.Errorf("in the end: revision %d, %v, %v", n, err, werr)
	}
	close(stop)
	wg.Wait()
	if n := swaps(); n != updates {
		t.Errorf("a process that waits for changes saw %d of %d", n, updates)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 2+len(names(0)) {
		t.Errorf("in the volume: %v, %v", list, err)
	}
}

// watchSwaps waits for changes of a volume as programs do, and returns what tells how
// often "..data" was replaced.
func watchSwaps(t *testing.T, dir string) func() int {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	return func() (n int) {
		defer unix.Close(fd)
		buf := make([]byte, 64<<10)
		for {
			got, err := unix.Read(fd, buf)
			if errors.Is(err, unix.EAGAIN) {
				return n
			}
			if err != nil {
				t.Fatal(err)
			}
			for b := buf[:got]; len(b) > 0; {
				size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
				if name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:size]), "\x00"); name == "..data" {
					n++
				}
				b = b[size:]
			}
		}
	}
}
