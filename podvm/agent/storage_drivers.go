// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"golang.org/x/sys/unix"
)

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
	"rw": 0, "suid": 0, "dev": 0, "exec": 0, "defaults": 0, "remount": 0,
}

func parseStorageOptions(s *agentpb.Storage) (storageOptions, error) {
	o := storageOptions{gid: -1}
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
func mountEphemeral(_ context.Context, _ *Agent, r *storageRequest) (func() error, error) {
	fstype := r.Fstype
	if fstype == "" {
		fstype = "tmpfs"
	}
	if fstype != "tmpfs" && fstype != "hugetlbfs" {
		return nil, fmt.Errorf("fstype %q is neither tmpfs nor hugetlbfs: %w", fstype, errdefs.ErrInvalidArgument)
	}
	data := r.opts.data
	if r.opts.mode != "" {
		data = append(data, "mode="+r.opts.mode)
	}
	undo, err := r.mount(r.Source, fstype, r.opts.flags, strings.Join(data, ","))
	if err != nil {
		return nil, fmt.Errorf("%s with %q: %w", fstype, strings.Join(data, ","), invalid(err))
	}
	// r.dir is what lies beneath; the mount is found by name.
	if err := r.opts.own(r.at, 0o1777); err != nil {
		return nil, errors.Join(err, undo())
	}
	return undo, nil
}

// invalid adds the class to an error of the kernel about what it was asked for.
func invalid(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// makeLocal makes a directory of the guest: an emptyDir without a medium. With a
// limit it is a file system of that size, since a directory cannot be bounded; the
// guest has no disk, so both are in its memory.
func makeLocal(_ context.Context, _ *Agent, r *storageRequest) (func() error, error) {
	size := ""
	for _, opt := range r.opts.data {
		key, value, _ := strings.Cut(opt, "=")
		if key != "size" {
			return nil, fmt.Errorf("option %q: a directory has only mode=, fsgid= and size=: %w", opt, errdefs.ErrInvalidArgument)
		}
		size = value
	}
	var undo func() error
	if size != "" {
		var err error
		if undo, err = r.mount("local", "tmpfs", r.opts.flags, "mode=755,size="+size); err != nil {
			return nil, fmt.Errorf("option size=%s: %w", size, invalid(err))
		}
	}
	if err := r.opts.own(r.at, 0o755); err != nil {
		if undo != nil {
			err = errors.Join(err, undo())
		}
		return nil, err
	}
	return undo, nil
}

// mountBind shows a directory of the guest at another place.
func mountBind(_ context.Context, _ *Agent, r *storageRequest) (func() error, error) {
	if len(r.opts.data) > 0 || r.opts.mode != "" || r.opts.gid >= 0 {
		return nil, fmt.Errorf("options %q: a bind takes only flags: %w", r.Options, errdefs.ErrInvalidArgument)
	}
	if st, err := os.Stat(r.Source); err != nil || !st.IsDir() {
		return nil, fmt.Errorf("source %q is not a directory of the guest: %w", r.Source, errdefs.ErrInvalidArgument)
	}
	return r.mount(r.Source, "", r.opts.flags|unix.MS_BIND, "")
}

// giveToGroup gives a volume and what is in it to a group, as Kubernetes' fsGroup
// has it. With OnRootMismatch a volume whose root is the group's already is left
// alone. Read-only content gets no right to write.
func giveToGroup(at string, g *agentpb.FSGroup, readOnly bool) error {
	root, err := os.OpenRoot(at)
	if err != nil {
		return fmt.Errorf("fs_group %d: %w", g.GroupId, err)
	}
	defer root.Close()
	rights := os.FileMode(0o660)
	if readOnly {
		rights = 0o440
	}
	if g.GroupChangePolicy == typespb.FSGroupChangePolicy_OnRootMismatch {
		var st unix.Stat_t
		if err := unix.Stat(at, &st); err != nil {
			return fmt.Errorf("fs_group %d: %w", g.GroupId, err)
		}
		need := uint32(rights|0o110) | unix.S_ISGID
		if st.Gid == g.GroupId && st.Mode&need == need {
			return nil
		}
	}
	// The root itself comes last: with OnRootMismatch it says that all else was done.
	visit := func(name string, d fs.DirEntry) error {
		if d.Type()&fs.ModeSymlink != 0 {
			return nil
		}
		st, err := root.Lstat(name)
		if err == nil {
			err = root.Lchown(name, -1, int(g.GroupId))
		}
		if err == nil {
			mode := st.Mode() | rights
			if st.IsDir() {
				mode |= 0o110 | fs.ModeSetgid
			}
			err = root.Chmod(name, mode)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		return err
	}
	var top fs.DirEntry
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err
		case err != nil:
			return nil
		case name == ".":
			top = d
			return nil
		}
		return visit(name, d)
	})
	if err == nil {
		err = visit(".", top)
	}
	if err != nil {
		return fmt.Errorf("fs_group %d: %w", g.GroupId, err)
	}
	return nil
}
