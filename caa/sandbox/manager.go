// SPDX-License-Identifier: Apache-2.0

// Package sandbox brings pod VMs up and takes them down. For each pod sandbox there
// is at most one instance, and a record of it that was on disk before the instance
// was asked for.
//
//	           StartVM          all steps done
//	reserved ──────────► starting ──────────► running
//	   ▲  │                 │                    │
//	   │  │ undo            │ undo               │ undo
//	   │  └────────────► deleting ◄──────────────┘
//	   │ CreateVM           │ nothing left
//	   └────────────────── gone
//
// "undo" is StopVM, a step that failed, a lease that ran out, or a loss found at a
// restart. Whatever its cause, it is the same: the intent is written, and then every
// step is undone, last first, again and again until nothing is left.
//
// The work is a list of steps, each with what it does and what undoes it: reserve
// (on CreateVM), instance, tunnel, agent (on StartVM). A step writes to the record
// what it is about to make before it makes it. Undoing a step that was never done,
// or half, or twice, is no error.
//
// Work belongs to the Manager, not to whoever asked: a caller of StartVM that leaves
// changes nothing but that nobody is told. If its VM comes up and nobody has come
// back for it when Config.Lease is over, it is deleted. The same holds for a sandbox
// that was reserved and never started.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/caa/agentproxy"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
)

// records is the part of store.Store that the Manager uses.
type records interface {
	All() ([]store.Record, map[string]error, error)
	Put(store.Record) error
	Delete(id string) error
}

// network is what is done to pods' network namespaces on this node.
type network interface {
	// Inspect reads the pod's network as the CNI left it. NotFound: no such path.
	// InvalidArgument: not a namespace, or one without network.
	Inspect(ctx context.Context, netns string) (PodNetworks, error)
	// Ensure makes or repairs the node ends of all of a sandbox's tunnels.
	Ensure(ctx context.Context, t NodeTunnels) error
	// Remove removes them. What is absent is no error, the namespace included.
	Remove(ctx context.Context, t NodeTunnels) error
}

// PodNetworks is the network of a pod.
type PodNetworks struct {
	// Interfaces, at least one, that with the default route first: addresses, hardware
	// address, name, routes, neighbours and MTU.
	Interfaces []podvmconfig.PodNetwork
	Rules      []podvmconfig.Rule
	// LeftOut says what else is there and why the VM does not get it.
	LeftOut []string
}

// NodeTunnels are the node ends of one sandbox's tunnels.
type NodeTunnels struct {
	Tunnels []store.Tunnel
	NetNS   string
	Remote  netip.Addr // the pod VM
}

const (
	// DefaultLease is how long a sandbox nobody has claimed is kept: above the
	// 10 min after which kata's shim (remote_hypervisor_timeout = 600) has given
	// up a StartVM, so that one that is merely slow is not taken away.
	DefaultLease = 15 * time.Minute
	// DefaultListSettle is how long an instance that was asked for, and that
	// nobody has seen, is looked for: providers' lists lag by seconds.
	DefaultListSettle = 20 * time.Second

	// instanceTimeout bounds the instance step: kata's remote_hypervisor_timeout.
	instanceTimeout = 10 * time.Minute
	// checkTimeout bounds the local and quick parts of CreateVM and recovery.
	checkTimeout = 10 * time.Second
	// goneWait is how long CreateVM waits for an earlier sandbox of the same id,
	// as clients without pods make them (ctr run, with a name), to be gone.
	goneWait = 30 * time.Second
)

// maxVNI is the largest VXLAN network identifier (RFC 7348 §5: 24 bits).
const maxVNI = 1<<24 - 1

