// SPDX-License-Identifier: Apache-2.0

// Package volume keeps the volumes that a runtime copies into the guest, and switches
// them from one revision to the next the way the kubelet does on a node:
//
//	<dir>/                   a tmpfs of bounded size, mounted with the first volume
//	├── .staging/            what has not arrived whole, and what is being removed
//	└── <name>/              a volume; containers bind it
//	    ├── ..2026_11_21/    its revision
//	    ├── ..data           -> ..2026_11_21
//	    └── key              -> ..data/key
//
// A revision is unpacked beside the volumes, where no container sees it, moved into
// the volume, and takes effect with one rename of "..data". Only then do links of new
// names appear and those of old ones go, and the revision before leaves with one
// rename. So whoever opens "..data" once sees one revision, whole; and a process that
// waits for changes with inotify sees what it would see on a node.
//
// A volume's life, the revision in place and the archive of the next:
//
//	(absent) --first piece--> receiving --last piece--> unpacking --switched--> in place
//	                              ^                         |                     |
//	                              |                         | error: as before    |
//	                              +--------- first piece of the next revision ----+
//
// Archives come from the node, and a container may write into its volume where the
// node says so; neither is trusted. All names are resolved below the volume by
// os.Root, which follows no symbolic link out of it.
package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// staging is the directory of what is not in place. No volume has a name like it.
const staging = ".staging"

