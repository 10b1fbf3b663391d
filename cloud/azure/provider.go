// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// ListSettle is how far a list may be behind what was done before.
const ListSettle = 10 * time.Second

// Provider is the Azure of one configuration. It starts no goroutine that outlives a
// call.
type Provider struct {
	cfg   Config
	place place
	arm   *client
	key   *sshKey
	none  *scarce
	work  *keyed // by token: creates; by VM name: deletions; "sizes"

	mu    sync.Mutex
	sizes *catalog               // nil: not asked for yet; guarded by mu
	known map[string]*remembered // by VM name; guarded by mu
}

var (
	_ cloud.Provider  = (*Provider)(nil)
	_ cloud.Explainer = (*Provider)(nil)
)

// remembered is what a provider has seen of an instance. All of it can be found out
// again; it saves requests, and names what is not named as expected.
type remembered struct {
	addrs []netip.Addr
	// more are paths of things that belong to the instance under other names than
	// things.rest gives.
	more []string
	// Of the deletion, if this process has asked for one: when last, and when to look
	// again.
	asked, next time.Time
	pace        time.Duration
	vmGone      bool
}

// New makes a provider; nothing is asked of Azure. InvalidArgument: the configuration
// is wrong; all problems are joined, each names its key.
func New(c Config) (*Provider, error) {
	c, err := c.complete()
	if err != nil {
		return nil, fmt.Errorf("azure provider: %w", err)
	}
	arm, err := newClient(c)
	if err != nil {
		return nil, fmt.Errorf("azure provider: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &Provider{
		cfg: c, arm: arm, key: newSSHKey(c.SSHPublicKeyFile),
		// In lower case, because an id must not change when somebody writes the
		// group's name otherwise, and Azure does not mind.
		place: place{c.SubscriptionID, strings.ToLower(c.ResourceGroup)},
		none:  &scarce{until: map[candidate]shortage{}},
		work:  &keyed{held: map[string]chan struct{}{}},
		known: map[string]*remembered{},
	}, nil
}

// Close lets go of idle connections; the provider can still be used. A transport that
// came with the configuration is its owner's.
func (p *Provider) Close() { p.arm.idle() }

// remember calls f on what is known of an instance.
func (p *Provider) remember(t things, f func(*remembered)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.known[t.name]
	if r == nil {
		r = &remembered{}
		p.known[t.name] = r
	}
	f(r)
}

func (p *Provider) forget(t things) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.known, t.name)
}

// recall returns a copy.
func (p *Provider) recall(t things) remembered {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.known[t.name]; r != nil {
		return *r
	}
	return remembered{}
}

// errGone is what follow returns when the VM is not there any more.
var errGone = errors.New("the VM has gone while it was made")
