// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// runner makes the processes of one container exist: libcontainer, or for a sandbox
// container without an image pauseRunner. Its methods are called with the operation
// lock held.
type runner interface {
	// spawn starts a process and attaches its streams. The container's first one
	// waits for begin. After an error nothing of the process is left.
	spawn(p *process, terminal bool) error
	// first tells where the first process is, once it was spawned.
	first() (residence, error)
	// begin lets the first process become the user's command.
	begin() error
	// destroy removes what the runner made. No process is left in it.
	destroy() error
}

// residence is where a container's first process lives.
type residence struct {
	pid    int // in the agent's pid namespace
	cgroup cgroups.Manager
	limits cgroups.Resources
	// sharedPID: the pid namespace is another container's, and does not end with the
	// process.
	sharedPID bool
	// oom is what the OOM watch needs beside the cgroup. Nil: there is nothing to
	// watch for.
	oom oomNotifier
}

// handle is a process that was started; both libcontainer and os have it.
type handle interface {
	Signal(os.Signal) error
	Wait() (*os.ProcessState, error)
}

// newRunner chooses what runs a container, and describes its first process.
func (c *container) newRunner(in placement) (runner, *process, error) {
	if isBuiltIn(c.spec) {
		return newPauseRunner(c, in)
	}
	cfg, err := libConfig(c.spec, in)
	if err != nil {
		return nil, nil, err
	}
	init, err := newProcess(ExecID(c.id), c.spec.Process, true)
	if err != nil {
		return nil, nil, err
	}
	late := keepLate(cfg)
	lib, err := libcontainer.Create(filepath.Join(c.agent.cfg.StateDir, "runtime"), string(c.id), cfg)
	if err != nil {
		return nil, nil, err
	}
	return &libRunner{lib: lib, cfg: cfg, buffer: c.agent.cfg.StreamBuffer, late: late, log: c.agent.log}, init, nil
}

// keepLate takes the hooks out of the configuration that libcontainer runs at another
// time than the specification says, or whose failure it takes for its own.
func keepLate(cfg *configs.Config) configs.Hooks {
	late := configs.Hooks{}
	for _, name := range []configs.HookName{configs.Poststart, configs.Poststop} {
		if list := cfg.Hooks[name]; len(list) > 0 {
			late[name] = list
			delete(cfg.Hooks, name)
		}
	}
	return late
}

// libRunner runs a container with libcontainer.
type libRunner struct {
	lib    *libcontainer.Container
	cfg    *configs.Config
	buffer int           // bytes kept per stream
	late   configs.Hooks // what libcontainer does not run
	log    *slog.Logger
}

func (r *libRunner) spawn(p *process, terminal bool) error {
	s, err := p.openStreams(terminal)
	if err != nil {
		return err
	}
	if err := r.lib.Start(p.lib); err != nil {
		s.close(s.child)
		s.close(s.parent)
		return err
	}
	p.handle = p.lib
	if err := p.attach(s, r.buffer); err != nil {
		_ = p.handle.Signal(unix.SIGKILL)
		_, _ = p.handle.Wait()
		return err
	}
	return nil
}

func (r *libRunner) first() (residence, error) {
	st, err := r.lib.State()
	if err != nil {
		return residence{}, err
	}
	// A copy: the manager keeps in it what it sets, and libcontainer's own would no
	// longer start processes after an update.
	own := *r.cfg.Cgroups
	cg, err := manager.NewWithPaths(&own, st.CgroupPaths)
	if err != nil {
		return residence{}, fmt.Errorf("find the cgroup: %w", err)
	}
	return residence{
		pid: st.InitProcessPid, cgroup: cg, limits: *r.cfg.Cgroups.Resources,
		sharedPID: r.cfg.Namespaces.PathOf(configs.NEWPID) != "", oom: r.lib,
	}, nil
}

func (r *libRunner) begin() error {
	if err := r.lib.Exec(); err != nil {
		return err
	}
	if err := r.hook(configs.Poststart); err != nil {
		return errors.Join(err, r.lib.Signal(unix.SIGKILL))
	}
	return nil
}

// destroy takes the container away even if a hook that is to run afterwards fails
// (runtime-spec 1.2, config.md, "Posix-platform Hooks").
func (r *libRunner) destroy() error {
	if err := r.lib.Destroy(); err != nil {
		return err
	}
	err := r.hook(configs.Poststop)
	delete(r.late, configs.Poststop)
	if err != nil {
		r.log.Warn("a poststop hook failed", logkey.Container, r.lib.ID(), logkey.Error, err)
	}
	return nil
}

// hook runs the hooks of a name that libcontainer does not.
func (r *libRunner) hook(name configs.HookName) error {
	if len(r.late[name]) == 0 {
		return nil
	}
	st, err := r.lib.OCIState()
	if err != nil {
		return err
	}
	if name == configs.Poststop {
		st.Status = specs.StateStopped
	}
	if err := r.late.Run(name, st); err != nil {
		return fmt.Errorf("%s hook: %w", name, err)
	}
	return nil
}
