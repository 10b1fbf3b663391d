// SPDX-License-Identifier: Apache-2.0

// Package container is one container of the pod, from the moment when the guest has
// made it to its removal.
//
//	created --start--> running --pause--> paused
//	   |  |              |    <--resume--   |
//	   |  |              +------ exit ------+----> stopped --delete--> deleted
//	   |  +--------------------- exit -----------> stopped
//	   +----------------------- delete ------------------------------> deleted
//
// Its first process and its execs are package process's. The container holds back
// its own exit until those of its execs are published, and writes back the
// termination message before.
package container

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/process"
	"github.com/kata-remote/kata-remote/shim/spec"
	"github.com/kata-remote/kata-remote/shim/state"
	"github.com/kata-remote/kata-remote/shim/stdio"
)

const (
	// execsGrace is how long the exit of a container waits for its execs', which
	// the kernel killed with it.
	execsGrace = 2 * time.Second
	// oomGrace is how long an exit by a SIGKILL that nobody here sent waits for the
	// guest's word on whether memory ran out. containerd decides on the reason
	// "OOMKilled" when it sees the exit, so the OOM event must come first.
	oomGrace = 200 * time.Millisecond
	// removeTimeout is what a guest has to remove a container whose process has ended:
	// within the 10 s that containerd gives to the handling of an exit
	// (internal/cri/server/events.go), with room for what else happens then.
	removeTimeout = 5 * time.Second
	// terminationMax is what Kubernetes keeps of a termination message.
	terminationMax = 4096
)

// publisher queues an event for containerd; implemented by service.Events.
type publisher interface {
	Publish(event proto.Message)
}

// Config describes a container that exists in the guest.
type Config struct {
	ID, Bundle string
	Conn       *guest.Conn
	Features   extension.Set
	Events     publisher
	Stdio      stdio.Config
	// TerminationLog is the node's file that takes the container's termination
	// message; empty: none.
	TerminationLog string
	// Quiet: see stdio.Process.
	Quiet bool
	// Removed runs after the container was removed from the guest. It may be nil.
	Removed func()
	// Exited runs after the exit of the first process was published. It may be nil.
	Exited func()
}

// Container is safe for concurrent use.
type Container struct {
	cfg  Config
	init *process.Process
	oom  chan struct{} // closed at the first OOM event

	mu       sync.Mutex // guards the fields below; never held while calling a process or the guest
	state    State
	execs    map[string]*process.Process
	oomKills uint64 // as often as OOM was called
	why      string // why the container is ended from outside; empty: it is not
}

// New returns the container in StateCreated.
func New(cfg Config) *Container {
	c := &Container{cfg: cfg, oom: make(chan struct{}), execs: map[string]*process.Process{}}
	c.init = process.New(process.Config{
		Conn: cfg.Conn, Features: cfg.Features, Container: cfg.ID, GuestID: cfg.ID, Stdio: cfg.Stdio, Quiet: cfg.Quiet,
		Start: c.startInit,
		Started: func() {
			c.move(eventStart)
			cfg.Events.Publish(&events.TaskStart{ContainerID: cfg.ID, Pid: Pid()})
		},
		Exiting: c.exiting,
		Exited: func(e process.Exit) {
			c.move(eventExit)
			cfg.Events.Publish(taskExit(cfg.ID, cfg.ID, e))
			if cfg.Exited != nil {
				go cfg.Exited()
			}
		},
	})
	return c
}

// StatusLost is the exit status of what ended with its pod VM: that of SIGKILL.
const StatusLost = 128 + uint32(syscall.SIGKILL)

// Pid is what the shim reports as the pid of every process: containerd wants one
// that lives on the node, and the guest's mean nothing here. It is the shim's own,
// so it is never signalled.
func Pid() uint32 { return uint32(os.Getpid()) }

// ID is the container's id.
func (c *Container) ID() string { return c.cfg.ID }

// Init is the container's first process.
func (c *Container) Init() *process.Process { return c.init }

// State is the container's present state.
func (c *Container) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

