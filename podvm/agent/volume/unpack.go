// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// dataLink and nextLink are the kubelet's names (Kubernetes,
	// pkg/volume/util/atomic_writer.go).
	dataLink = "..data"
	nextLink = "..data_tmp"
)

// tree is what an archive holds, unpacked.
type tree struct {
	root *os.Root
	top  *tar.Header // of the volume's own directory
	link *tar.Header // of "..data"; nil: a plain tree
	dirs []*tar.Header
}

// install unpacks an archive and makes it the volume's revision.
func (s *Store) install(v *volume, name string, u *upload) (err error) {
	staged := s.stage()
	if err := v.root.Mkdir(staged, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.root.RemoveAll(staged)) }()
	root, err := v.root.OpenRoot(staged)
	if err != nil {
		return err
	}
	defer root.Close()
	t := &tree{root: root}
	if err := ended(u); err != nil {
		return err
	}
	if err := t.unpack(&draining{f: u.f, size: int64(u.size)}); err != nil {
		return err
	}
	if v.revision == 0 {
		// Nobody sees it yet: it is completed where it is and moved as a whole.
		if t.link != nil {
			if err := s.switchTo(root, root, t); err != nil {
				return err
			}
		}
		if err := own(root, ".", t.top); err != nil {
			return err
		}
		v.plain = t.link == nil
		return v.root.Rename(staged, name)
	}
	if v.plain || t.link == nil {
		return fmt.Errorf("a tree without %s cannot be switched, and the volume has one revision already: %w", dataLink, errdefs.ErrFailedPrecondition)
	}
	into, err := v.root.OpenRoot(name)
	if err != nil {
		return err
	}
	defer into.Close()
	if err := s.move(root, into, t.link.Linkname); err != nil {
		return err
	}
	if err := s.switchTo(v.root, into, t); err != nil {
		return err
	}
	return own(into, ".", t.top)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// draining reads an archive and gives its memory back as it goes: the archive and what
// is unpacked from it need not both fit into the store.
type draining struct {
	f                 *os.File
	at, size, drained int64
}

// drainEach is how much is given back at a time, bytes.
const drainEach = 64 << 10

func (d *draining) Read(b []byte) (int, error) {
	n, err := d.f.ReadAt(b[:min(int64(len(b)), d.size-d.at)], d.at)
	d.at += int64(n)
	if d.at-d.drained >= drainEach {
		if err := unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, d.drained, d.at-d.drained); err != nil {
			return n, fmt.Errorf("give the archive's memory back: %w", err)
		}
		d.drained = d.at
	}
	if d.at == d.size && n == 0 {
		err = io.EOF
	}
	return n, err
}

// ended checks for the two empty blocks that end an archive: one that lacks its end
// between two entries could not be told from a whole one otherwise.
func ended(u *upload) error {
	var end [1024]byte
	if u.size < uint64(len(end)) {
		return invalid("an archive of %d bytes", u.size)
	}
	if _, err := u.f.ReadAt(end[:], int64(u.size)-int64(len(end))); err != nil {
		return err
	}
	if end != [1024]byte{} {
		return invalid("the archive lacks its end")
	}
	return nil
}

// unpack writes the archive's entries and checks its shape.
func (t *tree) unpack(src io.Reader) error {
	in := tar.NewReader(src)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return invalid("the archive is damaged: %w", err)
		}
		h.Name = filepath.Clean(h.Name)
		if !filepath.IsLocal(h.Name) {
			return invalid("the archive has an entry %q outside of it", h.Name)
		}
		first, _, _ := strings.Cut(h.Name, "/")
		switch {
		case h.Name == "." && h.Typeflag == tar.TypeDir:
			t.top = h
			continue
		case h.Name == dataLink && h.Typeflag == tar.TypeSymlink:
			t.link = h
			continue
		case first == dataLink || first == nextLink || h.Name == ".":
			return invalid("the archive has an entry %q, which is not its to make", h.Name)
		}
		if err := t.entry(h, in); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
	if t.top == nil {
		return invalid(`the archive has no entry "."`)
	}
	if t.link != nil {
		if err := t.onlyRevision(t.link.Linkname); err != nil {
			return err
		}
	}
	// Times last, innermost first: what is made in a directory changes its time.
	for _, h := range slices.Backward(t.dirs) {
		if err := own(t.root, h.Name, h); err != nil {
			return err
		}
	}
	return nil
}

