// SPDX-License-Identifier: Apache-2.0

// Package rootfs keeps the root file systems that a runtime streams into the guest.
// Each is a tmpfs of bounded size at <state dir>/<container id>/rootfs; writes of the
// container count against the same bound.
package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"archive/tar"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	// bytesPerInode bounds the number of files: a tmpfs charges neither names nor
	// empty files to its size.
	bytesPerInode = 4 << 10
	// fewestInodes lets a small root file system hold a small image's names.
	fewestInodes = 16 << 10
	// zstdWindow bounds the decoder's memory, bytes: the archive comes from outside.
	zstdWindow = 8 << 20
)

// Store knows the root file systems of one guest. Its methods may be called
// concurrently.
type Store struct {
	dir         string
	defaultSize uint64

	mu     sync.Mutex
	trees  map[string]*tree // guarded by mu
	closed bool             // guarded by mu
}

type tree struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when the import ended
	used   bool          // guarded by Store.mu; a container has it as its root
}

// NewStore returns a store below dir. defaultSize bounds a tree that has no limit of
// its own, bytes.
func NewStore(dir string, defaultSize uint64) *Store {
	return &Store{dir: dir, defaultSize: defaultSize, trees: make(map[string]*tree)}
}

// Path returns where the root file system of a container is.
func (s *Store) Path(id string) string { return filepath.Join(s.dir, id, "rootfs") }

// Import fills the root file system of a container with a tar archive, decompressed
// first when compressed is set. limit bounds it in bytes; 0 takes the store's
// default. It reads what src returns to its end; reads must fail when the context src
// was given is done. It returns the path. After an error nothing is
// left. A tree imported before under the same id, or still being imported, is
// replaced, unless a container uses it (AlreadyExists). ResourceExhausted: the limit
// is too small; InvalidArgument: the archive is damaged.
func (s *Store) Import(ctx context.Context, id string, src func(context.Context) io.Reader, compressed bool, limit uint64) (_ string, err error) {
	ctx, t, err := s.begin(ctx, id)
	if err != nil {
		return "", err
	}
	defer func() {
		t.cancel()
		if err != nil {
			err = errors.Join(err, s.drop(id, t))
		}
		close(t.done)
	}()
	if limit == 0 {
		limit = s.defaultSize
	}
	path := s.Path(id)
	if err := Mount(path, limit); err != nil {
		return "", fmt.Errorf("make the root file system of container %s: %w", id, err)
	}
	if err := unpack(ctx, path, src(ctx), compressed); err != nil {
		return "", fmt.Errorf("unpack the root file system of container %s: %w", id, explain(ctx, err, limit))
	}
	return path, nil
}

// begin takes the id, sending an earlier import of it away.
func (s *Store) begin(ctx context.Context, id string) (context.Context, *tree, error) {
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return nil, nil, fmt.Errorf("the agent is ending: %w", errdefs.ErrUnavailable)
		}
		before := s.trees[id]
		if before == nil {
			t := &tree{done: make(chan struct{})}
			ctx, t.cancel = context.WithCancel(ctx)
			s.trees[id] = t
			s.mu.Unlock()
			return ctx, t, nil
		}
		if before.used {
			s.mu.Unlock()
			return nil, nil, fmt.Errorf("container %s uses its root file system: %w", id, errdefs.ErrAlreadyExists)
		}
		s.mu.Unlock()
		before.cancel()
		select {
		case <-before.done:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
		if err := s.drop(id, before); err != nil {
			return nil, nil, err
		}
	}
}

// drop removes a tree that nothing works on. One that was dropped before, or
// replaced, is left alone.
func (s *Store) drop(id string, t *tree) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trees[id] != t {
		return nil
	}
	delete(s.trees, id)
	return Unmount(s.Path(id))
}

// Use marks the tree of a container as in use and tells whether there is one.
// Unavailable: it is still being imported.
func (s *Store) Use(id string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.trees[id]
	if t == nil {
		return false, nil
	}
	select {
	case <-t.done:
	default:
		return false, fmt.Errorf("the root file system of container %s is still being imported: %w", id, errdefs.ErrUnavailable)
	}
	t.used = true
	return true, nil
}

