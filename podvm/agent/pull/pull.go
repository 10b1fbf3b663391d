// SPDX-License-Identifier: Apache-2.0

// Package pull gives containers root file systems whose images the guest itself pulls
// from a registry, what kata calls guest pull (storage driver image_guest_pull,
// kata-containers 4.1, src/agent/src/storage/image_pull_handler.rs). The node has no
// part in it: requests leave through the machine's own interface.
//
// An image is unpacked once, layer upon layer, into a tmpfs of bounded size: the tree.
// Each container that runs it has an overlay of it with a tmpfs of its own above, which
// is as large as the tree left of the bound. So a root costs at most what an imported
// one does, and containers of one pod share what they have in common.
//
//	<dir>/tree-N    tmpfs, the image             ─┐
//	<dir>/writes-N  tmpfs, upper and work         ─┴─▶ overlay at the container's root
//
// # Life of a tree
//
//	pulling ──done──▶ ready ──▶ gone
//	   └──failed, or abandoned──▲
//
// A pull belongs to nobody who waits for it: its callers may give up and come again,
// as the kubelet does with a new container id. It is abandoned when nobody has waited
// for it for Config.Linger. A tree that no container uses stays until another image is
// pulled, because a container that ends is often started again; what was pulled under
// a digest is not asked for twice.
//
// # What is trusted
//
// Nothing that comes from the registry. Digests of manifest, configuration and layers
// are verified, those of the unpacked layers too; names are resolved inside of the
// tree; sizes, files, entries of an archive and documents are bounded. A tree is used
// only when all of it was verified.
package pull

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/kata-remote/kata-remote/podvm/agent/rootfs"
	"golang.org/x/sys/unix"
)

// DefaultLinger is how long a pull goes on that nobody waits for: longer than the
// kubelet takes to try a container again.
const DefaultLinger = time.Minute

// Config describes a Store.
type Config struct {
	// Dir is an absolute path; it exists while there are trees. It has no comma and
	// no colon, which mean something to overlayfs.
	Dir string
	// RootSize bounds each root file system, image and writes together, in bytes.
	RootSize uint64
	// AuthFile is a docker configuration with credentials. Missing: there are none.
	AuthFile string
	// CA are certificates, PEM, of authorities that registries may have beside those
	// of the system.
	CA string
	// Insecure lists registries, host or host:port, that may be spoken to in plain
	// HTTP. Those on this machine always may.
	Insecure []string
	// Linger replaces DefaultLinger; < 0: a pull ends with the last who waits for it.
	Linger time.Duration
}

// Store has the images of one guest. Its methods may be called concurrently.
type Store struct {
	cfg   Config
	roots *x509.CertPool // nil: the system's

	// life ends with Close: the pulls' own context, since they outlive their callers.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup

	// dirs keeps one from removing an empty Dir while another makes a directory in it.
	// Held only for a mount or an unmount.
	dirs sync.Mutex

	mu     sync.Mutex
	last   int                // guarded by mu; number of the last directory
	trees  map[v1.Hash]*tree  // guarded by mu; by the image manifest's digest
	pulled map[string]v1.Hash // guarded by mu; what references stood for
}

type tree struct {
	digest v1.Hash
	path   string
	cancel context.CancelFunc // ends the pull
	done   chan struct{}      // closed when the tree is ready or gone
	// Set before done is closed.
	used uint64 // bytes
	err  error

	refs  int         // guarded by Store.mu
	timer *time.Timer // guarded by Store.mu; abandons the pull; nil: somebody waits
}

// New returns a store without images. InvalidArgument: CA has no certificate, or Dir
// is not usable.
func New(cfg Config) (*Store, error) {
	if !filepath.IsAbs(cfg.Dir) || filepath.Clean(cfg.Dir) != cfg.Dir || !plainPath(cfg.Dir) {
		return nil, fmt.Errorf("directory %q for images is not an absolute, clean path without comma and colon: %w", cfg.Dir, errdefs.ErrInvalidArgument)
	}
	if cfg.Linger == 0 {
		cfg.Linger = DefaultLinger
	}
	s := &Store{cfg: cfg, trees: make(map[v1.Hash]*tree), pulled: make(map[string]v1.Hash)}
	if cfg.CA != "" {
		var err error
		if s.roots, err = x509.SystemCertPool(); err != nil {
			s.roots = x509.NewCertPool() // a machine without authorities of its own
		}
		if !s.roots.AppendCertsFromPEM([]byte(cfg.CA)) {
			return nil, fmt.Errorf("the additional authority for registries is not a certificate in PEM: %w", errdefs.ErrInvalidArgument)
		}
	}
	s.life, s.end = context.WithCancel(context.Background())
	return s, nil
}

