// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// storageDriver makes one kind of storage.
type storageDriver struct {
	// lasting: it is the pod's and not its containers'. An emptyDir keeps its content
	// when the only container that uses it is replaced, or while an init container
	// has gone and the next has not come.
	lasting bool
	// make makes the storage at r.at, where a directory is. It may take as long as
	// ctx lasts: other storages do not wait for it. undo takes away what was mounted
	// there and leaves the directory; nil: a directory with what is in it is all
	// there is. After an error nothing is left but the directory.
	make func(ctx context.Context, a *Agent, r *storageRequest) (undo func() error, err error)
}

// storageDrivers are those GetGuestDetails reports, by the name a Storage has them
// under. A driver is added here.
var storageDrivers = map[string]storageDriver{
	"ephemeral": {lasting: true, make: mountEphemeral},
	"local":     {lasting: true, make: makeLocal},
	"bind":      {make: mountBind},
	guestPull:   {make: pullImage},

	extension.SubPathDriver: {make: bindSubPath},
}

func storageDriverNames() []string { return slices.Sorted(maps.Keys(storageDrivers)) }

// storageRequest is a storage that is to be made.
type storageRequest struct {
	*agentpb.Storage
	container ContainerID // empty: it is the sandbox's
	at        string      // the mount point, clean, below the state directory
	dir       *os.File    // the directory there, open, reached without a symbolic link
	opts      storageOptions
}

// mount mounts over the directory and returns what takes it away again. The flags
// apply to what becomes visible; a bind takes all but MS_REC from a second call.
func (r *storageRequest) mount(source, fstype string, flags uintptr, data string) (undo func() error, err error) {
	first, rest := flags, uintptr(0)
	if flags&unix.MS_BIND != 0 {
		first, rest = flags&(unix.MS_BIND|unix.MS_REC), flags&^(unix.MS_BIND|unix.MS_REC)
	}
	if err := unix.Mount(source, fdPath(r.dir), fstype, first, data); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	undo = func() error { return unmount(r.at) }
	if rest != 0 {
		// r.dir is what lies beneath; the mount is found by name.
		if err := unix.Mount("", r.at, "", unix.MS_REMOUNT|unix.MS_BIND|rest, ""); err != nil {
			return nil, errors.Join(fmt.Errorf("remount: %w", err), undo())
		}
	}
	return undo, nil
}

