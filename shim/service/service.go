// SPDX-License-Identifier: Apache-2.0

// Package service is the Task API that containerd calls, and the Sandbox API: one
// service per pod, which knows the pod's sandbox and its containers. It looks things up, translates, and
// leaves the work to packages sandbox, container and process. No lock is held while
// any of them waits for somebody.
package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/shim/config"
	"github.com/kata-remote/kata-remote/shim/container"
	"github.com/kata-remote/kata-remote/shim/sandbox"
	"github.com/kata-remote/kata-remote/shim/spec"
	"github.com/kata-remote/kata-remote/shim/stdio"
)

// closeTimeout bounds what happens between the answer to Shutdown and the end of the
// process: containerd gives a shim 3 s (core/runtime/v2/shim.go).
const closeTimeout = 2 * time.Second

var empty = &emptypb.Empty{}

// Config describes a service.
type Config struct {
	// Namespace is containerd's.
	Namespace string
	// Events takes the events; the service closes it.
	Events *Events
	// Exit ends the process. It runs once, after Close.
	Exit func()
	// Version is reported by Connect.
	Version string
}

// Service is safe for concurrent use.
type Service struct {
	cfg  Config
	once sync.Once

	mu         sync.Mutex // guards the fields below; never held over a call
	sandbox    *sandbox.Sandbox
	sandboxCtr string                          // id of the container that is the sandbox; empty with api
	api        *pod                            // the sandbox if it was made through the Sandbox API
	containers map[string]*container.Container // nil value: being created
}

// New returns a service that has no sandbox yet.
func New(cfg Config) *Service {
	return &Service{cfg: cfg, containers: map[string]*container.Container{}}
}

func (s *Service) container(id string) (*container.Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// Create makes a container and, for the first one of a pod, the pod VM.
func (s *Service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return nil, fmt.Errorf("restore from a checkpoint: %w", errdefs.ErrNotImplemented)
	}
	io := stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal, Namespace: s.cfg.Namespace, Container: r.ID}
	if err := io.Validate(); err != nil {
		return nil, err
	}
	cfg, err := config.Load(r.Options)
	if err != nil {
		return nil, err
	}
	spc, err := spec.Read(r.Bundle)
	if err != nil {
		return nil, err
	}
	role, sandboxID, err := spec.Identity(spc, r.ID)
	if err != nil {
		return nil, err
	}
	sb, err := s.reserve(r.ID, sandboxID, r.Bundle, role)
	if err != nil {
		return nil, err
	}
	if p, err := s.pod(sandboxID); err == nil {
		spec.AddPodFiles(spc, p.files)
	}
	c, err := s.create(ctx, r, spc, role, sb, cfg, io)
	if err != nil {
		s.forget(r.ID, role, sb)
		return nil, err
	}
	s.mu.Lock()
	s.containers[r.ID] = c
	s.mu.Unlock()
	s.cfg.Events.Publish(&events.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Checkpoint: r.Checkpoint, Pid: container.Pid(),
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	log.G(ctx).WithField(logkey.Container, r.ID).Info("container created")
	return &taskapi.CreateTaskResponse{Pid: container.Pid()}, nil
}

