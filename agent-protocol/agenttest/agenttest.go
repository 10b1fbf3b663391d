// SPDX-License-Identifier: Apache-2.0

// Package agenttest is an agent for tests: it speaks the whole protocol of a pod
// VM, keeps the state a real one keeps, and refuses what a real one refuses, but its
// containers are Go functions. It can be told to fail or to hang at any call.
//
// A container's program is chosen by its first argument from Agent.Programs; an
// unknown one fails at StartContainer (or ExecProcess) as a missing command does. A
// pod's sandbox container without a root runs pause, where extension.Pause is among
// Agent.Features.
// Package podvm/agent is held to the same behaviour by its own tests on real
// containers.
package agenttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// Proc is what a program sees of its process.
type Proc struct {
	Args     []string
	Env      []string
	Terminal bool
	Stdin    io.Reader
	Stdout   io.Writer // blocks while nobody acknowledges what was written, as a pipe does
	Stderr   io.Writer // not used with a terminal
	Signals  <-chan syscall.Signal
}

// Program runs a process and returns its exit status. It must return soon after ctx
// ends: that is SIGKILL.
type Program func(ctx context.Context, p *Proc) int

// Fault is consulted before every call with its method name ("CreateContainer"). An
// error is returned to the caller; blocking on ctx hangs the call.
type Fault func(ctx context.Context, method string) error

// Agent is the fake. Fields are set before Register.
type Agent struct {
	// Programs by name. Nil: no command exists.
	Programs map[string]Program
	// Features advertised in GetGuestDetails. Nil: a stock agent, whose extension
	// service answers Unimplemented.
	Features []extension.Feature
	// Policies: it takes a policy, as a kata-agent built with that feature does; ours
	// refuses each. It enforces none.
	Policies bool
	// Fault may be nil.
	Fault Fault

	mu         sync.Mutex // guards the fields below; never held over a wait
	sandbox    *agentpb.CreateSandboxRequest
	containers map[string]*container
	files      map[string]*File
	rootfs     map[string][]byte // archives by container id
	times      []time.Time
	policy     string
	volumes    map[string]*volume
	calls      []string
	oom        chan string
	notices    chan *podvmpb.Notice
	work       group
}

// File is something CopyFile made.
type File struct {
	Mode     uint32
	UID, GID int32
	Data     []byte
	// Target of a symbolic link.
	Target string
}

type container struct {
	req     *agentpb.CreateContainerRequest
	builtIn bool                // runs pause
	procs   map[string]*process // by exec id; "" is the first process
	paused  bool
}

func (a *Agent) init() {
	if a.containers == nil {
		a.containers = map[string]*container{}
		a.files = map[string]*File{}
		a.rootfs = map[string][]byte{}
		a.volumes = map[string]*volume{}
		a.oom = make(chan string, 16)
		a.notices = make(chan *podvmpb.Notice, 16)
	}
}

// Register adds the agent's services to s.
func (a *Agent) Register(s *ttrpc.Server) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.init()
	svc := service{a}
	agentpb.RegisterAgentServiceService(s, svc)
	agentpb.RegisterHealthService(s, svc)
	if len(a.Features) > 0 {
		podvmpb.RegisterPodVMService(s, extensionService{a})
	}
}

// Serve answers on l until ctx ends. It may be called for several listeners and
// again after it returned: the state stays, as it does when a connection breaks.
func (a *Agent) Serve(ctx context.Context, l net.Listener) error {
	s, err := ttrpc.NewServer(
		ttrpc.WithUnaryServerInterceptor(func(ctx context.Context, um ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
			method := path.Base(info.FullMethod)
			if err := a.enter(ctx, method); err != nil {
				return nil, errgrpc.ToGRPC(err)
			}
			return m(ctx, um)
		}),
	)
	if err != nil {
		return err
	}
	a.Register(s)
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	err = s.Serve(ctx, l)
	if ctx.Err() != nil || errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}

func (a *Agent) enter(ctx context.Context, method string) error {
	a.mu.Lock()
	a.calls = append(a.calls, method)
	a.mu.Unlock()
	if a.Fault == nil {
		return nil
	}
	return a.Fault(ctx, method)
}

// Close kills every process and waits for their programs.
func (a *Agent) Close() {
	a.mu.Lock()
	a.init()
	for _, c := range a.containers {
		for _, p := range c.procs {
			p.kill()
		}
	}
	a.mu.Unlock()
	a.work.end()
}

// group is the goroutines of an Agent. A sync.WaitGroup alone must not be added to
// while it is waited for, and calls come in until the server is closed.
type group struct {
	mu    sync.Mutex
	ended bool // guarded by mu
	wg    sync.WaitGroup
}

// run runs f in a goroutine of its own. Unavailable: the group has ended.
func (g *group) run(f func()) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return fmt.Errorf("the agent is closed: %w", errdefs.ErrUnavailable)
	}
	g.wg.Go(f)
	return nil
}

func (g *group) end() {
	g.mu.Lock()
	g.ended = true
	g.mu.Unlock()
	g.wg.Wait()
}

// Calls are the methods called so far, in order.
func (a *Agent) Calls() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.calls...)
}

// Sandbox is the request that made the sandbox, or nil.
func (a *Agent) Sandbox() *agentpb.CreateSandboxRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sandbox
}

// Container is the request that made a container, or nil.
func (a *Agent) Container(id string) *agentpb.CreateContainerRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.containers[id]; c != nil {
		return proto.CloneOf(c.req)
	}
	return nil
}

// Files are what CopyFile made so far, by guest path.
func (a *Agent) Files() map[string]File {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := make(map[string]File, len(a.files))
	for k, f := range a.files {
		m[k] = *f
	}
	return m
}

// Rootfs is the (compressed) archive imported for a container, or nil.
func (a *Agent) Rootfs(id string) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rootfs[id]
}

// TerminalSize is the size of the terminal of a container's first process: rows and
// columns.
func (a *Agent) TerminalSize(id string) (rows, columns uint32) {
	p, err := a.find(id, "")
	if err != nil {
		return 0, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.row, p.column
}

// Times are what SetGuestDateTime told so far.
func (a *Agent) Times() []time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]time.Time(nil), a.times...)
}

// Policy is what SetPolicy brought last.
func (a *Agent) Policy() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.policy
}

// OOM makes the next GetOOMEvent report a container.
func (a *Agent) OOM(id string) {
	a.mu.Lock()
	a.init()
	a.mu.Unlock()
	a.oom <- id
}

// find returns a process. NotFound and InvalidArgument are the codes of a kata-agent
// for an unknown exec and an unknown container.
func (a *Agent) find(id, exec string) (*process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.containers[id]
	if c == nil {
		return nil, fmt.Errorf("invalid container id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	if exec == id {
		exec = "" // the runtime names the first process by its container
	}
	p := c.procs[exec]
	if p == nil {
		return nil, fmt.Errorf("no exec %q in container %s: %w", exec, id, errdefs.ErrNotFound)
	}
	return p, nil
}

// program finds the command of p. The error's text has what runc says, because
// containerd's users look for it.
func (a *Agent) program(p *agentpb.Process) (Program, error) {
	if p == nil || len(p.Args) == 0 {
		return nil, fmt.Errorf("process has no args: %w", errdefs.ErrInvalidArgument)
	}
	prog := a.Programs[strings.TrimPrefix(p.Args[0], "/")]
	if prog == nil {
		return nil, fmt.Errorf("exec: %q: executable file not found in $PATH", p.Args[0])
	}
	return prog, nil
}
