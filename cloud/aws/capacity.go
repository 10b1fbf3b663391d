// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"errors"
	"fmt"
	"maps"
	"time"
)

// dryFor is how long a place without capacity is not asked again (Karpenter's number).
const dryFor = 3 * time.Minute

// pool is what there was no capacity in. An empty field means all.
type pool struct{ typ, zone, subnet, market string }

// drought is a pool's emptiness.
type drought struct {
	until time.Time
	code  string
}

// pools are those that an attempt would draw from, by scope.
func (a attempt) pools() map[scope]pool {
	zone, sub := a.Zone, ""
	if zone == "" {
		sub = a.Subnet
	}
	return map[scope]pool{
		scopePool:   {typ: a.Type, zone: zone, subnet: sub, market: a.Market},
		scopeSubnet: {subnet: a.Subnet},
		scopeMarket: {typ: a.Type, market: a.Market},
		scopeSpot:   {market: a.Market},
	}
}

// rememberDry keeps a capacity error for dryFor.
func (p *Provider) rememberDry(a attempt, s scope, err error) {
	c := code(err)
	var e *apiError
	if !errors.As(err, &e) {
		return
	}
	p.setDry(a.pools()[s], c)
}

func (p *Provider) setDry(where pool, code string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(p.droughts, func(_ pool, d drought) bool { return !now.Before(d.until) })
	p.droughts[where] = drought{until: now.Add(dryFor), code: code}
}

// dry says why an attempt is not worth a call now. "": it is.
func (p *Provider) dry(a attempt) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, where := range a.pools() {
		if d, ok := p.droughts[where]; ok && now.Before(d.until) {
			return fmt.Sprintf("%s, %s ago; asked again in %s", d.code,
				(dryFor - d.until.Sub(now)).Round(time.Second), d.until.Sub(now).Round(time.Second))
		}
	}
	return ""
}

// noteEnd learns from an instance that has ended by itself: EC2 may find only after
// RunInstances that it has no capacity, and takes spot instances back when it needs
// theirs. The next pod goes elsewhere.
func (p *Provider) noteEnd(m machine) {
	market := marketOnDemand
	if m.spot {
		market = marketSpot
	}
	switch m.reason {
	case "Server.InsufficientInstanceCapacity", "Server.SpotInstanceTermination", "Server.SpotInstanceShutdown":
		p.setDry(pool{typ: m.typ, zone: m.zone, market: market}, m.reason)
	}
}