// reserve takes the container's id and returns its sandbox, a new one for the first
// container of a pod.
func (s *Service) reserve(id, sandboxID, bundle string, role spec.Role) (*sandbox.Sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.containers[id]; ok {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	if role == spec.RoleMember {
		if s.sandbox == nil || s.sandbox.ID() != sandboxID {
			return nil, fmt.Errorf("sandbox %s of container %s: %w", sandboxID, id, errdefs.ErrNotFound)
		}
	} else {
		if s.sandbox != nil {
			return nil, fmt.Errorf("this shim serves sandbox %s: %w", s.sandbox.ID(), errdefs.ErrAlreadyExists)
		}
		s.sandbox = sandbox.New(sandbox.Config{ID: id, Bundle: bundle, OOM: s.oom, Taken: s.taken})
		s.sandboxCtr = id
	}
	s.containers[id] = nil
	return s.sandbox, nil
}

func (s *Service) create(ctx context.Context, r *taskapi.CreateTaskRequest, spc *specs.Spec, role spec.Role, sb *sandbox.Sandbox, cfg config.Config, io stdio.Config) (*container.Container, error) {
	if role != spec.RoleMember {
		if err := sb.Start(ctx, spc, role, cfg); err != nil {
			return nil, err
		}
	}
	made, err := sb.CreateContainer(ctx, r, spc)
	if err != nil {
		return nil, err
	}
	c := container.Config{
		ID: r.ID, Bundle: r.Bundle, Conn: made.Guest.Conn, Features: made.Guest.Features, Events: s.cfg.Events,
		Stdio: io, TerminationLog: made.TerminationLog, Quiet: role == spec.RoleSandbox, Removed: made.Release,
	}
	if role != spec.RoleMember {
		c.Exited = sb.Stop // the pod ends with the container that stands for it
	}
	return container.New(c), nil
}

// forget undoes reserve.
func (s *Service) forget(id string, role spec.Role, sb *sandbox.Sandbox) {
	if role != spec.RoleMember {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		sb.Close(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
	if role != spec.RoleMember {
		s.sandbox, s.sandboxCtr = nil, ""
	}
}

func (s *Service) oom(id string) {
	if c, err := s.container(id); err == nil {
		c.OOM()
	}
}

// Start starts a container's first process, or an exec.
func (s *Service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	if r.ExecID == "" {
		s.mu.Lock()
		sb := s.sandbox
		s.mu.Unlock()
		if err := sb.Taken(); err != nil {
			return nil, err
		}
	}
	if err := c.Start(ctx, r.ExecID); err != nil {
		return nil, err
	}
	return &taskapi.StartResponse{Pid: container.Pid()}, nil
}

// Exec registers a process to be started in a container.
func (s *Service) Exec(_ context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	if r.ExecID == "" {
		return nil, fmt.Errorf("exec id is empty: %w", errdefs.ErrInvalidArgument)
	}
	var p specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &p); err != nil {
		return nil, fmt.Errorf("exec %s: process spec: %w: %w", r.ExecID, err, errdefs.ErrInvalidArgument)
	}
	return empty, c.Exec(r, &p, s.cfg.Namespace)
}

// Delete removes an exec or a container.
func (s *Service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	e, err := c.Delete(ctx, r.ExecID)
	if err != nil {
		return nil, err
	}
	at := timestamppb.New(e.At)
	if e.At.IsZero() {
		at = timestamppb.Now() // never started
	}
	if r.ExecID == "" {
		s.deleted(r.ID)
		s.cfg.Events.Publish(&events.TaskDelete{ContainerID: r.ID, Pid: container.Pid(), ExitStatus: e.Status, ExitedAt: at})
	}
	return &taskapi.DeleteResponse{Pid: container.Pid(), ExitStatus: e.Status, ExitedAt: at}, nil
}

// deleted forgets a container; with the one that is the sandbox the pod VM goes.
func (s *Service) deleted(id string) {
	s.mu.Lock()
	delete(s.containers, id)
	sb, last := s.sandbox, s.sandboxCtr == id
	s.mu.Unlock()
	if last {
		sb.Stop()
	}
}

// State reports on a process.
func (s *Service) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	return c.Status(r.ExecID)
}

// Pids reports the shim's own pid: see container.Pid.
func (s *Service) Pids(_ context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	if _, err := s.container(r.ID); err != nil {
		return nil, err
	}
	return &taskapi.PidsResponse{Processes: []*task.ProcessInfo{{Pid: container.Pid()}}}, nil
}

// Pause freezes a container.
func (s *Service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Pause(ctx)
}

// Resume thaws it.
func (s *Service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Resume(ctx)
}

// Checkpoint is not implemented.
func (s *Service) Checkpoint(context.Context, *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("checkpoint: %w", errdefs.ErrNotImplemented)
}

// Kill sends a signal.
func (s *Service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Kill(ctx, r.ExecID, syscall.Signal(r.Signal))
}

// ResizePty sets the size of a terminal.
func (s *Service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	return empty, c.Resize(ctx, r.ExecID, r.Height, r.Width)
}

// CloseIO marks the end of a process's standard input.
func (s *Service) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	if !r.Stdin {
		return empty, nil
	}
	return empty, c.CloseInput(r.ExecID)
}

// Update changes a container's resources.
func (s *Service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	var res specs.LinuxResources
	if err := json.Unmarshal(r.Resources.GetValue(), &res); err != nil {
		return nil, fmt.Errorf("resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return empty, c.Update(ctx, &res)
}

// Wait returns when a process exited.
func (s *Service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	e, err := c.Wait(ctx, r.ExecID)
	if err != nil {
		return nil, err
	}
	return &taskapi.WaitResponse{ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}, nil
}

// Stats reports what a container uses.
func (s *Service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	u, err := c.Usage(ctx)
	if err != nil {
		return nil, err
	}
	a, err := anyOf(container.Metrics(u, c.OOMKills()))
	if err != nil {
		return nil, err
	}
	return &taskapi.StatsResponse{Stats: a}, nil
}

// Connect reports pids; containerd asks after a restart.
func (s *Service) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	resp := &taskapi.ConnectResponse{ShimPid: container.Pid(), Version: s.cfg.Version}
	if _, err := s.container(r.ID); err == nil {
		resp.TaskPid = container.Pid()
	}
	return resp, nil
}

// Shutdown ends the shim once it has no containers any more; Now does not wait for
// that. A pod of the Sandbox API lives without containers, and ends with
// ShutdownSandbox. It answers before it does.
func (s *Service) Shutdown(_ context.Context, r *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	idle := len(s.containers) == 0 && s.api == nil
	s.mu.Unlock()
	if idle || r.Now {
		go s.Close()
	}
	return empty, nil
}

// Close gives the pod VM back, delivers what events it can, and ends the process,
// all within closeTimeout. It may be called more than once.
func (s *Service) Close() {
	s.once.Do(func() {
		ctx, cancel := context.WithTimeoutCause(context.Background(), closeTimeout, errors.New("shim ends"))
		defer cancel()
		s.mu.Lock()
		sb := s.sandbox
		s.mu.Unlock()
		if sb != nil {
			sb.Close(ctx)
		}
		s.cfg.Events.Close(ctx)
		if s.cfg.Exit != nil {
			s.cfg.Exit()
		}
	})
}
