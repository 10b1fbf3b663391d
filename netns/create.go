// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/errdefs"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Create makes a network namespace and mounts it at path, so that it lives without
// a process. Missing parent directories are made. A file left at path by a Create
// that was cut short is used again.
//
// AlreadyExists: a namespace is mounted there; it is left alone.
func Create(path string) error {
	if h, err := open(path); err == nil {
		h.Close()
		return fmt.Errorf("network namespace %s: %w", path, errdefs.ErrAlreadyExists)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make directory of network namespace %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o444)
	if err != nil {
		return fmt.Errorf("make mount point of network namespace %s: %w", path, err)
	}
	f.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- createAt(path)
	}()
	if err := <-done; err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// createAt runs on a goroutine of its own with its thread locked; see inside.
func createAt(path string) error {
	origin, err := vns.Get()
	if err != nil {
		return fmt.Errorf("open the thread's network namespace: %w", err)
	}
	defer origin.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("unshare network namespace: %w", err)
	}
	err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	if err != nil {
		err = fmt.Errorf("mount network namespace on %s: %w", path, err)
	}
	if back := vns.Set(origin); back == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// Remove unmounts the namespace at path and removes the file. The kernel takes the
// namespace down once the last process has left it. A path that does not exist is
// not an error.
//
// InvalidArgument: path is something else than a namespace; it is left alone.
func Remove(path string) error {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil
	case err != nil:
		return &os.PathError{Op: "remove network namespace", Path: path, Err: err}
	}
	if h, err := open(path); err == nil {
		h.Close()
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	} else if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0 {
		return fmt.Errorf("%s is not a network namespace: %w", path, errdefs.ErrInvalidArgument)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point of network namespace: %w", err)
	}
	return nil
}
