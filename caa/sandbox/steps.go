// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/caa/agentproxy"
	"github.com/kata-remote/kata-remote/caa/pki"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/userdata"
)

// Names of the steps, in their order.
const (
	StepReserve  = "reserve"
	StepInstance = "instance"
	StepTunnel   = "tunnel"
	StepAgent    = "agent"
)

// Steps are the names of all steps, in their order.
var Steps = []string{StepReserve, StepInstance, StepTunnel, StepAgent}

// step is one part of bringing a sandbox up. do writes to the record what it will
// make before it makes it. undo is called whatever do has come to, again until it
// returns nil, and stillThere when something it has asked to go is not gone yet.
type step struct {
	name string
	do   func(context.Context, *Sandbox) error
	undo func(context.Context, *Sandbox) error
}

func (m *Manager) stepList() []step {
	return []step{
		{StepReserve, m.doReserve, m.undoReserve},
		{StepInstance, m.doInstance, m.undoInstance},
		{StepTunnel, m.doTunnel, m.undoTunnel},
		{StepAgent, m.doAgent, m.undoAgent},
	}
}

// perform does a step and notes its time. The note reaches the disk with the next
// change of the record.
func (m *Manager) perform(ctx context.Context, sb *Sandbox, s step) error {
	begin := time.Now()
	m.cfg.FaultPoint(s.name + ":before")
	if err := s.do(ctx, sb); err != nil {
		return err
	}
	m.cfg.FaultPoint(s.name + ":after")
	ms := float64(time.Since(begin).Microseconds()) / 1000
	sb.mu.Lock()
	sb.rec.Steps = append(sb.rec.Steps[:len(sb.rec.Steps):len(sb.rec.Steps)], store.Step{Name: s.name, Millis: ms})
	sb.mu.Unlock()
	sb.log.Info("step done", logkey.Step, s.name, logkey.Duration, ms)
	return nil
}

// reserve makes the sandbox of a request. The caller holds its lock.
func (m *Manager) reserve(ctx context.Context, req Request, p parsed) (*Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if err := m.full(); err != nil {
		return nil, err
	}
	socket, err := m.agentSocket(req.ID)
	if err != nil {
		return nil, err
	}
	plan, err := m.cfg.Provider.Plan(ctx, p.size)
	if err != nil {
		return nil, fmt.Errorf("choose an instance for pod %s: %w", p.pod, err)
	}
	pod, err := m.cfg.Network.Inspect(ctx, req.NetNS)
	if err != nil {
		return nil, fmt.Errorf("network of pod %s: %w", p.pod, err)
	}
	underlay, err := m.cfg.Underlay(ctx)
	if err != nil {
		return nil, fmt.Errorf("address of this node towards pod VMs: %w", err)
	}
	tunnels := make([]store.Tunnel, len(pod.Interfaces))
	for i, n := range pod.Interfaces {
		tunnels[i] = store.Tunnel{Port: m.cfg.VXLANPort, Local: underlay.Local, MTU: underlay.MTU, Pod: n}
	}
	name := instanceName(p.pod.Name, req.ID)
	now := time.Now()
	sb := m.newSandbox(store.Record{
		ID: req.ID, State: StateGone, Created: now, Changed: now,
		Lease: now.Add(m.cfg.Lease),
		Pod:   p.pod, NetNS: req.NetNS, Request: p.digest, AgentSocket: socket,
		Instance: store.Instance{
			Provider: m.cfg.ProviderName, Owner: m.cfg.Owner, Name: name, Plan: plan,
		},
		Tunnels: tunnels, Rules: pod.Rules,
		TLS: store.TLS{ServerName: name},
	})
	m.explain(ctx, sb, p.size)
	for _, why := range pod.LeftOut {
		sb.log.Warn("left out of the pod VM's network", "reason", why)
	}
	if err := m.perform(ctx, sb, m.steps[0]); err != nil {
		m.freeVNIs(sb.record().Tunnels)
		return nil, err
	}
	return sb, nil
}

// explain logs why the sandbox gets the instance type of its plan, where the provider
// chooses among types.
func (m *Manager) explain(ctx context.Context, sb *Sandbox, size cloud.Size) {
	e, ok := m.cfg.Provider.(cloud.Explainer)
	if !ok {
		return
	}
	choice, err := e.Explain(ctx, size)
	if err != nil { // not the choice's fault: Plan has just made it
		sb.log.Warn("no explanation of the instance type", logkey.Error, err)
		return
	}
	sb.log.Info("instance type chosen", "type", choice.Type.Name, "choice", choice)
}

