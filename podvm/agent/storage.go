// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"golang.org/x/sys/unix"
)

// mountedStorage is one storage that exists.
type mountedStorage struct {
	refs    int
	mounted bool
	// lasting: it is the pod's and not its containers'. An emptyDir keeps its content
	// when the only container that uses it is replaced, or while an init container
	// has gone and the next has not come.
	lasting bool
}

// storageDriver makes one kind of storage at dir, an open directory. It tells
// whether it mounted something there.
type storageDriver struct {
	name    string
	lasting bool
	make    func(s *agentpb.Storage, o storageOptions, dir *os.File) (mounted bool, err error)
}

// storageDrivers are those GetGuestDetails reports. A driver is added here.
var storageDrivers = []storageDriver{
	{name: "ephemeral", lasting: true, make: mountEphemeral},
	{name: "local", lasting: true, make: makeLocal},
	{name: "bind", make: mountBind},
}

// storageOptions is a storage's list of options, taken apart.
type storageOptions struct {
	flags uintptr
	data  []string // for the file system
	mode  string   // octal; empty: unsaid
	gid   int      // -1: unsaid
}

var mountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
	"noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME,
	"sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC, "bind": unix.MS_BIND, "rbind": unix.MS_BIND | unix.MS_REC,
	"rw": 0, "suid": 0, "dev": 0, "exec": 0, "defaults": 0,
}

func parseStorageOptions(s *agentpb.Storage) (storageOptions, error) {
	o := storageOptions{gid: -1}
	if s.FsGroup != nil {
		o.gid = int(s.FsGroup.GroupId)
	}
	for _, opt := range s.Options {
		for _, one := range strings.Split(opt, ",") {
			key, value, _ := strings.Cut(one, "=")
			if flag, ok := mountFlags[one]; ok {
				o.flags |= flag
				continue
			}
			switch key {
			case "fsgid":
				gid, err := strconv.ParseUint(value, 10, 31)
				if err != nil {
					return o, fmt.Errorf("storage %s: option %q is not a group id: %w", s.MountPoint, one, errdefs.ErrInvalidArgument)
				}
				o.gid = int(gid)
			case "mode":
				if _, err := strconv.ParseUint(value, 8, 12); err != nil {
					return o, fmt.Errorf("storage %s: option %q is not an octal mode: %w", s.MountPoint, one, errdefs.ErrInvalidArgument)
				}
				o.mode = value
			case "":
			default:
				o.data = append(o.data, one)
			}
		}
	}
	return o, nil
}

// perm is the mode the options ask for, or otherwise. A group that owns the volume
// may write to it, and so may what is made in it.
func (o storageOptions) perm(otherwise uint32) uint32 {
	perm := otherwise
	if o.mode != "" {
		m, _ := strconv.ParseUint(o.mode, 8, 12) // checked when it was parsed
		perm = uint32(m)
	}
	if o.gid >= 0 {
		perm |= unix.S_ISGID | 0o070
	}
	return perm
}