// Config is what a Manager needs. Zero durations take their defaults.
type Config struct {
	Records      records
	Provider     cloud.Provider
	ProviderName string
	Owner        cloud.Owner
	Network      network
	// Underlay tells this node's address and MTU towards instances.
	Underlay func(context.Context) (cloud.Underlay, error)

	PodsDir       string
	ForwarderPort uint16
	VXLANPort     uint16
	VNIBase       uint32        // the first VNI to give out
	ProxyTimeout  time.Duration // for the forwarder to answer, once there is an instance
	Limit         int           // sandboxes at a time; < 0: no limit
	Tags          map[string]string
	Pull          Pull // for guests that pull images

	Lease      time.Duration
	ListSettle time.Duration
	Log        *slog.Logger

	// FaultPoint, for tests, is called before and after the effect of every step
	// ("instance:before", "instance:after", "undo instance:before", ...). It may
	// end the goroutine.
	FaultPoint func(point string)
}

// Manager holds all sandboxes of the node. It is safe for concurrent use.
type Manager struct {
	cfg   Config
	steps []step
	locks keylock
	admit sync.Mutex // held from counting sandboxes to adding one; taken before any other

	run  context.Context // of the Manager's own work; ends with Close
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu        sync.Mutex
	sandboxes map[string]*Sandbox // guarded by mu
	vnis      map[uint32]string   // VNIs in use; guarded by mu
	lastVNI   uint32              // guarded by mu
	broken    map[string]error    // records that cannot be read; guarded by mu
	closed    bool                // guarded by mu
}

// ErrClosed is returned to those who wait for work that the Manager's Close has
// interrupted. Unavailable.
var ErrClosed = errdefs.ErrUnavailable.WithMessage("the adaptor is stopping; the sandbox is looked after when it starts again")

// New makes a Manager. Recover must be called once, before anything else.
func New(cfg Config) *Manager {
	if cfg.Lease == 0 {
		cfg.Lease = DefaultLease
	}
	if cfg.ListSettle == 0 {
		cfg.ListSettle = DefaultListSettle
	}
	if cfg.FaultPoint == nil {
		cfg.FaultPoint = func(string) {}
	}
	m := &Manager{
		cfg:       cfg,
		sandboxes: map[string]*Sandbox{},
		vnis:      map[uint32]string{},
		lastVNI:   cfg.VNIBase - 1,
		broken:    map[string]error{},
	}
	m.steps = m.stepList()
	m.run, m.stop = context.WithCancel(context.Background())
	return m
}

// Close ends all work where it stands and undoes none of it: records stay, pods run
// on, the next Manager takes over.
func (m *Manager) Close() {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.stop()
	m.wg.Wait()
	for _, sb := range m.all() {
		sb.mu.Lock()
		p := sb.proxy
		sb.proxy = nil
		sb.mu.Unlock()
		if p != nil {
			p.Close()
		}
	}
}

// goRun runs f as part of the Manager's work. False: it is closed, and f is not run.
func (m *Manager) goRun(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.wg.Go(f)
	}
	return !m.closed
}

// Sandbox is one of them.
type Sandbox struct {
	m    *Manager
	id   string
	gone chan struct{} // closed when nothing is left, the record included
	log  *slog.Logger

	mu       sync.Mutex
	rec      store.Record      // as on disk, but for steps' times; guarded by mu
	starting *startOp          // the StartVM under way; guarded by mu
	undoing  bool              // a deletion is under way; guarded by mu
	searched time.Time         // since when the instance is looked for; guarded by mu
	met      bool              // the provider knew the instance, in this process; guarded by mu
	proxy    *agentproxy.Proxy // guarded by mu

	// serverKey and serverCert are the forwarder's; between issue and Create they
	// are here and nowhere else. Used by the instance step alone.
	serverKey  podvmconfig.Secret
	serverCert string
}

func (m *Manager) newSandbox(rec store.Record) *Sandbox {
	return &Sandbox{
		m: m, id: rec.ID, rec: rec, gone: make(chan struct{}),
		log: m.cfg.Log.With(logkey.Sandbox, rec.ID, logkey.Pod, rec.Pod.String()),
	}
}

func (sb *Sandbox) record() store.Record {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.rec
}

// update changes the record, on disk first. Nothing is changed when that fails.
func (sb *Sandbox) update(f func(*store.Record)) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.updateLocked(f)
}

