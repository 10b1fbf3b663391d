// SPDX-License-Identifier: Apache-2.0

// Package sim is a cloud in memory, for tests. It is strict (it refuses what a
// real cloud refuses) and stateful (what was made stays until it is deleted), and
// it shows on request what real clouds do now and then: latency, lists that lag,
// throttling, empty capacity pools, replies that get lost, credentials that expire.
//
// A World is the cloud; it outlives its providers, as a cloud outlives the
// adaptor. Time is the time package's, so that a World made in a testing/synctest
// bubble runs on the bubble's clock; without a Launcher it has no goroutine.
package sim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"sort"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Config is how the cloud behaves. The zero Config is a fast, consistent cloud
// without limits.
type Config struct {
	Latency    time.Duration // of each call: half of it before the effect, half after
	BootTime   time.Duration // from accepted to running
	DeleteTime time.Duration // from deletion asked to gone
	// Lag is how long List does not see a change, and Get shows the state before
	// it. Get finds an instance from the start and loses it only when it is gone.
	Lag time.Duration
	// Rate and Burst limit calls (per second, and at once) as a token bucket;
	// beyond it a call is Unavailable. Zero Rate: no limit.
	Rate, Burst float64
	// Catalog of types; the zero Catalog is DefaultCatalog.
	Catalog cloud.Catalog
	// Capacity is how many instances of a type may exist; a type that is absent
	// has no limit.
	Capacity map[string]int
	// Launcher backs instances with something real; nil makes none.
	Launcher Launcher
}

// DefaultCatalog is what a World offers unless told otherwise.
var DefaultCatalog = cloud.Catalog{
	Types: []cloud.InstanceType{
		{Name: "sim.small", VCPUs: 2, MemoryMiB: 2048},
		{Name: "sim.medium", VCPUs: 4, MemoryMiB: 8192},
		{Name: "sim.large", VCPUs: 8, MemoryMiB: 32768},
		{Name: "sim.gpu", VCPUs: 8, MemoryMiB: 65536, GPUs: 1, GPUModel: "SIM100"},
	},
	Default: "sim.small",
	Key:     "the simulated cloud's catalog",
}

// Launcher starts what an instance stands for. Launch is called once per instance,
// from a goroutine of the World; its context ends when the instance is deleted.
type Launcher interface {
	Launch(ctx context.Context, id cloud.InstanceID, req cloud.CreateRequest) (Machine, error)
}

// Machine is a started instance.
type Machine interface {
	// Addrs are the addresses of Instance.Addrs, first to last.
	Addrs() []netip.Addr
	// Done is closed when the machine has ended, however that came.
	Done() <-chan struct{}
	// Stop ends the machine and returns when all it used is free.
	Stop()
}

// World is one cloud account. Safe for concurrent use.
type World struct {
	cfg Config

	mu        sync.Mutex
	instances map[cloud.InstanceID]*instance // guarded by mu; the gone ones too
	byToken   map[string]*instance           // guarded by mu; the latest of each token
	faults    []*Fault                       // guarded by mu
	capacity  map[string]int                 // guarded by mu
	bucket    float64                        // guarded by mu; calls that may be made now
	filled    time.Time                      // guarded by mu; when bucket was right
	serial    int                            // guarded by mu
	calls     map[Op]int                     // guarded by mu
	running   sync.WaitGroup                 // goroutines of launched machines
}

// instance is an instance and its past. Its versions are in order of time; some
// may lie in the future, which is how the cloud works on without a goroutine.
type instance struct {
	req         cloud.CreateRequest
	fingerprint string
	addrs       []netip.Addr
	versions    []version
	stop        context.CancelFunc // ends the machine; nil without a Launcher
	ended       bool               // the machine's goroutine is at its end
}

type version struct {
	at   time.Time
	inst cloud.Instance
	gone bool
}

// NewWorld makes an empty cloud.
func NewWorld(cfg Config) *World {
	if len(cfg.Catalog.Types) == 0 {
		cfg.Catalog = DefaultCatalog
	}
	w := &World{
		cfg:       cfg,
		instances: map[cloud.InstanceID]*instance{},
		byToken:   map[string]*instance{},
		capacity:  map[string]int{},
		calls:     map[Op]int{},
		bucket:    cfg.Burst,
		filled:    time.Now(),
	}
	for t, n := range cfg.Capacity {
		w.capacity[t] = n
	}
	return w
}

// SetCapacity changes how many instances of a type may exist; below zero: no limit.
func (w *World) SetCapacity(typ string, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n < 0 {
		delete(w.capacity, typ)
		return
	}
	w.capacity[typ] = n
}

// Instances returns the truth, lag or not: every instance that is not gone, those
// being deleted included, oldest first.
func (w *World) Instances() []cloud.Instance {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	var out []cloud.Instance
	for _, i := range w.instances {
		if v := i.at(now); !v.gone {
			out = append(out, v.inst)
		}
	}
	sortInstances(out)
	return out
}

// Leaks says in words what still exists; empty when the cloud bills for nothing.
func (w *World) Leaks() []string {
	var out []string
	for _, i := range w.Instances() {
		out = append(out, fmt.Sprintf("instance %s (%s) of sandbox %s is %s", i.ID, i.Name, i.SandboxID, i.State))
	}
	return out
}

