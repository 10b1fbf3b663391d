// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// maxArchive bounds a volume in bytes: it is held in memory while it is sent. The
	// kubelet's own are of some MiB at most, 1 MiB for each ConfigMap or Secret.
	maxArchive = 64 << 20
	// maxEntries bounds the number of its files and directories.
	maxEntries = 20_000
	// lookAgain is the pause before a volume is read again that was replaced while it
	// was read; its replacement takes the kubelet a few system calls.
	lookAgain = 5 * time.Millisecond
	maxLooks  = 40
)

// archive collects a volume as PutVolume wants it.
type archive struct {
	buf     bytes.Buffer
	w       *tar.Writer
	entries int
	dirs    []string // paths on the node
}

func newArchive() *archive {
	a := &archive{}
	a.w = tar.NewWriter(&a.buf)
	return a
}

func (a *archive) finish() ([]byte, error) {
	if err := a.w.Close(); err != nil {
		return nil, err
	}
	return a.buf.Bytes(), nil
}

// tree adds what is at path, and all below it, as name. What a copy could not stand
// for is InvalidArgument.
func (a *archive) tree(ctx context.Context, path, name string) error {
	return filepath.WalkDir(path, func(at string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		rel, err := filepath.Rel(path, at)
		if err != nil {
			return err
		}
		return a.add(at, filepath.Join(name, rel))
	})
}

// add adds one entry. A directory is added without what is in it.
func (a *archive) add(path, name string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(st.Mtim.Unix())}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
		a.dirs = append(a.dirs, path)
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFREG:
		return a.file(path, h)
	default:
		return fmt.Errorf("%s is a socket, pipe or device of the node, which a copy cannot stand for: %w", path, errdefs.ErrInvalidArgument)
	}
	return a.header(h)
}

func (a *archive) header(h *tar.Header) error {
	a.entries++
	if a.entries > maxEntries || int64(a.buf.Len())+h.Size > maxArchive {
		return fmt.Errorf("it has more than %d MiB or %d entries, too much for a copy in the pod VM: mount less, or use network storage from inside the pod: %w", maxArchive>>20, maxEntries, errdefs.ErrInvalidArgument)
	}
	return a.w.WriteHeader(h)
}

func (a *archive) file(path string, h *tar.Header) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	h.Typeflag, h.Size = tar.TypeReg, fi.Size()
	if err := a.header(h); err != nil {
		return err
	}
	if _, err := io.CopyN(a.w, f, h.Size); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("%s became shorter while it was copied: %w", path, err)
	}
	return nil
}

// readTree is the archive of a directory that is copied once. The directory may be
// reached by a link.
func readTree(ctx context.Context, source string) ([]byte, error) {
	root, err := filepath.EvalSymlinks(source)
	if err != nil {
		return nil, err
	}
	a := newArchive()
	if err := a.tree(ctx, root, "."); err != nil {
		return nil, err
	}
	return a.finish()
}

// revision is one state of a volume that is followed.
type revision struct {
	archive []byte
	digest  [sha256.Size]byte
	dirs    []string // on the node: the volume's, and those that are read through "..data"
}

// readRevision reads one consistent revision of a volume of the kubelet's. The writer
// never changes a revision's content: it makes another directory, moves "..data" to
// it and only then removes the one before. So what was read is whole if "..data"
// still names it afterwards.
func readRevision(ctx context.Context, source string) (*revision, error) {
	var last error
	for range maxLooks {
		r, err := lookOnce(ctx, source)
		if err == nil {
			return r, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, errReplaced) {
			return nil, err
		}
		last = err
		select {
		case <-time.After(lookAgain):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return nil, fmt.Errorf("%s was not to be read: %w", source, last)
}

var errReplaced = errors.New("it was replaced while it was read")

func lookOnce(ctx context.Context, source string) (*revision, error) {
	name, err := revisionOf(source)
	if err != nil {
		return nil, err
	}
	a := newArchive()
	if err := a.add(source, "."); err != nil {
		return nil, err
	}
	if err := a.tree(ctx, filepath.Join(source, name), name); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(source, "..data"), &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: source + "/..data", Err: err}
	}
	// Its time says nothing: a link that was made again to the same place is no change.
	if err := a.header(&tar.Header{Typeflag: tar.TypeSymlink, Name: "..data", Linkname: name, Mode: 0o777, Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(0, 0)}); err != nil {
		return nil, err
	}
	if now, err := revisionOf(source); err != nil || now != name {
		return nil, errors.Join(errReplaced, err)
	}
	b, err := a.finish()
	if err != nil {
		return nil, err
	}
	return &revision{archive: b, digest: sha256.Sum256(b), dirs: a.dirs}, nil
}