func (sb *Sandbox) updateLocked(f func(*store.Record)) error {
	rec := sb.rec
	f(&rec)
	if err := sb.m.cfg.Records.Put(rec); err != nil {
		return err
	}
	sb.rec = rec
	return nil
}

// moveLocked takes the sandbox through e, on disk first, with what else f changes. mu
// is held.
func (sb *Sandbox) moveLocked(e event, f func(*store.Record)) error {
	from := sb.rec.State
	to, err := next(from, e)
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", sb.id, err)
	}
	err = sb.updateLocked(func(r *store.Record) {
		if to != from {
			r.State, r.Changed = to, time.Now()
		}
		if f != nil {
			f(r)
		}
	})
	if err == nil && to != from {
		sb.logState(from, to)
	}
	return err
}

func (sb *Sandbox) logState(from, to store.State) {
	attrs := []any{"from", from, "to", to}
	if sb.rec.Instance.ID != "" {
		attrs = append(attrs, logkey.Instance, sb.rec.Instance.ID)
	}
	if to == StateDeleting {
		attrs = append(attrs, "reason", sb.rec.Reason)
	}
	sb.log.Info("sandbox is "+to.String(), attrs...)
}

// find returns the sandbox of id. NotFound when there is none.
func (m *Manager) find(id string) (*Sandbox, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if sb := m.sandboxes[id]; sb != nil {
		return sb, nil
	}
	if err := m.broken[id]; err != nil {
		return nil, errdefs.ErrDataLoss.WithMessage(err.Error() + "; remove the pod")
	}
	return nil, errdefs.ErrNotFound.WithMessage(fmt.Sprintf("sandbox %s is not known to this adaptor: CreateVM comes first", id))
}

func (m *Manager) all() []*Sandbox {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*Sandbox, 0, len(m.sandboxes))
	for _, sb := range m.sandboxes {
		all = append(all, sb)
	}
	return all
}

// Knows tells whether an instance belongs to a sandbox of this Manager. One whose
// sandbox's record cannot be read does.
func (m *Manager) Knows(inst cloud.Instance) bool {
	m.mu.Lock()
	sb, broken := m.sandboxes[inst.SandboxID], m.broken[inst.SandboxID]
	m.mu.Unlock()
	if broken != nil {
		return true
	}
	if sb == nil {
		return false
	}
	rec := sb.record()
	return rec.Instance.Token == inst.Token || rec.Instance.ID == inst.ID
}

// Create is CreateVM: it checks the request and writes down what a start will make.
// Nothing outside the record exists afterwards. It returns the path on which the
// agent will answer once the sandbox runs.
//
// The same request again gets the same answer. AlreadyExists: the id is taken, by
// another request. InvalidArgument, NotFound: the request is wrong, and the text
// says where. ResourceExhausted: the node has all the pod VMs it may have, or none
// of the size asked for.
func (m *Manager) Create(ctx context.Context, req Request) (agentSocket string, err error) {
	p, err := req.parse()
	if err != nil {
		return "", err
	}
	for {
		sb, again, err := m.createOnce(ctx, req, p)
		if err != nil {
			return "", err
		}
		if !again {
			return sb.record().AgentSocket, nil
		}
		t := time.NewTimer(goneWait)
		select {
		case <-sb.gone:
			t.Stop()
		case <-t.C:
			return "", errdefs.ErrUnavailable.WithMessage(fmt.Sprintf(
				"sandbox %s: an earlier one of the same id is still being deleted; try again later", req.ID))
		case <-ctx.Done():
			t.Stop()
			return "", fmt.Errorf("wait for the deletion of an earlier sandbox %s: %w", req.ID, ctx.Err())
		}
	}
}

