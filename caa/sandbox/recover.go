// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/caa/store"
)

const (
	// adoptParallel bounds the calls to provider and kernel at a restart.
	adoptParallel = 8
	// repairFirst and repairLongest pace the repair of a tunnel that could not be
	// made at a restart.
	repairFirst   = time.Second
	repairLongest = time.Minute
)

// Recover takes over what an earlier Manager has left, and returns when every record
// is in hand: pods that run are served again, half-made ones and those being deleted
// are on their way out, reserved ones wait for their start or the end of their
// lease. Records that cannot be read stay as they are and are logged.
// FailedPrecondition: records of another provider; nothing was touched.
func (m *Manager) Recover(ctx context.Context) error {
	records, broken, err := m.cfg.Records.All()
	if err != nil {
		return err
	}
	for _, rec := range records {
		if p := rec.Instance.Provider; p != m.cfg.ProviderName {
			return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
				"sandbox %s (pod %s) was made by provider %q and CLOUD_PROVIDER is %q: set it back until the pods of the old provider are removed",
				rec.ID, rec.Pod, p, m.cfg.ProviderName))
		}
	}
	all := make([]*Sandbox, 0, len(records))
	m.mu.Lock()
	for id, err := range broken {
		m.broken[id] = err
		m.cfg.Log.Error("a record cannot be read and is left alone; remove its pod", logkey.Sandbox, id, logkey.Error, err)
	}
	for _, rec := range records {
		sb := m.newSandbox(rec)
		m.sandboxes[rec.ID] = sb
		for _, t := range rec.Tunnels {
			m.vnis[t.VNI] = rec.ID
			m.lastVNI = max(m.lastVNI, t.VNI)
		}
		all = append(all, sb)
	}
	m.mu.Unlock()

	var wg sync.WaitGroup
	slots := make(chan struct{}, adoptParallel)
	for _, sb := range all {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if err := m.takeOver(ctx, sb); err != nil {
				sb.log.Error("a sandbox cannot be taken over", logkey.Error, err)
			}
		})
	}
	wg.Wait()
	return ctx.Err()
}

// takeOver decides on one record.
func (m *Manager) takeOver(ctx context.Context, sb *Sandbox) error {
	switch rec := sb.record(); rec.State {
	case StateReserved:
		return nil
	case StateRunning:
		return m.adopt(ctx, sb)
	case StateStarting:
		// Its caller was told that the start has failed when the adaptor went;
		// the forwarder's key went with it.
		return sb.undo("the adaptor was restarted while the sandbox was starting")
	case StateDeleting:
		return sb.undo(rec.Reason)
	default:
		return fmt.Errorf("its state %q is not known to this version", rec.State)
	}
}

// adopt serves a running pod again. A loss that cannot be mended ends the pod; a
// provider that does not answer does not.
func (m *Manager) adopt(ctx context.Context, sb *Sandbox) error {
	rec := sb.record()
	target, err := m.target(rec)
	if err != nil {
		return sb.undo(fmt.Sprintf("its record holds no usable keys: %v", err))
	}
	if err := m.serve(sb, target, rec, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	inst, err := m.cfg.Provider.Get(ctx, rec.Instance.ID)
	if err == nil {
		sb.meet()
		err = failed(inst)
		if err != nil {
			return sb.undo(fmt.Sprintf("instance %s: %v", rec.Instance.ID, err))
		}
	} else if errdefs.IsNotFound(err) {
		return sb.undo(fmt.Sprintf("instance %s is gone", rec.Instance.ID))
	} else {
		sb.log.Warn("the provider cannot tell how the instance is; the pod is kept", logkey.Instance, rec.Instance.ID, logkey.Error, err)
	}
	err = m.cfg.Network.Ensure(ctx, tunnelsOf(rec))
	switch {
	case errdefs.IsNotFound(err):
		return sb.undo("its network namespace " + rec.NetNS + " is gone")
	case err != nil:
		sb.log.Error("the tunnel of a running pod cannot be checked; trying on", logkey.Error, err)
		m.goRun(func() { m.repair(sb) })
	}
	sb.log.Info("sandbox is taken over", "state", rec.State, logkey.Instance, rec.Instance.ID)
	return nil
}

// repair makes the tunnel of a running sandbox until it succeeds.
func (m *Manager) repair(sb *Sandbox) {
	for wait := repairFirst; sleep(m.run, wait) == nil; wait = min(2*wait, repairLongest) {
		done, err := m.repairOnce(sb)
		if done {
			return
		}
		sb.log.Warn("the tunnel of a running pod cannot be repaired; trying again", logkey.Error, err)
	}
}

func (m *Manager) repairOnce(sb *Sandbox) (done bool, err error) {
	unlock, err := m.locks.lock(m.run, sb.id)
	if err != nil {
		return true, nil
	}
	defer unlock()
	rec := sb.record()
	if rec.State != StateRunning {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(m.run, checkTimeout)
	defer cancel()
	if err := m.cfg.Network.Ensure(ctx, tunnelsOf(rec)); err != nil {
		return false, err
	}
	sb.log.Info("the tunnel is repaired")
	return true, nil
}

// adoptBroken makes a sandbox of a record that cannot be read, to be deleted: its
// instance is found by its tags. The record stays as it is until something is found.
func (m *Manager) adoptBroken(id string) *Sandbox {
	socket, err := m.agentSocket(id)
	if err != nil {
		m.cfg.Log.Error("the agent socket of a sandbox without record stays", logkey.Sandbox, id, logkey.Error, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if sb := m.sandboxes[id]; sb != nil {
		return sb
	}
	sb := m.newSandbox(store.Record{
		ID: id, State: StateDeleting, Reason: "StopVM", AgentSocket: socket,
		Created: time.Now(), Changed: time.Now(), Pod: store.Pod{Name: id},
		Instance: store.Instance{Provider: m.cfg.ProviderName, Owner: m.cfg.Owner, Asked: true},
	})
	m.sandboxes[id] = sb
	return sb
}
