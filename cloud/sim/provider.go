// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Provider is one client of a World. It keeps nothing itself: any number of
// providers, one after the other or at once, see the same instances.
type Provider struct {
	w *World
}

var (
	_ cloud.Provider  = (*Provider)(nil)
	_ cloud.Explainer = (*Provider)(nil)
)

// NewProvider returns a client of the cloud.
func (w *World) NewProvider() *Provider { return &Provider{w: w} }

// Plan implements cloud.Provider. It does not reach the cloud.
func (p *Provider) Plan(ctx context.Context, size cloud.Size) (cloud.Plan, error) {
	if err := ctx.Err(); err != nil {
		return cloud.Plan{}, err
	}
	choice, err := p.w.cfg.Catalog.Choose(size)
	if err != nil {
		return cloud.Plan{}, err
	}
	image := size.Image
	if image == "" {
		image = "sim-image"
	}
	return choice.Plan(image), nil
}

// Explain implements cloud.Explainer. It does not reach the cloud.
func (p *Provider) Explain(ctx context.Context, size cloud.Size) (cloud.Choice, error) {
	if err := ctx.Err(); err != nil {
		return cloud.Choice{}, err
	}
	return p.w.cfg.Catalog.Choose(size)
}

// call brackets the effect of an API call with latency, limits and faults.
func (p *Provider) call(ctx context.Context, op Op, effect func() error) error {
	if err := cloud.Pause(ctx, p.w.cfg.Latency/2); err != nil {
		return err
	}
	p.w.mu.Lock()
	before, after := p.w.admit(op)
	err := before
	if err == nil {
		err = effect()
	}
	p.w.mu.Unlock()
	if err != nil {
		return err
	}
	if err := cloud.Pause(ctx, p.w.cfg.Latency/2); err != nil {
		return err // the cloud has done it; the caller does not know
	}
	return after
}

// Create implements cloud.Provider.
func (p *Provider) Create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	if err := req.Validate(); err != nil {
		return cloud.Instance{}, err
	}
	req.UserData = bytes.Clone(req.UserData)
	req.Tags = maps.Clone(req.Tags)
	var out cloud.Instance
	err := p.call(ctx, OpCreate, func() error {
		w := p.w
		now := time.Now()
		if i, ok := w.byToken[req.Token]; ok && !i.at(now).gone {
			v := i.at(now)
			if i.fingerprint != req.Fingerprint() {
				return fmt.Errorf("token %s made instance %s from a different request: %w", req.Token, v.inst.ID, errdefs.ErrAlreadyExists)
			}
			out = v.inst
			return nil
		}
		if _, err := w.cfg.Catalog.Choose(cloud.Size{Type: req.Plan.Type, VCPUs: req.Plan.VCPUs, MemoryMiB: req.Plan.MemoryMiB, GPUs: req.Plan.GPUs}); err != nil || req.Plan.Type == "" {
			return fmt.Errorf("plan %+v was not made by Plan: %w", req.Plan, errdefs.ErrInvalidArgument)
		}
		if err := w.capacityFor(req.Plan.Type); err != nil {
			return err
		}
		out = w.create(req).at(now).inst
		return nil
	})
	if err != nil {
		return cloud.Instance{}, fmt.Errorf("create instance %s: %w", req.Name, err)
	}
	return out, nil
}

// Get implements cloud.Provider.
func (p *Provider) Get(ctx context.Context, id cloud.InstanceID) (cloud.Instance, error) {
	var out cloud.Instance
	err := p.call(ctx, OpGet, func() error {
		i, err := p.find(id)
		if err != nil {
			return err
		}
		out = i.at(time.Now().Add(-p.w.cfg.Lag)).inst
		return nil
	})
	if err != nil {
		return cloud.Instance{}, fmt.Errorf("get instance %q: %w", id, err)
	}
	return out, nil
}

// List implements cloud.Provider.
func (p *Provider) List(ctx context.Context, owner cloud.Owner) ([]cloud.Instance, error) {
	if owner.Cluster == "" {
		return nil, fmt.Errorf("list instances: the owner's cluster is empty: %w", errdefs.ErrInvalidArgument)
	}
	var out []cloud.Instance
	err := p.call(ctx, OpList, func() error {
		then := time.Now().Add(-p.w.cfg.Lag)
		for _, i := range p.w.instances {
			v := i.at(then)
			if v.gone || i.versions[0].at.After(then) {
				continue
			}
			if o := v.inst.Owner; o.Cluster == owner.Cluster && (owner.Node == "" || o.Node == owner.Node) {
				out = append(out, v.inst)
			}
		}
		sortInstances(out)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list instances of cluster %s: %w", owner.Cluster, err)
	}
	return out, nil
}

// Delete implements cloud.Provider.
func (p *Provider) Delete(ctx context.Context, id cloud.InstanceID) error {
	err := p.call(ctx, OpDelete, func() error {
		i, err := p.find(id)
		if err != nil {
			return err
		}
		now := time.Now()
		v := i.at(now)
		if v.inst.State == cloud.StateDeleting {
			return nil
		}
		v.at, v.inst.State, v.inst.Addrs = now, cloud.StateDeleting, nil
		i.set(v)
		if i.stop != nil && !i.ended {
			i.stop() // run adds the end
			return nil
		}
		p.w.goneAfter(i, v)
		return nil
	})
	if err != nil {
		return fmt.Errorf("delete instance %q: %w", id, err)
	}
	return nil
}

// find needs mu.
func (p *Provider) find(id cloud.InstanceID) (*instance, error) {
	i, ok := p.w.instances[id]
	if !ok || i.at(time.Now()).gone {
		return nil, errdefs.ErrNotFound
	}
	return i, nil
}

// Check implements cloud.Provider.
func (p *Provider) Check(ctx context.Context) error {
	return p.call(ctx, OpCheck, func() error { return nil })
}
