// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// candidate is one way to get a VM.
type candidate struct {
	Size string `json:"size"`
	Zone string `json:"zone,omitempty"` // "": Azure chooses, and gives none
	Spot bool   `json:"spot,omitempty"`
}

func (c candidate) String() string {
	s := c.Size
	if c.Zone != "" {
		s += " in zone " + c.Zone
	}
	if c.Spot {
		s += ", spot"
	}
	return s
}

// anyZone stands for the candidate in all zones.
func (c candidate) anyZone() candidate {
	c.Zone = "*"
	return c
}

// progress is what Note is given: where the VM was asked for, and how the operation
// that makes it can be followed by the next process.
type progress struct {
	candidate
	Operation string `json:"operation,omitempty"` // path and query
}

// making is one Create at work.
type making struct {
	p   *Provider
	req cloud.CreateRequest
	things
	sizes *catalog
	key   string // for SSH
	last  progress
	tried []error
	dirty bool // an attempt has left something that can be used by the next
}

// Create implements cloud.Provider. It returns when the VM has a host and an address,
// which is when its guest begins to start, and before Azure calls the operation
// done; until then it may turn out that there is no capacity, and the next candidate
// is tried.
func (p *Provider) Create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	inst, err := p.create(ctx, req)
	if err != nil {
		return cloud.Instance{}, fmt.Errorf("create instance %s: %w", req.Name, err)
	}
	return inst, nil
}

func (p *Provider) create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	if err := checkRequest(req); err != nil {
		return cloud.Instance{}, err
	}
	if err := ctx.Err(); err != nil {
		return cloud.Instance{}, err
	}
	m := &making{p: p, req: req, things: things{p.place, nameOf(req.Token)}}
	// Callers with one token do not race each other; those of other processes are
	// told apart by If-None-Match.
	unlock, err := p.work.lock(ctx, "create "+m.name)
	if err != nil {
		return cloud.Instance{}, err
	}
	defer unlock()
	if m.sizes, err = p.catalog(ctx); err != nil {
		return cloud.Instance{}, err
	}
	if m.key, err = p.key.line(); err != nil {
		return cloud.Instance{}, err
	}
	p.forget(m.things) // of a deletion before
	if req.Progress != "" {
		if err := json.Unmarshal([]byte(req.Progress), &m.last); err != nil {
			m.last = progress{} // another version's: the VM's name is all that is needed
		}
		if inst, err := m.resume(ctx); inst != nil || err != nil {
			return deref(inst), err
		}
	}
	return m.run(ctx)
}

func deref(i *cloud.Instance) cloud.Instance {
	if i == nil {
		return cloud.Instance{}
	}
	return *i
}

// resume goes on with what an earlier Create with the token has begun. Nil and nil:
// nothing of it is left.
func (m *making) resume(ctx context.Context) (*cloud.Instance, error) {
	vm, err := m.p.getVM(ctx, m.things)
	if missing(err) {
		// Parts of it may be there: an attempt that failed and was not swept.
		return nil, m.clean(ctx, left.reusable)
	}
	if err != nil {
		return nil, err
	}
	return m.adopt(ctx, vm, m.last.Operation)
}

// adopt takes over a VM that exists. Nil and nil: there was no capacity for it, it is
// removed, and others may be tried.
func (m *making) adopt(ctx context.Context, vm *vmView, operation string) (*cloud.Instance, error) {
	if was := tag(vm.Tags, tagRequest); was != fingerprint(m.req) || tag(vm.Tags, cloud.TagToken) != m.req.Token {
		return nil, fmt.Errorf("token %s made %s from a different request: %w", m.req.Token, m.name, errdefs.ErrAlreadyExists)
	}
	return m.finish(ctx, candidateOf(vm), vm, operation)
}

// candidateOf reads from a VM how it was asked for.
func candidateOf(vm *vmView) candidate {
	c := candidate{Size: vm.Properties.HardwareProfile.VMSize, Spot: vm.Properties.Priority == "Spot"}
	if len(vm.Zones) > 0 {
		c.Zone = vm.Zones[0]
	}
	return c
}

