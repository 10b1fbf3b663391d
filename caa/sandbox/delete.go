// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
)

const (
	// undoFirst and undoLongest pace the rounds of a deletion. The first wait is
	// what a local instance needs to go; with the longest one, a day of outage
	// costs 3000 questions.
	undoFirst   = 20 * time.Millisecond
	undoLongest = 30 * time.Second
	// undoTimeout bounds one round, so that a call that hangs is made again.
	undoTimeout = 2 * time.Minute
	// undoComplain is after how long a deletion that makes no progress is worth a
	// person's attention.
	undoComplain = 10 * time.Minute
)

// stillThere is returned by the undo of a step whose thing is going but not gone.
type stillThere struct{ what string }

func (e stillThere) Error() string { return e.what + " is still there" }

// Stop is StopVM: it writes down that the sandbox is to go and returns. A start
// under way ends. The deletion goes on until nothing is left, over restarts if need
// be. An id that is not known is a success: what was asked for is so.
func (m *Manager) Stop(_ context.Context, id string) error {
	m.mu.Lock()
	sb, broken := m.sandboxes[id], m.broken[id]
	m.mu.Unlock()
	if sb == nil && broken != nil {
		sb = m.adoptBroken(id)
	}
	if sb == nil {
		return nil
	}
	return sb.undo("StopVM")
}

// Wait returns when nothing is left of the sandbox, or ctx is done.
func (m *Manager) Wait(ctx context.Context, id string) error {
	m.mu.Lock()
	sb := m.sandboxes[id]
	m.mu.Unlock()
	if sb == nil {
		return nil
	}
	select {
	case <-sb.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// undo starts the deletion of the sandbox, if it has not begun. The intent is on
// disk when it returns nil.
func (sb *Sandbox) undo(reason string) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.rec.State == StateDeleting && sb.undoing {
		return nil
	}
	if sb.rec.State == StateGone {
		return nil
	}
	if sb.rec.State != StateDeleting {
		err := sb.moveLocked(eventUndo, func(r *store.Record) { r.Reason, r.Lease = reason, time.Time{} })
		if err != nil {
			return err
		}
	}
	if sb.starting != nil {
		sb.starting.cancel(errStopped)
	}
	sb.undoing = true
	sb.m.goRun(sb.runUndo)
	return nil
}

// runUndo undoes all steps, last first, until every one of them is undone. What
// holds up one does not hold up another; the record goes last.
func (sb *Sandbox) runUndo() {
	m, begin := sb.m, time.Now()
	unlock, err := m.locks.lock(m.run, sb.id) // until a start under way has ended
	if err != nil {
		return
	}
	defer unlock()
	complained := begin
	undone := map[string]bool{}
	for wait := undoFirst; ; wait = min(wait*3/2, undoLongest) {
		err := sb.undoRound(undone)
		if err == nil {
			break
		}
		if m.run.Err() != nil {
			return
		}
		var there stillThere
		switch {
		case errors.As(err, &there):
			sb.log.Debug("deletion is under way", logkey.Error, err)
		case time.Since(complained) > undoComplain:
			complained = time.Now()
			sb.log.Error("the sandbox cannot be deleted; trying on", "since", begin, logkey.Error, err)
		default:
			sb.log.Warn("deletion failed; trying again", logkey.Error, err, "in", wait.String())
		}
		if sleep(m.run, wait) != nil {
			return
		}
	}
	sb.mu.Lock()
	from := sb.rec.State
	sb.rec.State, _ = next(from, eventGone)
	sb.logState(from, sb.rec.State)
	sb.mu.Unlock()
	close(sb.gone)
}

// undoRound undoes what is not undone yet. The first step, which is the record,
// waits for all others.
func (sb *Sandbox) undoRound(undone map[string]bool) error {
	ctx, cancel := context.WithTimeout(sb.m.run, undoTimeout)
	defer cancel()
	var errs []error
	for i := len(sb.m.steps) - 1; i >= 0; i-- {
		s := sb.m.steps[i]
		if undone[s.name] || i == 0 && len(errs) > 0 {
			continue
		}
		sb.m.cfg.FaultPoint("undo " + s.name + ":before")
		begin := time.Now()
		if err := s.undo(ctx, sb); err != nil {
			errs = append(errs, fmt.Errorf("undo step %s: %w", s.name, err))
			continue
		}
		sb.m.cfg.FaultPoint("undo " + s.name + ":after")
		undone[s.name] = true
		sb.log.Debug("step undone", logkey.Step, s.name, logkey.Duration, float64(time.Since(begin).Microseconds())/1000)
	}
	return errors.Join(errs...)
}

// undoInstance deletes the instance until the provider says that there is none.
func (m *Manager) undoInstance(ctx context.Context, sb *Sandbox) error {
	rec := sb.record()
	inst := rec.Instance
	if inst.ID == "" {
		found, err := m.search(ctx, sb, inst)
		if err != nil || found == "" {
			return err
		}
		if err := sb.update(func(r *store.Record) { r.Instance.ID = found }); err != nil {
			return err
		}
		inst.ID = found
	}
	err := m.cfg.Provider.Delete(ctx, inst.ID)
	switch {
	case errdefs.IsNotFound(err) && m.maybeLate(sb):
		return stillThere{"the possibility of instance " + string(inst.ID)}
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("delete instance %s: %w", inst.ID, err)
	}
	sb.meet()
	return stillThere{"instance " + string(inst.ID)}
}

// maybeLate tells whether a provider's NotFound may only mean that it does not know
// the instance yet. Providers see to that for what they have made themselves; what an
// adaptor before this one has had made just before it ended, they learn of like
// anybody else, within ListSettle.
func (m *Manager) maybeLate(sb *Sandbox) bool {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.met || time.Since(sb.rec.Created) > instanceTimeout+m.cfg.ListSettle {
		return false
	}
	if sb.searched.IsZero() {
		sb.searched = time.Now()
	}
	return time.Since(sb.searched) < m.cfg.ListSettle
}

// meet notes that this process knows the instance to exist.
func (sb *Sandbox) meet() {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.met = true
}

// search looks for an instance that may have been made without our having learnt its
// id. Empty: there is none. A list may lag, so that one look does not prove much: it
// goes on for ListSettle when the provider's answer to Create was lost or unclear,
// and is one look when Create was refused.
func (m *Manager) search(ctx context.Context, sb *Sandbox, want store.Instance) (cloud.InstanceID, error) {
	if !want.Asked && sb.record().TLS.CA == "" {
		return "", nil // the step did not come as far as asking
	}
	list, err := m.cfg.Provider.List(ctx, want.Owner)
	if err != nil {
		return "", fmt.Errorf("look for the instance: %w", err)
	}
	for _, inst := range list {
		if inst.SandboxID == sb.id && (inst.Token == want.Token || want.Token == "") {
			return inst.ID, nil
		}
	}
	if !want.Asked {
		return "", nil
	}
	sb.mu.Lock()
	if sb.searched.IsZero() {
		sb.searched = time.Now()
	}
	since := time.Since(sb.searched)
	sb.mu.Unlock()
	if since < m.cfg.ListSettle {
		return "", stillThere{"the possibility of an instance"}
	}
	return "", nil
}
