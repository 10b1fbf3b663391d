// SPDX-License-Identifier: Apache-2.0

package agent

/*
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define REPORT 3     // a pipe: an error's text, or nothing and its end
#define NAMESPACES 4 // the first of the namespaces to join
#define NOBODY 65535 // the user of Kubernetes' pause image

static void must(int ok, const char *what)
{
	if (ok)
		return;
	dprintf(REPORT, "%s: %s", what, strerror(errno));
	_exit(1);
}

static void enter(int namespaces)
{
	for (int i = 0; i < namespaces; i++)
		must(setns(NAMESPACES + i, 0) == 0, "join a namespace");
	// Those, and what the agent was started with.
	must(syscall(SYS_close_range, REPORT + 1, ~0U, 0) == 0, "close descriptors");
	// Nothing of the guest's files is seen from here, and nothing is kept mounted.
	must(mount("", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "make the mounts private");
	must(mount("pause", "/proc", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,nr_inodes=1,mode=555") == 0, "mount an empty root");
	must(chdir("/proc") == 0 && syscall(SYS_pivot_root, ".", ".") == 0, "change the root");
	must(umount2(".", MNT_DETACH) == 0 && chdir("/") == 0, "leave the old root");
}

static void drop(void)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct none[2] = { { 0 } };
	int cap;

	for (cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		must(prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0, "drop a capability");
	must(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) == 0, "drop ambient capabilities");
	must(setgroups(0, NULL) == 0 && setresgid(NOBODY, NOBODY, NOBODY) == 0 && setresuid(NOBODY, NOBODY, NOBODY) == 0, "become nobody");
	must(syscall(SYS_capset, &head, none) == 0, "drop all capabilities");
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "set no_new_privs");
	must(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0, "refuse tracers");
}

// pause is the whole program of a sandbox container. It runs in place of the Go
// runtime, and before every other constructor.
__attribute__((constructor(101))) static void pause_program(int argc, char **argv)
{
	const char *namespaces = getenv("PEERPOD_PAUSE");
	sigset_t set;

	if (argc != 1 || strcmp(argv[0], "/pause") != 0 || !namespaces)
		return;
	must(prctl(PR_SET_NAME, "pause", 0, 0, 0) == 0, "set the name");
	// Blocked, they are kept for sigwait even by process 1, which otherwise is not
	// sent what it has no handler for.
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGCHLD);
	must(sigprocmask(SIG_SETMASK, &set, NULL) == 0, "block signals");
	must(setsid() >= 0, "leave the session");
	enter(atoi(namespaces));
	drop();
	close(REPORT);
	for (;;) {
		int sig = sigwaitinfo(&set, NULL);

		if (sig == SIGTERM || sig == SIGINT)
			_exit(0);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
*/
import "C"

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/configs/validate"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// pauseName is the command line of the built-in program.
const pauseName = "/pause"

// isBuiltIn tells whether a container gets the agent's own pause program
// (docs/extension.md): the pod's sandbox, without a root file system.
func isBuiltIn(spec *specs.Spec) bool {
	return isSandbox(spec) && (spec.Root == nil || spec.Root.Path == "")
}

// isSandbox tells whether a container is the one that stands for the pod.
func isSandbox(spec *specs.Spec) bool {
	return spec.Annotations[annotation.ContainerType] == annotation.ContainerTypeSandbox ||
		spec.Annotations[annotation.CRIOContainerType] == annotation.ContainerTypeSandbox
}

// pauseRunner runs a pod's sandbox container: one process that does nothing but hold
// the pid namespace which containers may share, as its process 1. It is this
// program's own file, stopped before the Go runtime would start (see the C half),
// because under emulation libcontainer and a root file system for it cost half a
// second of every pod's start.
//
// Containers that share its pid namespace could reach through it: a process may look
// into, and if it is strong enough trace, another of its namespace. So it is in the
// pod's ipc, uts and network namespaces and not in the agent's, sees an empty root,
// has no capability, a user of its own and cannot be traced without CAP_SYS_PTRACE.
//
// Of the spec it takes annotations and linux.sysctl. Command, user, mounts and limits
// are those of an image's pause; hooks are refused.
type pauseRunner struct {
	in     placement
	cgroup cgroups.Manager
	sysctl map[string]string
	buffer int         // bytes kept per stream
	proc   *os.Process // nil before spawn
}

// newPauseRunner checks the spec and makes nothing. Its pid namespace is always new:
// the pod's sandbox is the first container.
func newPauseRunner(c *container, in placement) (runner, *process, error) {
	if h := c.spec.Hooks; h != nil && len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer)+len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) > 0 { //nolint:staticcheck // Prestart is deprecated, not gone
		return nil, nil, fmt.Errorf("OCI.Hooks: the sandbox's built-in program has none; give OCI.Root.Path to run an image's: %w", errdefs.ErrInvalidArgument)
	}
	r := &pauseRunner{in: in, buffer: c.agent.cfg.StreamBuffer}
	if c.spec.Linux != nil {
		r.sysctl = c.spec.Linux.Sysctl
	}
	if err := checkSysctl(r.sysctl, in); err != nil {
		return nil, nil, err
	}
	var err error
	if r.cgroup, err = manager.New(&cgroups.Cgroup{Path: in.cgroup, Resources: &cgroups.Resources{}}); err != nil {
		return nil, nil, fmt.Errorf("find the cgroup: %w", err)
	}
	return r, &process{id: ExecID(c.id), lib: &libcontainer.Process{}, exited: make(chan struct{})}, nil
}