// Mount pulls an image, unless it is here, and mounts a root file system with it at a
// directory, with flags of mount(2). undo takes that away again and leaves the
// directory. After an error nothing is mounted.
//
// Classes: InvalidArgument, the reference; NotFound, the image; PermissionDenied, the
// credentials; Unavailable, the way to the registry; FailedPrecondition, its
// certificate or its lack of one; ResourceExhausted, the size; DataLoss, what it sent.
func (s *Store) Mount(ctx context.Context, reference, at string, flags uintptr) (undo func() error, err error) {
	t, err := s.acquire(ctx, reference)
	if err != nil {
		return nil, fmt.Errorf("pull image %s: %w", reference, err)
	}
	undo, err = s.mount(ctx, t, at, flags)
	if err != nil {
		s.release(t)
		return nil, fmt.Errorf("mount image %s: %w", reference, err)
	}
	return undo, nil
}

// leastWrites is the room for a container's own writes, bytes, where the image left
// none: the overlay needs a little for itself.
const leastWrites = 1 << 20

func (s *Store) mount(ctx context.Context, t *tree, at string, flags uintptr) (undo func() error, err error) {
	var st unix.Stat_t
	if err := unix.Stat(t.path, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", t.path, err)
	}
	room := uint64(leastWrites)
	if s.cfg.RootSize > t.used {
		room = max(room, s.cfg.RootSize-t.used)
	}
	writes := s.directory("writes")
	if err := s.makeTree(writes, room); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.removeTree(writes))
		}
	}()
	upper, work := filepath.Join(writes, "upper"), filepath.Join(writes, "work")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o700)); err != nil {
		return nil, err
	}
	// The root directory itself is the upper one.
	if err := errors.Join(unix.Chown(upper, int(st.Uid), int(st.Gid)), unix.Chmod(upper, st.Mode&0o7777)); err != nil {
		return nil, fmt.Errorf("give the root directory its owner and mode: %w", err)
	}
	if err := mountOverlay(ctx, at, flags, "lowerdir="+t.path+",upperdir="+upper+",workdir="+work); err != nil {
		return nil, err
	}
	where := at
	if link, err := os.Readlink(at); err == nil {
		where = link // of a descriptor, which ends before the mount does
	}
	var once sync.Once
	return func() error {
		if err := unix.Unmount(where, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", where, err)
		}
		if err := s.removeTree(writes); err != nil {
			return err
		}
		once.Do(func() { s.release(t) })
		return nil
	}, nil
}

const (
	// overlayWait is how long overlayfs may be missing. The image loads its module
	// while the pod's first calls are served, 0.3 s after the start.
	overlayWait  = 10 * time.Second
	overlayRetry = 50 * time.Millisecond
)

func mountOverlay(ctx context.Context, at string, flags uintptr, data string) error {
	ctx, cancel := context.WithTimeout(ctx, overlayWait)
	defer cancel()
	for {
		err := unix.Mount("overlay", at, "overlay", flags, data)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("mount overlayfs at %s with %q: %w", at, data, err)
		if !errors.Is(err, unix.ENODEV) {
			return err
		}
		select {
		case <-time.After(overlayRetry):
		case <-ctx.Done():
			return err
		}
	}
}

func (s *Store) makeTree(path string, size uint64) error {
	s.dirs.Lock()
	defer s.dirs.Unlock()
	return rootfs.Mount(path, size)
}

func (s *Store) removeTree(path string) error {
	s.dirs.Lock()
	defer s.dirs.Unlock()
	return rootfs.Unmount(path)
}

// directory returns a new path.
func (s *Store) directory(kind string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.directoryLocked(kind)
}

func (s *Store) directoryLocked(kind string) string {
	s.last++
	return filepath.Join(s.cfg.Dir, kind+"-"+strconv.Itoa(s.last))
}

// RemoveAll ends every pull and removes every image that no root file system uses.
func (s *Store) RemoveAll() error {
	s.mu.Lock()
	var list []*tree
	for _, t := range s.trees {
		list = append(list, t)
		t.cancel()
	}
	s.mu.Unlock()
	for _, t := range list {
		<-t.done
	}
	return s.evict()
}

// Close is RemoveAll, and the store takes no more.
func (s *Store) Close() error {
	s.end()
	err := s.RemoveAll()
	s.wg.Wait()
	return err
}
