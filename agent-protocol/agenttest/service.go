// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
)

// service is the protocol's edge; unimplemented.go has the calls that a remote
// virtual machine has no use for.
type service struct{ *Agent }

var empty = &emptypb.Empty{}

// PowerOff is the end of the machine, hung or not: every process ends, and the next
// sandbox is another one.
func (a *Agent) PowerOff() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.containers {
		for _, p := range c.procs {
			p.kill()
		}
	}
	a.sandbox = nil
}

func (service) Check(context.Context, *agentpb.CheckRequest) (*agentpb.HealthCheckResponse, error) {
	return &agentpb.HealthCheckResponse{Status: agentpb.HealthCheckResponse_SERVING}, nil
}

func (service) Version(context.Context, *agentpb.CheckRequest) (*agentpb.VersionCheckResponse, error) {
	return &agentpb.VersionCheckResponse{GrpcVersion: "0.0.1", AgentVersion: "agenttest"}, nil
}

func (s service) CreateSandbox(_ context.Context, r *agentpb.CreateSandboxRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sandbox != nil && s.sandbox.SandboxId != r.SandboxId {
		return nil, errgrpc.ToGRPC(fmt.Errorf("sandbox %s exists already: %w", s.sandbox.SandboxId, errdefs.ErrFailedPrecondition))
	}
	s.sandbox = r
	return empty, nil
}

func (s service) DestroySandbox(context.Context, *agentpb.DestroySandboxRequest) (*emptypb.Empty, error) {
	s.PowerOff()
	return empty, nil
}

func (s service) GetGuestDetails(context.Context, *agentpb.GuestDetailsRequest) (*agentpb.GuestDetailsResponse, error) {
	var f []string
	for _, x := range s.Features {
		f = append(f, string(x))
	}
	return &agentpb.GuestDetailsResponse{AgentDetails: &agentpb.AgentDetails{Version: "agenttest", SupportsSeccomp: true, ExtraFeatures: f}}, nil
}

func (s service) CreateContainer(_ context.Context, r *agentpb.CreateContainerRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.sandbox == nil:
		return nil, errgrpc.ToGRPC(fmt.Errorf("no sandbox: %w", errdefs.ErrFailedPrecondition))
	case s.containers[r.ContainerId] != nil:
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", r.ContainerId, errdefs.ErrAlreadyExists))
	case r.OCI == nil:
		return nil, errgrpc.ToGRPC(fmt.Errorf("OCI is missing: %w", errdefs.ErrInvalidArgument))
	}
	builtIn := r.OCI.GetRoot().GetPath() == ""
	proc, prog, err := r.OCI.Process, Program(pause), error(nil)
	switch {
	case !builtIn:
		prog, err = s.program(proc)
	case slices.Contains(s.Features, extension.Pause) && isSandbox(r.OCI.Annotations):
		proc = &agentpb.Process{Args: []string{"/pause"}}
	default:
		err = fmt.Errorf("OCI.Root.Path is empty: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.containers[r.ContainerId] = &container{req: r, builtIn: builtIn, procs: map[string]*process{"": newProcess(proc, prog)}}
	return empty, nil
}

// isSandbox tells whether annotations are those of a pod's sandbox container.
func isSandbox(annotations map[string]string) bool {
	return annotations[annotation.ContainerType] == annotation.ContainerTypeSandbox ||
		annotations[annotation.CRIOContainerType] == annotation.ContainerTypeSandbox
}

// pause is the program of a sandbox container without an image (extension.Pause).
func pause(ctx context.Context, p *Proc) int {
	for {
		select {
		case sig := <-p.Signals:
			if sig == syscall.SIGTERM || sig == syscall.SIGINT {
				return 0
			}
		case <-ctx.Done():
			return 128 + int(syscall.SIGKILL)
		}
	}
}

func (s service) StartContainer(_ context.Context, r *agentpb.StartContainerRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ContainerId, "")
	if err == nil {
		err = p.start(&s.work)
	}
	return empty, errgrpc.ToGRPC(err)
}