// candidates are all ways to get the VM, the best first: by size, then market, then
// zone. Where a token's turn through the zones begins depends on the token, so that
// pods spread.
func (m *making) candidates() []candidate {
	h := fnv.New32a()
	h.Write([]byte(m.req.Token))
	turn := int(h.Sum32() % 5040) // divisible by any number of zones there is
	markets := map[Market][]bool{MarketRegular: {false}, MarketSpot: {true, false}, MarketOnly: {true}}[m.p.cfg.Spot]
	var out []candidate
	for _, name := range append([]string{m.req.Plan.Type}, m.req.Plan.Alternatives...) {
		z, ok := m.sizes.named(name)
		if !ok {
			continue
		}
		zones := []string{""}
		if len(m.p.cfg.Zones) > 0 {
			zones = m.p.cfg.zonesOf(z)
		}
		for _, spot := range markets {
			if spot && z.noSpot {
				continue
			}
			for i := range zones {
				out = append(out, candidate{z.Name, zones[(i+turn)%len(zones)], spot})
			}
		}
	}
	// The one that was asked before comes first: its answer may have been lost.
	for i, c := range out {
		if c == m.last.candidate {
			copy(out[1:i+1], out[:i])
			out[0] = c
		}
	}
	return out
}

// run tries the candidates.
func (m *making) run(ctx context.Context) (cloud.Instance, error) {
	all := m.candidates()
	if len(all) == 0 {
		return cloud.Instance{}, fmt.Errorf("plan %+v was not made by Plan: %w", m.req.Plan, errdefs.ErrInvalidArgument)
	}
	for _, c := range all {
		if why := m.p.none.why(c); why != nil {
			m.tried = append(m.tried, fmt.Errorf("%s: %w", c, why))
			continue
		}
		inst, err := m.try(ctx, c)
		if err != nil {
			return cloud.Instance{}, err
		}
		if inst != nil {
			return *inst, nil
		}
	}
	said := make([]string, len(m.tried))
	for i, t := range m.tried {
		said[i] = t.Error()
	}
	none := fmt.Errorf("there is no capacity; add sizes to AZURE_INSTANCE_SIZES or zones to AZURE_ZONES (%s): %w", strings.Join(said, "; "), errdefs.ErrResourceExhausted)
	if m.dirty {
		return cloud.Instance{}, m.giveUp(ctx, none)
	}
	return cloud.Instance{}, none
}

// try asks for the VM at one candidate. Nil and nil: there is no capacity.
func (m *making) try(ctx context.Context, c candidate) (*cloud.Instance, error) {
	z, _ := m.sizes.named(c.Size)
	if err := m.note(ctx, progress{candidate: c}); err != nil {
		return nil, err
	}
	rep, err := m.p.arm.do(ctx, call{
		method: http.MethodPut, path: m.vm(), version: apiVM, counts: subject{familyPut, m.vm()},
		header: http.Header{"If-None-Match": {"*"}}, // make it, or leave it as it is
		body:   m.p.body(m.req, m.things, c, z, m.key),
	})
	var refused *apiError
	if errors.As(err, &refused) && refused.status != http.StatusTooManyRequests {
		// It may exist all the same: made by another process, or by a request whose
		// answer was lost. What is refused then is not what was made.
		exists, inst, err := m.existing(ctx, c)
		if exists && inst == nil && err == nil && m.p.none.why(c) == nil {
			return m.try(ctx, c) // there was no capacity for that one, and it is gone
		}
		if exists || err != nil {
			return inst, err
		}
		switch {
		case refused.status == http.StatusPreconditionFailed:
			return nil, fmt.Errorf("%s existed a moment ago: %w", m.name, errdefs.ErrUnavailable)
		case missing(refused) && refused.code != "ResourceGroupNotFound":
			refused.status = http.StatusBadRequest // something that the request names is not there
		}
	}
	if err != nil {
		return nil, m.failed(ctx, c, err)
	}
	var vm *vmView
	if json.Unmarshal(rep.body, &vm) != nil {
		vm = nil // accepted all the same
	}
	op := m.p.operation(rep)
	if op != "" {
		if err := m.note(ctx, progress{c, op}); err != nil {
			return nil, err
		}
	}
	return m.finish(ctx, c, vm, op)
}

