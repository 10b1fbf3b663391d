// SPDX-License-Identifier: Apache-2.0

// Package sandbox is the pod: its virtual machine, had from the adaptor, and the
// agent in it.
//
//	new --start--> starting --ready--> ready --stop--> stopped
//	                  |                                   ^
//	                  +--------------- stop --------------+
//
// What is to be given back is on disk before it is asked for (record.go). Stopping
// never waits for the adaptor: the connection to the guest is dropped, which ends
// every process that still runs with status 137, and the pod VM is given back in the
// background.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/agent-protocol/vmnote"
	"github.com/kata-remote/kata-remote/shim/config"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/rootfs"
	"github.com/kata-remote/kata-remote/shim/spec"
	"github.com/kata-remote/kata-remote/shim/state"
	"github.com/kata-remote/kata-remote/shim/volume"
)

const (
	// rollbackTimeout bounds a StopVM that undoes a start: the adaptor answers at once.
	rollbackTimeout = 5 * time.Second
	// agentTimeout bounds the agent's part of a start, once the pod VM runs.
	agentTimeout = time.Minute
	// stopTimeout bounds one attempt to give a pod VM back, stopRetry is the longest
	// pause between two, and stopAttempts how many there are before the stop is left
	// beside the adaptor's socket.
	stopTimeout  = 5 * time.Second
	stopRetry    = 5 * time.Second
	stopAttempts = 3
	// oomRetry is the pause after a failed poll for OOM events.
	oomRetry = time.Second

	hostnameMax = 64 // what Linux takes (UTS_NAMELEN)
	shmDefault  = 64 << 20
)

// Config describes a sandbox.
type Config struct {
	ID, Bundle string
	// OOM is told of containers that ran out of memory.
	OOM func(container string)
	// Stopped runs once, in its own goroutine, when the sandbox was stopped. It may be nil.
	Stopped func()
	// Taken runs once, when the cloud takes the pod VM back: it ends the containers, in
	// the time there is. The sandbox is stopped when it returns. It may be nil.
	Taken func(context.Context, *Taking)
	// ClockInterval replaces clockInterval when it is not 0.
	ClockInterval time.Duration
}

// Sandbox is safe for concurrent use.
type Sandbox struct {
	cfg     Config
	volumes *volume.Set
	run     context.Context // of the sandbox's goroutines
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu       sync.Mutex // guards the fields below; never held over a call
	state    State
	record   vmnote.Note
	conn     *guest.Conn
	features extension.Set
	seccomp  bool
	handlers []string      // the agent's storage drivers
	pull     bool          // the guest pulls images
	taking   *Taking       // nil: the cloud lets it be
	released chan struct{} // closed when the pod VM was given back, or word was left
}

// New returns a sandbox in StateNew.
func New(cfg Config) *Sandbox {
	run, cancel := context.WithCancel(context.Background())
	if cfg.ClockInterval == 0 {
		cfg.ClockInterval = clockInterval
	}
	return &Sandbox{cfg: cfg, volumes: volume.NewSet(cfg.ID), run: run, cancel: cancel, released: make(chan struct{})}
}

// Guest is what containers need to know of the sandbox.
type Guest struct {
	Conn     *guest.Conn
	Features extension.Set
	Seccomp  bool
	// Handlers are the agent's storage drivers.
	Handlers []string
	// Pull: it pulls the images of the containers.
	Pull bool
}

// Holds tells whether the agent has a program of its own for a container that only
// holds the pod's namespaces.
func (g Guest) Holds() bool { return g.Features.Has(extension.Pause) }

// StartContainer starts a container that nobody else looks after.
func (g Guest) StartContainer(ctx context.Context, id string) error {
	return guest.AgentOnce(ctx, g.Conn, errdefs.IsFailedPrecondition,
		agentpb.AgentServiceService.StartContainer, &agentpb.StartContainerRequest{ContainerId: id})
}