func (c *Container) move(on state.Event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := life.Next(c.state, on)
	if err != nil {
		return err
	}
	c.state = s
	return nil
}

// can tells whether an event would be in order.
func (c *Container) can(on state.Event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := life.Next(c.state, on)
	return err
}

func taskExit(container, id string, e process.Exit) *events.TaskExit {
	return &events.TaskExit{ContainerID: container, ID: id, Pid: Pid(), ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}
}

// process finds a process by containerd's exec id.
func (c *Container) process(exec string) (*process.Process, error) {
	if exec == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[exec]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("exec %s of container %s: %w", exec, c.cfg.ID, errdefs.ErrNotFound)
}

func (c *Container) startInit(ctx context.Context) error {
	if s := c.State(); s != StateCreated {
		return fmt.Errorf("container is %s, cannot start it: %w", s, errdefs.ErrFailedPrecondition)
	}
	return guest.AgentOnce(ctx, c.cfg.Conn, errdefs.IsFailedPrecondition,
		agentpb.AgentServiceService.StartContainer, &agentpb.StartContainerRequest{ContainerId: c.cfg.ID})
}

// Start starts the first process, or an exec.
func (c *Container) Start(ctx context.Context, exec string) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	return p.Start(ctx)
}

// Exec registers a process. It is made in the guest when it is started.
func (c *Container) Exec(r *taskapi.ExecProcessRequest, spc *specs.Process, namespace string) error {
	io := stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal, Namespace: namespace, Container: c.cfg.ID}
	if err := io.Validate(); err != nil {
		return err
	}
	spc.Terminal = r.Terminal
	proc, err := spec.ExecProcess(spc)
	if err != nil {
		return fmt.Errorf("exec %s: %w", r.ExecID, err)
	}
	// The guest keeps an exec's id as long as the container; containerd's clients
	// use one again as soon as they deleted it.
	var suffix [8]byte
	rand.Read(suffix[:])
	guestID := r.ExecID + "-" + hex.EncodeToString(suffix[:])
	id, cid := r.ExecID, c.cfg.ID
	p := process.New(process.Config{
		Conn: c.cfg.Conn, Features: c.cfg.Features, Container: cid, ExecID: id, GuestID: guestID, Stdio: io,
		Start: func(ctx context.Context) error {
			if s := c.State(); s != StateRunning {
				return fmt.Errorf("container is %s, cannot start an exec in it: %w", s, errdefs.ErrFailedPrecondition)
			}
			return guest.AgentOnce(ctx, c.cfg.Conn, errdefs.IsAlreadyExists,
				agentpb.AgentServiceService.ExecProcess, &agentpb.ExecProcessRequest{ContainerId: cid, ExecId: guestID, Process: proc})
		},
		Started: func() {
			c.cfg.Events.Publish(&events.TaskExecStarted{ContainerID: cid, ExecID: id, Pid: Pid()})
		},
		Exited: func(e process.Exit) { c.cfg.Events.Publish(taskExit(cid, id, e)) },
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[id] != nil {
		return fmt.Errorf("exec %s of container %s: %w", id, cid, errdefs.ErrAlreadyExists)
	}
	if c.state != StateRunning && c.state != StateCreated {
		return fmt.Errorf("container is %s, cannot exec in it: %w", c.state, errdefs.ErrFailedPrecondition)
	}
	c.execs[id] = p
	c.cfg.Events.Publish(&events.TaskExecAdded{ContainerID: cid, ExecID: id})
	return nil
}

// exiting runs between the end of the first process and its publication.
func (c *Container) exiting(ctx context.Context, e process.Exit) {
	if e.Status == 128+uint32(syscall.SIGKILL) && !c.init.Killed() {
		select {
		case <-c.oom:
		case <-c.cfg.Conn.Dead():
		case <-time.After(oomGrace):
		}
	}
	c.saveTermination(ctx)
	grace, cancel := context.WithTimeout(ctx, execsGrace)
	defer cancel()
	for _, p := range c.allExecs() {
		if s := p.Snapshot().State; s == process.StateRunning || s == process.StateStarting {
			p.Wait(grace)
		}
	}
}

// saveTermination brings the termination message back to where the kubelet reads it.
func (c *Container) saveTermination(ctx context.Context) {
	if c.cfg.TerminationLog == "" {
		return
	}
	r, err := guest.Agent(ctx, c.cfg.Conn, agentpb.AgentServiceService.GetDiagnosticData,
		&agentpb.GetDiagnosticDataRequest{LogType: "termination_log", ContainerId: c.cfg.ID})
	c.mu.Lock()
	data := c.why
	c.mu.Unlock()
	if err == nil && len(r.Data) > 0 {
		data = r.Data[max(0, len(r.Data)-terminationMax):]
	}
	if data != "" {
		err = errors.Join(err, writeExisting(c.cfg.TerminationLog, data))
	}
	if err != nil && !errors.Is(err, guest.ErrDead) {
		log.G(ctx).WithError(err).WithField(logkey.Container, c.cfg.ID).Warn("termination message was not saved")
	}
}

// Explain has the container's termination message say why it ends, unless it writes one.
func (c *Container) Explain(why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.why = why
}

func writeExisting(path, data string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(data)
	return errors.Join(err, f.Close())
}

// OOM publishes that the guest's kernel killed a process of the container for memory.
func (c *Container) OOM() {
	c.cfg.Events.Publish(&events.TaskOOM{ContainerID: c.cfg.ID})
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.oomKills++; c.oomKills == 1 {
		close(c.oom)
	}
}

// OOMKills is how often the guest's kernel killed in the container for want of memory.
func (c *Container) OOMKills() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.oomKills
}