// unmount takes the topmost mount away. None there is no error.
func unmount(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// storage is one that exists, or is being made.
type storage struct {
	driver string
	refs   int           // guarded by Agent.volMu
	ready  chan struct{} // closed when it was made or could not be
	// Set before ready is closed.
	err   error
	undo  func() error // as storageDriver.make returns it
	flags uintptr      // it was mounted with
}

// addStorage makes a storage or takes another reference to it; container is empty
// for those of the sandbox. InvalidArgument: an unknown driver, an option no driver
// has, a mount point outside of the state directory or one that another driver has.
func (a *Agent) addStorage(ctx context.Context, container ContainerID, s *agentpb.Storage) error {
	at, rel, err := a.mountPoint(s)
	if err != nil {
		return err
	}
	driver, ok := storageDrivers[s.Driver]
	if !ok {
		return fmt.Errorf("storage %s: this agent has no driver %q, only %s: %w", at, s.Driver, strings.Join(storageDriverNames(), ", "), errdefs.ErrInvalidArgument)
	}
	opts, err := parseStorageOptions(s)
	if err != nil {
		return err
	}
	for {
		v, mine, err := a.reserveStorage(at, s.Driver)
		if err != nil {
			return err
		}
		if mine {
			v.undo, v.err = a.makeStorage(ctx, driver, rel, &storageRequest{Storage: s, container: container, at: at, opts: opts})
			v.flags = opts.flags
			if v.err != nil {
				a.volMu.Lock()
				delete(a.volumes, at)
				a.volMu.Unlock()
			}
			close(v.ready)
			return v.err
		}
		select {
		case <-v.ready:
		case <-ctx.Done():
			// The one that makes it still holds a reference.
			a.volMu.Lock()
			v.refs--
			a.volMu.Unlock()
			return fmt.Errorf("storage %s: wait for the one that makes it: %w", at, ctx.Err())
		}
		if v.err == nil {
			return nil
		}
		// What the other could not do may be its context's fault: try with ours.
	}
}

// mountPoint checks where a storage is to be; rel is that below the state directory.
func (a *Agent) mountPoint(s *agentpb.Storage) (at, rel string, err error) {
	at = filepath.Clean(s.MountPoint)
	rel, err = filepath.Rel(a.cfg.StateDir, at)
	if err != nil || !filepath.IsLocal(rel) || rel == "." {
		return "", "", fmt.Errorf("storage %q: the mount point is not below %s: %w", s.MountPoint, a.cfg.StateDir, errdefs.ErrInvalidArgument)
	}
	return at, rel, nil
}

// reserveStorage takes a reference, and tells whether the caller is to make it.
func (a *Agent) reserveStorage(at, driver string) (v *storage, mine bool, err error) {
	a.volMu.Lock()
	defer a.volMu.Unlock()
	if have := a.volumes[at]; have != nil {
		if have.driver != driver {
			return nil, false, fmt.Errorf("storage %s: it is there already with driver %s, not %s: %w", at, have.driver, driver, errdefs.ErrInvalidArgument)
		}
		have.refs++
		return have, false, nil
	}
	v = &storage{driver: driver, refs: 1, ready: make(chan struct{})}
	a.volumes[at] = v
	return v, true, nil
}

// makeStorage has a driver make a storage.
func (a *Agent) makeStorage(ctx context.Context, driver storageDriver, rel string, r *storageRequest) (undo func() error, err error) {
	if r.dir, err = a.openBelow(rel); err != nil {
		return nil, fmt.Errorf("storage %s: %w", r.at, err)
	}
	defer r.dir.Close()
	if undo, err = driver.make(ctx, a, r); err == nil && r.FsGroup != nil {
		if err = giveToGroup(r.at, r.FsGroup, r.opts.flags&unix.MS_RDONLY != 0); err != nil && undo != nil {
			err = errors.Join(err, undo())
		}
	}
	if err != nil {
		a.removeEmptyDirs(r.at)
		return nil, fmt.Errorf("storage %s: driver %s: %w", r.at, r.Driver, err)
	}
	return undo, nil
}

// openBelow makes and opens a directory below the state directory. No symbolic link
// leads out of it.
func (a *Agent) openBelow(rel string) (*os.File, error) {
	root, err := os.OpenRoot(a.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := root.MkdirAll(rel, 0o755); err != nil {
		return nil, err
	}
	return root.Open(rel)
}

// dropStorage gives a reference back. The last one takes the storage away, unless it
// is the pod's.
func (a *Agent) dropStorage(at string) error {
	a.volMu.Lock()
	defer a.volMu.Unlock()
	v := a.volumes[at]
	if v == nil {
		return nil
	}
	if v.refs--; v.refs > 0 || storageDrivers[v.driver].lasting {
		return nil
	}
	return a.removeStorage(at, v)
}

// removeStorage takes a storage away. volMu is held.
func (a *Agent) removeStorage(at string, v *storage) error {
	if v.undo != nil {
		if err := v.undo(); err != nil {
			return fmt.Errorf("storage %s: %w", at, err)
		}
		if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove storage %s: %w", at, err)
		}
	} else if err := os.RemoveAll(at); err != nil {
		return fmt.Errorf("remove storage %s: %w", at, err)
	}
	delete(a.volumes, at)
	a.removeEmptyDirs(filepath.Dir(at))
	return nil
}

// removeEmptyDirs removes a directory and those above that were made for it, as far
// as nothing is in them.
func (a *Agent) removeEmptyDirs(dir string) {
	for dir != a.cfg.StateDir && os.Remove(dir) == nil {
		dir = filepath.Dir(dir)
	}
}

// dropAllStorage takes every storage away: the pod is gone.
func (a *Agent) dropAllStorage() error {
	a.volMu.Lock()
	defer a.volMu.Unlock()
	var errs []error
	for at, v := range a.volumes {
		errs = append(errs, a.removeStorage(at, v))
	}
	return errors.Join(errs...)
}

// UpdateEphemeralMounts changes the size of file systems in memory that are there.
// InvalidArgument: a storage of another kind, one that does not exist, or a size
// below what is used.
func (s *service) UpdateEphemeralMounts(_ context.Context, req *agentpb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	for _, st := range req.Storages {
		if err := s.a.remount(st); err != nil {
			return empty(err)
		}
	}
	return empty(nil)
}

func (a *Agent) remount(s *agentpb.Storage) error {
	at, _, err := a.mountPoint(s)
	if err != nil {
		return err
	}
	opts, err := parseStorageOptions(s)
	if err != nil {
		return err
	}
	a.volMu.Lock()
	defer a.volMu.Unlock()
	v := a.volumes[at]
	switch {
	case s.Driver != "ephemeral":
		return fmt.Errorf("storage %s: driver %q has no size to change, only ephemeral has: %w", at, s.Driver, errdefs.ErrInvalidArgument)
	case v == nil || v.driver != s.Driver || !v.made():
		return fmt.Errorf("storage %s: there is none of driver %s at this mount point: %w", at, s.Driver, errdefs.ErrInvalidArgument)
	}
	// A remount takes the flags away that it does not name.
	data := strings.Join(opts.data, ",")
	if err := unix.Mount("", at, "", unix.MS_REMOUNT|v.flags|opts.flags, data); err != nil {
		return fmt.Errorf("storage %s: remount with %q: %w", at, data, invalid(err))
	}
	return nil
}

// made tells whether a storage is there.
func (v *storage) made() bool {
	select {
	case <-v.ready:
		return v.err == nil
	default:
		return false
	}
}

// GetVolumeStats measures the file system a path of the guest is in, as CSI's
// NodeGetVolumeStats has it.
func (s *service) GetVolumeStats(_ context.Context, req *agentpb.VolumeStatsRequest) (*agentpb.VolumeStatsResponse, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(req.VolumeGuestPath, &st); err != nil {
		return nil, toGRPC(fmt.Errorf("measure volume %q: %w", req.VolumeGuestPath, err))
	}
	block := uint64(st.Frsize)
	return &agentpb.VolumeStatsResponse{
		Usage: []*agentpb.VolumeUsage{
			{Unit: agentpb.VolumeUsage_BYTES, Available: st.Bavail * block, Total: st.Blocks * block, Used: (st.Blocks - st.Bfree) * block},
			{Unit: agentpb.VolumeUsage_INODES, Available: st.Ffree, Total: st.Files, Used: st.Files - st.Ffree},
		},
		VolumeCondition: &agentpb.VolumeCondition{},
	}, nil
}