// own gives the directory its mode and group.
func (o storageOptions) own(path string, otherwise uint32) error {
	if o.gid >= 0 {
		if err := unix.Chown(path, -1, o.gid); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	if o.gid >= 0 || o.mode != "" {
		if err := unix.Chmod(path, o.perm(otherwise)); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	return nil
}

// mountEphemeral mounts a file system in memory: an emptyDir with medium Memory, or
// the pod's /dev/shm.
func mountEphemeral(s *agentpb.Storage, o storageOptions, dir *os.File) (bool, error) {
	fstype := s.Fstype
	if fstype == "" {
		fstype = "tmpfs"
	}
	if fstype != "tmpfs" && fstype != "hugetlbfs" {
		return false, fmt.Errorf("fstype %q is neither tmpfs nor hugetlbfs: %w", fstype, errdefs.ErrInvalidArgument)
	}
	data := o.data
	if o.mode != "" {
		data = append(data, "mode="+o.mode)
	}
	if err := unix.Mount(s.Source, fdPath(dir), fstype, o.flags, strings.Join(data, ",")); err != nil {
		return false, fmt.Errorf("mount %s with %q: %w", fstype, strings.Join(data, ","), err)
	}
	// dir is what lies beneath; the mount is found by name.
	return true, o.own(filepath.Clean(s.MountPoint), 0o1777)
}

// makeLocal makes a directory of the guest: an emptyDir without a medium.
func makeLocal(_ *agentpb.Storage, o storageOptions, dir *os.File) (bool, error) {
	return false, o.own(fdPath(dir), 0o755)
}

// mountBind shows a directory of the guest at another place.
func mountBind(s *agentpb.Storage, o storageOptions, dir *os.File) (bool, error) {
	flags := o.flags | unix.MS_BIND
	if err := unix.Mount(s.Source, fdPath(dir), "", flags&(unix.MS_BIND|unix.MS_REC), ""); err != nil {
		return false, fmt.Errorf("bind %s: %w", s.Source, err)
	}
	// A bind takes its other flags only from a second call.
	if rest := flags &^ (unix.MS_BIND | unix.MS_REC); rest != 0 {
		if err := unix.Mount("", filepath.Clean(s.MountPoint), "", unix.MS_REMOUNT|unix.MS_BIND|rest, ""); err != nil {
			return true, fmt.Errorf("remount: %w", err)
		}
	}
	return true, nil
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// addStorage makes a storage or takes another reference to it. InvalidArgument: an
// unknown driver, or a mount point outside of the state directory.
func (a *Agent) addStorage(s *agentpb.Storage) error {
	at := filepath.Clean(s.MountPoint)
	rel, err := filepath.Rel(a.cfg.StateDir, at)
	if err != nil || !filepath.IsLocal(rel) || rel == "." {
		return fmt.Errorf("storage %q: the mount point is not below %s: %w", s.MountPoint, a.cfg.StateDir, errdefs.ErrInvalidArgument)
	}
	var driver *storageDriver
	for i := range storageDrivers {
		if storageDrivers[i].name == s.Driver {
			driver = &storageDrivers[i]
		}
	}
	if driver == nil {
		return fmt.Errorf("storage %s: this agent has no driver %q: %w", at, s.Driver, errdefs.ErrInvalidArgument)
	}
	opts, err := parseStorageOptions(s)
	if err != nil {
		return err
	}
	a.volMu.Lock()
	defer a.volMu.Unlock()
	if have := a.volumes[at]; have != nil {
		have.refs++
		return nil
	}
	dir, err := a.openBelow(rel)
	if err != nil {
		return fmt.Errorf("storage %s: %w", at, err)
	}
	defer dir.Close()
	mounted, err := driver.make(s, opts, dir)
	if err != nil {
		if mounted {
			err = errors.Join(err, unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
		}
		return fmt.Errorf("storage %s: driver %s: %w", at, s.Driver, err)
	}
	a.volumes[at] = &mountedStorage{refs: 1, mounted: mounted, lasting: driver.lasting}
	return nil
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
	if v.refs--; v.refs > 0 || v.lasting {
		return nil
	}
	return a.unmountStorage(at, v)
}

// unmountStorage takes a storage away. volMu is held.
func (a *Agent) unmountStorage(at string, v *mountedStorage) error {
	if v.mounted {
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount storage %s: %w", at, err)
		}
		if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove storage %s: %w", at, err)
		}
	} else if err := os.RemoveAll(at); err != nil {
		return fmt.Errorf("remove storage %s: %w", at, err)
	}
	delete(a.volumes, at)
	// Directories above that were made for it go when they are empty.
	for dir := filepath.Dir(at); dir != a.cfg.StateDir && os.Remove(dir) == nil; {
		dir = filepath.Dir(dir)
	}
	return nil
}

// dropAllStorage takes every storage away: the pod is gone.
func (a *Agent) dropAllStorage() error {
	a.volMu.Lock()
	defer a.volMu.Unlock()
	var errs []error
	for at, v := range a.volumes {
		errs = append(errs, a.unmountStorage(at, v))
	}
	return errors.Join(errs...)
}