// Fail ends an instance as a crash of its machine would: from now on it is
// StateFailed with detail. NotFound when it does not exist.
func (w *World) Fail(id cloud.InstanceID, detail string) error {
	w.mu.Lock()
	i, ok := w.instances[id]
	if !ok || i.at(time.Now()).gone {
		w.mu.Unlock()
		return fmt.Errorf("instance %q: %w", id, errdefs.ErrNotFound)
	}
	w.fail(i, detail)
	stop := i.stop
	w.mu.Unlock()
	if stop != nil {
		stop()
	}
	return nil
}

// Close stops all machines and waits for them. Only needed with a Launcher.
func (w *World) Close() {
	w.mu.Lock()
	for _, i := range w.instances {
		if i.stop != nil {
			i.stop()
		}
	}
	w.mu.Unlock()
	w.running.Wait()
}

// at returns the version that holds at t; before the first, the first.
func (i *instance) at(t time.Time) version {
	v := i.versions[0]
	for _, next := range i.versions[1:] {
		if next.at.After(t) {
			break
		}
		v = next
	}
	return v
}

// set drops what was to come and adds a version.
func (i *instance) set(v version) {
	n := len(i.versions)
	for n > 0 && i.versions[n-1].at.After(v.at) {
		n--
	}
	i.versions = append(i.versions[:n], v)
}

// fail needs mu.
func (w *World) fail(i *instance, detail string) {
	now := time.Now()
	v := i.at(now)
	if v.gone || v.inst.State == cloud.StateDeleting || v.inst.State == cloud.StateFailed {
		return
	}
	v.at, v.inst.State, v.inst.Detail = now, cloud.StateFailed, detail
	i.set(v)
}

// create needs mu. It makes the instance; the request is valid and its token new.
func (w *World) create(req cloud.CreateRequest) *instance {
	w.serial++
	id := cloud.InstanceID(fmt.Sprintf("i-%s-%04d", short(req.Token), w.serial))
	now := time.Now()
	inst := cloud.Instance{
		ID: id, Name: req.Name, Token: req.Token, SandboxID: req.SandboxID, Owner: req.Owner,
		State: cloud.StatePending, CreatedAt: now,
	}
	i := &instance{req: req, fingerprint: req.Fingerprint()}
	i.versions = []version{{at: now, inst: inst}}
	w.instances[id] = i
	w.byToken[req.Token] = i
	if w.cfg.Launcher == nil {
		inst.State = cloud.StateRunning
		inst.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{198, 18, byte(w.serial >> 8), byte(w.serial)})} // RFC 2544
		i.versions = append(i.versions, version{at: now.Add(w.cfg.BootTime), inst: inst})
		return i
	}
	ctx, cancel := context.WithCancel(context.Background())
	i.stop = cancel
	w.running.Add(1)
	go w.run(ctx, i, id)
	return i
}

// run is the life of a real machine. Deletion cancels ctx; the instance is gone
// when the machine has stopped and DeleteTime is over.
func (w *World) run(ctx context.Context, i *instance, id cloud.InstanceID) {
	defer w.running.Done()
	err := cloud.Pause(ctx, w.cfg.BootTime)
	var m Machine
	if err == nil {
		m, err = w.cfg.Launcher.Launch(ctx, id, i.req)
	}
	if err == nil {
		w.mu.Lock()
		if v := i.at(time.Now()); v.inst.State == cloud.StatePending {
			v.at, v.inst.State, v.inst.Addrs = time.Now(), cloud.StateRunning, m.Addrs()
			i.set(v)
		}
		w.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-m.Done():
			err = fmt.Errorf("the machine ended")
		}
		m.Stop()
	}
	if err != nil && ctx.Err() == nil {
		w.mu.Lock()
		w.fail(i, err.Error())
		w.mu.Unlock()
	}
	<-ctx.Done() // a failed instance exists until it is deleted
	w.mu.Lock()
	defer w.mu.Unlock()
	i.ended = true
	if v := i.at(time.Now()); v.inst.State == cloud.StateDeleting {
		w.goneAfter(i, v)
	}
}

// goneAfter needs mu.
func (w *World) goneAfter(i *instance, v version) {
	v.at, v.gone = time.Now().Add(w.cfg.DeleteTime), true
	i.versions = append(i.versions, v)
}

// capacityFor needs mu. ResourceExhausted when the pool of typ is empty.
func (w *World) capacityFor(typ string) error {
	limit, limited := w.capacity[typ]
	if !limited {
		return nil
	}
	n := 0
	now := time.Now()
	for _, i := range w.instances {
		if i.req.Plan.Type == typ && !i.at(now).gone {
			n++
		}
	}
	if n >= limit {
		return fmt.Errorf("no capacity for instance type %s: %d of %d in use; try another type: %w", typ, n, limit, errdefs.ErrResourceExhausted)
	}
	return nil
}

func sortInstances(s []cloud.Instance) {
	sort.Slice(s, func(a, b int) bool {
		if !s[a].CreatedAt.Equal(s[b].CreatedAt) {
			return s[a].CreatedAt.Before(s[b].CreatedAt)
		}
		return s[a].ID < s[b].ID
	})
}

func short(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:4])
}
