// SPDX-License-Identifier: Apache-2.0

// Package process is one process in the guest, a container's first one or an exec,
// from its registration to its removal.
//
//	created --start--> starting --started--> running --exit--> exited --delete--> deleted
//	   |                  |                                     ^  ^
//	   |                  +-------------- exit ----------------+  |
//	   +------------------------- exit ---------------------------+
//	   +------------------------- delete -----------------------------> deleted
//
// A process has one start event and one exit event. The goroutine that produces the
// exit begins after the start was published, and publishes only after the last byte
// of output was handed over (or did not move for drainIdle).
package process

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/state"
	"github.com/kata-remote/kata-remote/shim/stdio"
)

const (
	// drainIdle is how long after its end a process's output may stand still,
	// because nobody reads it, before the exit is published all the same. The
	// copying goes on until the process is deleted.
	drainIdle = 10 * time.Second
	// deleteIdle is what Delete still grants to output that did not drain.
	deleteIdle = time.Second
	// hookTimeout bounds what is done between the end of a process and its exit.
	hookTimeout = 5 * time.Second

	// signalTimeout is what a guest has to take a signal. containerd stops the containers
	// of a pod one after the other, and the kubelet gives all of it 2 minutes
	// (runtimeRequestTimeout).
	signalTimeout = 5 * time.Second

	statusUnknown = 255                        // nobody knows how it ended
	statusKilled  = 128 + int(syscall.SIGKILL) // it ended with its pod VM
)

// Exit is how a process ended.
type Exit struct {
	// Status is an exit code, 128+n for signal n, or 255 where nobody knows.
	Status uint32
	At     time.Time
}

// Config describes a process.
type Config struct {
	Conn     *guest.Conn
	Features extension.Set
	// Container is the id of its container, ExecID the id containerd knows the
	// process by (empty: the container's first one), GuestID the one the guest does:
	// the container's id for its first process, as with kata's runtime.
	Container, ExecID, GuestID string
	Stdio                      stdio.Config
	// Quiet: see stdio.Process.
	Quiet bool
	// Start makes the process run in the guest.
	Start func(ctx context.Context) error
	// Started publishes the start. It runs with the process's lock held, like Exited,
	// so that nobody sees the state before its event is queued: it must not wait and
	// not call back.
	Started func()
	// Exiting runs between the end and its publication; it may be nil. ctx is bounded.
	Exiting func(ctx context.Context, e Exit)
	// Exited publishes the exit.
	Exited func(e Exit)
}

// Process is safe for concurrent use.
type Process struct {
	cfg  Config
	done chan struct{} // closed when the process exited

	mu       sync.Mutex // guards the fields below
	state    State
	exit     Exit
	streams  *stdio.Streams
	size     [2]uint32 // rows and columns wanted before the start; 0: none
	killed   bool      // somebody sent SIGKILL
	inputEnd bool      // the standard input was closed, possibly before the start
	// abandoned ends the attempts to deliver a SIGKILL; nil: see Abandon.
	abandoned context.CancelFunc
}

// New registers a process.
func New(cfg Config) *Process { return &Process{cfg: cfg, done: make(chan struct{})} }

// Snapshot is what State reports.
type Snapshot struct {
	State State
	Exit  Exit
	Stdio stdio.Config
}

// Snapshot returns the process's present state.
func (p *Process) Snapshot() Snapshot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Snapshot{State: p.state, Exit: p.exit, Stdio: p.cfg.Stdio}
}

// Done is closed when the process exited.
func (p *Process) Done() <-chan struct{} { return p.done }

// Killed tells whether somebody sent SIGKILL through Kill.
func (p *Process) Killed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.killed
}

// Wait returns when the process exited or ctx ends.
func (p *Process) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.done:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.exit, nil
	case <-ctx.Done():
		return Exit{}, context.Cause(ctx)
	}
}

func (p *Process) move(on state.Event) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.moveLocked(on)
}

func (p *Process) moveLocked(on state.Event) error {
	s, err := life.Next(p.state, on)
	if err != nil {
		return err
	}
	p.state = s
	return nil
}

