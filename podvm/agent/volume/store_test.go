// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bed is a store of its own.
type bed struct {
	t *testing.T
	*Store
}

func newBed(t *testing.T, size uint64) bed {
	t.Helper()
	s := NewStore(filepath.Join(t.TempDir(), "volumes"), size)
	t.Cleanup(func() {
		if err := s.Reset(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(s.dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("left behind: %v", err)
		}
	})
	return bed{t, s}
}

func (b bed) path(parts ...string) string {
	return filepath.Join(append([]string{b.dir}, parts...)...)
}

// file is one entry of an archive; its mode's type bits say what it is.
type file struct {
	name, data string
	mode       uint32
	uid, gid   int
}

var changed = time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)

func pack(t *testing.T, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: int64(f.mode & 0o7777), Uid: f.uid, Gid: f.gid, ModTime: changed, Format: tar.FormatPAX}
		switch f.mode & unix.S_IFMT {
		case unix.S_IFDIR:
			h.Typeflag = tar.TypeDir
		case unix.S_IFLNK:
			h.Typeflag, h.Linkname, f.data = tar.TypeSymlink, f.data, ""
		case unix.S_IFREG:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(f.data))
		case unix.S_IFIFO:
			h.Typeflag = tar.TypeFifo
		case unix.S_IFCHR:
			h.Typeflag = tar.TypeChar
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(f.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// revision is an archive as the shim makes it: a directory, the link to it, and keys.
func revision(t *testing.T, dir string, files ...file) []byte {
	all := []file{{name: ".", mode: unix.S_IFDIR | 0o2777, gid: 34}, {name: dir, mode: unix.S_IFDIR | 0o755, gid: 34}}
	for _, f := range files {
		f.name = dir + "/" + f.name
		all = append(all, f)
	}
	return pack(t, append(all, file{name: "..data", data: dir, mode: unix.S_IFLNK | 0o777})...)
}

func regular(name, data string) file {
	return file{name: name, data: data, mode: unix.S_IFREG | 0o440, uid: 12, gid: 34}
}

func (b bed) put(name string, n uint64, archive []byte) {
	b.t.Helper()
	if _, done, err := b.Put(Piece{Path: b.path(name), Revision: n, Data: archive, EOF: true}); err != nil || !done {
		b.t.Fatalf("revision %d of %s: done %v, %v", n, name, done, err)
	}
}

// list is what a container finds: each name with its type, mode, owner and content.
func (b bed) list(name string) []string {
	b.t.Helper()
	var out []string
	err := filepath.WalkDir(b.path(name), func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(b.path(name), path)
		what := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			what, _ = os.Readlink(path)
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what = string(data)
		}
		out = append(out, fmt.Sprintf("%s %o %d:%d %s", rel, st.Mode, st.Uid, st.Gid, what))
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

func (b bed) want(name string, lines ...string) {
	b.t.Helper()
	if diff := cmp.Diff(lines, b.list(name)); diff != "" {
		b.t.Errorf("-want +got\n%s", diff)
	}
}

// TestSwitch follows one volume through its revisions: keys come and go, in
// subdirectories too, down to none; owners change without a new directory.
func TestSwitch(t *testing.T) {
	b := newBed(t, 8<<20)
	b.put("v", 1, revision(t, "..1", regular("a", "one"), regular("b", "two"),
		file{name: "sub", mode: unix.S_IFDIR | 0o755}, file{name: "sub/deep", mode: unix.S_IFDIR | 0o750}, regular("sub/deep/c", "three")))
	b.want("v", ". 42777 0:34 ", "..1 40755 0:34 ", "..1/a 100440 12:34 one", "..1/b 100440 12:34 two",
		"..1/sub 40755 0:0 ", "..1/sub/deep 40750 0:0 ", "..1/sub/deep/c 100440 12:34 three",
		"..data 120777 0:0 ..1", "a 120777 0:0 ..data/a", "b 120777 0:0 ..data/b", "sub 120777 0:0 ..data/sub")
	if st, err := os.Stat(b.path("v", "a")); err != nil || !st.ModTime().Equal(changed) {
		t.Errorf("time of change: %v, %v", st.ModTime(), err)
	}
	b.put("v", 2, revision(t, "..2", regular("b", "2"), regular("d", "4")))
	b.want("v", ". 42777 0:34 ", "..2 40755 0:34 ", "..2/b 100440 12:34 2", "..2/d 100440 12:34 4",
		"..data 120777 0:0 ..2", "b 120777 0:0 ..data/b", "d 120777 0:0 ..data/d")
	b.put("v", 3, revision(t, "..2", file{name: "b", data: "2", mode: unix.S_IFREG | 0o600, uid: 1}))
	b.want("v", ". 42777 0:34 ", "..2 40755 0:34 ", "..2/b 100600 1:0 2", "..data 120777 0:0 ..2", "b 120777 0:0 ..data/b")
	b.put("v", 4, revision(t, "..4"))
	b.want("v", ". 42777 0:34 ", "..4 40755 0:34 ", "..data 120777 0:0 ..4")
	if left, err := os.ReadDir(b.path(staging)); err != nil || len(left) > 0 {
		t.Errorf("staging has %v, %v", left, err)
	}
	if err := b.Remove(b.path("v")); err != nil {
		t.Error(err)
	}
	if err := b.Remove(b.path("v")); err != nil {
		t.Errorf("again: %v", err)
	}
	if _, err := os.Stat(b.path("v")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}

// TestContainerWrites: what a container put into a volume it could write to does not
// lead an update out of the volume, and is gone after it.
func TestContainerWrites(t *testing.T) {
	b := newBed(t, 8<<20)
	b.put("v", 1, revision(t, "..1", regular("a", "one")))
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "kept"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	v := b.path("v")
	for _, err := range []error{
		os.Remove(filepath.Join(v, "..data")), os.Symlink(outside, filepath.Join(v, "..data")),
		os.Symlink(outside, filepath.Join(v, "..data_tmp")), os.Symlink(outside, filepath.Join(v, "x")),
		os.MkdirAll(filepath.Join(v, "b", "full"), 0o755), os.Rename(filepath.Join(v, "..1"), filepath.Join(v, "..moved")),
		os.Symlink(outside, filepath.Join(v, "..2")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	b.put("v", 2, revision(t, "..2", regular("b", "two")))
	b.want("v", ". 42777 0:34 ", "..2 40755 0:34 ", "..2/b 100440 12:34 two", "..data 120777 0:0 ..2", "b 120777 0:0 ..data/b")
	if list, err := os.ReadDir(outside); err != nil || len(list) != 1 {
		t.Errorf("outside of the volume: %v, %v", list, err)
	}
}

func TestPlain(t *testing.T) {
	b := newBed(t, 8<<20)
	archive := pack(t, file{name: ".", mode: unix.S_IFDIR | 0o700}, regular("hosts", "h"), file{name: "l", data: "/etc", mode: unix.S_IFLNK | 0o777})
	b.put("p", 1, archive)
	b.put("p", 1, archive)
	b.want("p", ". 40700 0:0 ", "hosts 100440 12:34 h", "l 120777 0:0 /etc")
	if _, _, err := b.Put(Piece{Path: b.path("p"), Revision: 2, Data: archive, EOF: true}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second revision of a plain tree: %v", err)
	}
}

// TestPieces has archives that come in pieces: twice, from the start again, with a
// gap, and interrupted by a newer one.
func TestPieces(t *testing.T) {
	b := newBed(t, 8<<20)
	one, two := revision(t, "..1", regular("a", strings.Repeat("1", 5000))), revision(t, "..2", regular("a", strings.Repeat("2", 5000)))
	send := func(n uint64, archive []byte, from, to int, have int, done bool) {
		t.Helper()
		got, ok, err := b.Put(Piece{Path: b.path("v"), Revision: n, Offset: uint64(from), Data: archive[from:to], EOF: to == len(archive)})
		if err != nil || got != uint64(have) || ok != done {
			t.Fatalf("revision %d, %d to %d: have %d, done %v, %v", n, from, to, got, ok, err)
		}
	}
	fails := func(n uint64, archive []byte, from, to int, class func(error) bool) {
		t.Helper()
		if _, _, err := b.Put(Piece{Path: b.path("v"), Revision: n, Offset: uint64(from), Data: archive[from:to], EOF: to == len(archive)}); !class(err) {
			t.Errorf("revision %d, %d to %d: %v", n, from, to, err)
		}
	}
	end := len(one)
	fails(1, one, 1000, 2000, errdefs.IsOutOfRange)
	send(1, one, 0, 1000, 1000, false)
	send(1, one, 0, 1000, 1000, false)
	send(1, one, 500, 2000, 2000, false)
	fails(1, one, 3000, 4000, errdefs.IsOutOfRange)
	send(1, one, 0, 500, 500, false)
	send(1, one, 500, end, end, true)
	send(1, one, 0, 500, 500, true) // the answer was lost, all is sent again
	send(2, two, 0, 1000, 1000, false)
	send(3, one, 0, 1000, 1000, false)
	fails(2, two, 1000, 2000, errdefs.IsFailedPrecondition)
	send(3, one, 1000, end, end, true)
	fails(2, two, 0, len(two), errdefs.IsFailedPrecondition)
	if left, err := os.ReadDir(b.path(staging)); err != nil || len(left) > 0 {
		t.Errorf("staging has %v, %v", left, err)
	}
	b.put("v", 4, two)
}

// TestHostile: no archive and no path leads out, and what was in place stays.
func TestHostile(t *testing.T) {
	b := newBed(t, 4<<20)
	b.put("v", 1, revision(t, "..1", regular("a", "one")))
	before := b.list("v")
	top := file{name: ".", mode: unix.S_IFDIR | 0o755}
	dir := file{name: "..2", mode: unix.S_IFDIR | 0o755}
	data := file{name: "..data", data: "..2", mode: unix.S_IFLNK | 0o777}
	link := func(name, target string) file { return file{name: name, data: target, mode: unix.S_IFLNK | 0o777} }
	whole := revision(t, "..2", regular("a", "two"))
	for name, archive := range map[string][]byte{
		"nothing":             {},
		"no archive":          []byte(strings.Repeat("x", 4096)),
		"cut":                 whole[:2048],
		"no root":             pack(t, dir, data),
		"no revision":         pack(t, top, data),
		"another revision":    pack(t, top, file{name: "..3", mode: unix.S_IFDIR | 0o755}, data),
		"two revisions":       pack(t, top, dir, file{name: "..3", mode: unix.S_IFDIR | 0o755}, data),
		"more beside it":      pack(t, top, dir, regular("a", ""), data),
		"a name outside":      pack(t, top, dir, regular("../../escape", ""), data),
		"an absolute name":    pack(t, top, dir, regular("/escape", ""), data),
		"through a link":      pack(t, top, dir, link("..2/l", "/"), regular("..2/l/escape", ""), data),
		"through .. links":    pack(t, top, dir, link("..2/l", "../../.."), regular("..2/l/escape", ""), data),
		"below ..data":        pack(t, top, link("..2", "/"), regular("..data/escape", ""), data),
		"the revision a link": pack(t, top, link("..2", "/"), data),
		"..data far away":     pack(t, top, dir, link("..data", "../../..")),
		"..data a file":       pack(t, top, dir, regular("..data", "..2")),
		"..data_tmp":          pack(t, top, dir, link("..data_tmp", "..2"), data),
		"a name twice":        pack(t, top, dir, regular("..2/a", ""), regular("..2/a", ""), data),
		"a fifo":              pack(t, top, dir, file{name: "..2/f", mode: unix.S_IFIFO | 0o644}, data),
		"a device":            pack(t, top, dir, file{name: "..2/d", mode: unix.S_IFCHR | 0o644}, data),
	} {
		if _, _, err := b.Put(Piece{Path: b.path("v"), Revision: 2, Data: archive, EOF: true}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, path := range []string{"", "v", "/etc", b.dir, b.dir + "/../x", b.path("..data"), b.path(staging), b.path("a", "b"), b.path("a\nb")} {
		if _, _, err := b.Put(Piece{Path: path, Revision: 1, Data: whole, EOF: true}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("put at %q: %v", path, err)
		}
		if err := b.Remove(path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("remove %q: %v", path, err)
		}
	}
	if _, _, err := b.Put(Piece{Path: b.path("w"), Data: whole, EOF: true}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("revision 0: %v", err)
	}
	b.want("v", before...)
	if left, err := os.ReadDir(b.path(staging)); err != nil || len(left) > 0 {
		t.Errorf("staging has %v, %v", left, err)
	}
	b.put("v", 2, whole)
}

// TestFull: a revision that does not fit leaves the one before, and its room.
func TestFull(t *testing.T) {
	b := newBed(t, 1<<20)
	b.put("v", 1, revision(t, "..1", regular("a", strings.Repeat("1", 100<<10))))
	before := b.list("v")
	var small []file
	for i := range 300 { // in an archive they take a quarter of what they take as files
		small = append(small, regular(fmt.Sprint(i), "x"))
	}
	big := revision(t, "..2", small...)
	for range 3 {
		if _, _, err := b.Put(Piece{Path: b.path("v"), Revision: 2, Data: big, EOF: true}); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "1 MiB") {
			t.Errorf("the archive fits and the tree does not: %v", err)
		}
		if _, _, err := b.Put(Piece{Path: b.path("v"), Revision: 2, Data: make([]byte, 1<<20)}); !errdefs.IsResourceExhausted(err) {
			t.Errorf("the archive does not fit: %v", err)
		}
	}
	b.want("v", before...)
	// The archive, what it becomes and what was before would not fit together.
	b.put("v", 2, revision(t, "..2", regular("a", strings.Repeat("3", 600<<10))))
}
