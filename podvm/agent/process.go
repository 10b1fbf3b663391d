// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/podvm/agent/stream"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/utils"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ExecID names a process within its container.
type ExecID string

// process is one process of a container: the first, or one added by ExecProcess.
type process struct {
	id  ExecID
	lib *libcontainer.Process // what libcontainer starts; every process's streams

	// Set by the runner before the process is published; nil where there is none.
	handle         handle
	stdin          *stream.Input
	stdout, stderr *stream.Output // a terminal has stdout only
	terminal       *os.File       // master; its owner is stdout

	exited chan struct{} // closed after status is set

	mu        sync.Mutex
	state     ProcessState // guarded by mu
	status    int32        // guarded by mu; valid once exited
	collected bool         // guarded by mu; somebody was told the status
}

// to takes a step of the process's life.
func (p *process) to(s ProcessState) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := step("process "+string(p.id), processTransitions, p.state, s); err != nil {
		return err
	}
	p.state = s
	return nil
}

// wait waits for the exit status: the code, or 128 and the signal's number. It can
// be called by many and after the exit.
func (p *process) wait(ctx context.Context) (int32, error) {
	select {
	case <-p.exited:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.collected = true
	return p.status, nil
}

// hasExited tells whether the status is known, and whether somebody was told.
func (p *process) hasExited() (exited, collected bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == ProcessExited, p.collected
}

// started tells whether the process exists, and with it its streams.
func (p *process) started() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state != ProcessStarting
}

// settled tells whether nobody can want anything of the process any more.
func (p *process) settled() bool {
	exited, collected := p.hasExited()
	if !exited || !collected {
		return false
	}
	return p.stdout.Settled() && (p.stderr == nil || p.stderr.Settled())
}

// signal sends a signal. A process that is gone, and whose status nobody has heard
// yet, takes every signal without an error, as a zombie does; afterwards NotFound.
func (p *process) signal(sig unix.Signal) error {
	if exited, collected := p.hasExited(); exited {
		if collected {
			return fmt.Errorf("process %s has ended: %w", p.id, errdefs.ErrNotFound)
		}
		return nil
	}
	err := p.handle.Signal(sig)
	switch {
	case err == nil, errors.Is(err, os.ErrProcessDone), errors.Is(err, unix.ESRCH):
		return nil
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("signal %d: %w: %w", int(sig), err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("send signal %d to process %s: %w", int(sig), p.id, err)
}

// resize sets the size of the process's terminal. Unavailable: it has none.
func (p *process) resize(rows, columns uint32) error {
	if p.terminal == nil {
		return fmt.Errorf("no tty: %w", errdefs.ErrUnavailable)
	}
	if exited, _ := p.hasExited(); exited {
		return nil
	}
	conn, err := p.terminal.SyscallConn()
	if err != nil {
		return fmt.Errorf("resize the terminal of process %s: %w", p.id, err)
	}
	var ioctl error
	err = conn.Control(func(fd uintptr) {
		ioctl = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(rows), Col: uint16(columns)})
	})
	if errors.Is(err, os.ErrClosed) {
		return nil // drained and closed: the process is on its way out
	}
	if err := errors.Join(err, ioctl); err != nil {
		return fmt.Errorf("resize the terminal of process %s: %w", p.id, err)
	}
	return nil
}

// close ends the process's streams. The process must be gone.
func (p *process) close() {
	if p.stdin != nil {
		p.stdin.Abort()
	}
	for _, o := range []*stream.Output{p.stdout, p.stderr} {
		if o != nil {
			o.Close()
		}
	}
}

// newProcess builds libcontainer's description of a process. Resources and rights it
// does not name are the container's.
func newProcess(id ExecID, spec *specs.Process, init bool) (*process, error) {
	limits, err := rlimits(spec.Rlimits)
	if err != nil {
		return nil, err
	}
	lib := &libcontainer.Process{
		Args: spec.Args, Env: spec.Env, Cwd: spec.Cwd, Init: init,
		UID: int(spec.User.UID), GID: int(spec.User.GID), Rlimits: limits, Label: spec.SelinuxLabel,
	}
	if lib.Cwd == "" {
		lib.Cwd = "/"
	}
	for _, g := range spec.User.AdditionalGids {
		lib.AdditionalGroups = append(lib.AdditionalGroups, int(g))
	}
	if c := spec.Capabilities; c != nil {
		lib.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	if spec.NoNewPrivileges {
		yes := true
		lib.NoNewPrivileges = &yes
	}
	if b := spec.ConsoleSize; b != nil && spec.Terminal {
		lib.ConsoleWidth, lib.ConsoleHeight = uint16(b.Width), uint16(b.Height)
	}
	return &process{id: id, lib: lib, exited: make(chan struct{})}, nil
}

// pipes are the ends of a process's streams while it is being started.
type pipes struct {
	child  []*os.File // the process's
	parent []*os.File // ours; index 0 to 2 as the descriptors, or the console socket alone
}

func (s *pipes) close(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

// openStreams makes the process's streams and gives it its ends.
func (p *process) openStreams(terminal bool) (*pipes, error) {
	s := &pipes{}
	if terminal {
		parent, child, err := utils.NewSockPair("console")
		if err != nil {
			return nil, fmt.Errorf("make a console socket: %w", err)
		}
		s.parent, s.child = []*os.File{parent}, []*os.File{child}
		p.lib.ConsoleSocket = child
		return s, nil
	}
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			s.close(s.child)
			s.close(s.parent)
			return nil, fmt.Errorf("make a pipe: %w", err)
		}
		if len(s.child) == 0 {
			s.child, s.parent = append(s.child, r), append(s.parent, w)
		} else {
			s.child, s.parent = append(s.child, w), append(s.parent, r)
		}
	}
	p.lib.Stdin, p.lib.Stdout, p.lib.Stderr = s.child[0], s.child[1], s.child[2]
	return s, nil
}

// attach takes the streams over once the process was started, and begins to drain
// them.
func (p *process) attach(s *pipes, limit int) error {
	s.close(s.child)
	if p.lib.ConsoleSocket == nil {
		p.stdin = stream.NewInput(s.parent[0], true)
		p.stdout = stream.NewOutput(s.parent[1], limit)
		p.stderr = stream.NewOutput(s.parent[2], limit)
		return nil
	}
	defer s.close(s.parent)
	got, err := utils.RecvFile(s.parent[0])
	if err != nil {
		return fmt.Errorf("receive the terminal of process %s: %w", p.id, err)
	}
	// Again as a file that the runtime's poller knows, so that deadlines work on it.
	fd, err := unix.FcntlInt(got.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	got.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return fmt.Errorf("take over the terminal of process %s: %w", p.id, err)
	}
	p.terminal = os.NewFile(uintptr(fd), "/dev/ptmx")
	p.stdin = stream.NewInput(p.terminal, false)
	p.stdout = stream.NewOutput(p.terminal, limit)
	return nil
}

// exitStatus is the status a runtime is told.
func exitStatus(s *os.ProcessState) int32 {
	ws, ok := s.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return 128 + int32(ws.Signal())
	}
	return int32(s.ExitCode())
}
