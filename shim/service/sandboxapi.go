// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/shim/config"
	"github.com/kata-remote/kata-remote/shim/container"
	"github.com/kata-remote/kata-remote/shim/sandbox"
	"github.com/kata-remote/kata-remote/shim/sandboxpb"
	"github.com/kata-remote/kata-remote/shim/spec"
)

// SandboxName is the Sandbox API of containerd 2, with which it makes a pod where the
// runtime handler has sandboxer = "shim". Such a pod has no sandbox container in
// containerd: the sandbox is the pod VM itself.
const SandboxName = "containerd.runtime.sandbox.v1.Sandbox"

// States of SandboxStatus: the CRI plugin takes the names of its own enumeration.
const (
	sandboxReady    = "SANDBOX_READY"
	sandboxNotReady = "SANDBOX_NOTREADY"
)

// releaseWait bounds how long StopSandbox waits until the adaptor was told: it answers
// at once, or is away and will find word. The node takes the pod's network apart
// next, so that it is better to have told it before.
const releaseWait = 5 * time.Second

// pod is a sandbox that was made through the Sandbox API.
type pod struct {
	sandbox *sandbox.Sandbox
	spec    *specs.Spec // as spec.FromPod made it
	files   map[string]string
	cfg     config.Config
	bundle  string
	done    chan struct{} // closed when the sandbox was stopped

	mu              sync.Mutex // guards the fields below
	stopping        bool       // somebody asked for the end
	status          uint32
	created, exited time.Time
}

// sandboxAPI is the service under SandboxName.
func (s *Service) sandboxAPI() *ttrpc.ServiceDesc {
	return &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox":   handle("CreateSandbox", s.CreateSandbox),
		"StartSandbox":    handle("StartSandbox", s.StartSandbox),
		"Platform":        handle("Platform", s.Platform),
		"StopSandbox":     handle("StopSandbox", s.StopSandbox),
		"WaitSandbox":     handle("WaitSandbox", s.WaitSandbox),
		"SandboxStatus":   handle("SandboxStatus", s.SandboxStatus),
		"PingSandbox":     handle("PingSandbox", s.PingSandbox),
		"ShutdownSandbox": handle("ShutdownSandbox", s.ShutdownSandbox),
		"SandboxMetrics":  handle("SandboxMetrics", s.SandboxMetrics),
	}}
}

func (s *Service) pod(id string) (*pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.api; p != nil && p.sandbox.ID() == id {
		return p, nil
	}
	return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
}

// CreateSandbox takes a pod's configuration and refuses what cannot be had. Nobody is
// asked for a machine before StartSandbox.
func (s *Service) CreateSandbox(_ context.Context, r *sandboxpb.CreateSandboxRequest) (*sandboxpb.Nothing, error) {
	pc, err := podConfig(r)
	if err != nil {
		return nil, err
	}
	options, err := config.ReadOptions(r.BundlePath)
	if err != nil {
		return nil, err
	}
	cfg, err := config.Load(options)
	if err != nil {
		return nil, err
	}
	files, err := sandbox.WritePodFiles(r.BundlePath, pc)
	if err != nil {
		return nil, err
	}
	spc := spec.FromPod(pc, r.SandboxId, r.NetnsPath, files)
	if err := sandbox.Check(spc, spec.RoleSandbox, r.SandboxId); err != nil {
		return nil, err
	}
	p := &pod{spec: spc, files: files, cfg: cfg, bundle: r.BundlePath, done: make(chan struct{}), created: time.Now()}
	p.sandbox = sandbox.New(sandbox.Config{ID: r.SandboxId, Bundle: r.BundlePath, OOM: s.oom, Taken: s.taken, Stopped: p.stopped})
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sandbox != nil {
		return nil, fmt.Errorf("this shim serves sandbox %s: %w", s.sandbox.ID(), errdefs.ErrAlreadyExists)
	}
	s.sandbox, s.api = p.sandbox, p
	return &sandboxpb.Nothing{}, nil
}

