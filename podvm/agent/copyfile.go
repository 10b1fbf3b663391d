// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"golang.org/x/sys/unix"
)

// stagingDir holds files that are not complete. It is beside the volumes, on the same
// file system and in no container, so that a file appears in its place at once.
const stagingDir = ".staging"

// fileCopier writes what CopyFile brings. All names are resolved below one directory;
// no symbolic link leads out of it.
type fileCopier struct {
	dir string

	mu      sync.Mutex
	root    *os.Root           // guarded by mu; nil until the first file
	uploads map[string]*upload // guarded by mu; by path below dir
	serial  int                // guarded by mu; makes staging names unique
}

// upload is a regular file of which parts are missing.
type upload struct {
	f       *os.File
	staged  string
	size    int64
	written int64 // bytes from the start that have arrived
}

func newFileCopier(dir string) *fileCopier {
	return &fileCopier{dir: dir, uploads: make(map[string]*upload)}
}

// copy does one CopyFile. A directory is made, or kept and given mode and owner; a
// link or file replaces what has its name in one step, a file when its last part has
// come. Parts come in order; one may be repeated. InvalidArgument: path, type or
// sizes are wrong; FailedPrecondition: the file's first part is missing; OutOfRange:
// a part before this one is missing.
func (c *fileCopier) copy(req *agentpb.CopyFileRequest) error {
	rel, err := filepath.Rel(c.dir, filepath.Clean(req.Path))
	if err != nil || !filepath.IsAbs(req.Path) || !filepath.IsLocal(rel) || rel == "." || strings.HasPrefix(rel+"/", stagingDir+"/") {
		return fmt.Errorf("path %q is not below %s: %w", req.Path, c.dir, errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.open(); err != nil {
		return fmt.Errorf("copy %s: %w", req.Path, err)
	}
	if err := c.mkdirs(filepath.Dir(rel), req); err != nil {
		return fmt.Errorf("copy %s: %w", req.Path, err)
	}
	switch req.FileMode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = c.directory(rel, req)
	case unix.S_IFLNK:
		err = c.link(rel, req)
	case unix.S_IFREG, 0:
		err = c.part(rel, req)
	default:
		err = fmt.Errorf("file mode %#o is of no type that can be copied: %w", req.FileMode, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("copy %s: %w", req.Path, err)
	}
	return nil
}

// open opens the directory and empties the staging area. mu is held.
func (c *fileCopier) open() error {
	if c.root != nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Join(c.dir, stagingDir), 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(c.dir)
	if err != nil {
		return err
	}
	c.root = root
	return nil
}

// mode is the request's file mode in Go's terms.
func mode(m uint32) os.FileMode {
	out := os.FileMode(m & 0o777)
	for bit, flag := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if m&bit != 0 {
			out |= flag
		}
	}
	return out
}

// mkdirs makes the directories above a file that are missing, and only those get the
// request's mode and owner. mu is held.
func (c *fileCopier) mkdirs(rel string, req *agentpb.CopyFileRequest) error {
	if rel == "." {
		return nil
	}
	if err := c.mkdirs(filepath.Dir(rel), req); err != nil {
		return err
	}
	perm := req.DirMode & 0o777
	if perm == 0 {
		perm = 0o750
	}
	err := c.root.Mkdir(rel, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.own(rel, os.FileMode(perm), req)
}

func (c *fileCopier) own(rel string, perm os.FileMode, req *agentpb.CopyFileRequest) error {
	// Owner first: chown takes setuid and setgid away.
	if err := c.root.Lchown(rel, int(req.Uid), int(req.Gid)); err != nil {
		return err
	}
	return c.root.Chmod(rel, perm)
}

func (c *fileCopier) directory(rel string, req *agentpb.CopyFileRequest) error {
	st, err := c.root.Lstat(rel)
	if err == nil && !st.IsDir() {
		if err := c.root.Remove(rel); err != nil {
			return err
		}
	}
	if err != nil || !st.IsDir() {
		if err := c.root.Mkdir(rel, 0o700); err != nil {
			return err
		}
	}
	return c.own(rel, mode(req.FileMode), req)
}

// stage returns a name in the staging area that nothing has. mu is held.
func (c *fileCopier) stage() string {
	c.serial++
	return filepath.Join(stagingDir, strconv.Itoa(c.serial))
}

// place moves a complete file to where it belongs. What is there is replaced; only a
// directory, which rename(2) does not replace by a file, is removed before. mu is
// held.
func (c *fileCopier) place(staged, rel string) error {
	err := c.root.Rename(staged, rel)
	if err == nil {
		return nil
	}
	if st, statErr := c.root.Lstat(rel); statErr == nil && st.IsDir() {
		if err := c.root.RemoveAll(rel); err != nil {
			return err
		}
		err = c.root.Rename(staged, rel)
	}
	return err
}

func (c *fileCopier) link(rel string, req *agentpb.CopyFileRequest) error {
	staged := c.stage()
	if err := c.root.Symlink(string(req.Data), staged); err != nil {
		return err
	}
	err := c.root.Lchown(staged, int(req.Uid), int(req.Gid))
	if err == nil {
		err = c.place(staged, rel)
	}
	if err != nil {
		_ = c.root.Remove(staged)
	}
	return err
}

// part writes one part of a regular file and, with the last, puts the file in place.
func (c *fileCopier) part(rel string, req *agentpb.CopyFileRequest) error {
	n := int64(len(req.Data))
	if req.FileSize < 0 || req.Offset < 0 || req.Offset > req.FileSize || n > req.FileSize-req.Offset {
		return fmt.Errorf("%d bytes at offset %d are outside of the file's size, %d: %w", n, req.Offset, req.FileSize, errdefs.ErrInvalidArgument)
	}
	u := c.uploads[rel]
	if req.Offset == 0 {
		if u != nil {
			c.abandon(rel)
		}
		staged := c.stage()
		f, err := c.root.OpenFile(staged, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		u = &upload{f: f, staged: staged, size: req.FileSize}
		c.uploads[rel] = u
	}
	switch {
	case u == nil:
		return fmt.Errorf("a part at offset %d came before the first: %w", req.Offset, errdefs.ErrFailedPrecondition)
	case u.size != req.FileSize:
		return fmt.Errorf("the file's size was %d and is now %d; begin again at offset 0: %w", u.size, req.FileSize, errdefs.ErrInvalidArgument)
	case req.Offset > u.written:
		return fmt.Errorf("a part at offset %d came before that at %d: %w", req.Offset, u.written, errdefs.ErrOutOfRange)
	}
	if _, err := u.f.WriteAt(req.Data, req.Offset); err != nil {
		c.abandon(rel)
		if errors.Is(err, unix.ENOSPC) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
		}
		return err
	}
	u.written = max(u.written, req.Offset+n)
	if u.written < u.size {
		return nil
	}
	err := errors.Join(u.f.Chown(int(req.Uid), int(req.Gid)), u.f.Chmod(mode(req.FileMode)))
	if err == nil {
		err = c.place(u.staged, rel)
	}
	c.abandon(rel) // what is left of it: the descriptor, or after an error the file too
	return err
}

// abandon forgets an upload. mu is held.
func (c *fileCopier) abandon(rel string) {
	u := c.uploads[rel]
	delete(c.uploads, rel)
	_ = u.f.Close()
	_ = c.root.Remove(u.staged)
}

// reset removes everything that was copied.
func (c *fileCopier) reset() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.root == nil {
		return nil
	}
	for rel := range c.uploads {
		c.abandon(rel)
	}
	entries, err := fs.ReadDir(c.root.FS(), ".")
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, c.root.RemoveAll(e.Name()))
	}
	errs = append(errs, c.root.Close())
	c.root = nil
	return errors.Join(errs...)
}

// close is the end of the copier.
func (c *fileCopier) close() error { return c.reset() }
