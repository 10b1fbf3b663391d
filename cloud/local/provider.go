// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/iso9660"
)

// Provider makes VMs on this node. It has no state of its own but the
// configuration, and no goroutine. Links are made in the network namespace of the
// process. Safe for concurrent use.
type Provider struct {
	cfg          Config
	kvm          string        // the device; tests have others
	probeTimeout time.Duration // probeTimeout, except in tests
}

var (
	_ cloud.Provider         = (*Provider)(nil)
	_ cloud.UnderlayReporter = (*Provider)(nil)
)

// New completes and checks the configuration. InvalidArgument, all problems at
// once. It looks at nothing on the node; Check does.
func New(cfg Config) (*Provider, error) {
	cfg, err := cfg.complete(runtime.NumCPU())
	if err != nil {
		return nil, err
	}
	return &Provider{cfg: cfg, kvm: "/dev/kvm", probeTimeout: probeTimeout}, nil
}

// Underlay implements cloud.UnderlayReporter. The bridge need not exist yet.
func (p *Provider) Underlay(ctx context.Context) (cloud.Underlay, error) {
	return cloud.Underlay{Local: p.cfg.gateway(), MTU: p.cfg.MTU}, ctx.Err()
}

// Plan implements cloud.Provider. There are no types, images or GPUs to choose
// from: asking for one is InvalidArgument. ResourceExhausted: this node could not
// carry it even if it were empty.
func (p *Provider) Plan(ctx context.Context, size cloud.Size) (cloud.Plan, error) {
	if err := ctx.Err(); err != nil {
		return cloud.Plan{}, err
	}
	const annotation = "annotation io.katacontainers.config.hypervisor."
	switch {
	case size.Type != "":
		return cloud.Plan{}, fmt.Errorf("instance type %q: the local provider has no types; ask for vCPUs and memory instead (remove %smachine_type): %w", size.Type, annotation, errdefs.ErrInvalidArgument)
	case size.GPUs != 0:
		return cloud.Plan{}, fmt.Errorf("%d GPUs: the local provider has none (remove %sdefault_gpus): %w", size.GPUs, annotation, errdefs.ErrInvalidArgument)
	case size.Image != "":
		return cloud.Plan{}, fmt.Errorf("image %q: the local provider boots the one of its configuration (remove %simage): %w", size.Image, annotation, errdefs.ErrInvalidArgument)
	case size.VCPUs < 0 || size.MemoryMiB < 0:
		return cloud.Plan{}, fmt.Errorf("a size below zero was asked for (%s): %w", size.Ask(), errdefs.ErrInvalidArgument)
	case size.MemoryMiB != 0 && size.MemoryMiB < minMemoryMiB:
		return cloud.Plan{}, fmt.Errorf("%d MiB memory are too little to boot; ask for %d or more (%sdefault_memory): %w", size.MemoryMiB, minMemoryMiB, annotation, errdefs.ErrInvalidArgument)
	}
	plan := cloud.Plan{VCPUs: size.VCPUs, MemoryMiB: size.MemoryMiB, Image: p.cfg.Initrd}
	if plan.VCPUs == 0 {
		plan.VCPUs = p.cfg.DefaultVCPUs
	}
	if plan.MemoryMiB == 0 {
		plan.MemoryMiB = p.cfg.DefaultMemoryMiB
	}
	limits, err := readLimits("/", runtime.NumCPU())
	if err != nil {
		return cloud.Plan{}, fmt.Errorf("limits of this node: %w", err)
	}
	return plan, limits.fits(plan)
}

// Create implements cloud.Provider. It returns when QEMU runs.
func (p *Provider) Create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	inst, err := p.create(ctx, req)
	if err != nil {
		return cloud.Instance{}, fmt.Errorf("create instance %s: %w", req.Name, err)
	}
	return inst, nil
}

func (p *Provider) create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	if err := req.Validate(); err != nil {
		return cloud.Instance{}, err
	}
	if req.Plan.VCPUs < 1 || req.Plan.MemoryMiB < minMemoryMiB {
		return cloud.Instance{}, fmt.Errorf("plan %+v was not made by Plan: %w", req.Plan, errdefs.ErrInvalidArgument)
	}
	accel, _, err := p.Accel(ctx)
	if err != nil {
		return cloud.Instance{}, err
	}
	if p.cfg.Machine == MachineMicroVM && accel != AccelKVM {
		return cloud.Instance{}, fmt.Errorf("LOCAL_MACHINE %s needs KVM, which does not work here: kernels lose their clock in it under emulation; set LOCAL_MACHINE to %s: %w", MachineMicroVM, MachineQ35, errdefs.ErrFailedPrecondition)
	}
	id := idOf(req.Token)
	fresh, err := p.reserve(ctx, id, req, accel)
	if err != nil {
		return cloud.Instance{}, err
	}
	unlock, err := p.lockInstance(ctx, id)
	if errdefs.IsNotFound(err) {
		return cloud.Instance{}, fmt.Errorf("instance %s was deleted while it was made: %w", id, errdefs.ErrUnavailable)
	}
	if err != nil {
		return cloud.Instance{}, err
	}
	defer unlock()
	r, err := p.load(id)
	if err != nil {
		return cloud.Instance{}, err
	}
	if r.Deleting || r.Process.PID != 0 {
		return p.instance(r)
	}
	if err := p.make(ctx, r, req.UserData, fresh); err != nil {
		if ctx.Err() != nil {
			return cloud.Instance{}, err // recorded; the token or List finds it
		}
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), quitTimeout+killTimeout)
		defer cancel()
		return cloud.Instance{}, errors.Join(err, p.remove(undo, r))
	}
	return p.instance(r)
}

