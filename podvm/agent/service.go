// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/podvm/agent/stream"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// service is grpc.AgentService: each method finds the container, has it do the work
// and gives errors the codes a kata-agent gives them (kata-containers 4.1, src/agent/src/rpc.rs).
type service struct {
	unimplemented
	a *Agent
}

var _ agentpb.AgentServiceService = (*service)(nil)

// empty is the reply of the calls that only succeed or fail.
func empty(err error) (*emptypb.Empty, error) { return reply(&emptypb.Empty{}, err) }

// container finds a container. An unknown one is of the given class: a kata-agent
// says INTERNAL in the calls of a container's life and INVALID_ARGUMENT in the
// others.
func (a *Agent) container(id string, class error) (*container, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.containers[ContainerID(id)]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("%s: no container %q: %w", invalidID, id, class)
}

// process finds a process for the calls about one.
func (a *Agent) process(id, exec string) (*process, error) {
	c, err := a.container(id, errdefs.ErrInvalidArgument)
	if err != nil {
		return nil, err
	}
	return c.find(ExecID(exec))
}

func (s *service) CreateSandbox(ctx context.Context, req *agentpb.CreateSandboxRequest) (*emptypb.Empty, error) {
	return empty(s.a.createSandbox(ctx, req))
}

func (s *service) DestroySandbox(ctx context.Context, _ *agentpb.DestroySandboxRequest) (*emptypb.Empty, error) {
	// The caller leaving does not keep the pod half destroyed.
	err := s.a.destroySandbox(context.WithoutCancel(ctx))
	if err == nil && s.a.cfg.OnDestroy != nil {
		defer s.a.wg.Go(s.a.cfg.OnDestroy)
	}
	return empty(err)
}

func (s *service) CreateContainer(ctx context.Context, req *agentpb.CreateContainerRequest) (*emptypb.Empty, error) {
	return empty(s.a.createContainer(ctx, req))
}

// createContainer checks a request, takes the id and has the container set up.
func (a *Agent) createContainer(ctx context.Context, req *agentpb.CreateContainerRequest) (err error) {
	if err := checkCreate(req); err != nil {
		return err
	}
	began := time.Now()
	c := &container{id: ContainerID(req.ContainerId), agent: a, op: make(chan struct{}, 1), initExec: ExecID(req.ExecId)}
	c.op <- struct{}{} // ours until the container is created
	defer c.unlock()
	ctx, c.abandon = context.WithCancel(ctx)
	defer c.abandon()
	sb, err := a.takeID(ctx, c)
	if err != nil {
		return err
	}
	if err := c.create(ctx, req, sb); err != nil {
		// The import stays: the caller may mend the spec and try again.
		if c.imported {
			a.root.Unuse(string(c.id))
			c.imported = false
		}
		if clean := c.release(context.WithoutCancel(ctx)); clean != nil {
			a.log.Error("release what a failed create left", logkey.Container, c.id, logkey.Error, clean)
			a.mu.Lock()
			delete(a.containers, c.id)
			a.mu.Unlock()
		}
		return fmt.Errorf("create container %s: %w", c.id, err)
	}
	a.log.Info("container created", logkey.Container, c.id, logkey.Duration, time.Since(began).Milliseconds())
	return nil
}

// takeID makes the container known and returns the sandbox it is to be in. Where one
// of that id is being created it waits for the outcome: a runtime whose connection
// broke calls again while the first call may not have noticed yet, and takes
// AlreadyExists for success.
func (a *Agent) takeID(ctx context.Context, c *container) (*sandbox, error) {
	for {
		a.mu.Lock()
		sb, have := a.sandbox, a.containers[c.id]
		gone := sb == nil || sb.ending || a.closed
		if !gone && have == nil {
			a.containers[c.id] = c
		}
		a.mu.Unlock()
		switch {
		case gone:
			return nil, fmt.Errorf("container %s: there is no sandbox; call CreateSandbox first: %w", c.id, errdefs.ErrFailedPrecondition)
		case have == nil:
			return sb, nil
		}
		if _, err := have.in(StateCreating); err != nil {
			return nil, fmt.Errorf("container %s: %w", c.id, errdefs.ErrAlreadyExists)
		}
		if err := have.lock(ctx); err != nil {
			return nil, err
		}
		have.unlock()
	}
}

// checkCreate refuses what this agent would otherwise ignore.
func checkCreate(req *agentpb.CreateContainerRequest) error {
	if err := checkContainerID(req.ContainerId); err != nil {
		return err
	}
	if req.OCI == nil {
		return fmt.Errorf("container %s: OCI is missing: %w", req.ContainerId, errdefs.ErrInvalidArgument)
	}
	for _, d := range req.Devices {
		return fmt.Errorf("container %s: device %s (%s %s, %s in the guest): a pod VM in a cloud has no device of its node, and none is plugged in after its start; take it out of the pod: %w",
			req.ContainerId, d.ContainerPath, d.Type, d.Id, d.VmPath, errdefs.ErrInvalidArgument)
	}
	if req.StdinPort|req.StdoutPort|req.StderrPort != 0 {
		return fmt.Errorf("container %s: %w", req.ContainerId, errPorts)
	}
	return nil
}

