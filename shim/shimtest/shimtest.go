// SPDX-License-Identifier: Apache-2.0

// Package shimtest is what surrounds a shim, for tests: an adaptor whose pod VM is
// an agenttest.Agent behind a proxy that can be broken, a containerd that takes
// events, and bundles.
package shimtest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/hypervisorpb"
)

// Adaptor is a remote hypervisor with one pod VM.
type Adaptor struct {
	// Socket is the adaptor's, AgentSocket that of the pod VM's agent.
	Socket, AgentSocket string
	// OnStart runs in StartVM; an error fails it. Set before use.
	OnStart func(ctx context.Context) error

	t        *testing.T
	agent    string // the agent's own socket
	powerOff func()
	mu       sync.Mutex
	vms      map[string]*hypervisorpb.CreateVMRequest
	stops    []string
	listen   net.Listener
	conns    map[net.Conn]struct{}
	wg       sync.WaitGroup
	stop     func()
}

// NewAdaptor serves in a temporary directory until the test ends.
func NewAdaptor(t *testing.T, agent *agenttest.Agent) *Adaptor {
	t.Helper()
	dir := shortDir(t)
	a := &Adaptor{
		Socket: filepath.Join(dir, "hypervisor.sock"), AgentSocket: filepath.Join(dir, "agent.ttrpc"),
		t: t, powerOff: agent.PowerOff, agent: filepath.Join(dir, "real.sock"), vms: map[string]*hypervisorpb.CreateVMRequest{}, conns: map[net.Conn]struct{}{},
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := a.mustListen(a.agent)
	a.wg.Go(func() {
		if err := agent.Serve(ctx, l); err != nil {
			t.Errorf("agent: %v", err)
		}
	})
	a.Connect()
	a.Up()
	t.Cleanup(func() {
		a.Down()
		a.Break()
		agent.Close()
		cancel()
		a.wg.Wait()
	})
	return a
}

// shortDir is a temporary directory whose name leaves room for a socket's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "shim")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (a *Adaptor) mustListen(path string) net.Listener {
	l, err := net.Listen("unix", path)
	if err != nil {
		a.t.Fatal(err)
	}
	return l
}

// Up serves the adaptor's socket.
func (a *Adaptor) Up() {
	s, err := ttrpc.NewServer()
	if err != nil {
		a.t.Fatal(err)
	}
	hypervisorpb.RegisterHypervisorService(s, a)
	l := a.mustListen(a.Socket)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(context.Background(), l)
	}()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stop = func() {
		s.Close()
		<-done
	}
}

// Down ends it.
func (a *Adaptor) Down() {
	a.mu.Lock()
	stop := a.stop
	a.stop = nil
	a.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// Connect makes the agent's socket and carries its bytes.
func (a *Adaptor) Connect() {
	l := a.mustListen(a.AgentSocket)
	a.mu.Lock()
	a.listen = l
	a.mu.Unlock()
	a.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.wg.Go(func() { a.proxy(c) })
		}
	})
}

func (a *Adaptor) proxy(c net.Conn) {
	up, err := net.Dial("unix", a.agent)
	if err != nil {
		c.Close()
		return
	}
	a.mu.Lock()
	a.conns[c] = struct{}{}
	a.mu.Unlock()
	done := make(chan struct{})
	go func() {
		io.Copy(up, c)
		up.Close()
		close(done)
	}()
	io.Copy(c, up)
	c.Close()
	up.Close()
	<-done
	a.mu.Lock()
	delete(a.conns, c)
	a.mu.Unlock()
}

// Cut breaks the connections to the agent, which may be made anew at once.
func (a *Adaptor) Cut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.conns {
		c.Close()
	}
}

// Break cuts the connections and removes the agent's socket, as an adaptor that ends
// does. Connect makes it again.
func (a *Adaptor) Break() {
	a.mu.Lock()
	l := a.listen
	a.listen = nil
	a.mu.Unlock()
	if l != nil {
		l.Close()
	}
	a.Cut()
}

// VM is the request a pod VM was made by, or nil.
func (a *Adaptor) VM(id string) *hypervisorpb.CreateVMRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.vms[id]
}

// Stops are the ids of StopVM so far.
func (a *Adaptor) Stops() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.stops)
}

// CreateVM implements hypervisorpb.HypervisorService.
func (a *Adaptor) CreateVM(_ context.Context, r *hypervisorpb.CreateVMRequest) (*hypervisorpb.CreateVMResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.vms[r.Id] != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("sandbox %s: %w", r.Id, errdefs.ErrAlreadyExists))
	}
	a.vms[r.Id] = r
	return &hypervisorpb.CreateVMResponse{AgentSocketPath: a.AgentSocket}, nil
}

