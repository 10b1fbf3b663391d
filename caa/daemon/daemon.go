// SPDX-License-Identifier: Apache-2.0

// Package daemon puts the adaptor together: it opens the state file, takes over what
// it names, and then answers on the socket until it is told to stop. Stopping stops
// no pod.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/vmnote"
	"github.com/kata-remote/kata-remote/caa/agentproxy"
	"github.com/kata-remote/kata-remote/caa/api"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/caa/sandbox"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/caa/sweep"
	"github.com/kata-remote/kata-remote/cloud"
)

// checkTimeout bounds what Check asks of the provider. The local provider may try
// out virtualisation with a boot, which takes seconds.
const checkTimeout = 2 * time.Minute

// Daemon is an adaptor about to run.
type Daemon struct {
	cfg      *config.Config
	log      *slog.Logger
	provider cloud.Provider
	network  network

	// ready, for tests, is called when the socket answers.
	ready func(*sandbox.Manager)
}

// network is what package sandbox needs of the node's network.
type network interface {
	Inspect(context.Context, string) (sandbox.PodNetworks, error)
	Ensure(context.Context, sandbox.NodeTunnels) error
	Remove(context.Context, sandbox.NodeTunnels) error
}

// announcer is implemented by providers that have something to find out, and to say,
// before they are used.
type announcer interface {
	Announce(context.Context, *slog.Logger)
}

// settler is implemented by providers that know how far behind their List can be.
type settler interface {
	ListSettle() time.Duration
}

// New makes an adaptor of a configuration. Nothing is opened or changed yet.
// InvalidArgument: the provider cannot be made of the configuration.
func New(cfg *config.Config, log *slog.Logger) (*Daemon, error) {
	provider, err := NewProvider(cfg)
	if err != nil {
		return nil, err
	}
	return NewWith(cfg, provider, log), nil
}

// NewWith is New for a provider that no configuration names: tests bring simulated
// clouds.
func NewWith(cfg *config.Config, provider cloud.Provider, log *slog.Logger) *Daemon {
	return &Daemon{cfg: cfg, log: log, provider: provider, network: nodeNetwork{}}
}

// Provider is the one that the configuration names, for whoever needs the provider and
// no adaptor: benchmarks.
func (d *Daemon) Provider() cloud.Provider { return d.provider }

// Check tells whether the adaptor could work on this node: what the provider needs
// is there and its credentials are accepted, and so are the files for pulls by the
// guest. It changes nothing.
func (d *Daemon) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if err := d.provider.Check(ctx); err != nil {
		return fmt.Errorf("provider %s: %w", d.cfg.Provider, err)
	}
	return pull(d.cfg).Check()
}