func (s service) RemoveContainer(_ context.Context, r *agentpb.RemoveContainerRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.ContainerId]
	if c == nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("invalid container id %q: %w", r.ContainerId, errdefs.ErrInternal))
	}
	for _, p := range c.procs {
		p.kill()
	}
	delete(s.containers, r.ContainerId)
	delete(s.rootfs, r.ContainerId)
	return empty, nil
}

func (s service) ExecProcess(_ context.Context, r *agentpb.ExecProcessRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.ContainerId]
	switch {
	case c == nil:
		return nil, errgrpc.ToGRPC(fmt.Errorf("invalid container id %q: %w", r.ContainerId, errdefs.ErrInvalidArgument))
	case c.builtIn:
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s runs the agent's own pause program and has no command to run: %w", r.ContainerId, errdefs.ErrFailedPrecondition))
	case r.ExecId == "":
		return nil, errgrpc.ToGRPC(fmt.Errorf("exec_id is missing: %w", errdefs.ErrInvalidArgument))
	case c.procs[r.ExecId] != nil:
		return nil, errgrpc.ToGRPC(fmt.Errorf("exec %s: %w", r.ExecId, errdefs.ErrAlreadyExists))
	}
	prog, err := s.program(r.Process)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	p := newProcess(r.Process, prog)
	c.procs[r.ExecId] = p
	return empty, errgrpc.ToGRPC(p.start(&s.work))
}

func (s service) SignalProcess(_ context.Context, r *agentpb.SignalProcessRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	sig := syscall.Signal(r.Signal)
	if r.ExecId == "" && sig == syscall.SIGKILL {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, p := range s.containers[r.ContainerId].procs {
			p.kill()
		}
		return empty, nil
	}
	return empty, errgrpc.ToGRPC(p.signal(sig))
}

func (s service) WaitProcess(ctx context.Context, r *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return &agentpb.WaitProcessResponse{Status: int32(p.status)}, nil
}

func (s service) ReadStdout(ctx context.Context, r *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return s.read(ctx, r, func(p *process) *output { return p.stdout })
}

func (s service) ReadStderr(ctx context.Context, r *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return s.read(ctx, r, func(p *process) *output { return p.stderr })
}

func (s service) read(ctx context.Context, r *agentpb.ReadStreamRequest, of func(*process) *output) (*agentpb.ReadStreamResponse, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	o := of(p)
	o.mu.Lock()
	offset := o.base
	o.mu.Unlock()
	b, _, err := o.next(ctx, offset, uint64(r.Len), nil)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	o.ack(offset + uint64(len(b))) // as a kata-agent: what was answered is gone
	return &agentpb.ReadStreamResponse{Data: b}, nil
}

func (s service) WriteStdin(_ context.Context, r *agentpb.WriteStreamRequest) (*agentpb.WriteStreamResponse, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	p.stdinMu.Lock()
	off := p.stdinOff
	p.stdinMu.Unlock()
	if _, err := p.writeInput(off, r.Data, len(r.Data) == 0); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &agentpb.WriteStreamResponse{Len: uint32(len(r.Data))}, nil
}

func (s service) CloseStdin(_ context.Context, r *agentpb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err == nil {
		p.stdinW.Close()
	}
	return empty, errgrpc.ToGRPC(err)
}

func (s service) TtyWinResize(_ context.Context, r *agentpb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if !p.spec.Terminal {
		return nil, errgrpc.ToGRPC(fmt.Errorf("no tty: %w", errdefs.ErrUnavailable))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.row, p.column = r.Row, r.Column
	return empty, nil
}

func (s service) pause(id string, paused bool) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	if c == nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("invalid container id %q: %w", id, errdefs.ErrInvalidArgument))
	}
	c.paused = paused
	return empty, nil
}

func (s service) PauseContainer(_ context.Context, r *agentpb.PauseContainerRequest) (*emptypb.Empty, error) {
	return s.pause(r.ContainerId, true)
}

func (s service) ResumeContainer(_ context.Context, r *agentpb.ResumeContainerRequest) (*emptypb.Empty, error) {
	return s.pause(r.ContainerId, false)
}