// Start starts the process. Once the guest was asked the work goes on even if the
// caller leaves, because nobody could tell whether it happened. A process that
// could not be started has exited with status 255 and no event.
func (p *Process) Start(ctx context.Context) error {
	if err := p.move(eventStart); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := p.start(ctx); err != nil {
		p.finish(Exit{Status: statusUnknown, At: time.Now()}, false)
		return err
	}
	return nil
}

func (p *Process) start(ctx context.Context) error {
	files, err := stdio.Open(p.cfg.Stdio)
	if err != nil {
		return err
	}
	if err := p.cfg.Start(ctx); err != nil {
		files.Close()
		return err
	}
	streams := stdio.Start(stdio.Process{
		Conn: p.cfg.Conn, Features: p.cfg.Features, Container: p.cfg.Container, Exec: p.signalID(),
		Terminal: p.cfg.Stdio.Terminal, Quiet: p.cfg.Quiet,
	}, files)
	p.mu.Lock()
	p.streams = streams
	size, inputEnd := p.size, p.inputEnd
	if err = p.moveLocked(eventStarted); err == nil {
		p.cfg.Started()
	}
	p.mu.Unlock()
	if err != nil {
		streams.Close()
		return err
	}
	if inputEnd {
		streams.CloseInput()
	}
	if size != [2]uint32{} {
		if err := p.resize(ctx, size); err != nil {
			p.log(ctx).WithError(err).Warn("set size of terminal")
		}
	}
	go p.wait(ctx)
	return nil
}

// wait owns the end of a running process. It is ended by the process's end or the
// guest's, which closes the connection.
func (p *Process) wait(ctx context.Context) {
	p.mu.Lock()
	streams := p.streams
	p.mu.Unlock()
	if !p.cfg.Features.Has(extension.Streams) {
		streams.WaitRead(ctx, drainIdle)
	}
	e := p.result(ctx)
	if p.cfg.Exiting != nil {
		hctx, cancel := context.WithTimeout(ctx, hookTimeout)
		p.cfg.Exiting(hctx, e)
		cancel()
	}
	if streams.WaitDrained(ctx, drainIdle) {
		streams.Close()
	} else {
		p.log(ctx).Warn("output is not being read, exit published before its end")
	}
	p.finish(e, true)
}

// result asks the guest how the process ended.
func (p *Process) result(ctx context.Context) Exit {
	r, err := guest.Agent(ctx, p.cfg.Conn, agentpb.AgentServiceService.WaitProcess,
		&agentpb.WaitProcessRequest{ContainerId: p.cfg.Container, ExecId: p.cfg.GuestID})
	e := Exit{At: time.Now()}
	switch {
	case err == nil:
		e.Status = uint32(r.Status)
	case errors.Is(err, guest.ErrDead):
		e.Status = uint32(statusKilled)
	default:
		p.log(ctx).WithError(err).Error("exit status is unknown")
		e.Status = statusUnknown
	}
	return e
}

// finish records the exit, once, and publishes it.
func (p *Process) finish(e Exit, publish bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.finishLocked(e, publish)
}

func (p *Process) finishLocked(e Exit, publish bool) {
	if p.moveLocked(eventExit) != nil {
		return
	}
	p.exit = e
	if publish {
		p.cfg.Exited(e)
	}
	close(p.done)
}

// Kill sends a signal; SIGKILL to a container's first process reaches all of the
// container. A process that has exited is NotFound; guest.ErrSilent: it is not known
// whether the guest got the signal, see Abandon.
func (p *Process) Kill(ctx context.Context, sig syscall.Signal) error {
	p.mu.Lock()
	state := p.state
	if sig == syscall.SIGKILL {
		p.killed = true
	}
	p.mu.Unlock()
	switch state {
	case StateExited, StateDeleted:
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	case StateCreated:
		if p.cfg.ExecID != "" {
			return fmt.Errorf("exec %s was not started: %w", p.cfg.ExecID, errdefs.ErrFailedPrecondition)
		}
		if sig != syscall.SIGKILL && sig != syscall.SIGTERM {
			return fmt.Errorf("container %s was not started: %w", p.cfg.Container, errdefs.ErrFailedPrecondition)
		}
		p.finish(Exit{Status: 128 + uint32(sig), At: time.Now()}, true)
		return nil
	}
	_, err := guest.AgentWithin(ctx, p.cfg.Conn, signalTimeout, agentpb.AgentServiceService.SignalProcess, p.signal(sig))
	if errors.Is(err, guest.ErrDead) {
		return nil // the process ends with its guest: perhaps by this very signal
	}
	return err
}

