// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sandbox is what the pod's containers share.
type sandbox struct {
	id       string
	hostname string
	ipc, uts string   // paths of its namespaces
	storages []string // mount points it holds a reference to
	hooks    *specs.Hooks
	pidns    *os.File // guarded by Agent.mu; nil: no container was created yet
	ending   bool     // guarded by Agent.mu; being destroyed: no container may be added
}

// lockSandbox serialises what changes the sandbox as a whole.
func (a *Agent) lockSandbox(ctx context.Context) error {
	select {
	case a.sandboxOp <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// createSandbox makes the sandbox. A second call with the same id is a repetition
// and changes nothing.
func (a *Agent) createSandbox(ctx context.Context, req *agentpb.CreateSandboxRequest) (err error) {
	if err := checkID("sandbox_id", req.SandboxId); err != nil {
		return err
	}
	if err := loadModules(ctx, req.KernelModules); err != nil {
		return err
	}
	if err := a.lockSandbox(ctx); err != nil {
		return err
	}
	defer func() { <-a.sandboxOp }()
	a.mu.Lock()
	have, closed := a.sandbox, a.closed
	a.mu.Unlock()
	switch {
	case closed:
		return fmt.Errorf("the agent is ending: %w", errdefs.ErrUnavailable)
	case have != nil && have.id == req.SandboxId:
		return nil
	case have != nil:
		return fmt.Errorf("this guest holds sandbox %s and cannot become sandbox %s: %w", have.id, req.SandboxId, errdefs.ErrFailedPrecondition)
	}
	sb := &sandbox{id: req.SandboxId, hostname: req.Hostname}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.releaseSandbox(sb))
		}
	}()
	if sb.hooks, err = guestHooks(req.GuestHookPath); err != nil {
		return err
	}
	if err := a.makeNamespaces(sb); err != nil {
		return fmt.Errorf("make the namespaces of sandbox %s: %w", sb.id, err)
	}
	for _, s := range req.Storages {
		if err := a.addStorage(ctx, "", s); err != nil {
			return err
		}
		sb.storages = append(sb.storages, filepath.Clean(s.MountPoint))
	}
	if err := a.writeDNS(req.Dns); err != nil {
		return fmt.Errorf("write the DNS configuration of sandbox %s: %w", sb.id, err)
	}
	a.mu.Lock()
	a.sandbox = sb
	a.mu.Unlock()
	a.log.Info("sandbox created", logkey.Sandbox, sb.id)
	return nil
}

// makeNamespaces makes an ipc and a uts namespace and binds them to files. It works
// in a thread of its own, which ends with them: a thread in foreign namespaces must
// not run other goroutines.
func (a *Agent) makeNamespaces(sb *sandbox) error {
	dir := filepath.Join(a.cfg.StateDir, "sandbox", "ns")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	sb.ipc, sb.uts = filepath.Join(dir, "ipc"), filepath.Join(dir, "uts")
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if sb.hostname != "" {
				if err := unix.Sethostname([]byte(sb.hostname)); err != nil {
					return fmt.Errorf("set hostname %q: %w", sb.hostname, err)
				}
			}
			for _, path := range []string{sb.ipc, sb.uts} {
				if err := os.WriteFile(path, nil, 0o444); err != nil {
					return err
				}
				ns := "/proc/self/task/" + strconv.Itoa(unix.Gettid()) + "/ns/" + filepath.Base(path)
				if err := unix.Mount(ns, path, "", unix.MS_BIND, ""); err != nil {
					return fmt.Errorf("bind %s to %s: %w", ns, path, err)
				}
			}
			return nil
		}()
	}()
	return <-done
}

// writeDNS stores the lines of the pod's resolv.conf.
func (a *Agent) writeDNS(lines []string) error {
	if len(lines) == 0 {
		return nil
	}
	text := []byte(strings.Join(lines, "\n") + "\n")
	path := filepath.Join(a.cfg.StateDir, "sandbox", "resolv.conf")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return err
	}
	if a.cfg.ResolvConf == "" {
		return nil
	}
	return os.WriteFile(a.cfg.ResolvConf, text, 0o644)
}

// sharedPIDNS is the path of the pid namespace of the first container created; empty
// when there is none yet.
func (a *Agent) sharedPIDNS() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sandbox == nil || a.sandbox.pidns == nil {
		return ""
	}
	return pidNSPath(a.sandbox.pidns)
}

// offerPIDNS remembers the pid namespace of a container's first process if it is the
// sandbox's first. Held open, the namespace cannot be mistaken for a later one.
func (a *Agent) offerPIDNS(pid int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sandbox == nil || a.sandbox.pidns != nil {
		return nil
	}
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/pid")
	if err != nil {
		return err
	}
	a.sandbox.pidns = f
	return nil
}

// destroySandbox removes every container and what they share. Without a sandbox it
// removes what was imported. What could not be removed is left for the next call.
func (a *Agent) destroySandbox(ctx context.Context) error {
	if err := a.lockSandbox(ctx); err != nil {
		return err
	}
	defer func() { <-a.sandboxOp }()
	a.mu.Lock()
	sb := a.sandbox
	if sb != nil {
		sb.ending = true
	}
	list := make([]*container, 0, len(a.containers))
	for _, c := range a.containers {
		list = append(list, c)
	}
	a.mu.Unlock()
	var errs []error
	for _, c := range list { // all at once; then one after the other
		if p, err := c.find(""); err == nil {
			if exited, _ := p.hasExited(); !exited {
				errs = append(errs, c.killAll())
			}
		}
	}
	for _, c := range list {
		one, cancel := context.WithTimeout(ctx, destroyTimeout)
		if err := c.remove(one); !errors.Is(err, errRemoved) {
			errs = append(errs, err)
		}
		cancel()
	}
	errs = append(errs, a.root.RemoveAll(ctx), a.files.reset(), a.copied.Reset())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if sb == nil {
		return nil
	}
	if err := errors.Join(a.releaseSandbox(sb), a.images.RemoveAll()); err != nil {
		return err
	}
	a.mu.Lock()
	a.sandbox = nil
	a.mu.Unlock()
	a.log.Info("sandbox destroyed", logkey.Sandbox, sb.id)
	return nil
}

// releaseSandbox gives back what the sandbox holds, and every storage.
func (a *Agent) releaseSandbox(sb *sandbox) error {
	var errs []error
	sb.storages = nil
	errs = append(errs, a.dropAllStorage())
	for _, path := range []string{sb.ipc, sb.uts} {
		if path == "" {
			continue
		}
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	// What was made for the sandbox; a directory stays when something else is in it.
	for _, name := range []string{"resolv.conf", "ns", ""} {
		_ = os.Remove(filepath.Join(a.cfg.StateDir, "sandbox", name))
	}
	a.mu.Lock()
	if sb.pidns != nil {
		sb.pidns.Close()
		sb.pidns = nil
	}
	a.mu.Unlock()
	return errors.Join(errs...)
}