// Unuse takes Use back.
func (s *Store) Unuse(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.trees[id]; t != nil {
		t.used = false
	}
}

// Remove removes the tree of a container and tells whether there was one. It ends an
// import under way.
func (s *Store) Remove(ctx context.Context, id string) (bool, error) {
	s.mu.Lock()
	t := s.trees[id]
	s.mu.Unlock()
	if t == nil {
		return false, nil
	}
	t.cancel()
	select {
	case <-t.done:
	case <-ctx.Done():
		return true, ctx.Err()
	}
	return true, s.drop(id, t)
}

// RemoveAll removes every tree. Trees added meanwhile may stay.
func (s *Store) RemoveAll(ctx context.Context) error {
	s.mu.Lock()
	ids := make([]string, 0, len(s.trees))
	for id := range s.trees {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	var errs []error
	for _, id := range ids {
		_, err := s.Remove(ctx, id)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Close removes every tree and takes no more.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	return s.RemoveAll(context.Background())
}

// Inodes is how many files a root file system of a size may have.
func Inodes(limit uint64) uint64 { return max(limit/bytesPerInode, fewestInodes) }

// Mount makes a directory and mounts an empty root file system there, a tmpfs whose
// size is limit, in bytes. After an error nothing is left.
func Mount(path string, limit uint64) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	data := fmt.Sprintf("size=%d,nr_inodes=%d,mode=0755", limit, Inodes(limit))
	if err := unix.Mount("rootfs", path, "tmpfs", 0, data); err != nil {
		return errors.Join(fmt.Errorf("mount a tmpfs of %d bytes at %s: %w", limit, path, err), rmdirs(path))
	}
	return nil
}

// Unmount takes away what Mount made: the tmpfs, its directory, and the one above once
// it is empty. Where nothing is mounted, the directories alone.
func Unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return rmdirs(path)
}

// rmdirs removes the mount point and, once empty, the container's directory.
func rmdirs(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Remove(filepath.Dir(path)); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	return nil
}

// unpack writes the archive into the tree. archive.Apply resolves every name inside
// the tree, so that none leads out of it; nobody else writes to the tree meanwhile.
func unpack(ctx context.Context, path string, src io.Reader, compressed bool) error {
	in := src
	if compressed {
		dec, err := zstd.NewReader(src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return err
		}
		defer dec.Close()
		in = dec
	}
	// The archive is a whole tree: a file that looks like a whiteout is a file.
	_, err := archive.Apply(ctx, path, in, archive.WithConvertWhiteout(func(*tar.Header, string) (bool, error) { return true, nil }))
	if err != nil {
		return err
	}
	// What follows the archive's last record, padding, and the end of the frame.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if compressed {
		_, err = io.Copy(io.Discard, src)
	}
	return err
}

// explain gives the error a class and says what to change.
func explain(ctx context.Context, err error, limit uint64) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("the image does not fit into the root file system's limit of %d bytes (%d MiB); raise the limit or the pod's memory: %w: %w",
			limit, limit>>20, err, errdefs.ErrResourceExhausted)
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", err, ctx.Err())
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, tar.ErrHeader), errors.Is(err, zstd.ErrMagicMismatch), errors.Is(err, zstd.ErrCRCMismatch), isZstd(err):
		return fmt.Errorf("the archive is damaged: %w: %w", err, errdefs.ErrInvalidArgument)
	default:
		return err
	}
}

// isZstd recognises the decoder's other complaints about its input.
func isZstd(err error) bool {
	for _, e := range []error{
		zstd.ErrReservedBlockType, zstd.ErrCompressedSizeTooBig, zstd.ErrBlockTooSmall, zstd.ErrUnexpectedBlockSize,
		zstd.ErrWindowSizeExceeded, zstd.ErrWindowSizeTooSmall, zstd.ErrDecoderSizeExceeded, zstd.ErrUnknownDictionary,
		zstd.ErrFrameSizeExceeded, zstd.ErrFrameSizeMismatch,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