func (p *Process) signal(sig syscall.Signal) *agentpb.SignalProcessRequest {
	return &agentpb.SignalProcessRequest{ContainerId: p.cfg.Container, ExecId: p.signalID(), Signal: uint32(sig)}
}

// Abandon gives up a process whose guest does not answer to SIGKILL: it has exited with
// status 137 as far as anybody here is concerned, and its output is not waited for. The
// guest gets the signal when it answers again, if it ever does; until then the process
// may go on.
func (p *Process) Abandon(ctx context.Context) {
	if !p.end() {
		return
	}
	kctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p.mu.Lock()
	p.abandoned = cancel
	p.mu.Unlock()
	p.log(ctx).Error("the pod VM does not answer to SIGKILL: the process is given up")
	go func() { // ends with the connection at the latest
		defer cancel()
		if _, err := guest.Agent(kctx, p.cfg.Conn, agentpb.AgentServiceService.SignalProcess, p.signal(syscall.SIGKILL)); err == nil {
			p.log(ctx).Info("the process that was given up got its SIGKILL")
		}
	}()
}

// End has a process that was started exit with status 137 without asking the guest,
// which is about to go.
func (p *Process) End() { p.end() }

func (p *Process) end() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != StateStarting && p.state != StateRunning {
		return false
	}
	p.killed = true
	p.finishLocked(Exit{Status: uint32(statusKilled), At: time.Now()}, p.state == StateRunning)
	return true
}

// Abandoned tells whether the process was given up.
func (p *Process) Abandoned() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.abandoned != nil
}

// signalID is empty for a container's first process: kata's agents then let SIGKILL
// reach every process of the container.
func (p *Process) signalID() string {
	if p.cfg.ExecID == "" {
		return ""
	}
	return p.cfg.GuestID
}

// Resize sets the size of the terminal, at the start when that is still to come.
func (p *Process) Resize(ctx context.Context, rows, columns uint32) error {
	p.mu.Lock()
	state := p.state
	p.size = [2]uint32{rows, columns}
	p.mu.Unlock()
	switch state {
	case StateCreated, StateStarting:
		return nil
	case StateRunning:
		return p.resize(ctx, [2]uint32{rows, columns})
	}
	return fmt.Errorf("process is %s, cannot resize its terminal: %w", state, errdefs.ErrFailedPrecondition)
}

func (p *Process) resize(ctx context.Context, size [2]uint32) error {
	_, err := guest.Agent(ctx, p.cfg.Conn, agentpb.AgentServiceService.TtyWinResize,
		&agentpb.TtyWinResizeRequest{ContainerId: p.cfg.Container, ExecId: p.cfg.GuestID, Row: size[0], Column: size[1]})
	return err
}

// CloseInput marks the end of the process's standard input. A client may be done with
// it while the start is still under way; then it holds from the start on.
func (p *Process) CloseInput() {
	p.mu.Lock()
	p.inputEnd = true
	streams := p.streams
	p.mu.Unlock()
	if streams != nil {
		streams.CloseInput()
	}
}

// Delete ends the process's life here and frees its streams. One that runs is
// FailedPrecondition.
func (p *Process) Delete(ctx context.Context) (Exit, error) {
	p.mu.Lock()
	err := p.moveLocked(eventDelete)
	e, streams, abandoned := p.exit, p.streams, p.abandoned
	p.mu.Unlock()
	if err != nil {
		return Exit{}, err
	}
	if streams != nil {
		if abandoned == nil {
			streams.WaitDrained(ctx, deleteIdle)
		}
		streams.Close()
	}
	if abandoned != nil && p.cfg.ExecID == "" {
		abandoned() // it was removed with its container, whose id may come again
	}
	return e, nil
}

func (p *Process) log(ctx context.Context) *log.Entry {
	return log.G(ctx).WithField(logkey.Container, p.cfg.Container).WithField(logkey.Exec, p.cfg.ExecID)
}