// Guest returns the connection to the agent; FailedPrecondition unless the sandbox
// is ready.
func (s *Sandbox) Guest() (Guest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != StateReady {
		return Guest{}, fmt.Errorf("sandbox %s is %s, not ready: %w", s.cfg.ID, s.state, errdefs.ErrFailedPrecondition)
	}
	return Guest{s.conn, s.features, s.seccomp, s.handlers, s.pull}, nil
}

// ID is the sandbox's id.
func (s *Sandbox) ID() string { return s.cfg.ID }

func (s *Sandbox) move(on state.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, err := life.Next(s.state, on)
	if err != nil {
		return err
	}
	s.state = next
	return nil
}

// State is the sandbox's present state.
func (s *Sandbox) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Check refuses a pod that no pod VM can be, without asking anybody.
func Check(spc *specs.Spec, role spec.Role, id string) error {
	_, _, err := wanted(spc, role, id)
	return err
}

// wanted is what CreateVM is to be asked for.
func wanted(spc *specs.Spec, role spec.Role, id string) (netns string, annotations map[string]string, err error) {
	if netns, err = spec.NetNS(spc); err != nil {
		return "", nil, err
	}
	if err := spec.Check(spc); err != nil {
		return "", nil, err
	}
	if _, err := os.Stat(netns); err != nil {
		return "", nil, fmt.Errorf("network namespace of the sandbox: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if _, err := rootfs.ForcesPull(spc.Annotations); err != nil {
		return "", nil, err
	}
	if _, err := decodePolicy(spc.Annotations[annotation.Policy]); err != nil {
		return "", nil, fmt.Errorf("annotation %s is not base64: %w: %w", annotation.Policy, err, errdefs.ErrInvalidArgument)
	}
	annotations, err = vmAnnotations(spc, role, id)
	return netns, annotations, err
}

// Start gets a pod VM and makes the sandbox in it. It may take minutes. When it
// fails, or ctx ends, the pod VM is given back before it returns.
func (s *Sandbox) Start(ctx context.Context, spc *specs.Spec, role spec.Role, cfg config.Config) (err error) {
	netns, annotations, err := wanted(spc, role, s.cfg.ID)
	if err != nil {
		return err
	}
	record := vmnote.Note{Sandbox: s.cfg.ID, Socket: cfg.Socket}
	if err := s.move(eventStart); err != nil {
		return err
	}
	forced, _ := rootfs.ForcesPull(spc.Annotations) // wanted has seen to it
	s.mu.Lock()
	s.record, s.pull = record, cfg.GuestPull || forced
	s.mu.Unlock()
	if err := record.Write(filepath.Join(s.cfg.Bundle, RecordName)); err != nil {
		s.move(eventStop)
		close(s.released)
		return fmt.Errorf("record the sandbox: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.rollback(context.WithoutCancel(ctx)))
		}
	}()
	h := Hypervisor{cfg.Socket}
	socket, err := h.createVM(ctx, s.cfg.ID, netns, annotations)
	if errors.Is(err, errNotReached) {
		// Nobody was asked: there is nothing to give back, and no word to leave.
		s.mu.Lock()
		s.record = vmnote.Note{}
		s.mu.Unlock()
		return errors.Join(err, os.Remove(filepath.Join(s.cfg.Bundle, RecordName)))
	}
	if err != nil {
		return err
	}
	if err := s.startVM(ctx, h, cfg.Timeout); err != nil {
		return err
	}
	return s.connect(ctx, spc, h, socket)
}

// startVM waits for the pod VM as long as the caller does. The adaptor would go on
// without either of them; the rollback of Start stops it.
func (s *Sandbox) startVM(ctx context.Context, h Hypervisor, timeout time.Duration) error {
	vctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := h.startVM(vctx, s.cfg.ID)
	switch {
	case err == nil || vctx.Err() == nil:
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("the caller gave up while the pod VM was starting (for the kubelet, raise runtimeRequestTimeout): %w", context.Cause(ctx))
	}
	return fmt.Errorf("the pod VM did not start within %s (remote_hypervisor_timeout): %w", timeout, context.DeadlineExceeded)
}

// connect reaches the agent and makes the sandbox in the guest.
func (s *Sandbox) connect(ctx context.Context, spc *specs.Spec, h Hypervisor, socket string) error {
	conn := guest.New(guest.Config{Socket: socket, Gone: func(ctx context.Context) bool { return h.answers(ctx) }})
	s.mu.Lock()
	s.conn = conn
	s.mu.Unlock()
	actx, cancel := context.WithTimeoutCause(ctx, agentTimeout, fmt.Errorf("the agent did not answer within %s: %w", agentTimeout, context.DeadlineExceeded))
	defer cancel()
	passed := make(chan bool, 1)
	go func() { passed <- extensionPasses(actx, conn) }() // beside what follows: it costs no time
	if text := spc.Annotations[annotation.Policy]; text != "" {
		policy, _ := decodePolicy(text) // wanted has seen to it
		if _, err := guest.Agent(actx, conn, agentpb.AgentServiceService.SetPolicy, &agentpb.SetPolicyRequest{Policy: policy}); err != nil {
			return fmt.Errorf("have the agent enforce the policy of annotation %s: %w", annotation.Policy, err)
		}
	}
	if _, err := guest.Agent(actx, conn, agentpb.AgentServiceService.CreateSandbox, s.createRequest(spc)); err != nil {
		return fmt.Errorf("make the sandbox in the pod VM: %w", err)
	}
	// Before the first container the clock can be set with a step that nobody sees.
	clock := make(chan error, 1)
	go func() {
		cctx, cancel := context.WithTimeout(actx, clockFirst)
		defer cancel()
		clock <- tellTime(cctx, conn)
	}()
	d, err := guest.Agent(actx, conn, agentpb.AgentServiceService.GetGuestDetails, &agentpb.GuestDetailsRequest{})
	first := <-clock
	if err != nil {
		return fmt.Errorf("ask the agent for its features: %w", err)
	}
	features := extension.Set(d.GetAgentDetails().GetExtraFeatures())
	if !<-passed {
		features = features.WithoutService()
	}
	s.mu.Lock()
	s.features, s.seccomp = features, d.GetAgentDetails().GetSupportsSeccomp()
	s.handlers = d.GetAgentDetails().GetStorageHandlers()
	s.mu.Unlock()
	if err := s.move(eventReady); err != nil {
		return err
	}
	s.wg.Go(func() { s.watchOOM(conn) })
	s.wg.Go(func() { s.keepTime(conn, first) })
	s.wg.Go(func() { s.forwardPorts(spc, conn, d.GetAgentDetails().GetExtraFeatures()) })
	s.wg.Go(func() { s.watchNotices(conn, features) })
	s.wg.Go(func() {
		select {
		case <-conn.Dead():
			s.Stop()
		case <-s.run.Done():
		}
	})
	s.wg.Go(func() {
		if err := vmnote.Deliver(s.run, h.Socket, h.StopVM); err != nil && s.run.Err() == nil {
			log.G(s.run).WithError(err).Warn("stops left for the adaptor")
		}
	})
	return nil
}

// extensionPasses tells whether calls of the extension service reach the agent. What an
// agent advertises passes cloud-api-adaptor, whose own server answers to the calls
// (0.22, pkg/util/agentproto/redirector.go): those it does not know it refuses.
func extensionPasses(ctx context.Context, conn *guest.Conn) bool {
	err := conn.PodVM(ctx, func(ctx context.Context, vm podvmpb.PodVMClient) error {
		_, err := vm.WriteInput(ctx, &podvmpb.WriteInputRequest{}) // to no process: refused by the agent
		return err
	})
	return !errdefs.IsNotImplemented(err)
}

// createRequest is what kata's runtime sends (kata-containers 4.1, virtcontainers/kata_agent.go).
func (s *Sandbox) createRequest(spc *specs.Spec) *agentpb.CreateSandboxRequest {
	r := &agentpb.CreateSandboxRequest{SandboxId: s.cfg.ID, Hostname: spc.Hostname}
	if len(r.Hostname) > hostnameMax {
		r.Hostname = r.Hostname[:hostnameMax]
	}
	shm := uint64(shmDefault)
	for _, m := range spc.Mounts {
		switch m.Destination {
		case "/etc/resolv.conf":
			if b, err := os.ReadFile(m.Source); err == nil {
				r.Dns = strings.Split(strings.TrimRight(string(b), "\n"), "\n")
			}
		case "/dev/shm":
			var st unix.Statfs_t
			if m.Type == "bind" && unix.Statfs(m.Source, &st) == nil && st.Type == unix.TMPFS_MAGIC {
				shm = st.Blocks * uint64(st.Bsize)
			}
		}
	}
	r.Storages = []*agentpb.Storage{{
		Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: volume.ShmPath,
		Options: []string{"noexec", "nosuid", "nodev", "mode=1777", fmt.Sprintf("size=%d", shm)},
	}}
	return r
}

// watchOOM polls for OOM events until the guest is gone, or says that it has none.
func (s *Sandbox) watchOOM(conn *guest.Conn) {
	for {
		r, err := guest.Agent(s.run, conn, agentpb.AgentServiceService.GetOOMEvent, &agentpb.GetOOMEventRequest{})
		switch {
		case err == nil:
			s.cfg.OOM(r.ContainerId)
			continue
		case errors.Is(err, guest.ErrDead), s.run.Err() != nil, errdefs.IsNotImplemented(err):
			return
		}
		select {
		case <-time.After(oomRetry):
		case <-s.run.Done():
			return
		}
	}
}

// rollback undoes a failed start.
func (s *Sandbox) rollback(ctx context.Context) error {
	if err := s.move(eventStop); err != nil {
		return nil // Stop was faster
	}
	ctx, cancel := context.WithTimeout(ctx, rollbackTimeout)
	defer cancel()
	s.disconnect()
	defer close(s.released)
	if s.record == (vmnote.Note{}) {
		return nil
	}
	return Release(ctx, s.record)
}

func (s *Sandbox) disconnect() {
	s.mu.Lock()
	conn := s.conn
	s.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

// Stop ends the sandbox and everything in it. It returns at once and may be called
// more than once; Released tells when the adaptor was told.
func (s *Sandbox) Stop() {
	if s.move(eventStop) != nil {
		return
	}
	log.G(s.run).WithField(logkey.Sandbox, s.cfg.ID).Info("sandbox stopped")
	s.mu.Lock()
	record := s.record
	s.mu.Unlock()
	go func() {
		defer close(s.released)
		s.disconnect()
		s.release(record)
	}()
	if s.cfg.Stopped != nil {
		go s.cfg.Stopped()
	}
}

// release gives the pod VM back.
func (s *Sandbox) release(r vmnote.Note) {
	wait := stopRetry / 8
	for attempt := 1; ; attempt++ {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		err := Hypervisor{r.Socket}.StopVM(ctx, r.Sandbox)
		cancel()
		if err == nil {
			return
		}
		log.G(s.run).WithError(err).WithField(logkey.Sandbox, r.Sandbox).Warn("give the pod VM back")
		if attempt == stopAttempts || s.run.Err() != nil {
			if err := r.Leave(); err != nil {
				log.G(s.run).WithError(err).WithField(logkey.Sandbox, r.Sandbox).Error("pod VM may be left behind, remove it by hand")
			}
			return
		}
		select {
		case <-time.After(wait):
		case <-s.run.Done():
		}
		wait = min(2*wait, stopRetry)
	}
}

// Released is closed when the adaptor was told to take the pod VM, or word was left
// for it.
func (s *Sandbox) Released() <-chan struct{} { return s.released }

// Close stops the sandbox and ends its goroutines. It waits for the adaptor only as
// long as ctx allows; then the stop is left to `delete`, which runs next.
func (s *Sandbox) Close(ctx context.Context) {
	s.Stop()
	s.mu.Lock()
	started := s.state != StateNew
	s.mu.Unlock()
	if started {
		select {
		case <-s.released:
		case <-ctx.Done():
		}
	}
	s.cancel()
	s.volumes.Close()
	s.wg.Wait()
}
