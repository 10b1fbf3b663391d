// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"golang.org/x/sys/unix"
)

// shareMounts shows directories of containers that are there in a new one, whose first
// process is pid. A container is named by what its runtime calls it, or by its id.
// InvalidArgument: there is no such container, or no such path in it.
func (a *Agent) shareMounts(mounts []*agentpb.SharedMount, pid int) error {
	if len(mounts) == 0 {
		return nil
	}
	to, err := openMountNS(pid)
	if err != nil {
		return err
	}
	defer to.Close()
	for _, m := range mounts {
		src, err := a.named(m.SrcCtr)
		if err != nil {
			return fmt.Errorf("shared mount %s: %w", m.Name, err)
		}
		from, err := openMountNS(src)
		if err != nil {
			return fmt.Errorf("shared mount %s: container %s: %w", m.Name, m.SrcCtr, err)
		}
		err = carry(from, m.SrcPath, to, m.DstPath)
		from.Close()
		if err != nil {
			return fmt.Errorf("shared mount %s, from %s of container %s to %s: %w", m.Name, m.SrcPath, m.SrcCtr, m.DstPath, err)
		}
	}
	return nil
}

// named finds the first process of a container.
func (a *Agent) named(name string) (pid int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, c := range a.containers {
		c.mu.Lock()
		pid, state := c.pid, c.state
		c.mu.Unlock()
		if pid == 0 || state == StateStopped || state == StateRemoved {
			continue
		}
		if string(id) == name || c.spec.Annotations[annotation.ContainerName] == name {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("the pod has no container %q that runs: %w", name, errdefs.ErrInvalidArgument)
}

func openMountNS(pid int) (*os.File, error) { return os.Open("/proc/" + strconv.Itoa(pid) + "/ns/mnt") }

// carry binds a directory or file of one mount namespace into another. A thread of
// its own enters both and ends with them. There its root directory is the container's,
// so that no path leads out of it; links of /proc, which could, are not followed.
func carry(from *os.File, src string, to *os.File, dst string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- func() error {
			// Threads share a root directory until one leaves.
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			if err := unix.Setns(int(from.Fd()), unix.CLONE_NEWNS); err != nil {
				return os.NewSyscallError("setns", err)
			}
			at, err := openPath(src)
			if err != nil {
				return err
			}
			defer unix.Close(at)
			tree, err := unix.OpenTree(at, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
			if err != nil {
				return os.NewSyscallError("open_tree", err)
			}
			defer unix.Close(tree)
			if err := unix.Setns(int(to.Fd()), unix.CLONE_NEWNS); err != nil {
				return os.NewSyscallError("setns", err)
			}
			where, err := openPath(dst)
			if errors.Is(err, os.ErrNotExist) {
				if err := os.MkdirAll(dst, 0o755); err != nil {
					return err
				}
				where, err = openPath(dst)
			}
			if err != nil {
				return err
			}
			defer unix.Close(where)
			return os.NewSyscallError("move_mount", unix.MoveMount(tree, "", where, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
		}()
	}()
	return <-done
}

// openPath names a place of the calling thread's mount namespace.
func openPath(path string) (int, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return -1, fmt.Errorf("%w: %w", &os.PathError{Op: "open", Path: path, Err: err}, errdefs.ErrInvalidArgument)
	}
	return fd, nil
}