// Kill sends a signal to the first process or an exec. The guest lets SIGKILL of
// the first process reach the whole container, with all or without it.
//
// SIGKILL ends a process even if its guest hangs: then it is given up. Other signals
// fail. The sandbox's container is not asked for in the guest at all: its end is that
// of the guest.
func (c *Container) Kill(ctx context.Context, exec string, sig syscall.Signal) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	if sig == syscall.SIGKILL && c.cfg.Quiet && exec == "" && p.Snapshot().State == process.StateRunning {
		p.End()
		return nil
	}
	err = p.Kill(ctx, sig)
	if sig != syscall.SIGKILL || !errors.Is(err, guest.ErrSilent) {
		return err
	}
	if exec == "" { // the execs' exits come before the container's
		for _, x := range c.allExecs() {
			x.Abandon(ctx)
		}
	}
	p.Abandon(ctx)
	return nil
}

func (c *Container) allExecs() (execs []*process.Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.execs {
		execs = append(execs, p)
	}
	return execs
}

// Pause freezes the container.
func (c *Container) Pause(ctx context.Context) error {
	if err := c.can(eventPause); err != nil {
		return err
	}
	if _, err := guest.Agent(ctx, c.cfg.Conn, agentpb.AgentServiceService.PauseContainer, &agentpb.PauseContainerRequest{ContainerId: c.cfg.ID}); err != nil {
		return err
	}
	if err := c.move(eventPause); err != nil {
		return err
	}
	c.cfg.Events.Publish(&events.TaskPaused{ContainerID: c.cfg.ID})
	return nil
}

// Resume thaws it.
func (c *Container) Resume(ctx context.Context) error {
	if err := c.can(eventResume); err != nil {
		return err
	}
	if _, err := guest.Agent(ctx, c.cfg.Conn, agentpb.AgentServiceService.ResumeContainer, &agentpb.ResumeContainerRequest{ContainerId: c.cfg.ID}); err != nil {
		return err
	}
	if err := c.move(eventResume); err != nil {
		return err
	}
	c.cfg.Events.Publish(&events.TaskResumed{ContainerID: c.cfg.ID})
	return nil
}

// Update changes the container's resources.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	_, err := guest.Agent(ctx, c.cfg.Conn, agentpb.AgentServiceService.UpdateContainer,
		&agentpb.UpdateContainerRequest{ContainerId: c.cfg.ID, Resources: spec.Resources(r)})
	return err
}