// doReserve chooses what must be unique, writes the record, and makes the sandbox
// known.
func (m *Manager) doReserve(_ context.Context, sb *Sandbox) error {
	m.admit.Lock() // one at a time, for the limit to be exact
	defer m.admit.Unlock()
	if err := m.full(); err != nil {
		return err
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	vnis, err := m.takeVNIs(sb.id, len(sb.rec.Tunnels))
	if err != nil {
		return err
	}
	for i, vni := range vnis {
		t := &sb.rec.Tunnels[i]                           // nobody else has the record yet
		t.VNI, t.Device = vni, fmt.Sprintf("ppvx%d", vni) // at most 12 bytes; the kernel takes 15
		t.Pod.WorkerNodeIP = t.Local
		t.Pod.TunnelType = podvmconfig.TunnelVXLAN
		t.Pod.VXLANPort, t.Pod.VXLANID = t.Port, vni
		t.Pod.Index = int(vni - m.cfg.VNIBase)
	}
	var token [16]byte
	rand.Read(token[:]) // never fails (crypto/rand, Go 1.24)
	sb.rec.Instance.Token = hex.EncodeToString(token[:])
	if err := sb.moveLocked(eventReserve, nil); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sandboxes[sb.id] = sb
	return nil
}

// undoReserve forgets the sandbox. It is the last thing undone.
func (m *Manager) undoReserve(_ context.Context, sb *Sandbox) error {
	rec := sb.record()
	if err := m.cfg.Records.Delete(rec.ID); err != nil {
		return err
	}
	m.freeVNIs(rec.Tunnels)
	m.mu.Lock()
	delete(m.sandboxes, rec.ID)
	delete(m.broken, rec.ID)
	m.mu.Unlock()
	return nil
}

// doInstance makes the instance and waits for its address.
func (m *Manager) doInstance(ctx context.Context, sb *Sandbox) error {
	ctx, cancel := context.WithTimeout(ctx, instanceTimeout)
	defer cancel()
	if err := m.issue(sb); err != nil {
		return err
	}
	rec := sb.record()
	data, err := m.userData(rec, sb.serverCert, sb.serverKey)
	if err != nil {
		return err
	}
	// From here on the provider may have something of ours.
	if err := sb.update(func(r *store.Record) { r.Instance.Asked = true }); err != nil {
		return err
	}
	m.cfg.FaultPoint(StepInstance + ":asked")
	inst, err := m.create(ctx, sb, cloud.CreateRequest{
		Token: rec.Instance.Token, Name: rec.Instance.Name, SandboxID: rec.ID, Owner: rec.Instance.Owner,
		Plan: rec.Instance.Plan, UserData: data, Tags: m.cfg.Tags,
		Note: func(_ context.Context, progress string) error {
			return sb.update(func(r *store.Record) { r.Instance.Progress = progress })
		},
		Answers: func(ctx context.Context, addr netip.Addr) error { return m.answers(ctx, rec, addr) },
	})
	sb.serverKey, sb.serverCert = "", "" // the instance has them
	if err != nil {
		return fmt.Errorf("create the instance of pod %s: %w", rec.Pod, err)
	}
	sb.meet()
	m.cfg.FaultPoint(StepInstance + ":created")
	if err := sb.update(func(r *store.Record) { r.Instance.ID = inst.ID }); err != nil {
		return err
	}
	addr, err := m.address(ctx, inst)
	if err != nil {
		return fmt.Errorf("instance %s of pod %s: %w", inst.ID, rec.Pod, err)
	}
	return sb.update(func(r *store.Record) { r.Instance.Addr = addr })
}

// issue makes the sandbox's certificates. The forwarder's key stays in memory.
func (m *Manager) issue(sb *Sandbox) error {
	name := sb.record().TLS.ServerName
	b, err := pki.Issue(name, time.Now())
	if err != nil {
		return err
	}
	sb.serverKey, sb.serverCert = b.ServerKey, b.ServerCert
	return sb.update(func(r *store.Record) {
		r.TLS = store.TLS{ServerName: name, CA: b.CA, ClientCert: b.ClientCert, ClientKey: b.ClientKey}
	})
}

// userData is the cloud-config that tells the VM what it is.
func (m *Manager) userData(rec store.Record, serverCert string, serverKey podvmconfig.Secret) ([]byte, error) {
	cfg := podvmconfig.Config{
		Rules: rec.Rules, PodNamespace: rec.Pod.Namespace, PodName: rec.Pod.Name,
		TLSServerKey: serverKey, TLSServerCert: serverCert, TLSClientCA: rec.TLS.CA,
		SandboxID: rec.ID,
	}
	for i := range rec.Tunnels {
		if i == 0 {
			cfg.PodNetwork = &rec.Tunnels[i].Pod
		} else {
			cfg.MorePodNetworks = append(cfg.MorePodNetworks, rec.Tunnels[i].Pod)
		}
	}
	files, err := m.cfg.Pull.tell(&cfg)
	if err != nil {
		return nil, fmt.Errorf("user data of pod %s: %w", rec.Pod, err)
	}
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("user data of pod %s: %w", rec.Pod, err)
	}
	doc, err := json.MarshalIndent(cfg, "", "  ")
	if err != nil {
		return nil, err
	}
	return userdata.Render(append([]userdata.File{{Path: podvmconfig.Path, Content: doc}}, files...))
}