func (r *pauseRunner) spawn(p *process, _ bool) error {
	if r.proc != nil {
		return fmt.Errorf("the pod's sandbox container runs the agent's own pause program and has no command to run; use another container of the pod: %w", errdefs.ErrFailedPrecondition)
	}
	if err := r.setSysctl(); err != nil {
		return err
	}
	s, err := p.openStreams(false)
	if err != nil {
		return err
	}
	if err := r.launch(s.child); err != nil {
		s.close(s.child)
		s.close(s.parent)
		return err
	}
	p.handle = r.proc
	return p.attach(s, r.buffer)
}

// launch starts the program and returns when it has given up every right.
func (r *pauseRunner) launch(streams []*os.File) (err error) {
	self, report, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer self.Close()
	files := append(append([]*os.File(nil), streams...), report) // by their numbers in the program
	opened := []*os.File{report}
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	for _, path := range r.in.joined() {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("join a namespace of the pod: %w", err)
		}
		files, opened = append(files, f), append(opened, f)
	}
	if err := r.cgroup.Apply(-1); err != nil {
		return fmt.Errorf("make the cgroup: %w", err)
	}
	if cgroups.IsCgroup2UnifiedMode() {
		// Born in it: moving a process waits for every other that forks.
		dir, err := os.Open(r.cgroup.Path(""))
		if err != nil {
			return fmt.Errorf("open the cgroup: %w", err)
		}
		opened = append(opened, dir)
		attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	}
	// The same file as the agent's, by the link that needs no path.
	proc, err := os.StartProcess("/proc/self/exe", []string{pauseName}, &os.ProcAttr{
		Env: []string{"PEERPOD_PAUSE=" + strconv.Itoa(len(r.in.joined()))}, Files: files, Sys: attr,
	})
	if err != nil {
		return fmt.Errorf("start the pause program: %w", err)
	}
	if err := r.settle(proc, self, report); err != nil {
		_ = proc.Kill()
		_, _ = proc.Wait()
		return err
	}
	r.proc = proc
	return nil
}

// settle waits for the program to say that it is set up.
func (r *pauseRunner) settle(proc *os.Process, self, report *os.File) error {
	if !cgroups.IsCgroup2UnifiedMode() {
		if err := r.cgroup.Apply(proc.Pid); err != nil {
			return fmt.Errorf("put the pause program into its cgroup: %w", err)
		}
	}
	report.Close()
	text, err := io.ReadAll(self)
	if err == nil && len(text) > 0 {
		err = fmt.Errorf("%s", text)
	}
	if err != nil {
		return fmt.Errorf("set up the pause program: %w", err)
	}
	return nil
}

func (r *pauseRunner) first() (residence, error) {
	return residence{pid: r.proc.Pid, cgroup: r.cgroup}, nil
}

// begin has nothing to do: what the program does, it does from the beginning.
func (r *pauseRunner) begin() error { return nil }

func (r *pauseRunner) destroy() error {
	if err := r.cgroup.Destroy(); err != nil {
		return fmt.Errorf("remove the cgroup: %w", err)
	}
	return nil
}

// joined are the paths of the pod's namespaces that are there already.
func (in placement) joined() []string {
	paths := []string{in.ipc, in.uts}
	if in.net != "" {
		paths = append(paths, in.net)
	}
	return paths
}

// checkSysctl holds the pod's kernel settings to the rules of every container: only
// those of its own namespaces.
func checkSysctl(sysctl map[string]string, in placement) error {
	ns := configs.Namespaces{{Type: configs.NEWIPC, Path: in.ipc}, {Type: configs.NEWUTS, Path: in.uts}}
	if in.net != "" {
		ns = append(ns, configs.Namespace{Type: configs.NEWNET, Path: in.net})
	}
	if err := validate.Validate(&configs.Config{Rootfs: "/", Namespaces: ns, Sysctl: sysctl}); err != nil {
		return fmt.Errorf("OCI.Linux.Sysctl: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// setSysctl writes the pod's kernel settings, which Kubernetes puts into the sandbox
// container's spec. The files show the namespaces of the thread that opens them, so a
// thread of its own does it and ends with it.
func (r *pauseRunner) setSysctl() error {
	if len(r.sysctl) == 0 {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- func() error {
			for _, path := range r.in.joined() {
				if err := setns(path); err != nil {
					return fmt.Errorf("join %s: %w", path, err)
				}
			}
			for key, value := range r.sysctl {
				path := filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/"))
				if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
					return fmt.Errorf("set OCI.Linux.Sysctl %s: %w", key, err)
				}
			}
			return nil
		}()
	}()
	return <-done
}

// setns moves the calling thread into a namespace.
func setns(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("setns", unix.Setns(int(f.Fd()), 0))
}
