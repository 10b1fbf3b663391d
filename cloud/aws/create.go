// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Markets.
const (
	marketSpot     = "spot"
	marketOnDemand = "on-demand"
)

// attempt is one way to ask for an instance, and what Create notes before it does.
type attempt struct {
	// Round is 0 until an instance of the request has ended; see next.
	Round  int    `json:"round,omitempty"`
	Type   string `json:"type"`
	Market string `json:"market"`
	Subnet string `json:"subnet,omitempty"` // "": the launch template's
	Zone   string `json:"zone,omitempty"`   // of the subnet, for texts and memory
	Token  string `json:"token"`            // RunInstances' ClientToken
}

func (a attempt) String() string {
	where := cmp.Or(a.Zone, a.Subnet, "the launch template's subnet")
	return fmt.Sprintf("%s %s in %s", a.Type, a.Market, where)
}

// sign sets the token. EC2 keeps tokens by zone where a subnet is given, and by
// region where it is not, and refuses a token with other parameters. So whatever
// tells attempts apart is in it (EC2 Developer Guide, "Ensuring idempotency").
func (a attempt) sign(request string) attempt {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %d %q %q %q", request, a.Round, a.Subnet, a.Type, a.Market))
	a.Token = hex.EncodeToString(sum[:]) // 64 characters: the most there may be
	return a
}

// candidates are all ways to ask for an instance, in the order in which to try them:
// by type, then by market, then by place, which each request begins with another of,
// so that pods spread.
func (p *Provider) candidates(req cloud.CreateRequest, places []subnet, round int) []attempt {
	order := slices.Clone(places)
	rank := func(s subnet) []byte {
		sum := sha256.Sum256(fmt.Appendf(nil, "%q %q", req.Token, s.id))
		return sum[:]
	}
	slices.SortFunc(order, func(a, b subnet) int { return bytes.Compare(rank(a), rank(b)) })
	markets := []string{marketOnDemand}
	switch p.cfg.Spot {
	case SpotFirst:
		markets = []string{marketSpot, marketOnDemand}
	case SpotOnly:
		markets = []string{marketSpot}
	}
	var out []attempt
	for _, t := range unique(append([]string{req.Plan.Type}, req.Plan.Alternatives...)) {
		for _, market := range markets {
			for _, s := range order {
				out = append(out, attempt{Round: round, Type: t, Market: market, Subnet: s.id, Zone: s.zone}.sign(req.Token))
			}
		}
	}
	return out
}

// made is what this process knows of a token that has made an instance.
type made struct {
	attempt attempt
	request string
	id      cloud.InstanceID
	at      time.Time
}

// madeFor is how long it is kept when nobody deletes the instance: it only saves
// callers that come back soon a question.
const madeFor = time.Hour

// Create implements cloud.Provider. Where Note is kept, a repeated Create begins with
// the attempt of Progress, whose token gives the instance if there is one. Where it
// is not (Note is nil), Create first looks for the token's tag; then two processes
// at once, of which one meets an empty pool that the other does not, may make two.
func (p *Provider) Create(ctx context.Context, req cloud.CreateRequest) (cloud.Instance, error) {
	if err := req.Validate(); err != nil {
		return cloud.Instance{}, err
	}
	m, err := p.create(ctx, req)
	if err != nil {
		return cloud.Instance{}, fmt.Errorf("create instance %s: %w", req.Name, err)
	}
	return m.Instance, nil
}