// create calls the provider until it has answered for good. It may be called again
// while it is unavailable: the token makes it the same call.
func (m *Manager) create(ctx context.Context, sb *Sandbox, req cloud.CreateRequest) (cloud.Instance, error) {
	const first, longest = 200 * time.Millisecond, 5 * time.Second // clouds ask for about this when they throttle
	for wait := first; ; wait = min(2*wait, longest) {
		req.Progress = sb.record().Instance.Progress
		inst, err := m.cfg.Provider.Create(ctx, req)
		switch {
		case err == nil:
			return inst, nil
		case ctx.Err() == nil && errdefs.IsUnavailable(err):
			sb.log.Warn("the provider is unavailable; asking again", logkey.Error, err)
			if serr := sleep(ctx, wait); serr != nil {
				return inst, fmt.Errorf("%w (%w)", err, serr)
			}
		case isDefinite(err):
			if uerr := sb.update(func(r *store.Record) { r.Instance.Asked = false }); uerr != nil {
				return inst, uerr
			}
			return inst, err
		default:
			return inst, err
		}
	}
}

// address waits for the instance's address. The first question follows at once,
// because providers that choose addresses themselves have the answer; the pace then
// falls to one a second, at which no cloud throttles.
func (m *Manager) address(ctx context.Context, inst cloud.Instance) (netip.Addr, error) {
	const first, longest = 10 * time.Millisecond, time.Second
	for wait := first; ; wait = min(wait*3/2, longest) {
		if err := failed(inst); err != nil {
			return netip.Addr{}, err
		}
		if len(inst.Addrs) > 0 {
			return inst.Addrs[0], nil
		}
		if err := sleep(ctx, wait); err != nil {
			return netip.Addr{}, fmt.Errorf("it has got no address: %w", err)
		}
		now, err := m.cfg.Provider.Get(ctx, inst.ID)
		switch {
		case err == nil:
			inst = now
		case errdefs.IsUnavailable(err):
		case errdefs.IsNotFound(err) && time.Since(inst.CreatedAt) < m.cfg.ListSettle:
			// Clouds answer so for a moment after Create.
		default:
			return netip.Addr{}, err
		}
	}
}

// failed is an error when an instance will not run (again).
func failed(inst cloud.Instance) error {
	if inst.State != cloud.StateFailed && inst.State != cloud.StateDeleting {
		return nil
	}
	detail := inst.Detail
	if detail == "" {
		detail = "the provider gives no reason"
	}
	return errdefs.ErrUnavailable.WithMessage(fmt.Sprintf("it is %s: %s", inst.State, detail))
}

func tunnelsOf(rec store.Record) NodeTunnels {
	return NodeTunnels{Tunnels: rec.Tunnels, NetNS: rec.NetNS, Remote: rec.Instance.Addr}
}

// doTunnel makes the node ends. The record has their devices' names since reserve.
func (m *Manager) doTunnel(ctx context.Context, sb *Sandbox) error {
	rec := sb.record()
	err := m.cfg.Network.Ensure(ctx, tunnelsOf(rec))
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		// The kernel binds the port when the first device on it comes up.
		return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"tunnel of pod %s: UDP port %d of this node is in use by another program: stop that program, or set VXLAN_PORT to a free port",
			rec.Pod, m.cfg.VXLANPort))
	case err != nil:
		return fmt.Errorf("tunnel of pod %s: %w", rec.Pod, err)
	}
	return nil
}