// Run is the adaptor. It returns nil after ctx has ended; pods run on and the next
// Run finds them. FailedPrecondition, AlreadyExists: another adaptor has the state
// or the socket. DataLoss: the state file is damaged.
func (d *Daemon) Run(ctx context.Context) (err error) {
	for _, w := range d.cfg.Warnings {
		d.log.Warn(w)
	}
	// Each pod reads the files anew; those that run need them no more.
	if err := pull(d.cfg).Check(); err != nil {
		d.log.Error("no pod can be started", logkey.Error, err)
	}
	st, err := store.Open(ctx, d.cfg.StateDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	if c, ok := d.provider.(io.Closer); ok {
		defer func() { err = errors.Join(err, c.Close()) }()
	}

	// Not the ConfigMap's: where several clusters share an account, instances
	// must not look alike because nobody named the clusters.
	cluster := d.cfg.Cluster
	if cluster == "" {
		cluster = st.Installation()
	}
	owner := cloud.Owner{Cluster: cluster, Node: d.cfg.Node}
	var settle time.Duration // 0: what suits a cloud
	if p, ok := d.provider.(settler); ok {
		settle = p.ListSettle()
	}
	m := sandbox.New(sandbox.Config{
		Records: st, Provider: d.provider, ProviderName: d.cfg.Provider, Owner: owner,
		Network: d.network, Underlay: d.underlay,
		PodsDir: d.cfg.PodsDir, ForwarderPort: d.cfg.ForwarderPort,
		VXLANPort: d.cfg.VXLANPort, VNIBase: d.cfg.VXLANMinID, ProxyTimeout: d.cfg.ProxyTimeout,
		Limit: d.cfg.Limit, Tags: d.cfg.Tags, Pull: pull(d.cfg), ListSettle: settle, Log: d.log,
	})
	defer m.Close()

	if p, ok := d.provider.(announcer); ok {
		p.Announce(ctx, d.log)
	}
	begin := time.Now()
	if err := m.Recover(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("take over the sandboxes in %s: %w", st.Path(), err)
	}
	// What shims could not say while nobody was here.
	d.takeNotes(ctx, m)
	l, err := agentproxy.ListenUnix(ctx, d.cfg.Socket)
	if err != nil {
		return err
	}
	// While the state file is ours, so is the socket: no successor has it yet.
	defer os.Remove(d.cfg.Socket)
	d.log.Info("ready", "socket", d.cfg.Socket, logkey.Provider, d.cfg.Provider, "node", owner.Node, "cluster", owner.Cluster,
		"sandboxes", len(m.Infos()), logkey.Duration, float64(time.Since(begin).Microseconds())/1000)
	if d.ready != nil {
		d.ready(m)
	}

	background, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() { m.Expire(background) })
	wg.Go(func() { d.watchNotes(background, m) })
	wg.Go(func() {
		s := &sweep.Sweeper{Provider: d.provider, Owner: owner, Known: m.Knows, Log: d.log}
		s.Run(background)
	})
	// Starts under way end first, so that their callers are told why.
	wg.Go(func() { <-background.Done(); m.Close() })
	err = api.Serve(ctx, l, m, d.log)
	if ctx.Err() != nil {
		d.log.Info("stopping; pods run on")
	}
	return err
}

// notesEvery is how long a note may lie that a shim left after the first look: its
// call broke with the adaptor before, and it wrote the note when this one was up.
// Looking costs one read of a directory that is mostly not there.
const notesEvery = 5 * time.Second

func (d *Daemon) watchNotes(ctx context.Context, m *sandbox.Manager) {
	tick := time.NewTicker(notesEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.takeNotes(ctx, m)
		case <-ctx.Done():
			return
		}
	}
}

func (d *Daemon) takeNotes(ctx context.Context, m *sandbox.Manager) {
	if err := vmnote.Deliver(ctx, d.cfg.Socket, m.Stop); err != nil && ctx.Err() == nil {
		d.log.Error("notes left for the adaptor", logkey.Error, err)
	}
}

func pull(cfg *config.Config) sandbox.Pull {
	return sandbox.Pull{AuthFile: cfg.Pull.AuthFile, CAFile: cfg.Pull.CAFile, Insecure: cfg.Pull.Insecure}
}

// underlay is the network between this node and its pod VMs: the provider's own
// where it makes one, else that of the node's default route.
func (d *Daemon) underlay(ctx context.Context) (cloud.Underlay, error) {
	if r, ok := d.provider.(cloud.UnderlayReporter); ok {
		return r.Underlay(ctx)
	}
	return defaultUnderlay(ctx)
}

// providers are the clouds this build knows, by the name in CLOUD_PROVIDER.
var providers = map[string]func(*config.Config) (cloud.Provider, error){
	config.ProviderLocal: newLocal,
	config.ProviderAWS:   newAWS,
	config.ProviderAzure: newAzure,
}

// NewProvider makes the provider of a configuration. InvalidArgument: the configuration
// is wrong, or this build has no such provider.
func NewProvider(cfg *config.Config) (cloud.Provider, error) {
	newOne := providers[cfg.Provider]
	if newOne == nil {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("CLOUD_PROVIDER is %q and this build has no such provider", cfg.Provider))
	}
	return newOne(cfg)
}
