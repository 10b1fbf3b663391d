// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// follower waits for a VM that Azure has agreed to make.
//
// Two things can be asked. The VM itself says when it has a host and runs, long
// before the operation is done, but may be read 36 times at once and then 12 times a
// minute. The operation, 45 times and then 15, says only that it has ended, and why.
// So the VM is read often at first and then every five seconds, and the operation
// beside it when it says so (Retry-After) or every two seconds.
type follower struct {
	p *Provider
	things
	seen      *vmView // as last read; nil: not yet
	operation string  // path and query; "": not known
	began     time.Time

	nextVM, nextOperation time.Time
	lastErr               error // of reading, for the case that time runs out

	answers  func(context.Context, netip.Addr) error // see cloud.CreateRequest; may be nil
	addrs    []netip.Addr                            // nil: not known yet
	answered chan struct{}                           // closed when the machine has answered; nil: not asked yet
	asking   sync.WaitGroup
}

const (
	// operationFrom: before, reading the VM is enough.
	operationFrom  = 15 * time.Second
	operationEvery = 2 * time.Second
	// visibleWithin is how long a VM that was accepted may not be there yet.
	visibleWithin = 10 * time.Second
)

// vmEvery is the time between two looks at the VM. In the first 24 s that makes 30,
// and then as many as Azure refills.
func vmEvery(age time.Duration) time.Duration {
	switch {
	case age < 2*time.Second:
		return 250 * time.Millisecond
	case age < 24*time.Second:
		return time.Second
	}
	return 6 * time.Second
}

// follow returns the instance as soon as it has an address and runs, by Azure's word or
// its own, or an *apiError with status 0 when the operation has failed.
func (f *follower) follow(ctx context.Context) (cloud.Instance, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer f.asking.Wait()
	defer cancel()
	f.nextVM = f.began
	if f.seen != nil {
		f.nextVM = f.began.Add(vmEvery(0))
	}
	f.nextOperation = f.began.Add(operationFrom)
	for {
		if f.seen != nil {
			inst, done, err := f.look(ctx)
			if done || err != nil {
				return inst, err
			}
		}
		if err := f.ask(ctx); err != nil {
			return cloud.Instance{}, err
		}
	}
}

// look decides by what was last read of the VM.
func (f *follower) look(ctx context.Context) (cloud.Instance, bool, error) {
	inst := f.p.instanceOf(f.things, f.seen)
	state := f.seen.Properties.ProvisioningState
	switch {
	case (state == "Failed" || state == "Canceled") && inst.State == cloud.StateFailed:
		return inst, false, f.why(ctx)
	case inst.State == cloud.StateDeleting:
		return inst, false, fmt.Errorf("%s is being deleted; it can be made again when it is gone: %w", f.name, errdefs.ErrUnavailable)
	case inst.State == cloud.StateFailed: // it was made, and has stopped since
		return inst, true, nil
	}
	if f.addrs = inst.Addrs; len(f.addrs) == 0 {
		addrs, err := f.p.addresses(ctx, f.things, f.seen)
		if ctx.Err() != nil {
			return inst, false, ctx.Err()
		}
		if err != nil {
			f.lastErr = err
		}
		f.addrs = addrs
	}
	f.askMachine(ctx)
	inst.Addrs = f.addrs
	if f.hasAnswered() {
		inst.State = cloud.StateRunning
	}
	return inst, inst.State == cloud.StateRunning && len(inst.Addrs) > 0, nil
}

// askMachine asks the machine itself whether it runs, beside Azure.
func (f *follower) askMachine(ctx context.Context) {
	if f.answers == nil || f.answered != nil || len(f.addrs) == 0 {
		return
	}
	addr, answered := f.addrs[0], make(chan struct{})
	f.answered = answered
	f.asking.Go(func() {
		if f.answers(ctx, addr) == nil {
			close(answered)
		}
	})
}

func (f *follower) hasAnswered() bool {
	select {
	case <-f.answered: // nil: never
		return true
	default:
		return false
	}
}

