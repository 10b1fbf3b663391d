// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is one file system of the guest.
type mount struct {
	kind, path string
	flags      uintptr
	data       string
}

const (
	safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

// mounts of PID 1, in order.
var mounts = []mount{
	{"proc", "/proc", safe, ""},
	{"sysfs", "/sys", safe, ""},
	{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666"},
	{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"mqueue", "/dev/mqueue", safe, ""},
	{"cgroup2", "/sys/fs/cgroup", safe, "nsdelegate"},
	// Not noexec: containers' root file systems stand below /run.
	{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// leaveRootfs makes the root directory a mount that can be pivoted away from.
//
// The kernel unpacks an initramfs into its first file system, "rootfs", whose mount
// has no parent; pivot_root(2), and so runc, refuses to leave it. A bind mount of
// the same file system on top of it has a parent. Nothing is copied, where
// switch_root would copy podvmd once more (Linux Documentation/filesystems/
// ramfs-rootfs-initramfs.rst; fs/namespace.c, mnt_has_parent; tried 2026-11-21).
func leaveRootfs() error {
	const at = "/mnt"
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind mount of the root directory: %w", err)
	}
	if err := unix.Chdir(at); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the bind mount to the root directory: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return unix.Chdir("/")
}

// mountAll mounts what every Linux process expects.
func mountAll() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.path, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.path, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.path, err)
		}
	}
	for link, target := range map[string]string{
		"/dev/fd":     "/proc/self/fd",
		"/dev/stdin":  "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// freezeRoot makes the initramfs read-only, and with it podvmd's own file. All that is
// written from here on is below one of the mounts.
func freezeRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make the root file system read-only: %w", err)
	}
	return nil
}

// enableControllers lets the cgroups below the root have every controller there is.
func enableControllers(root string) error {
	b, err := os.ReadFile(root + "/cgroup.controllers")
	if err != nil {
		return fmt.Errorf("read cgroup controllers: %w", err)
	}
	var on []string
	for c := range strings.FieldsSeq(string(b)) {
		on = append(on, "+"+c)
	}
	if err := os.WriteFile(root+"/cgroup.subtree_control", []byte(strings.Join(on, " ")), 0); err != nil {
		return fmt.Errorf("enable cgroup controllers: %w", err)
	}
	return nil
}
