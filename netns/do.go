// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/containerd/errdefs"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Do runs f on an operating system thread that is inside the namespace at path, and
// returns f's error. f must not start goroutines that rely on the namespace: they
// would run on other threads. ctx is looked at before f starts; f itself is never
// abandoned.
//
// NotFound: nothing at path. InvalidArgument: path is not a network namespace.
func Do(ctx context.Context, path string, f func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	target, err := open(path)
	if err != nil {
		return err
	}
	defer target.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- inside(target, f)
	}()
	return <-done
}

// inside runs f in target on the calling goroutine, which has locked its thread. The
// thread is unlocked only after its first namespace is back; otherwise Go destroys
// it together with the goroutine.
func inside(target vns.NsHandle, f func() error) error {
	origin, err := vns.Get()
	if err != nil {
		return fmt.Errorf("open the thread's network namespace: %w", err)
	}
	defer origin.Close()
	if err := vns.Set(target); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = f()
	if back := vns.Set(origin); back == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// open returns a descriptor of the namespace at path, which the caller closes.
func open(path string) (vns.NsHandle, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return vns.None(), fmt.Errorf("network namespace %s does not exist: %w", path, errdefs.ErrNotFound)
	case err != nil:
		return vns.None(), &os.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	if !isNetNS(fd) {
		unix.Close(fd)
		return vns.None(), fmt.Errorf("%s is not a network namespace: %w", path, errdefs.ErrInvalidArgument)
	}
	return vns.NsHandle(fd), nil
}

// isNetNS reports whether fd is a network namespace and not, say, the plain file
// that a namespace was once mounted on.
func isNetNS(fd int) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || st.Type != unix.NSFS_MAGIC {
		return false
	}
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	return err == nil && kind == unix.CLONE_NEWNET
}

// OpenFile returns a descriptor of the namespace at path, for netlink attributes that
// want one; the caller closes it. Errors are those of Do.
func OpenFile(path string) (*os.File, error) {
	ns, err := open(path)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(ns), path), nil
}