// reserve decides on an address and on admission, and writes the record. False
// when the record existed.
func (p *Provider) reserve(ctx context.Context, id cloud.InstanceID, req cloud.CreateRequest, accel Accel) (fresh bool, err error) {
	unlock, err := p.lockState(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	r, err := p.load(id)
	if err == nil && (r.Token != req.Token || r.Fingerprint != req.Fingerprint()) {
		return false, fmt.Errorf("token %s made instance %s from a different request: %w", req.Token, id, errdefs.ErrAlreadyExists)
	}
	if err == nil || !errdefs.IsNotFound(err) {
		return false, err
	}
	if err := p.tidy(); err != nil {
		return false, err
	}
	others, _, err := p.loadAll()
	if err != nil {
		return false, err
	}
	limits, err := readLimits("/", runtime.NumCPU())
	if err != nil {
		return false, fmt.Errorf("limits of this node: %w", err)
	}
	if err := errors.Join(limits.fits(req.Plan), limits.admit(req.Plan, living(others), p.cfg.CPUOvercommit)); err != nil {
		return false, err
	}
	addr, err := p.pick(id, others)
	if err != nil {
		return false, err
	}
	r = &record{
		Version: recordVersion, ID: id, Token: req.Token, Fingerprint: req.Fingerprint(),
		Name: req.Name, SandboxID: req.SandboxID, Owner: req.Owner, Tags: req.Tags, Plan: req.Plan,
		CreatedAt: time.Now().UTC(), Addr: addr, MAC: macOf(addr.Addr()).String(),
		Tap: "ppt" + string(id[3:15]), Bridge: p.cfg.Bridge, Accel: accel,
	}
	if err := os.Mkdir(p.dir(id), 0o700); err != nil {
		return false, err
	}
	if err := touch(filepath.Join(p.dir(id), lockName)); err != nil {
		return false, err
	}
	if err := p.store(r); err != nil {
		return false, fmt.Errorf("record instance %s: %w", id, err)
	}
	return true, syncDir(p.instancesDir())
}

// living are the instances that hold memory, or may do so soon.
func living(all []*record) []*record {
	var out []*record
	for _, r := range all {
		if r.Process.PID == 0 || r.Process.alive() {
			out = append(out, r)
		}
	}
	return out
}

// pick finds a free address. It starts at a place that depends on the ID, so that
// an address is not reused at once by somebody else.
func (p *Provider) pick(id cloud.InstanceID, others []*record) (netip.Prefix, error) {
	used := map[netip.Addr]bool{}
	for _, r := range others {
		used[r.Addr.Addr()] = true
	}
	h := fnv.New32a()
	h.Write([]byte(id))
	n := p.cfg.addresses()
	for i := range n {
		a, ok := p.cfg.address((int(h.Sum32()%uint32(n)) + i) % n)
		if ok && !used[a] {
			return netip.PrefixFrom(a, p.cfg.Subnet.Bits()), nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("all %d addresses of subnet %s are in use; delete pods or set a wider LOCAL_SUBNET: %w", n, p.cfg.Subnet, errdefs.ErrResourceExhausted)
}

// make builds what the record describes. The instance's lock is held.
func (p *Provider) make(ctx context.Context, r *record, userData []byte, fresh bool) error {
	if !fresh { // an earlier Create was interrupted, perhaps just after it started QEMU
		if err := p.stop(ctx, r); err != nil {
			return err
		}
	}
	img, err := iso9660.Image(seedLabel, seedFiles(r, p.cfg.MTU, userData), r.CreatedAt)
	if err == nil {
		err = writeFile(filepath.Join(p.dir(r.ID), seedName), img)
	}
	if err != nil {
		return fmt.Errorf("write seed: %w", err)
	}
	unlock, err := p.lockState(ctx)
	if err != nil {
		return err
	}
	bridge, err := p.ensureBridge()
	unlock()
	if err != nil {
		return err
	}
	if err := setNeighbor(r, bridge); err != nil {
		return err
	}
	tap, err := openTap(r, bridge)
	if err != nil {
		return err
	}
	defer tap.Close() // QEMU has its own descriptor
	return p.start(ctx, r, tap)
}

// instance is the record as the caller sees it, with the state of now.
func (p *Provider) instance(r *record) (cloud.Instance, error) {
	inst := cloud.Instance{ID: r.ID, Name: r.Name, Token: r.Token, SandboxID: r.SandboxID, Owner: r.Owner, CreatedAt: r.CreatedAt}
	boot, err := bootID()
	if err != nil {
		return cloud.Instance{}, err
	}
	dir := p.dir(r.ID)
	switch {
	case r.Deleting:
		inst.State = cloud.StateDeleting
	case r.Process.PID == 0:
		inst.State = cloud.StatePending
	case r.BootID != boot:
		inst.State, inst.Detail = cloud.StateFailed, "the node was restarted"
	case r.Process.alive():
		inst.State, inst.Addrs = cloud.StateRunning, []netip.Addr{r.Addr.Addr()}
		return inst, boundLog(filepath.Join(dir, serialName), maxSerialBytes, keepSerialBytes)
	default:
		inst.State = cloud.StateFailed
		inst.Detail = lastWords(dir)
	}
	return inst, nil
}

// Get implements cloud.Provider.
func (p *Provider) Get(ctx context.Context, id cloud.InstanceID) (cloud.Instance, error) {
	if err := ctx.Err(); err != nil {
		return cloud.Instance{}, err
	}
	r, err := p.load(id)
	if err != nil {
		return cloud.Instance{}, err
	}
	return p.instance(r)
}

// List implements cloud.Provider. It does not lag. An instance whose record is
// damaged is listed for everybody, without a name and in StateUnknown: it is on
// this node and somebody must delete it.
func (p *Provider) List(ctx context.Context, owner cloud.Owner) ([]cloud.Instance, error) {
	if owner.Cluster == "" {
		return nil, fmt.Errorf("list instances: the owner's cluster is empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	records, broken, err := p.loadAll()
	if err != nil {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	var out []cloud.Instance
	for _, r := range records {
		if r.Owner.Cluster != owner.Cluster || owner.Node != "" && r.Owner.Node != owner.Node {
			continue
		}
		inst, err := p.instance(r)
		if err != nil {
			return nil, err
		}
		out = append(out, inst)
	}
	for id, err := range broken {
		out = append(out, cloud.Instance{ID: id, Owner: owner, Detail: err.Error()})
	}
	sort.Slice(out, func(a, b int) bool { return out[a].ID < out[b].ID })
	return out, nil
}

// Delete implements cloud.Provider. The instance is gone when it returns nil.
func (p *Provider) Delete(ctx context.Context, id cloud.InstanceID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.delete(ctx, id); err != nil {
		return fmt.Errorf("delete instance %q: %w", id, err)
	}
	return nil
}

func (p *Provider) delete(ctx context.Context, id cloud.InstanceID) error {
	unlock, err := p.lockInstance(ctx, id)
	if errdefs.IsNotFound(err) {
		return errors.Join(err, p.tidyUp(ctx, id))
	}
	if err != nil {
		return err
	}
	defer unlock()
	r, err := p.load(id)
	if errdefs.IsNotFound(err) {
		return errors.Join(err, p.tidyUp(ctx, id))
	}
	if err != nil { // damaged: its directory still tells which QEMU is its own
		return p.remove(ctx, &record{ID: id, Bridge: p.cfg.Bridge})
	}
	if !r.Deleting {
		r.Deleting = true
		if err := p.store(r); err != nil {
			return err
		}
	}
	return p.remove(ctx, r)
}

// remove undoes make and reserve. The record goes last, so that a remove that was
// interrupted can be repeated. The instance's lock is held.
func (p *Provider) remove(ctx context.Context, r *record) error {
	if err := p.stop(ctx, r); err != nil {
		return err
	}
	if err := p.saveLog(r); err != nil {
		return fmt.Errorf("keep the serial log: %w", err)
	}
	unlock, err := p.lockState(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := removeNeighbor(r); err != nil {
		return err
	}
	for _, name := range []string{seedName, qmpName, serialName, stderrName} {
		if err := os.Remove(filepath.Join(p.dir(r.ID), name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	others, err := filepath.Glob(filepath.Join(p.instancesDir(), "*", recordName))
	if err != nil {
		return err
	}
	if len(others) == 0 || len(others) == 1 && others[0] == filepath.Join(p.dir(r.ID), recordName) {
		if err := p.removeBridge(); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(p.dir(r.ID), recordName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(p.dir(r.ID))
}

// tidyUp is tidy for an instance that has no record, if it has a directory: a
// Create was killed before it wrote the one, or a Delete before it removed the other.
func (p *Provider) tidyUp(ctx context.Context, id cloud.InstanceID) error {
	if _, err := os.Lstat(p.dir(id)); !idRule.MatchString(string(id)) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := p.lockState(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return p.tidy()
}

// tidy removes directories without a record: what is left when a reserve or a
// remove is killed next to its record. The state lock is held.
func (p *Provider) tidy() error {
	entries, err := os.ReadDir(p.instancesDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(p.instancesDir(), e.Name())
		if _, err := os.Stat(filepath.Join(dir, recordName)); errors.Is(err, fs.ErrNotExist) {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}