// createOnce returns the sandbox of the request, new or found. again: it is being
// deleted and has to be gone first.
func (m *Manager) createOnce(ctx context.Context, req Request, p parsed) (sb *Sandbox, again bool, err error) {
	known := func() (*Sandbox, bool, error) {
		sb, err := m.find(req.ID)
		if errdefs.IsNotFound(err) {
			return nil, false, nil
		}
		if err != nil {
			return nil, false, err
		}
		rec := sb.record()
		switch {
		case rec.State == StateDeleting:
			return sb, true, nil
		case rec.Request != p.digest:
			return nil, false, errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf(
				"sandbox %s exists (pod %s, %s) and was made by a different request", req.ID, rec.Pod, rec.State))
		}
		return sb, false, nil
	}
	// A sandbox that is being started or deleted has its lock taken for long.
	if sb, again, err := known(); sb != nil || err != nil {
		return sb, again, err
	}
	unlock, err := m.locks.lock(ctx, req.ID)
	if err != nil {
		return nil, false, fmt.Errorf("create sandbox %s: %w", req.ID, err)
	}
	defer unlock()
	if sb, again, err := known(); sb != nil || err != nil {
		return sb, again, err
	}
	sb, err = m.reserve(ctx, req, p)
	return sb, false, err
}

// agentSocket is the path on which a sandbox's agent answers.
func (m *Manager) agentSocket(id string) (string, error) {
	path := filepath.Join(m.cfg.PodsDir, id, "agent.ttrpc")
	if len(path) > relay.MaxUnixPath || strings.Contains(path, ":") {
		return "", errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(
			"agent socket %s: %d bytes, at most %d and no ':' are possible; shorten PODS_DIR", path, len(path), relay.MaxUnixPath))
	}
	return path, nil
}

// takeVNIs reserves n VNIs that no record holds, or none. They are given out in turn, so
// that one that was just freed rests as long as possible.
func (m *Manager) takeVNIs(id string, n int) ([]uint32, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var taken []uint32
	for range maxVNI - m.cfg.VNIBase + 1 {
		if m.lastVNI++; m.lastVNI > maxVNI || m.lastVNI < m.cfg.VNIBase {
			m.lastVNI = m.cfg.VNIBase
		}
		if _, used := m.vnis[m.lastVNI]; used {
			continue
		}
		m.vnis[m.lastVNI] = id
		if taken = append(taken, m.lastVNI); len(taken) == n {
			return taken, nil
		}
	}
	for _, vni := range taken {
		delete(m.vnis, vni)
	}
	return nil, errdefs.ErrResourceExhausted.WithMessage(fmt.Sprintf("%d VXLAN network identifiers are wanted and of %d to %d fewer are free", n, m.cfg.VNIBase, maxVNI))
}

func (m *Manager) freeVNIs(ts []store.Tunnel) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, t := range ts {
		delete(m.vnis, t.VNI)
	}
}

// full is an error when the node has all the sandboxes it may have. Those being
// deleted do not count: their successors are already waiting.
func (m *Manager) full() error {
	if m.cfg.Limit < 0 {
		return nil
	}
	n := 0
	for _, sb := range m.all() {
		if sb.record().State != StateDeleting {
			n++
		}
	}
	if n >= m.cfg.Limit {
		return errdefs.ErrResourceExhausted.WithMessage(fmt.Sprintf(
			"this node has %d pod VMs and PEERPODS_LIMIT_PER_NODE is %d: remove a pod, or raise it", n, m.cfg.Limit))
	}
	return nil
}

// sleep waits for d, or for ctx: then its cause is returned.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// isDefinite tells whether an error of Create means that nothing was made. An error
// of any other class may hide an instance.
func isDefinite(err error) bool {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	return errdefs.IsInvalidArgument(err) || errdefs.IsPermissionDenied(err) ||
		errdefs.IsResourceExhausted(err) || errdefs.IsFailedPrecondition(err)
}

// Info is what is known of a sandbox, for a person to look at. It holds keys.
type Info struct {
	store.Record
	Connections int // clients of the agent socket, now
}

// Infos returns what is known of every sandbox, in no order.
func (m *Manager) Infos() []Info {
	all := m.all()
	infos := make([]Info, len(all))
	for i, sb := range all {
		sb.mu.Lock()
		infos[i].Record = sb.rec
		if sb.proxy != nil {
			infos[i].Connections = sb.proxy.Connections()
		}
		sb.mu.Unlock()
	}
	return infos
}
