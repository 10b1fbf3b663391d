// SPDX-License-Identifier: Apache-2.0

// Package sweep deletes instances that carry this adaptor's tags and that no record
// knows: what was left by a state file that was lost, or by a provider that made
// more than it said. It is slow on purpose. An instance has to be unknown in two
// looks, and for the grace time in between, before it is touched.
package sweep

import (
	"context"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/cloud"
)

const (
	// DefaultInterval is between two looks. It bounds what a leaked instance
	// costs and, at one List call, costs nothing itself.
	DefaultInterval = 5 * time.Minute
	// DefaultGrace is how long an instance must have been unknown: above any lag
	// between what providers have and what they list.
	DefaultGrace = 10 * time.Minute
	// callTimeout bounds each call to the provider.
	callTimeout = 2 * time.Minute
)

// provider is the part of cloud.Provider that a sweep uses.
type provider interface {
	List(context.Context, cloud.Owner) ([]cloud.Instance, error)
	Delete(context.Context, cloud.InstanceID) error
}

// Sweeper looks for orphans. Use it from one goroutine.
type Sweeper struct {
	Provider provider
	Owner    cloud.Owner
	// Known tells whether a record accounts for an instance.
	Known    func(cloud.Instance) bool
	Interval time.Duration // 0: DefaultInterval
	Grace    time.Duration // 0: DefaultGrace
	Log      *slog.Logger

	unknown map[cloud.InstanceID]time.Time // since when
}

// Run sweeps now and at every interval until ctx ends.
func (s *Sweeper) Run(ctx context.Context) {
	if s.Interval == 0 {
		s.Interval = DefaultInterval
	}
	if s.Grace == 0 {
		s.Grace = DefaultGrace
	}
	t := time.NewTicker(s.Interval)
	defer t.Stop()
	for {
		s.Sweep(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Sweep looks once, at the given time, and deletes what has been unknown for long
// enough. What it deletes stays unknown and is asked for again until it is gone.
func (s *Sweeper) Sweep(ctx context.Context, now time.Time) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	list, err := s.Provider.List(ctx, s.Owner)
	if err != nil {
		if ctx.Err() == nil || ctx.Err() == context.DeadlineExceeded {
			s.Log.Warn("looking for orphaned instances failed; trying again later", logkey.Error, err)
		}
		return
	}
	before := s.unknown
	s.unknown = map[cloud.InstanceID]time.Time{}
	for _, inst := range list {
		if inst.Owner != s.Owner || s.Known(inst) {
			continue
		}
		since, seen := before[inst.ID]
		if !seen {
			s.unknown[inst.ID] = now
			s.Log.Warn("an instance of ours has no record; it is deleted if it stays so", attrs(inst)...)
			continue
		}
		s.unknown[inst.ID] = since
		if now.Sub(since) < s.Grace {
			continue
		}
		switch err := s.Provider.Delete(ctx, inst.ID); {
		case errdefs.IsNotFound(err):
			delete(s.unknown, inst.ID)
		case err != nil:
			s.Log.Error("an orphaned instance cannot be deleted", append(attrs(inst), logkey.Error, err)...)
		default:
			s.Log.Info("an orphaned instance is being deleted", attrs(inst)...)
		}
	}
}

func attrs(inst cloud.Instance) []any {
	return []any{logkey.Instance, inst.ID, logkey.Sandbox, inst.SandboxID, "name", inst.Name}
}
