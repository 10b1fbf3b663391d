// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Provider is the region of one configuration. It is safe for concurrent use.
type Provider struct {
	cfg    Config
	http   awssdk.HTTPClient
	limits limits

	conn    lazy[*session]
	types   lazy[typeList]
	subnets lazy[[]subnet]

	ids        batcher[cloud.InstanceID, *machine]
	tokens     batcher[string, []machine]
	leftovers  batcher[string, []leftover]
	terminates batcher[cloud.InstanceID, error]
	run        context.Context // of the batches; ends with Close
	stop       context.CancelFunc
	background sync.WaitGroup // batches under way

	creating keylock // by token; held while a Create is at work

	mu       sync.Mutex
	images   map[string]*lazy[imageInfo]     // guarded by mu
	recent   map[cloud.InstanceID]remembered // guarded by mu
	deleted  map[cloud.InstanceID]time.Time  // those of which nothing is left; guarded by mu
	made     map[string]made                 // by request token; guarded by mu
	droughts map[pool]drought                // guarded by mu
}

var (
	_ cloud.Provider  = (*Provider)(nil)
	_ cloud.Explainer = (*Provider)(nil)
)

// New makes a provider. It asks nobody anything. InvalidArgument: all that is wrong
// with the configuration, each with its key.
func New(cfg Config) (*Provider, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	p := &Provider{
		cfg: cfg, limits: newLimits(),
		images: map[string]*lazy[imageInfo]{}, recent: map[cloud.InstanceID]remembered{}, deleted: map[cloud.InstanceID]time.Time{},
		made: map[string]made{}, droughts: map[pool]drought{},
	}
	if cfg.HTTPClient != nil {
		p.http = cfg.HTTPClient
	} else if p.http, err = newHTTPClient(); err != nil {
		return nil, fmt.Errorf("aws provider: %w", err)
	}
	p.run, p.stop = context.WithCancel(context.Background())
	p.ids.do, p.ids.run, p.ids.wg = p.describeIDs, p.run, &p.background
	p.tokens.do, p.tokens.run, p.tokens.wg = p.describeTokens, p.run, &p.background
	p.leftovers.do, p.leftovers.run, p.leftovers.wg = p.describeLeftovers, p.run, &p.background
	p.terminates.do, p.terminates.run, p.terminates.wg = p.terminate, p.run, &p.background
	return p, nil
}

// Close ends calls whose callers have left. The provider must not be used again.
func (p *Provider) Close() error {
	p.stop()
	p.background.Wait()
	if c, ok := p.http.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
	return nil
}

// Plan implements cloud.Provider.
func (p *Provider) Plan(ctx context.Context, size cloud.Size) (cloud.Plan, error) {
	c, err := p.Explain(ctx, size)
	if err != nil {
		return cloud.Plan{}, err
	}
	if size.Image != "" {
		if _, err := p.image(ctx, size.Image); err != nil {
			return cloud.Plan{}, err
		}
	}
	return c.Plan(cmp.Or(size.Image, p.cfg.ImageID)), nil
}

// Explain implements cloud.Explainer.
func (p *Provider) Explain(ctx context.Context, size cloud.Size) (cloud.Choice, error) {
	cat, err := p.catalog(ctx)
	if err != nil {
		return cloud.Choice{Size: size}, fmt.Errorf("instance types: %w", err)
	}
	if size.Image != "" {
		image, err := p.image(ctx, size.Image)
		if err != nil {
			return cloud.Choice{Size: size}, err
		}
		cat.Arch = image.arch
	}
	return cat.Choose(size)
}

// Get implements cloud.Provider. Many Gets at once are one call. An instance that was
// terminated on request is gone, though EC2 lists it for an hour; one that ended by
// itself is StateFailed until Delete was called for it.
func (p *Provider) Get(ctx context.Context, id cloud.InstanceID) (cloud.Instance, error) {
	m, err := p.get(ctx, id)
	if err != nil {
		return cloud.Instance{}, fmt.Errorf("get instance %q: %w", id, err)
	}
	return m.Instance, nil
}

func (p *Provider) get(ctx context.Context, id cloud.InstanceID) (machine, error) {
	if !instanceRule.MatchString(string(id)) || p.isDeleted(id) {
		return machine{}, errdefs.ErrNotFound
	}
	m, err := p.ids.ask(ctx, id)
	switch {
	case err != nil:
		return machine{}, err
	case m == nil:
		if r, ok := p.recall(id); ok {
			return r, nil
		}
		return machine{}, errdefs.ErrNotFound
	case m.ended && m.byUser:
		return machine{}, errdefs.ErrNotFound
	case m.ended:
		p.noteEnd(*m)
	}
	return *m, nil
}

// List implements cloud.Provider. Behind the instances come volumes and network
// interfaces that carry the owner's tags and that no instance has: an instance lost
// them, or never got them. Their ids do for Delete as instances' do. Without the
// right to list those (see docs) there are none.
func (p *Provider) List(ctx context.Context, owner cloud.Owner) ([]cloud.Instance, error) {
	if owner.Cluster == "" {
		return nil, fmt.Errorf("list instances: the owner's cluster is empty: %w", errdefs.ErrInvalidArgument)
	}
	list, err := p.list(ctx, owner)
	if err != nil {
		return nil, fmt.Errorf("list instances of cluster %s: %w", owner.Cluster, err)
	}
	return list, nil
}

func (p *Provider) list(ctx context.Context, owner cloud.Owner) ([]cloud.Instance, error) {
	list, err := p.describe(ctx, false, append(ownerFilters(owner),
		filter("instance-state-name", "pending", "running", "shutting-down", "stopping", "stopped"))...)
	if err != nil {
		return nil, err
	}
	var out []cloud.Instance
	tokens := map[string]bool{}
	for _, m := range list {
		if owns(owner, m.Owner) && !p.isDeleted(m.ID) {
			out = append(out, m.Instance)
		}
		tokens[m.Token] = true
	}
	slices.SortFunc(out, func(a, b cloud.Instance) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	left, err := p.leftBehind(ctx, false, ownerFilters(owner)...)
	if err != nil {
		return nil, err
	}
	for _, l := range left {
		if l.free && owns(owner, l.Owner) && !tokens[l.Token] && !p.isMaking(l.Token) {
			out = append(out, l.Instance)
		}
	}
	return out, nil
}

// isMaking tells whether the token's instance is being made, or was so lately that it
// may not be listed yet.
func (p *Provider) isMaking(token string) bool {
	if p.creating.held(token) {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	m, ok := p.made[token]
	return ok && time.Since(m.at) < settle
}

// deletedFor is how long EC2 shows an instance after its end, and some.
const deletedFor = 2 * time.Hour

// setDeleted remembers that nothing is left of an instance, which EC2 shows on.
func (p *Provider) setDeleted(id cloud.InstanceID, token string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for o, at := range p.deleted {
		if now.Sub(at) > deletedFor {
			delete(p.deleted, o)
		}
	}
	p.deleted[id] = now
	delete(p.recent, id)
	if m, ok := p.made[token]; ok && m.id == id {
		delete(p.made, token)
	}
}

func (p *Provider) isDeleted(id cloud.InstanceID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.deleted[id]
	return ok
}
