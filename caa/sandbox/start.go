// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/caa/agentproxy"
	"github.com/kata-remote/kata-remote/caa/store"
)

// startOp is the work of one StartVM and those who wait for it.
type startOp struct {
	cancel  context.CancelCauseFunc
	done    chan struct{} // closed when err is set
	err     error         // read after done
	waiters int           // guarded by Sandbox.mu
}

// Start is StartVM: it makes the instance and the tunnel, waits for the forwarder
// and serves the agent socket. It returns when all of that is done or has failed;
// what was made is then being undone. When ctx ends first, the work goes on and a
// later Start finds it (see Config.Lease).
//
// A sandbox that runs already is a success. NotFound: no CreateVM came before.
// FailedPrecondition: it is being deleted. Aborted: a Stop came in between.
func (m *Manager) Start(ctx context.Context, id string) error {
	sb, err := m.find(id)
	if err != nil {
		return err
	}
	op, err := sb.begin()
	if op == nil || err != nil {
		return err
	}
	select {
	case <-op.done:
		return op.err
	case <-ctx.Done():
		err := fmt.Errorf("wait for sandbox %s to start (its start goes on): %w", id, ctx.Err())
		return errors.Join(err, sb.leave(op))
	}
}

// leave takes a caller off the start that was not told how it ended. Where the start
// has just ended well and nobody else was told, a lease begins after all.
func (sb *Sandbox) leave(op *startOp) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	op.waiters--
	if op.waiters > 0 || sb.rec.State != StateRunning || !sb.rec.Lease.IsZero() {
		return nil
	}
	return sb.updateLocked(func(r *store.Record) { r.Lease = time.Now().Add(sb.m.cfg.Lease) })
}

// begin starts the sandbox, or joins the start under way. Nil: it runs.
func (sb *Sandbox) begin() (*startOp, error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	switch {
	case sb.rec.State == StateRunning:
		return nil, sb.claimLocked()
	case sb.rec.State == StateStarting && sb.starting != nil:
		sb.starting.waiters++
		return sb.starting, nil
	}
	if err := sb.moveLocked(eventStart, nil); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(sb.m.run)
	op := &startOp{cancel: cancel, done: make(chan struct{}), waiters: 1}
	if !sb.m.goRun(func() { sb.runStart(ctx, op) }) {
		cancel(ErrClosed)
		return nil, ErrClosed
	}
	sb.starting = op
	return op, nil
}

// claimLocked ends the lease: somebody has asked for the sandbox.
func (sb *Sandbox) claimLocked() error {
	if sb.rec.Lease.IsZero() {
		return nil
	}
	return sb.updateLocked(func(r *store.Record) { r.Lease = time.Time{} })
}

// runStart is the work of a start. It is the Manager's.
func (sb *Sandbox) runStart(ctx context.Context, op *startOp) {
	defer op.cancel(nil)
	begin := time.Now()
	err := sb.startSteps(ctx)
	if err == nil {
		err = sb.ready(op)
	}
	if err != nil && context.Cause(ctx) == errStopped {
		err = fmt.Errorf("start sandbox %s: %w", sb.id, errStopped)
	}
	if err == nil {
		sb.log.Info("sandbox started", logkey.Duration, float64(time.Since(begin).Microseconds())/1000)
	} else if sb.m.run.Err() != nil {
		err = ErrClosed // not undone: the record tells the next start what to undo
	} else if uerr := sb.undo(err.Error()); uerr != nil {
		sb.log.Error("a failed start cannot be undone", logkey.Error, uerr)
	}
	sb.mu.Lock()
	sb.starting = nil
	sb.mu.Unlock()
	op.err = err
	close(op.done)
}

func (sb *Sandbox) startSteps(ctx context.Context) error {
	unlock, err := sb.m.locks.lock(ctx, sb.id)
	if err != nil {
		return err
	}
	defer unlock()
	for _, s := range sb.m.steps[1:] {
		if err := sb.m.perform(ctx, sb, s); err != nil {
			return err
		}
	}
	return nil
}

// ready marks the sandbox as running. Where nobody waits any more, a lease begins.
func (sb *Sandbox) ready(op *startOp) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	err := sb.moveLocked(eventReady, func(r *store.Record) {
		r.Lease = time.Time{}
		if op.waiters == 0 {
			r.Lease = time.Now().Add(sb.m.cfg.Lease)
		}
	})
	if err == nil && op.waiters == 0 {
		sb.log.Warn("the sandbox runs and its caller has left: it is deleted unless somebody comes back for it", "lease", sb.rec.Lease)
	}
	return err
}

// serve makes the agent socket and serves it.
func (m *Manager) serve(sb *Sandbox, target agentproxy.Target, rec store.Record, first *relay.TLSConn) error {
	p, err := agentproxy.Listen(m.run, agentproxy.Config{
		Path: rec.AgentSocket, Target: target, First: first, Log: sb.log,
		Silent: func(ctx context.Context) { m.examine(ctx, sb) },
	})
	if err != nil {
		return fmt.Errorf("agent socket of pod %s: %w", rec.Pod, err)
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.proxy = p
	return nil
}

// examine asks the provider after the instance of a running sandbox that does not
// answer. One that has failed or is gone will not answer again: its sandbox goes, and
// with it the agent socket, by which the shim learns of it.
func (m *Manager) examine(ctx context.Context, sb *Sandbox) {
	rec := sb.record()
	if rec.State != StateRunning {
		return
	}
	if err := m.lost(ctx, rec.Instance.ID); err != nil {
		sb.log.Error("the pod VM is lost", logkey.Instance, string(rec.Instance.ID), logkey.Error, err)
		if err := sb.undo("the pod VM is lost: " + err.Error()); err != nil {
			sb.log.Error("delete a sandbox whose pod VM is lost", logkey.Error, err)
		}
	}
}

// Expire deletes sandboxes whose lease is over, until ctx ends.
func (m *Manager) Expire(ctx context.Context) {
	for sleep(ctx, min(m.cfg.Lease/4, 30*time.Second)) == nil {
		for _, sb := range m.all() {
			if err := sb.expire(); err != nil {
				sb.log.Error("a sandbox nobody claims cannot be deleted", logkey.Error, err)
			}
		}
	}
}

func (sb *Sandbox) expire() error {
	sb.mu.Lock()
	over := !sb.rec.Lease.IsZero() && time.Now().After(sb.rec.Lease)
	state := sb.rec.State
	if over && state == StateRunning && sb.proxy != nil && sb.proxy.Served() {
		defer sb.mu.Unlock()
		return sb.claimLocked() // somebody uses it who was told of the socket by CreateVM
	}
	sb.mu.Unlock()
	if !over || state != StateReserved && state != StateRunning {
		return nil
	}
	return sb.undo(fmt.Sprintf("nobody has asked for it within %s", sb.m.cfg.Lease))
}

// errStopped is why a start ends when StopVM comes in between. Aborted.
var errStopped = errdefs.ErrAborted.WithMessage("StopVM was called")