// errPorts is the answer to a runtime that wants a process's streams on ports of its
// own.
var errPorts = fmt.Errorf("stdin_port, stdout_port, stderr_port: there is no vsock between a node and a pod VM; leave them 0 and use ReadStdout, ReadStderr and WriteStdin: %w", errdefs.ErrInvalidArgument)

func (s *service) StartContainer(ctx context.Context, req *agentpb.StartContainerRequest) (*emptypb.Empty, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInternal)
	if err == nil {
		err = c.start(ctx)
	}
	return empty(err)
}

func (s *service) RemoveContainer(ctx context.Context, req *agentpb.RemoveContainerRequest) (*emptypb.Empty, error) {
	if req.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(req.Timeout)*time.Second)
		defer cancel()
	}
	c, err := s.a.container(req.ContainerId, errdefs.ErrInternal)
	if err != nil {
		// A root file system may be all there is: its container was never created.
		if was, rmErr := s.a.root.Remove(ctx, req.ContainerId); was {
			return empty(rmErr)
		}
		return empty(err)
	}
	if err := c.remove(ctx); err != nil {
		return empty(err)
	}
	s.a.log.Info("container removed", logkey.Container, c.id)
	return empty(nil)
}

func (s *service) ExecProcess(ctx context.Context, req *agentpb.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInvalidArgument)
	if err != nil {
		return empty(err)
	}
	if err := checkID("exec_id", req.ExecId); err != nil {
		return empty(err)
	}
	switch {
	case req.Process == nil || len(req.Process.Args) == 0:
		err = fmt.Errorf("exec %s: process.Args is empty: %w", req.ExecId, errdefs.ErrInvalidArgument)
	case req.StdinPort|req.StdoutPort|req.StderrPort != 0:
		err = fmt.Errorf("exec %s: %w", req.ExecId, errPorts)
	default:
		err = c.exec(ctx, ExecID(req.ExecId), toProcess(req.Process), req.StringUser)
	}
	return empty(err)
}

func (s *service) SignalProcess(_ context.Context, req *agentpb.SignalProcessRequest) (*emptypb.Empty, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInvalidArgument)
	if err == nil {
		err = c.signal(ExecID(req.ExecId), unix.Signal(req.Signal))
	}
	return empty(err)
}

func (s *service) WaitProcess(ctx context.Context, req *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInternal)
	if err != nil {
		return nil, toGRPC(err)
	}
	p, err := c.find(ExecID(req.ExecId))
	if err != nil {
		return nil, toGRPC(err)
	}
	status, err := p.wait(ctx)
	return reply(&agentpb.WaitProcessResponse{Status: status}, err)
}

func (s *service) UpdateContainer(ctx context.Context, req *agentpb.UpdateContainerRequest) (*emptypb.Empty, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInvalidArgument)
	if err == nil && req.Resources != nil {
		err = c.update(ctx, toResources(req.Resources))
	}
	return empty(err)
}

func (s *service) StatsContainer(_ context.Context, req *agentpb.StatsContainerRequest) (*agentpb.StatsContainerResponse, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInvalidArgument)
	if err != nil {
		return nil, toGRPC(err)
	}
	if _, err := c.in(StateRunning, StatePaused, StateCreated, StateStopped); err != nil {
		return nil, toGRPC(err)
	}
	st, err := c.cgroup.GetStats()
	if err != nil {
		return nil, toGRPC(fmt.Errorf("measure container %s: %w", c.id, err))
	}
	net, err := s.a.net.Stats()
	return reply(&agentpb.StatsContainerResponse{CgroupStats: toCgroupStats(st), NetworkStats: net}, err)
}

func (s *service) PauseContainer(ctx context.Context, req *agentpb.PauseContainerRequest) (*emptypb.Empty, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInvalidArgument)
	if err == nil {
		err = c.freeze(ctx, StatePaused)
	}
	return empty(err)
}

func (s *service) ResumeContainer(ctx context.Context, req *agentpb.ResumeContainerRequest) (*emptypb.Empty, error) {
	c, err := s.a.container(req.ContainerId, errdefs.ErrInvalidArgument)
	if err == nil {
		err = c.freeze(ctx, StateRunning)
	}
	return empty(err)
}

// RemoveStaleVirtiofsShareMounts has nothing to do: this guest shares no file system
// with its node. A stock runtime calls it after every container.
func (s *service) RemoveStaleVirtiofsShareMounts(context.Context, *agentpb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return empty(nil)
}

func (s *service) CopyFile(_ context.Context, req *agentpb.CopyFileRequest) (*emptypb.Empty, error) {
	return empty(s.a.files.copy(req))
}

func (s *service) GetOOMEvent(ctx context.Context, _ *agentpb.GetOOMEventRequest) (*agentpb.OOMEvent, error) {
	id, err := s.a.oom.next(ctx)
	return reply(&agentpb.OOMEvent{ContainerId: string(id)}, err)
}