func (p *Provider) create(ctx context.Context, req cloud.CreateRequest) (machine, error) {
	if !typeRule.MatchString(req.Plan.Type) {
		return machine{}, fmt.Errorf("plan %+v was not made by Plan: %w", req.Plan, errdefs.ErrInvalidArgument)
	}
	for _, k := range sortedKeys(req.Tags) {
		if err := checkTag(k, req.Tags[k]); err != nil {
			return machine{}, fmt.Errorf("TAGS: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	l := launch{req: req, request: req.Fingerprint()}
	var err error
	if l.userData, err = encodeUserData(req.UserData); err != nil {
		return machine{}, err
	}
	unlock, err := p.creating.lock(ctx, req.Token)
	if err != nil {
		return machine{}, err
	}
	defer unlock()
	first, found, err := p.earlier(ctx, l)
	if err != nil || found != nil {
		return *cmp.Or(found, &machine{}), err
	}
	if l.image, err = p.image(ctx, cmp.Or(req.Plan.Image, p.cfg.ImageID)); err != nil {
		return machine{}, err
	}
	places, err := p.places(ctx)
	if err != nil {
		return machine{}, err
	}
	s, err := p.connect(ctx)
	if err != nil {
		return machine{}, err
	}
	l.groups = s.groups
	return p.tryAll(ctx, l, first, places)
}

// earlier finds out how far the request came before: the attempt to repeat, or the
// instance itself. Neither: it is new.
func (p *Provider) earlier(ctx context.Context, l launch) (*attempt, *machine, error) {
	p.mu.Lock()
	known, ok := p.made[l.req.Token]
	p.mu.Unlock()
	if ok && time.Since(known.at) < madeFor {
		if known.request != l.request {
			return nil, nil, used(l.req.Token, known.id)
		}
		m, err := p.get(ctx, known.id)
		if errdefs.IsNotFound(err) || err == nil && m.ended {
			return &known.attempt, nil, nil
		}
		return nil, &m, err
	}
	if l.req.Progress != "" {
		var a attempt
		if err := json.Unmarshal([]byte(l.req.Progress), &a); err != nil || a.Token == "" {
			// No class: an instance may exist, and List is the way to find it.
			return nil, nil, fmt.Errorf("the note on the request cannot be read: %q: %w", l.req.Progress, cmp.Or(err, errors.New("it has no token")))
		}
		return &a, nil, nil
	}
	if l.req.Note != nil {
		return nil, nil, nil // a note would have come before an instance
	}
	m, err := p.byToken(ctx, l)
	return nil, m, err
}

// byToken returns the instance that carries the request's token. Nil: none is seen.
func (p *Provider) byToken(ctx context.Context, l launch) (*machine, error) {
	list, err := p.tokens.ask(ctx, l.req.Token)
	if err != nil {
		return nil, err
	}
	var oldest *machine
	for i := range list {
		m := &list[i]
		if !m.ended && (oldest == nil || m.CreatedAt.Before(oldest.CreatedAt)) {
			oldest = m
		}
	}
	if oldest != nil && oldest.request != l.request {
		return nil, used(l.req.Token, oldest.ID)
	}
	return oldest, nil
}

func used(token string, id cloud.InstanceID) error {
	return fmt.Errorf("token %s made instance %s from a different request: %w", token, id, errdefs.ErrAlreadyExists)
}

// tryAll makes attempts, first the one of an earlier call if there was one, until one
// gets an instance or an error that no other place would mend.
func (p *Provider) tryAll(ctx context.Context, l launch, first *attempt, places []subnet) (machine, error) {
	round := 0
	if first != nil {
		round = first.Round
	}
	list := p.candidates(l.req, places, round)
	noted := ""
	if first != nil {
		noted = first.Token
		list = slices.DeleteFunc(list, func(a attempt) bool { return a.Token == first.Token })
		list = append([]attempt{*first}, list...)
	}
	var refusals []error
	for _, a := range list {
		if a.Token != noted {
			if reason := p.dry(a); reason != "" {
				refusals = append(refusals, fmt.Errorf("%s: %s", a, reason))
				continue
			}
		}
		m, err := p.try(ctx, l, a, a.Token == noted)
		s := capacity(err)
		if s == scopeNone {
			return m, err
		}
		p.rememberDry(a, s, err)
		refusals = append(refusals, fmt.Errorf("%s: %w", a, err))
	}
	return machine{}, exhausted(refusals)
}

// exhausted is the error when no candidate is left.
func exhausted(refusals []error) error {
	texts := make([]string, 0, len(refusals))
	for _, err := range refusals {
		texts = append(texts, strings.TrimSuffix(err.Error(), ": "+errdefs.ErrResourceExhausted.Error()))
	}
	return fmt.Errorf("there is no capacity: %s; add types to %s or subnets of other zones to AWS_SUBNET_ID, or try again later: %w",
		strings.Join(texts, "; "), typesKey, errdefs.ErrResourceExhausted)
}

// try makes one attempt. The note is kept before the call, unless it is the one
// that was kept last. A token whose instance has ended makes no other: then the
// attempt is made in the next round.
func (p *Provider) try(ctx context.Context, l launch, a attempt, noted bool) (machine, error) {
	for {
		if !noted && l.req.Note != nil {
			note, err := json.Marshal(a)
			if err != nil {
				return machine{}, err
			}
			if err := l.req.Note(ctx, string(note)); err != nil {
				return machine{}, fmt.Errorf("keep the note on the request: %w", err)
			}
		}
		out, err := call(ctx, p, p.limits.run, false, "RunInstances", (*ec2.Client).RunInstances, p.input(l, a))
		switch {
		case code(err) == codeMismatch:
			return p.mismatch(ctx, l, a)
		case code(err) == codeTerminated:
		case err != nil:
			return machine{}, err
		case len(out.Instances) != 1:
			return machine{}, fmt.Errorf("RunInstances answered with %d instances, asked for 1", len(out.Instances))
		default:
			m := p.machine(out.Instances[0])
			if m.ID == "" {
				return machine{}, errors.New("RunInstances answered with an instance without id")
			}
			if !m.ended {
				// The reply's tags may be missing; the request's are what is there.
				m.Name, m.Token, m.SandboxID, m.Owner, m.request = l.req.Name, l.req.Token, l.req.SandboxID, l.req.Owner, l.request
				p.keep(l, a, m)
				return m, nil
			}
			p.noteEnd(m)
		}
		a.Round++
		a, noted = a.sign(l.req.Token), false
	}
}

// keep remembers what an attempt made.
func (p *Provider) keep(l launch, a attempt, m machine) {
	p.remember(m)
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(p.made, func(_ string, o made) bool { return now.Sub(o.at) > madeFor })
	p.made[l.req.Token] = made{attempt: a, request: l.request, id: m.ID, at: now}
}

// mismatchWait paces the search for the instance of a used token.
const (
	mismatchFirst   = 200 * time.Millisecond
	mismatchLongest = 2 * time.Second
)

// mismatch decides what to do when the token was used with other parameters: the
// request may be another one, or the same and the configuration has changed since.
// The fingerprint on the instance tells.
func (p *Provider) mismatch(ctx context.Context, l launch, a attempt) (machine, error) {
	deadline := time.Now().Add(settle)
	for wait := mismatchFirst; ; wait = min(2*wait, mismatchLongest) {
		list, err := p.describe(ctx, false, filter("client-token", a.Token))
		if err != nil {
			return machine{}, err
		}
		for _, m := range list {
			if m.request != l.request || m.Token != l.req.Token {
				return machine{}, used(l.req.Token, m.ID)
			}
			p.keep(l, a, m)
			return m, nil
		}
		if time.Now().After(deadline) {
			// No class: something was made once, and List is the way to find it.
			return machine{}, fmt.Errorf("token %s was used before, and the instance it made is not to be seen", l.req.Token)
		}
		if err := cloud.Pause(ctx, wait); err != nil {
			return machine{}, err
		}
	}
}
