// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Metadata is the instance's own metadata service (IMDS, versions 1 and 2), to be
// served on port 80 of 169.254.169.254. It answers as "Use the Instance Metadata
// Service" in the User Guide has it: a session begins with PUT /latest/api/token,
// which refuses requests that came through a proxy; without a token only instances
// whose tokens are optional are served.
func (s *Server) Metadata(id string) http.Handler {
	return &metadata{s: s, id: id, tokens: map[string]time.Time{}}
}

type metadata struct {
	s  *Server
	id string

	mu     sync.Mutex
	tokens map[string]time.Time // and until when; guarded by mu
}

const (
	ttlHeader   = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	tokenHeader = "X-Aws-Ec2-Metadata-Token"
)

func (m *metadata) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Server", "EC2ws")
	s := m.s
	s.mu.Lock()
	now := s.cfg.Now()
	s.settle(now)
	i := s.instances[m.id]
	if i == nil || i.meta.endpoint == "disabled" {
		s.mu.Unlock()
		http.Error(w, "Forbidden", http.StatusForbidden)
		return
	}
	required := i.meta.tokens == "required"
	tree := s.metadataTree(i, now)
	userData := i.userData
	s.mu.Unlock()

	if r.URL.Path == "/latest/api/token" {
		m.newToken(w, r, now)
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	if !m.allowed(r, required, now) {
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	}
	version, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if version == "" {
		fmt.Fprint(w, "1.0\n2021-07-15\nlatest")
		return
	}
	if version != "latest" && version != "1.0" && version != "2021-07-15" {
		http.NotFound(w, r)
		return
	}
	switch trimmed := strings.TrimSuffix(rest, "/"); {
	case trimmed == "":
		fmt.Fprint(w, "dynamic\nmeta-data\nuser-data")
	case trimmed == "user-data" && len(userData) > 0:
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Write(userData)
	default:
		text, ok := lookup(tree, trimmed)
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprint(w, text)
	}
}

// newToken answers PUT /latest/api/token.
func (m *metadata) newToken(w http.ResponseWriter, r *http.Request, now time.Time) {
	if r.Method != http.MethodPut {
		http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	if r.Header.Get("X-Forwarded-For") != "" {
		http.Error(w, "Forbidden", http.StatusForbidden)
		return
	}
	ttl, err := strconv.Atoi(r.Header.Get(ttlHeader))
	if err != nil || ttl < 1 || ttl > 21600 {
		http.Error(w, "Bad Request", http.StatusBadRequest)
		return
	}
	m.s.mu.Lock()
	token := fmt.Sprintf("AQAE%016x%016x==", m.s.random.Uint64(), m.s.random.Uint64())
	m.s.mu.Unlock()
	m.mu.Lock()
	m.tokens[token] = now.Add(time.Duration(ttl) * time.Second)
	m.mu.Unlock()
	w.Header().Set(ttlHeader, strconv.Itoa(ttl))
	w.Header().Set("Content-Type", "text/plain")
	fmt.Fprint(w, token)
}

func (m *metadata) allowed(r *http.Request, required bool, now time.Time) bool {
	token := r.Header.Get(tokenHeader)
	if token == "" {
		return !required
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	until, ok := m.tokens[token]
	return ok && now.Before(until)
}

// metadataTree is what there is below /latest/, by path. s.mu is held.
func (s *Server) metadataTree(i *instance, now time.Time) map[string]string {
	nic := i.enis[0]
	zone := i.subnet.Zone
	var groups []string
	for _, g := range nic.groups {
		groups = append(groups, g.Name)
	}
	life := "on-demand"
	if i.market == "spot" {
		life = "spot"
	}
	document, _ := json.MarshalIndent(map[string]any{"accountId": s.cfg.Account, "architecture": i.typ.arch(), "availabilityZone": zone,
		"imageId": i.image.id, "instanceId": i.id, "instanceType": i.typ.Name, "pendingTime": i.launched.UTC().Format(time.RFC3339),
		"privateIp": nic.addr.String(), "region": s.cfg.Region, "version": "2017-09-30"}, "", "  ")
	t := map[string]string{
		"meta-data/ami-id": i.image.id, "meta-data/ami-launch-index": itoa(i.index), "meta-data/hostname": s.hostname(nic.addr),
		"meta-data/instance-action": "none", "meta-data/instance-id": i.id, "meta-data/instance-life-cycle": life,
		"meta-data/instance-type": i.typ.Name, "meta-data/local-hostname": s.hostname(nic.addr), "meta-data/local-ipv4": nic.addr.String(),
		"meta-data/mac": nic.mac, "meta-data/placement/availability-zone": zone, "meta-data/placement/region": s.cfg.Region,
		"meta-data/reservation-id": i.reservation, "meta-data/security-groups": strings.Join(groups, "\n"),
		"meta-data/services/domain": "amazonaws.com", "meta-data/services/partition": "aws",
		"meta-data/block-device-mapping/root": i.image.RootDevice, "meta-data/block-device-mapping/ami": strings.TrimPrefix(i.image.RootDevice, "/dev/"),
		"dynamic/instance-identity/document": string(document),
	}
	if k := i.launch.str("KeyName"); k != "" {
		t["meta-data/public-keys/0/openssh-key"] = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE= " + k + "\n"
	}
	for _, e := range i.enis {
		p := "meta-data/network/interfaces/macs/" + e.mac + "/"
		var ids []string
		for _, g := range e.groups {
			ids = append(ids, g.ID)
		}
		t[p+"security-group-ids"] = strings.Join(ids, "\n")
		for k, v := range map[string]string{"device-number": itoa(e.index), "interface-id": e.id, "local-hostname": s.hostname(e.addr),
			"local-ipv4s": e.addr.String(), "mac": e.mac, "owner-id": s.cfg.Account, "subnet-id": e.subnet.ID, "vpc-id": e.subnet.VPC,
			"subnet-ipv4-cidr-block": e.subnet.CIDR.Masked().String()} {
			t[p+k] = v
		}
		if e.public.IsValid() {
			t[p+"public-ipv4s"], t[p+"public-hostname"] = e.public.String(), s.publicName(e.public)
			t["meta-data/public-ipv4"], t["meta-data/public-hostname"] = e.public.String(), s.publicName(e.public)
		}
	}
	if i.meta.tags == "enabled" {
		for k, v := range i.tags {
			t["meta-data/tags/instance/"+k] = v
		}
	}
	if !i.reclaim.IsZero() {
		at := i.reclaim.UTC().Format(time.RFC3339)
		t["meta-data/spot/instance-action"] = fmt.Sprintf(`{"action":"terminate","time":"%s"}`, at)
		t["meta-data/spot/termination-time"] = at
	}
	return t
}

// lookup finds a path, or what is below it: the names, one a line, folders with a
// slash.
func lookup(tree map[string]string, path string) (string, bool) {
	if v, ok := tree[path]; ok {
		return v, true
	}
	below := map[string]bool{}
	for k := range tree {
		if rest, ok := strings.CutPrefix(k, path+"/"); ok {
			name, _, deeper := strings.Cut(rest, "/")
			if deeper {
				name += "/"
			}
			below[name] = true
		}
	}
	names := make([]string, 0, len(below))
	for n := range below {
		names = append(names, n)
	}
	sort.Strings(names)
	return strings.Join(names, "\n"), len(names) > 0
}
