// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"fmt"
	"slices"
	"time"
)

// Resource is something that exists and, but for a spot request, costs money.
type Resource struct {
	Kind  string // as in tag specifications: "instance", "volume", "network-interface", ...
	ID    string
	State string
	Tags  map[string]string
}

func (r Resource) String() string { return fmt.Sprintf("%s %s (%s)", r.Kind, r.ID, r.State) }

// Leaks returns everything that exists now and carries all of the tags, whatever the
// lag hides from Describe calls: instances that are not terminated, volumes, network
// interfaces, public addresses, snapshots, images, spot requests that are open, and
// launch templates. What came with the Config is none. Things of no tags at all are leaks too when they were made with an
// instance: untagged remains are the ones that nobody finds. The order is that of
// creation within each kind.
func (s *Server) Leaks(tags map[string]string) []Resource {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	s.settle(now)
	var out []Resource
	add := func(kind string, r *resource, state string, made bool) {
		if !r.exists(now) || !(carries(r.tags, tags) || made && len(r.tags) == 0) {
			return
		}
		t := map[string]string{}
		for k, v := range r.tags {
			t[k] = v
		}
		out = append(out, Resource{Kind: kind, ID: r.id, State: state, Tags: t})
	}
	for _, i := range sorted(s.instances, func(i *instance) int { return i.seq }) {
		if state := i.state(now); state != terminated {
			add("instance", &i.resource, state, true)
		}
	}
	for _, v := range sorted(s.volumes, func(v *volume) int { return v.seq }) {
		add("volume", &v.resource, v.status(), true)
	}
	for _, e := range sorted(s.enis, func(e *eni) int { return e.seq }) {
		add("network-interface", &e.resource, e.status(), true)
		if e.public.IsValid() && e.exists(now) && carries(e.tags, tags) {
			out = append(out, Resource{Kind: "address", ID: e.public.String(), State: "in-use", Tags: map[string]string{}})
		}
	}
	for _, n := range sorted(s.snapshots, func(n *snapshot) int { return n.seq }) {
		if !n.given {
			add("snapshot", &n.resource, n.state(now), false)
		}
	}
	for _, i := range sorted(s.images, func(i *image) int { return i.seq }) {
		if !slices.ContainsFunc(s.cfg.Images, func(c Image) bool { return c.ID == i.id }) {
			add("image", &i.resource, "available", false)
		}
	}
	for _, q := range sorted(s.spots, func(q *spotRequest) int { return q.seq }) {
		if q.state == "active" {
			add("spot-instances-request", &q.resource, q.state, true)
		}
	}
	for _, t := range sorted(s.templates, func(t *template) int { return t.seq }) {
		add("launch-template", &t.resource, "available", false)
	}
	return out
}

func carries(have, want map[string]string) bool {
	for k, v := range want {
		if x, ok := have[k]; !ok || x != v {
			return false
		}
	}
	return true
}

// Instance is what a test may want to know of one, lag or not.
type Instance struct {
	ID, Type, Zone, Subnet, Market, State string
	Token                                 string
	Tags                                  map[string]string
	UserData                              []byte
	MetadataTokens                        string // "required" or "optional"
	MetadataHops                          int
	TerminateOnShutdown                   bool
	SEVSNP                                bool
	KeyName, PlacementGroup, Tenancy      string
	Addr, PublicAddr, MAC                 string
	Launched                              time.Time
	RootGiB                               int
	RootEncrypted                         bool
}

// Instances are all that were ever launched, in the order of that.
func (s *Server) Instances() []Instance {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	s.settle(now)
	var out []Instance
	for _, i := range sorted(s.instances, func(i *instance) int { return i.seq }) {
		x := Instance{ID: i.id, Type: i.typ.Name, Zone: i.subnet.Zone, Subnet: i.subnet.ID, Market: i.market, State: i.state(now), Token: i.token,
			Tags: map[string]string{}, UserData: slices.Clone(i.userData), MetadataTokens: i.meta.tokens, MetadataHops: i.meta.hops,
			TerminateOnShutdown: i.terminate, SEVSNP: i.launch.at("CpuOptions").str("AmdSevSnp") == "enabled", KeyName: i.launch.str("KeyName"),
			PlacementGroup: i.launch.at("Placement").str("GroupName"), Tenancy: i.launch.at("Placement").or("Tenancy", "default"),
			Addr: i.addr().String(), MAC: i.enis[0].mac, Launched: i.launched}
		if p := i.enis[0].public; p.IsValid() {
			x.PublicAddr = p.String()
		}
		for k, v := range i.tags {
			x.Tags[k] = v
		}
		for _, v := range i.volumes {
			if v.device == i.image.RootDevice {
				x.RootGiB, x.RootEncrypted = v.gib, v.encrypted
			}
		}
		out = append(out, x)
	}
	return out
}