func (s service) UpdateContainer(_ context.Context, r *agentpb.UpdateContainerRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.ContainerId]
	if c == nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("invalid container id %q: %w", r.ContainerId, errdefs.ErrInvalidArgument))
	}
	if r.Resources != nil {
		if c.req.OCI.Linux == nil {
			c.req.OCI.Linux = &agentpb.Linux{}
		}
		c.req.OCI.Linux.Resources = r.Resources
	}
	return empty, nil
}

func (s service) StatsContainer(_ context.Context, r *agentpb.StatsContainerRequest) (*agentpb.StatsContainerResponse, error) {
	if _, err := s.find(r.ContainerId, ""); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &agentpb.StatsContainerResponse{CgroupStats: &agentpb.CgroupStats{
		CpuStats:    &agentpb.CpuStats{CpuUsage: &agentpb.CpuUsage{TotalUsage: 3000, UsageInKernelmode: 1000, UsageInUsermode: 2000}},
		MemoryStats: &agentpb.MemoryStats{Usage: &agentpb.MemoryData{Usage: 1 << 20, Limit: 1 << 30}},
		PidsStats:   &agentpb.PidsStats{Current: 1},
	}}, nil
}

// sharedRoot is the one place CopyFile may write to.
const sharedRoot = "/run/kata-containers/shared/containers/"

func (s service) CopyFile(_ context.Context, r *agentpb.CopyFileRequest) (*emptypb.Empty, error) {
	if !strings.HasPrefix(r.Path, sharedRoot) || strings.Contains(r.Path, "/../") {
		return nil, errgrpc.ToGRPC(fmt.Errorf("path %q is not below %s: %w", r.Path, sharedRoot, errdefs.ErrInvalidArgument))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &File{Mode: r.FileMode, UID: r.Uid, GID: r.Gid}
	switch r.FileMode & syscall.S_IFMT {
	case syscall.S_IFDIR:
	case syscall.S_IFLNK:
		f.Target = string(r.Data)
	case syscall.S_IFREG:
		if r.Offset > 0 {
			f = s.files[r.Path]
		}
		if f == nil || int64(len(f.Data)) != r.Offset {
			return nil, errgrpc.ToGRPC(fmt.Errorf("%s: offset %d does not follow what was copied: %w", r.Path, r.Offset, errdefs.ErrInvalidArgument))
		}
		f.Data = append(f.Data, r.Data...)
	default:
		return nil, errgrpc.ToGRPC(fmt.Errorf("%s: file type of mode %v cannot be copied: %w", r.Path, fs.FileMode(r.FileMode), errdefs.ErrInvalidArgument))
	}
	s.files[r.Path] = f
	return empty, nil
}

func (s service) SetGuestDateTime(_ context.Context, r *agentpb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.times = append(s.times, time.Unix(r.Sec, r.Usec*1000))
	return empty, nil
}

func (s service) SetPolicy(_ context.Context, r *agentpb.SetPolicyRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.Policies {
		return nil, errgrpc.ToGRPC(fmt.Errorf("this guest's agent evaluates no policies: %w", errdefs.ErrFailedPrecondition))
	}
	s.policy = r.Policy
	return empty, nil
}

func (s service) GetOOMEvent(ctx context.Context, _ *agentpb.GetOOMEventRequest) (*agentpb.OOMEvent, error) {
	select {
	case id := <-s.oom:
		return &agentpb.OOMEvent{ContainerId: id}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s service) GetDiagnosticData(_ context.Context, r *agentpb.GetDiagnosticDataRequest) (*agentpb.GetDiagnosticDataResponse, error) {
	const key = "io.kubernetes.container.terminationMessagePath"
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.ContainerId]
	if c == nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("invalid container id %q: %w", r.ContainerId, errdefs.ErrInvalidArgument))
	}
	for _, m := range c.req.OCI.Mounts {
		if dst := c.req.OCI.Annotations[key]; dst != "" && m.Destination == dst {
			if f := s.files[m.Source]; f != nil {
				return &agentpb.GetDiagnosticDataResponse{Data: string(f.Data[:min(len(f.Data), 4096)])}, nil
			}
		}
	}
	return &agentpb.GetDiagnosticDataResponse{}, nil
}