// StartVM implements hypervisorpb.HypervisorService.
func (a *Adaptor) StartVM(ctx context.Context, _ *hypervisorpb.StartVMRequest) (*hypervisorpb.StartVMResponse, error) {
	if a.OnStart != nil {
		if err := a.OnStart(ctx); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	return &hypervisorpb.StartVMResponse{}, nil
}

// StopVM implements hypervisorpb.HypervisorService. The agent forgets its sandbox: the
// next pod VM has a new one.
func (a *Adaptor) StopVM(_ context.Context, r *hypervisorpb.StopVMRequest) (*hypervisorpb.StopVMResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.vms[r.Id] == nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("sandbox %s: %w", r.Id, errdefs.ErrNotFound))
	}
	delete(a.vms, r.Id)
	a.stops = append(a.stops, r.Id)
	a.powerOff()
	return &hypervisorpb.StopVMResponse{}, nil
}

// Version implements hypervisorpb.HypervisorService.
func (a *Adaptor) Version(context.Context, *hypervisorpb.VersionRequest) (*hypervisorpb.VersionResponse, error) {
	return &hypervisorpb.VersionResponse{Version: "0.0.0"}, nil
}

// Sink is the part of containerd that takes events.
type Sink struct {
	Address string

	t       *testing.T
	mu      sync.Mutex
	events  []*types.Envelope
	changed chan struct{}
	stop    func()
}

// NewSink serves until the test ends.
func NewSink(t *testing.T) *Sink {
	t.Helper()
	s := &Sink{Address: filepath.Join(shortDir(t), "events.sock"), t: t, changed: make(chan struct{})}
	s.Up()
	t.Cleanup(s.Down)
	return s
}

// Up serves the socket.
func (s *Sink) Up() {
	srv, err := ttrpc.NewServer()
	if err != nil {
		s.t.Fatal(err)
	}
	eventsapi.RegisterTTRPCEventsService(srv, s)
	l, err := net.Listen("unix", s.Address)
	if err != nil {
		s.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(context.Background(), l)
	}()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop = func() {
		srv.Close()
		<-done
	}
}

// Down ends it, as a restart of containerd does.
func (s *Sink) Down() {
	s.mu.Lock()
	stop := s.stop
	s.stop = nil
	s.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// Forward implements the events service.
func (s *Sink) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, r.Envelope)
	close(s.changed)
	s.changed = make(chan struct{})
	return &emptypb.Empty{}, nil
}

// Events are those that came so far.
func (s *Sink) Events() []*types.Envelope {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events)
}

// WaitFor returns the events once ok says that they are enough.
func (s *Sink) WaitFor(ctx context.Context, ok func([]*types.Envelope) bool) ([]*types.Envelope, error) {
	for {
		s.mu.Lock()
		events, changed := slices.Clone(s.events), s.changed
		s.mu.Unlock()
		if ok(events) {
			return events, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return events, ctx.Err()
		}
	}
}

// Bundle makes a bundle with a small root file system and the spec, whose network
// namespace is an ordinary file: nobody here enters it.
func Bundle(t *testing.T, spec *specs.Spec) string {
	t.Helper()
	dir := shortDir(t)
	if err := os.MkdirAll(filepath.Join(dir, "rootfs/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "rootfs/bin/prog"), []byte("program"))
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "config.json"), b)
	return dir
}

// NetNS is a path that can be given for a network namespace.
func NetNS(t *testing.T) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "netns")
	write(t, path, nil)
	return path
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

// Spec is as containerd writes it for a container that runs args.
func Spec(netns string, annotations map[string]string, args ...string) *specs.Spec {
	return &specs.Spec{
		Version:     "1.0.2",
		Process:     &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}},
		Root:        &specs.Root{Path: "rootfs"},
		Hostname:    "pod",
		Annotations: annotations,
		Mounts:      []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
			{Type: specs.NetworkNamespace, Path: netns},
		}},
	}
}

// ConfigFile writes a configuration that names the adaptor's socket.
func (a *Adaptor) ConfigFile() string {
	path := filepath.Join(filepath.Dir(a.Socket), "configuration.toml")
	write(a.t, path, fmt.Appendf(nil, "[hypervisor.remote]\nremote_hypervisor_socket = %q\n", a.Socket))
	return path
}