// podConfig reads what the CRI plugin passes for the pod. A client without a pod of the
// CRI's may give annotations alone.
func podConfig(r *sandboxpb.CreateSandboxRequest) (*sandboxpb.PodSandboxConfig, error) {
	if !filepath.IsAbs(r.BundlePath) || r.SandboxId == "" {
		return nil, fmt.Errorf("sandbox %q in bundle %q: both are needed: %w", r.SandboxId, r.BundlePath, errdefs.ErrInvalidArgument)
	}
	c := &sandboxpb.PodSandboxConfig{}
	if url := r.Options.GetTypeUrl(); url != "" {
		name := url[strings.LastIndexByte(url, '/')+1:]
		if name != "runtime.v1.PodSandboxConfig" {
			return nil, fmt.Errorf("options of sandbox %s are a %s, not the CRI's runtime.v1.PodSandboxConfig: %w", r.SandboxId, name, errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(r.Options.Value, c); err != nil {
			return nil, fmt.Errorf("configuration of pod %s: %w: %w", r.SandboxId, err, errdefs.ErrInvalidArgument)
		}
	}
	if c.Annotations == nil {
		c.Annotations = map[string]string{}
	}
	for k, v := range r.Annotations {
		c.Annotations[k] = v
	}
	return c, nil
}

// StartSandbox gets the pod VM. When it fails nothing of it is left.
func (s *Service) StartSandbox(ctx context.Context, r *sandboxpb.ID) (*sandboxpb.StartSandboxResponse, error) {
	p, err := s.pod(r.SandboxId)
	if err != nil {
		return nil, err
	}
	if err := p.start(ctx); err != nil {
		return nil, err
	}
	log.G(ctx).WithField(logkey.Sandbox, r.SandboxId).Info("sandbox started")
	return &sandboxpb.StartSandboxResponse{Pid: container.Pid(), CreatedAt: timestamppb.New(p.created)}, nil
}

func (p *pod) start(ctx context.Context) error {
	if err := p.sandbox.Start(ctx, p.spec, spec.RoleSandbox, p.cfg); err != nil {
		return err
	}
	if err := p.hold(ctx); err != nil {
		p.stop()
		return err
	}
	return nil
}

// hold makes the process in the guest that the pod's namespaces belong to: the pid
// namespace that containers may share, and the kernel settings of the pod. The agent
// knows it under the sandbox's id, containerd does not know it. An agent without a
// program for it, a stock one, has no pod settings and no shared pid namespace; a
// container that wants the latter is refused by it.
func (p *pod) hold(ctx context.Context) error {
	id := p.sandbox.ID()
	g, err := p.sandbox.Guest()
	if err != nil {
		return err
	}
	if !g.Holds() {
		return nil
	}
	if _, err := p.sandbox.CreateContainer(ctx, &taskapi.CreateTaskRequest{ID: id, Bundle: p.bundle}, p.spec); err != nil {
		return fmt.Errorf("make the holder of the pod's namespaces: %w", err)
	}
	if err := g.StartContainer(ctx, id); err != nil {
		return fmt.Errorf("start the holder of the pod's namespaces: %w", err)
	}
	return nil
}

// stop ends the sandbox because somebody asked for it.
func (p *pod) stop() {
	p.mu.Lock()
	p.stopping = true
	p.mu.Unlock()
	p.sandbox.Stop()
}

// stopped runs when the sandbox was stopped, whoever did it.
func (p *pod) stopped() {
	p.mu.Lock()
	p.exited = time.Now()
	if !p.stopping {
		p.status = container.StatusLost
	}
	p.mu.Unlock()
	close(p.done)
}

// Platform is what containers of the pod are made for: pod VMs have the node's
// architecture.
func (s *Service) Platform(context.Context, *sandboxpb.ID) (*sandboxpb.PlatformResponse, error) {
	return &sandboxpb.PlatformResponse{Platform: &sandboxpb.Platform{Os: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the pod and everything in it.
func (s *Service) StopSandbox(ctx context.Context, r *sandboxpb.StopSandboxRequest) (*sandboxpb.Nothing, error) {
	p, err := s.pod(r.SandboxId)
	if err != nil {
		return nil, err
	}
	p.stop()
	if p.sandbox.State() != sandbox.StateStopped {
		return &sandboxpb.Nothing{}, nil // it was never started
	}
	t := time.NewTimer(releaseWait)
	defer t.Stop()
	select {
	case <-p.sandbox.Released():
	case <-t.C: // it goes on
	case <-ctx.Done():
	}
	return &sandboxpb.Nothing{}, nil
}

// WaitSandbox returns when the pod has ended: with status 0 if that was asked for,
// 137 if its machine was lost.
func (s *Service) WaitSandbox(ctx context.Context, r *sandboxpb.ID) (*sandboxpb.WaitSandboxResponse, error) {
	p, err := s.pod(r.SandboxId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return &sandboxpb.WaitSandboxResponse{ExitStatus: p.status, ExitedAt: timestamppb.New(p.exited)}, nil
}

// SandboxStatus reports on the pod, without asking the guest.
func (s *Service) SandboxStatus(_ context.Context, r *sandboxpb.SandboxStatusRequest) (*sandboxpb.SandboxStatusResponse, error) {
	p, err := s.pod(r.SandboxId)
	if err != nil {
		return nil, err
	}
	state := p.sandbox.State()
	resp := &sandboxpb.SandboxStatusResponse{SandboxId: r.SandboxId, Pid: container.Pid(), State: sandboxNotReady, CreatedAt: timestamppb.New(p.created)}
	if state == sandbox.StateReady {
		resp.State = sandboxReady
	}
	p.mu.Lock()
	if !p.exited.IsZero() {
		resp.ExitedAt = timestamppb.New(p.exited)
	}
	p.mu.Unlock()
	if r.Verbose {
		info, err := json.Marshal(map[string]any{"pid": container.Pid(), "processStatus": state.String(), "runtimeSpec": p.spec})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

// PingSandbox tells whether the pod lives; FailedPrecondition: it does not.
func (s *Service) PingSandbox(_ context.Context, r *sandboxpb.ID) (*sandboxpb.Nothing, error) {
	p, err := s.pod(r.SandboxId)
	if err != nil {
		return nil, err
	}
	_, err = p.sandbox.Guest()
	return &sandboxpb.Nothing{}, err
}

// ShutdownSandbox ends the shim, whatever it serves. It answers before it does.
func (s *Service) ShutdownSandbox(_ context.Context, r *sandboxpb.ID) (*sandboxpb.Nothing, error) {
	if p, err := s.pod(r.SandboxId); err == nil {
		p.mu.Lock()
		p.stopping = true
		p.mu.Unlock()
	}
	go s.Close()
	return &sandboxpb.Nothing{}, nil
}

// SandboxMetrics is what the pod's containers use together. One that does not answer
// is left out: it may be ending.
func (s *Service) SandboxMetrics(ctx context.Context, r *sandboxpb.ID) (*sandboxpb.SandboxMetricsResponse, error) {
	if _, err := s.pod(r.SandboxId); err != nil {
		return nil, err
	}
	var list []*container.Container
	s.mu.Lock()
	for _, c := range s.containers {
		if c != nil {
			list = append(list, c)
		}
	}
	s.mu.Unlock()
	usage := make([]*agentpb.StatsContainerResponse, len(list))
	var wg sync.WaitGroup
	for i, c := range list {
		wg.Go(func() {
			var err error
			if usage[i], err = c.Usage(ctx); err != nil {
				log.G(ctx).WithError(err).WithField(logkey.Container, c.ID()).Debug("no figures")
			}
		})
	}
	wg.Wait()
	var kills uint64
	for _, c := range list {
		kills += c.OOMKills()
	}
	data, err := anyOf(container.Metrics(container.Sum(usage), kills))
	if err != nil {
		return nil, err
	}
	return &sandboxpb.SandboxMetricsResponse{Metrics: &sandboxpb.Metric{
		Timestamp: timestamppb.Now(), Id: r.SandboxId, Data: &anypb.Any{TypeUrl: data.TypeUrl, Value: data.Value},
	}}, nil
}