// onlyRevision checks that a tree that is switched has nothing beside its revision.
func (t *tree) onlyRevision(name string) error {
	list, err := fs.ReadDir(t.root.FS(), ".")
	if err != nil {
		return err
	}
	if len(list) != 1 || !list[0].IsDir() || list[0].Name() != name || !strings.HasPrefix(name, "..") {
		return invalid(`%s names %q; beside it must be that directory, its name beginning with "..", and nothing else`, dataLink, name)
	}
	return nil
}

// entry writes one entry.
func (t *tree) entry(h *tar.Header, data io.Reader) error {
	switch h.Typeflag {
	case tar.TypeDir:
		if err := t.root.Mkdir(h.Name, 0o700); err != nil {
			return made(err)
		}
		t.dirs = append(t.dirs, h)
		return nil
	case tar.TypeReg:
		f, err := t.root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return made(err)
		}
		_, err = io.Copy(f, data)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = invalid("the archive ends in it: %w", err)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		return own(t.root, h.Name, h)
	case tar.TypeSymlink:
		if err := t.root.Symlink(h.Linkname, h.Name); err != nil {
			return made(err)
		}
		return t.root.Lchown(h.Name, h.Uid, h.Gid)
	}
	return invalid("type %q: a volume has directories, regular files and symbolic links", h.Typeflag)
}

// made says whose fault it is that an entry could not be made.
func made(err error) error {
	if errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// own gives an entry owner, mode and time.
func own(root *os.Root, name string, h *tar.Header) error {
	// Owner first: chown takes setuid and setgid away.
	if err := root.Lchown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	if err := root.Chmod(name, h.FileInfo().Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return root.Chtimes(name, h.ModTime, h.ModTime)
}

// move puts the revision's directory into the volume. One of that name that is there,
// because only owners or modes have changed, trades places with it at once.
func (s *Store) move(from, to *os.Root, name string) error {
	src, err := from.Open(".")
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := to.Open(".")
	if err != nil {
		return err
	}
	defer dst.Close()
	// Both names are single components: no link is followed.
	err = unix.Renameat2(int(src.Fd()), name, int(dst.Fd()), name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		err = unix.Renameat2(int(src.Fd()), name, int(dst.Fd()), name, unix.RENAME_EXCHANGE)
	}
	if err != nil {
		return fmt.Errorf("move %s into place: %w", name, err)
	}
	return nil
}

// switchTo makes the tree's revision, which is in the volume, the one that is seen:
// the kubelet's steps 8 to 12.
func (s *Store) switchTo(store, into *os.Root, t *tree) error {
	revision := t.link.Linkname
	if err := into.RemoveAll(nextLink); err != nil {
		return err
	}
	if err := into.Symlink(revision, nextLink); err != nil {
		return err
	}
	if err := into.Lchown(nextLink, t.link.Uid, t.link.Gid); err != nil {
		return err
	}
	if err := into.Rename(nextLink, dataLink); err != nil {
		return fmt.Errorf("switch to %s: %w", revision, err)
	}
	names, err := fs.ReadDir(into.FS(), revision)
	if err != nil {
		return err
	}
	keep := map[string]bool{dataLink: true, revision: true}
	for _, e := range names {
		if strings.HasPrefix(e.Name(), "..") {
			continue // the kubelet writes none, and it would be taken for its own
		}
		keep[e.Name()] = true
		if err := link(into, e.Name(), t.link); err != nil {
			return err
		}
	}
	have, err := fs.ReadDir(into.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range have {
		if keep[e.Name()] {
			continue
		}
		if err := s.takeOut(store, into, e); err != nil {
			return err
		}
	}
	return nil
}

// link makes the link by which containers know a name.
func link(into *os.Root, name string, owner *tar.Header) error {
	target := dataLink + "/" + name
	if have, err := into.Readlink(name); err == nil && have == target {
		return nil
	}
	if err := into.RemoveAll(name); err != nil {
		return err
	}
	if err := into.Symlink(target, name); err != nil {
		return err
	}
	return into.Lchown(name, owner.Uid, owner.Gid)
}

// takeOut removes an entry of the volume: a name that is gone, or the revision
// before, which leaves with one rename, so that nobody finds half of it.
func (s *Store) takeOut(store, into *os.Root, e fs.DirEntry) error {
	if !e.IsDir() || store == into {
		return into.RemoveAll(e.Name())
	}
	aside := s.stage()
	from, err := into.Open(".")
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := store.Open(filepath.Dir(aside))
	if err != nil {
		return err
	}
	defer to.Close()
	if err := unix.Renameat(int(from.Fd()), e.Name(), int(to.Fd()), filepath.Base(aside)); err != nil {
		return fmt.Errorf("take %s out: %w", e.Name(), err)
	}
	return store.RemoveAll(aside)
}