// namePattern is what volumes may be called.
var namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}$`)

// Store knows the volumes of one guest. Its methods may be called concurrently; those
// about one volume wait for each other.
type Store struct {
	dir  string
	size uint64

	mu      sync.Mutex
	root    *os.Root           // guarded by mu; nil: not mounted
	volumes map[string]*volume // guarded by mu; by name

	serial atomic.Uint64 // makes names in staging unique
}

// volume is one volume. Its mutex is held over work on the tmpfs and nothing else; who
// holds it does not take the store's.
type volume struct {
	mu       sync.Mutex
	revision uint64   // guarded by mu; in place; 0: none
	plain    bool     // guarded by mu; what is in place has no "..data"
	upload   *upload  // guarded by mu; nil: none
	gone     bool     // guarded by mu; removed, no more use
	root     *os.Root // the store's, while the volume is in it
}

// upload is an archive of which parts may be missing.
type upload struct {
	revision uint64
	f        *os.File
	staged   string
	size     uint64
}

// NewStore returns a store whose volumes are in dir. size bounds them all together,
// in bytes. Nothing is made before the first volume.
func NewStore(dir string, size uint64) *Store {
	return &Store{dir: filepath.Clean(dir), size: size, volumes: make(map[string]*volume)}
}

// Piece is one part of an archive, as PutVolume brings it.
type Piece struct {
	Path     string
	Revision uint64
	Offset   uint64
	Data     []byte
	EOF      bool
}

// Put takes a piece, and with the last one switches to the revision. It returns how
// much of the archive is there and whether the revision is in place.
// InvalidArgument: path or archive; OutOfRange: a piece before this one is missing;
// FailedPrecondition: a newer revision is in place, or a second one of a plain tree;
// ResourceExhausted: the store is full. After an error what was in place still is.
func (s *Store) Put(p Piece) (have uint64, done bool, err error) {
	name, err := s.name(p.Path)
	if err != nil {
		return 0, false, err
	}
	if p.Revision == 0 {
		return 0, false, fmt.Errorf("volume %s: revision 0: they begin with 1: %w", name, errdefs.ErrInvalidArgument)
	}
	v, err := s.open(name)
	if err != nil {
		return 0, false, fmt.Errorf("volume %s: %w", name, explain(err, s.size))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	have, done, err = s.put(v, name, p)
	if err != nil {
		return have, false, fmt.Errorf("volume %s, revision %d: %w", name, p.Revision, explain(err, s.size))
	}
	return have, done, nil
}

// name is the volume's that a path stands for.
func (s *Store) name(path string) (string, error) {
	name := filepath.Base(path)
	if filepath.Join(s.dir, name) != path || !namePattern.MatchString(name) {
		return "", fmt.Errorf("path %q is not a name below %s: %w", path, s.dir, errdefs.ErrInvalidArgument)
	}
	return name, nil
}

// open finds a volume, or makes a place for a new one.
func (s *Store) open(name string) (*volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.mount(); err != nil {
		return nil, err
	}
	v := s.volumes[name]
	if v == nil {
		v = &volume{root: s.root}
		s.volumes[name] = v
	}
	return v, nil
}

// mount makes the tmpfs. mu is held. Set-user-id programs and devices have no place
// in a volume; programs do: a ConfigMap may hold a script.
func (s *Store) mount() error {
	if s.root != nil {
		return nil
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("volumes", s.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size="+strconv.FormatUint(s.size, 10)); err != nil {
		return errors.Join(fmt.Errorf("mount a tmpfs of %d bytes at %s: %w", s.size, s.dir, err), os.Remove(s.dir))
	}
	root, err := os.OpenRoot(s.dir)
	if err == nil {
		err = root.Mkdir(staging, 0o700)
	}
	if err != nil {
		if root != nil {
			root.Close()
		}
		return errors.Join(err, unmount(s.dir))
	}
	s.root = root
	return nil
}

// stage returns a name in staging that nothing has.
func (s *Store) stage() string {
	return filepath.Join(staging, strconv.FormatUint(s.serial.Add(1), 10))
}

// put does Put for a volume whose mutex is held.
func (s *Store) put(v *volume, name string, p Piece) (uint64, bool, error) {
	switch {
	case v.gone:
		return 0, false, fmt.Errorf("it was removed meanwhile: %w", errdefs.ErrAborted)
	case p.Revision == v.revision:
		return p.Offset + uint64(len(p.Data)), true, nil
	case p.Revision < v.revision:
		return 0, false, fmt.Errorf("revision %d is in place: %w", v.revision, errdefs.ErrFailedPrecondition)
	case v.upload != nil && p.Revision < v.upload.revision:
		return 0, false, fmt.Errorf("revision %d is on its way: %w", v.upload.revision, errdefs.ErrFailedPrecondition)
	}
	if p.Offset == 0 && (v.upload == nil || v.upload.revision != p.Revision || v.upload.size > uint64(len(p.Data))) {
		v.abandon()
		if err := v.begin(s.stage(), p.Revision); err != nil {
			return 0, false, err
		}
	}
	u := v.upload
	if u == nil || u.revision != p.Revision || p.Offset > u.size {
		have := uint64(0)
		if u != nil && u.revision == p.Revision {
			have = u.size
		}
		return have, false, fmt.Errorf("a piece at %d came, and only %d bytes before it: %w", p.Offset, have, errdefs.ErrOutOfRange)
	}
	if end := p.Offset + uint64(len(p.Data)); end > u.size {
		if _, err := u.f.WriteAt(p.Data, int64(p.Offset)); err != nil {
			v.abandon()
			return 0, false, err
		}
		u.size = end
	}
	if !p.EOF {
		return u.size, false, nil
	}
	have := u.size
	defer v.abandon()
	if err := s.install(v, name, u); err != nil {
		return 0, false, err
	}
	v.revision = p.Revision
	return have, true, nil
}

// begin makes room for an archive.
func (v *volume) begin(staged string, revision uint64) error {
	f, err := v.root.OpenFile(staged, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	v.upload = &upload{revision: revision, f: f, staged: staged}
	return nil
}

// abandon forgets the archive that was being received.
func (v *volume) abandon() {
	if v.upload == nil {
		return
	}
	_ = v.upload.f.Close()
	_ = v.root.Remove(v.upload.staged)
	v.upload = nil
}

// Remove removes a volume; none there is no error. InvalidArgument: the path is no
// volume's. A container that still has it sees it empty.
func (s *Store) Remove(path string) error {
	name, err := s.name(path)
	if err != nil {
		return err
	}
	s.mu.Lock()
	v := s.volumes[name]
	s.mu.Unlock()
	if v == nil {
		return nil
	}
	if err := s.remove(v, name); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.volumes[name] == v {
		delete(s.volumes, name)
	}
	return nil
}

func (s *Store) remove(v *volume, name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.gone {
		return nil
	}
	v.abandon()
	if err := s.discard(v.root, name); err != nil {
		return err
	}
	v.gone = true
	return nil
}

// discard takes something out of sight with one rename, and removes it. Absence is no
// error.
func (s *Store) discard(root *os.Root, name string) error {
	aside := s.stage()
	err := root.Rename(name, aside)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return root.RemoveAll(aside)
}

// Reset removes every volume. Others may be put afterwards.
func (s *Store) Reset() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root == nil {
		return nil
	}
	for name, v := range s.volumes {
		v.mu.Lock() // its work is on the tmpfs, and soon done
		v.abandon()
		v.gone = true
		v.mu.Unlock()
		delete(s.volumes, name)
	}
	if err := unmount(s.dir); err != nil {
		return err
	}
	err := s.root.Close()
	s.root = nil
	return err
}

// unmount takes the tmpfs away. A container that goes on using a volume keeps it.
func unmount(dir string) error {
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return os.Remove(dir)
}

// explain gives an error its class.
func explain(err error, size uint64) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("the volumes of this pod need more than %d MiB in the pod VM, of which what is replaced is a part; give it more memory: %w: %w", size>>20, err, errdefs.ErrResourceExhausted)
	case errors.Is(err, unix.ENAMETOOLONG), strings.Contains(err.Error(), "path escapes"):
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}