func (m *Manager) undoTunnel(ctx context.Context, sb *Sandbox) error {
	rec := sb.record()
	if !rec.Instance.Addr.IsValid() {
		return nil // it is made only when the address is on disk
	}
	if err := m.cfg.Network.Remove(ctx, tunnelsOf(rec)); err != nil {
		return fmt.Errorf("remove the tunnel: %w", err)
	}
	return nil
}

func (m *Manager) target(rec store.Record) (agentproxy.Target, error) {
	cfg, err := pki.ClientConfig(rec.TLS.ServerName, rec.TLS.CA, rec.TLS.ClientCert, rec.TLS.ClientKey)
	if err != nil {
		return agentproxy.Target{}, err
	}
	return agentproxy.Target{Addr: netip.AddrPortFrom(rec.Instance.Addr, m.cfg.ForwarderPort), TLS: cfg}, nil
}

// answers waits until the forwarder of a sandbox answers at an address that its record
// does not have yet. Somebody else at that address has not the sandbox's key.
func (m *Manager) answers(ctx context.Context, rec store.Record, addr netip.Addr) error {
	rec.Instance.Addr = addr
	target, err := m.target(rec)
	if err != nil {
		return err
	}
	conn, err := agentproxy.Wait(ctx, target)
	if err != nil {
		return err
	}
	return conn.Close()
}

// doAgent waits until the VM's forwarder answers and then serves the agent socket.
func (m *Manager) doAgent(ctx context.Context, sb *Sandbox) error {
	rec := sb.record()
	target, err := m.target(rec)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timedOut := errdefs.ErrUnavailable.WithMessage(fmt.Sprintf("nothing within PROXY_TIMEOUT (%s)", m.cfg.ProxyTimeout))
	timer := time.AfterFunc(m.cfg.ProxyTimeout, func() { cancel(timedOut) })
	defer timer.Stop()
	watched := make(chan struct{})
	go func() { defer close(watched); m.watch(ctx, rec.Instance.ID, cancel) }()
	conn, err := agentproxy.Wait(ctx, target)
	cause := context.Cause(ctx)
	cancel(nil)
	<-watched
	switch {
	case err == nil:
	case cause == timedOut:
		return errdefs.ErrUnavailable.WithMessage(fmt.Sprintf(
			"the pod VM of %s (instance %s, address %s, port %d) did not answer within PROXY_TIMEOUT (%s): %v; see the instance's console, or raise PROXY_TIMEOUT",
			rec.Pod, rec.Instance.ID, rec.Instance.Addr, m.cfg.ForwarderPort, m.cfg.ProxyTimeout, err))
	case cause != nil:
		return fmt.Errorf("instance %s of pod %s, while waiting for its forwarder: %w", rec.Instance.ID, rec.Pod, cause)
	default:
		return err
	}
	return m.serve(sb, target, rec, conn)
}

// watch ends the wait for a forwarder whose instance has died.
func (m *Manager) watch(ctx context.Context, id cloud.InstanceID, cancel context.CancelCauseFunc) {
	const first, longest = time.Second, 10 * time.Second // not a start's pace: only how soon a dead VM is reported
	for wait := first; sleep(ctx, wait) == nil; wait = min(2*wait, longest) {
		if err := m.lost(ctx, id); err != nil {
			cancel(err)
			return
		}
	}
}

// lost tells why an instance will not answer any more. Nil: it may, or the provider
// cannot say.
func (m *Manager) lost(ctx context.Context, id cloud.InstanceID) error {
	inst, err := m.cfg.Provider.Get(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
		return err
	case err != nil:
		return nil
	}
	return failed(inst)
}

func (m *Manager) undoAgent(_ context.Context, sb *Sandbox) error {
	sb.mu.Lock()
	p := sb.proxy
	sb.proxy = nil
	rec := sb.rec
	sb.mu.Unlock()
	if p != nil {
		if err := p.Close(); err != nil {
			sb.log.Warn("close the agent socket", logkey.Error, err)
		}
	}
	if rec.AgentSocket == "" {
		return nil
	}
	return agentproxy.Remove(rec.AgentSocket)
}