// WriteStdin writes at the end of what was written. No data means the end of the
// input.
func (s *service) WriteStdin(ctx context.Context, req *agentpb.WriteStreamRequest) (*agentpb.WriteStreamResponse, error) {
	p, err := s.a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, toGRPC(err)
	}
	if len(req.Data) == 0 {
		p.stdin.Close()
		return &agentpb.WriteStreamResponse{}, nil
	}
	_, err = p.stdin.Append(ctx, req.Data)
	return reply(&agentpb.WriteStreamResponse{Len: uint32(len(req.Data))}, err)
}

func (s *service) CloseStdin(_ context.Context, req *agentpb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := s.a.process(req.ContainerId, req.ExecId)
	if err == nil {
		p.stdin.Close()
	}
	return empty(err)
}

func (s *service) ReadStdout(ctx context.Context, req *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return s.read(ctx, req, func(p *process) *stream.Output { return p.stdout })
}

// ReadStderr reads the terminal where the process has one, as a kata-agent does.
func (s *service) ReadStderr(ctx context.Context, req *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return s.read(ctx, req, func(p *process) *stream.Output {
		if p.stderr == nil {
			return p.stdout
		}
		return p.stderr
	})
}

// maxRead bounds a reply to half of what ttrpc carries in one message.
const maxRead = 2 << 20

// read serves the standard calls from the buffer that ReadOutput reads. What is sent
// is consumed: these calls have no way to say that it arrived.
func (s *service) read(ctx context.Context, req *agentpb.ReadStreamRequest, which func(*process) *stream.Output) (*agentpb.ReadStreamResponse, error) {
	p, err := s.a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, toGRPC(err)
	}
	if req.Len == 0 {
		return nil, toGRPC(fmt.Errorf("len is 0, and a reply without data means the end: %w", errdefs.ErrInvalidArgument))
	}
	out := which(p)
	claim, err := out.Claim(ctx)
	if err != nil {
		return nil, toGRPC(err)
	}
	defer out.Release(claim)
	at, _ := out.Bounds()
	data, _, err := out.Next(claim.Context, at, int(min(req.Len, maxRead)), nil)
	if err == nil {
		err = out.Ack(at + uint64(len(data)))
	} else if cause := context.Cause(claim.Context); cause != nil {
		err = cause
	}
	return reply(&agentpb.ReadStreamResponse{Data: data}, err)
}

func (s *service) TtyWinResize(_ context.Context, req *agentpb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	p, err := s.a.process(req.ContainerId, req.ExecId)
	if err == nil {
		err = p.resize(req.Row, req.Column)
	}
	return empty(err)
}

const (
	terminationAnnotation = "io.kubernetes.container.terminationMessagePath"
	// terminationLimit is how much of a termination message Kubernetes takes, bytes.
	terminationLimit = 4096
)

// GetDiagnosticData returns a container's termination message. NotFound: it names no
// file for one, or did not write it.
func (s *service) GetDiagnosticData(_ context.Context, req *agentpb.GetDiagnosticDataRequest) (*agentpb.GetDiagnosticDataResponse, error) {
	if req.LogType != "termination_log" {
		return nil, toGRPC(fmt.Errorf("log_type %q is not termination_log: %w", req.LogType, errdefs.ErrInvalidArgument))
	}
	c, err := s.a.container(req.ContainerId, errdefs.ErrInternal)
	if err != nil {
		return nil, toGRPC(err)
	}
	text, err := c.terminationMessage()
	return reply(&agentpb.GetDiagnosticDataResponse{Data: text}, err)
}

func (c *container) terminationMessage() (string, error) {
	if _, err := c.in(StateStopped, StateRunning, StatePaused, StateCreated); err != nil {
		return "", err
	}
	path := c.spec.Annotations[terminationAnnotation]
	if path == "" {
		return "", fmt.Errorf("container %s has no annotation %s: %w", c.id, terminationAnnotation, errdefs.ErrNotFound)
	}
	var (
		f   *os.File
		err error
	)
	i := slices.IndexFunc(c.spec.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == filepath.Clean(path) })
	switch {
	case isBuiltIn(c.spec):
		err = errors.New("it has no files")
	case i >= 0:
		f, err = os.OpenFile(c.spec.Mounts[i].Source, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	default:
		// The container wrote the path itself and may have put anything there.
		f, err = os.OpenInRoot(c.spec.Root.Path, strings.TrimPrefix(filepath.Clean(path), "/"))
	}
	if err != nil {
		return "", fmt.Errorf("termination message of container %s: %w: %w", c.id, err, errdefs.ErrNotFound)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return "", fmt.Errorf("termination message of container %s: %s is not a file: %w", c.id, path, errdefs.ErrNotFound)
	}
	buf := make([]byte, terminationLimit)
	n, _ := f.ReadAt(buf, 0) // EOF, or what there is
	return strings.ToValidUTF8(string(buf[:n]), "\uFFFD"), nil
}