// ask waits for the next time to ask and asks.
func (f *follower) ask(ctx context.Context) error {
	next := f.nextVM
	if f.operation != "" && f.nextOperation.Before(next) {
		next = f.nextOperation
	}
	if err := f.pauseUntil(ctx, next); err != nil {
		if f.lastErr != nil {
			return fmt.Errorf("%w; last: %w", err, f.lastErr)
		}
		return err
	}
	if f.hasAnswered() {
		return nil
	}
	now := time.Now()
	if f.operation != "" && !f.nextOperation.After(now) {
		done, after, err := f.p.operationState(ctx, f.operation, f.vm())
		f.nextOperation = later(now.Add(operationEvery), after)
		var failed *apiError
		switch {
		case errors.As(err, &failed) && failed.status == 0:
			return err
		case missing(err):
			f.operation = "" // Azure forgets them; the VM says the rest
		case err != nil:
			if ctx.Err() != nil {
				return ctx.Err()
			}
			f.lastErr = err
		case done:
			f.nextVM = now
		}
	}
	if !f.nextVM.After(now) {
		return f.read(ctx, now)
	}
	return nil
}

// pauseUntil waits for a time, or for the machine's answer.
func (f *follower) pauseUntil(ctx context.Context, at time.Time) error {
	t := time.NewTimer(time.Until(at))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-f.answered: // nil: never
	case <-t.C:
	}
	return nil
}

// read reads the VM.
func (f *follower) read(ctx context.Context, now time.Time) error {
	vm, err := f.p.getVM(ctx, f.things)
	f.nextVM = now.Add(vmEvery(now.Sub(f.began)))
	var refused *apiError
	switch {
	case err == nil:
		f.seen, f.lastErr = vm, nil
	case ctx.Err() != nil:
		return ctx.Err()
	case missing(err):
		if now.Sub(f.began) < visibleWithin {
			return nil
		}
		if f.operation != "" {
			if _, _, err := f.p.operationState(ctx, f.operation, f.vm()); err != nil && !missing(err) {
				return err
			}
		}
		return fmt.Errorf("%w: %w", errGone, errdefs.ErrUnavailable)
	case errors.As(err, &refused) && errdefs.IsUnavailable(err):
		f.nextVM, f.lastErr = later(f.nextVM, refused.after), err
	case errdefs.IsUnavailable(err):
		f.lastErr = err
	default:
		return err
	}
	return nil
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// why finds out why a VM could not be made: its operation knows best; else what the VM
// says of itself.
func (f *follower) why(ctx context.Context) error {
	if f.operation != "" {
		_, _, err := f.p.operationState(ctx, f.operation, f.vm())
		var failed *apiError
		if errors.As(err, &failed) && failed.status == 0 {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	code, message := failureOf(f.seen)
	return newAPIError(0, odata{Code: code, Message: message}, time.Time{})
}

// operationState asks for a long-running operation. An *apiError with status 0: the
// operation has failed. after is when to ask again.
func (p *Provider) operationState(ctx context.Context, operation, vm string) (done bool, after time.Time, err error) {
	path, query, err := p.arm.local(operation)
	if err != nil {
		return false, after, err
	}
	var state struct {
		Status string `json:"status"`
		Error  odata  `json:"error"`
	}
	c := call{path: path, query: query, counts: subject{familyOperation, vm}}
	if !query.Has("api-version") {
		c.version = apiOperation
	}
	rep, err := p.arm.read(ctx, c, &state)
	var refused *apiError
	if errors.As(err, &refused) {
		return false, refused.after, err
	}
	if err != nil {
		return false, after, err
	}
	switch strings.ToLower(state.Status) {
	case "succeeded":
		return true, rep.after, nil
	case "failed", "canceled":
		if state.Error.Code == "" {
			state.Error.Code = state.Status
		}
		return true, rep.after, newAPIError(0, state.Error, time.Time{})
	}
	return false, rep.after, nil
}

// statuses are the codes of the VM's instance view that begin with prefix, without
// it, and their messages.
func statuses(vm *vmView, prefix string, f func(code, message string)) {
	for _, s := range vm.Properties.InstanceView.Statuses {
		if len(s.Code) >= len(prefix) && strings.EqualFold(s.Code[:len(prefix)], prefix) {
			f(s.Code[len(prefix):], s.Message)
		}
	}
}

// power is the VM's power state, "" where it has none yet.
func power(vm *vmView) (state string) {
	statuses(vm, "PowerState/", func(code, _ string) { state = strings.ToLower(code) })
	return state
}

// failureOf is the code and the text of a VM whose provisioning has failed.
func failureOf(vm *vmView) (code, message string) {
	code = "ProvisioningFailed"
	statuses(vm, "ProvisioningState/failed", func(c, m string) {
		if c = strings.TrimPrefix(c, "/"); c != "" {
			code = c
		}
		message = m
	})
	return code, message
}
