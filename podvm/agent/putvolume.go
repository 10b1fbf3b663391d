// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/podvm/agent/volume"
	"golang.org/x/sys/unix"
)

// PutVolume brings a piece of a volume's revision.
func (s *podvm) PutVolume(_ context.Context, req *podvmpb.PutVolumeRequest) (*podvmpb.PutVolumeResponse, error) {
	if len(req.Data) > extension.MaxData {
		return nil, toGRPC(fmt.Errorf("a piece of %d bytes; at most %d are allowed: %w", len(req.Data), extension.MaxData, errdefs.ErrInvalidArgument))
	}
	have, done, err := s.a.copied.Put(volume.Piece{Path: req.Path, Revision: req.Revision, Offset: req.Offset, Data: req.Data, EOF: req.Eof})
	if err == nil && done {
		s.a.log.Debug("volume is in place", logkey.Volume, filepath.Base(req.Path), "revision", req.Revision, "bytes", have)
	}
	return reply(&podvmpb.PutVolumeResponse{Offset: have, Done: done}, err)
}

// RemoveVolume removes a volume.
func (s *podvm) RemoveVolume(_ context.Context, req *podvmpb.RemoveVolumeRequest) (*podvmpb.RemoveVolumeResponse, error) {
	return reply(&podvmpb.RemoveVolumeResponse{}, s.a.copied.Remove(req.Path))
}

// bindSubPath is the driver extension.SubPathDriver: it shows a part of another
// storage, as a container's subPath of an emptyDir. What is in that storage is its
// containers' to write, links to anywhere included, so the path is resolved below it
// by the kernel, and what was found is what is bound: no name is looked up twice.
func bindSubPath(_ context.Context, a *Agent, r *storageRequest) (func() error, error) {
	path, err := subPathOption(r.DriverOptions)
	if err != nil {
		return nil, err
	}
	if err := a.isStorage(r.Source); err != nil {
		return nil, err
	}
	dir, err := os.OpenRoot(r.Source)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := makeSubPath(dir, path, r.opts); err != nil {
		return nil, fmt.Errorf("path %q of %s: %w", path, r.Source, err)
	}
	found, err := openBeneath(dir, path)
	if err != nil {
		return nil, fmt.Errorf("path %q of %s: %w", path, r.Source, err)
	}
	defer found.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(found.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		// Only a file can have a file mounted on it.
		if err := os.Remove(r.at); err != nil {
			return nil, err
		}
		if err := os.WriteFile(r.at, nil, 0o600); err != nil {
			return nil, err
		}
	}
	if err := unix.Mount(fdPath(found), r.at, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	return func() error { return unmount(r.at) }, nil
}

// isStorage checks that another storage, ready for use, is at a path.
func (a *Agent) isStorage(at string) error {
	a.volMu.Lock()
	v := a.volumes[at]
	a.volMu.Unlock()
	if v != nil {
		select {
		case <-v.ready:
			if v.err == nil {
				return nil
			}
		default:
		}
	}
	return fmt.Errorf("source %q is no storage of this pod; list it before: %w", at, errdefs.ErrInvalidArgument)
}

func subPathOption(options []string) (string, error) {
	for _, o := range options {
		if path, ok := strings.CutPrefix(o, "path="); ok && filepath.IsLocal(path) {
			return filepath.Clean(path), nil
		}
	}
	return "", fmt.Errorf("driver_options %q have no path= that is relative and stays inside: %w", options, errdefs.ErrInvalidArgument)
}

// makeSubPath makes the directories of a path that are missing, the last with the
// options' mode and owner.
func makeSubPath(dir *os.Root, path string, o storageOptions) error {
	if _, err := dir.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := dir.MkdirAll(path, 0o755); err != nil {
		return err
	}
	owner := map[string]int{"uid": 0, "gid": max(o.gid, 0)}
	for _, opt := range o.data {
		key, value, _ := strings.Cut(opt, "=")
		id, err := strconv.ParseUint(value, 10, 31)
		if _, ok := owner[key]; !ok || err != nil {
			return fmt.Errorf("option %q: a sub path has only mode=, uid= and gid=: %w", opt, errdefs.ErrInvalidArgument)
		}
		owner[key] = int(id)
	}
	if err := dir.Lchown(path, owner["uid"], owner["gid"]); err != nil {
		return err
	}
	perm := uint32(0o755)
	if o.mode != "" {
		perm = o.perm(perm)
	}
	return dir.Chmod(path, mode(perm))
}

// openBeneath opens whatever is at a path, without using it.
func openBeneath(dir *os.Root, path string) (*os.File, error) {
	base, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer base.Close()
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(int(base.Fd()), path, how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case errors.Is(err, unix.EAGAIN): // something above was renamed meanwhile
			continue
		case errors.Is(err, unix.EXDEV):
			return nil, fmt.Errorf("a symbolic link leads out of the volume: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil, err
	}
}