// existing adopts the VM if there is one. Nil and nil although there was one: there was
// no capacity for it, and it is removed.
func (m *making) existing(ctx context.Context, c candidate) (exists bool, inst *cloud.Instance, err error) {
	vm, err := m.p.getVM(ctx, m.things)
	switch {
	case missing(err), errdefs.IsPermissionDenied(err):
		return false, nil, nil // the refusal says more
	case err != nil:
		return false, nil, err
	}
	inst, err = m.adopt(ctx, vm, m.operationOf(c))
	return true, inst, err
}

// operationOf is the operation of an earlier attempt at the same candidate.
func (m *making) operationOf(c candidate) string {
	if m.last.candidate == c {
		return m.last.Operation
	}
	return ""
}

func (m *making) note(ctx context.Context, pr progress) error {
	if m.req.Note == nil {
		return nil
	}
	b, err := json.Marshal(pr)
	if err != nil {
		return err
	}
	if err := m.req.Note(ctx, string(b)); err != nil {
		return fmt.Errorf("keep the progress of the request: %w", err)
	}
	return nil
}

// finish waits for a VM that was accepted. Nil and nil: there was no capacity.
func (m *making) finish(ctx context.Context, c candidate, vm *vmView, operation string) (*cloud.Instance, error) {
	f := follower{p: m.p, things: m.things, seen: vm, operation: operation, began: time.Now(), answers: m.req.Answers}
	inst, err := f.follow(ctx)
	if err == nil {
		return &inst, nil
	}
	return nil, m.failed(ctx, c, err)
}

// failed decides on an attempt's error. Whatever the attempt may have left is removed
// if Azure has said that it failed. Nil: the next candidate may be tried.
func (m *making) failed(ctx context.Context, c candidate, err error) error {
	var answered *apiError
	if !errors.As(err, &answered) || ctx.Err() != nil {
		return err
	}
	if answered.status != 0 && (errdefs.IsUnavailable(err) || errdefs.IsPermissionDenied(err)) {
		return err // not refused for good, or not so much as looked at
	}
	// Even a request that is refused at once can leave an interface or a disk.
	how, capacity := reachOf(err)
	if !capacity || how == reachAll {
		return m.giveUp(ctx, err)
	}
	if cerr := m.clean(ctx, left.reusable); cerr != nil {
		return fmt.Errorf("%w; and what is left of it could not be removed: %w", err, cerr)
	}
	m.dirty = true
	if how == reachSize {
		c = c.anyZone()
	}
	m.p.none.add(c, err)
	m.tried = append(m.tried, fmt.Errorf("%s: %w", c, err))
	return nil
}

// giveUp removes what the attempts have left before their error is returned. What takes
// longer than giveUpWithin is left to who calls Delete; the error then is no definite
// one, because something is still there.
func (m *making) giveUp(ctx context.Context, why error) error {
	within, cancel := context.WithTimeout(ctx, giveUpWithin)
	defer cancel()
	if err := m.clean(within, left.nothing); err != nil {
		return fmt.Errorf("%w; what is left of it has still to be deleted: %w", why, err)
	}
	return why
}

// giveUpWithin is longer than deletions take, and shorter than an interface can be
// reserved.
const giveUpWithin = 20 * time.Second

// clean removes what an attempt has left, and returns when enough of it is gone.
func (m *making) clean(ctx context.Context, enough func(left) bool) error {
	unlock, err := m.p.work.lock(ctx, "delete "+m.name)
	if err != nil {
		return err
	}
	defer unlock()
	m.p.forget(m.things)
	const first, longest = 200 * time.Millisecond, 10 * time.Second
	for wait := first; ; wait = min(wait*3/2, longest) {
		l, err := m.p.reap(ctx, m.things)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && !errdefs.IsUnavailable(err):
			return err
		case err == nil && enough(l):
			m.p.forget(m.things)
			return nil
		}
		pause := wait
		if l.reusable() { // only a reserved interface is left, which need not be asked for often
			pause = max(wait, time.Until(m.p.recall(m.things).next))
		}
		if err := cloud.Pause(ctx, pause); err != nil {
			return err
		}
	}
}

// operation returns path and query of the operation that a reply has started; "":
// none that we would ask.
func (p *Provider) operation(rep reply) string {
	link := rep.header.Get("Azure-AsyncOperation")
	if link == "" {
		return ""
	}
	path, query, err := p.arm.local(link)
	if err != nil || !strings.HasPrefix(path, "/subscriptions/") {
		return ""
	}
	return path + "?" + query.Encode()
}