// Resize sets the size of a process's terminal.
func (c *Container) Resize(ctx context.Context, exec string, rows, columns uint32) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	return p.Resize(ctx, rows, columns)
}

// CloseInput marks the end of a process's standard input.
func (c *Container) CloseInput(exec string) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	p.CloseInput()
	return nil
}

// Wait returns when a process exited or ctx ends.
func (c *Container) Wait(ctx context.Context, exec string) (process.Exit, error) {
	p, err := c.process(exec)
	if err != nil {
		return process.Exit{}, err
	}
	return p.Wait(ctx)
}

// Status is what containerd's State call reports.
func (c *Container) Status(exec string) (*taskapi.StateResponse, error) {
	p, err := c.process(exec)
	if err != nil {
		return nil, err
	}
	s := p.Snapshot()
	r := &taskapi.StateResponse{
		ID: c.cfg.ID, Bundle: c.cfg.Bundle, Pid: Pid(), ExecID: exec,
		Stdin: s.Stdio.Stdin, Stdout: s.Stdio.Stdout, Stderr: s.Stdio.Stderr, Terminal: s.Stdio.Terminal,
	}
	switch s.State {
	case process.StateCreated, process.StateStarting:
		r.Status = StateCreated.status()
	case process.StateRunning:
		if r.Status = c.State().status(); exec != "" || r.Status != StatePaused.status() {
			r.Status = StateRunning.status()
		}
	default:
		r.Status = StateStopped.status()
		r.ExitStatus, r.ExitedAt = s.Exit.Status, timestamppb.New(s.Exit.At)
	}
	return r, nil
}

// Delete removes an exec, or the container from the guest. Of a guest that is gone
// nothing needs removing.
func (c *Container) Delete(ctx context.Context, exec string) (process.Exit, error) {
	p, err := c.process(exec)
	if err != nil {
		return process.Exit{}, err
	}
	if exec != "" {
		e, err := p.Delete(ctx)
		if err == nil {
			c.mu.Lock()
			delete(c.execs, exec)
			c.mu.Unlock()
		}
		return e, err
	}
	if err := c.can(eventDelete); err != nil {
		return process.Exit{}, err
	}
	if err := c.remove(ctx); err != nil {
		return process.Exit{}, err
	}
	if c.cfg.Removed != nil {
		c.cfg.Removed()
	}
	e, err := p.Delete(ctx)
	if err != nil {
		return e, err
	}
	c.mu.Lock()
	execs := c.execs
	c.execs = nil
	c.mu.Unlock()
	for _, x := range execs {
		if x.Snapshot().State == process.StateCreated {
			continue
		}
		x.Wait(ctx) // gone with the container; the guest says so
		x.Delete(ctx)
	}
	return e, c.move(eventDelete)
}

// remove takes the container out of the guest. Stock agents say Internal or
// InvalidArgument for a container they do not have (kata-containers 4.1, src/agent/src/rpc.rs); whether it is
// there at all is only interesting when the connection works.
//
// A guest that hangs is not waited for: containerd deletes a container while it handles
// its exit, one after the other for all pods. The removal then goes on without it.
func (c *Container) remove(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { // ends with the connection at the latest
		done <- guest.AgentOnce(context.WithoutCancel(ctx), c.cfg.Conn, func(error) bool { return true },
			agentpb.AgentServiceService.RemoveContainer, &agentpb.RemoveContainerRequest{ContainerId: c.cfg.ID})
	}()
	limit := time.Duration(removeTimeout)
	if c.init.Abandoned() {
		limit = 0
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	var err error
	select {
	case err = <-done:
	case <-t.C:
		log.G(ctx).WithField(logkey.Container, c.cfg.ID).Error("the pod VM does not answer: the container's removal from it goes on in the background")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil || errors.Is(err, guest.ErrDead) || errdefs.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("remove container %s from the pod VM: %w", c.cfg.ID, err)
}
