// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"
)

// makeInstance makes one instance of a launch, with its interfaces and volumes.
func (s *Server) makeInstance(c *call, l *plan, reservation string, index int) *instance {
	tags := maps.Clone(l.tags["instance"])
	i := &instance{resource: s.newResource("i-", c.now, tags), reservation: reservation, index: index, typ: l.typ, image: l.image,
		subnet: l.subnet, token: c.str("ClientToken"), launch: l.p, market: l.market, userData: l.userData, meta: l.meta,
		launched: c.now, terminate: l.p.str("InstanceInitiatedShutdownBehavior") == "terminate" || l.market == "spot",
		protected: l.p.bool("DisableApiTermination")}
	if l.template != nil {
		i.tags["aws:ec2launchtemplate:id"] = l.template.of.id
		i.tags["aws:ec2launchtemplate:version"] = itoa(l.template.number)
	}
	s.instances[i.id] = i
	for n, nic := range l.nics {
		s.makeENI(c, l, i, n, nic)
	}
	for _, b := range l.blocks {
		s.makeVolume(c, l, i, b)
	}
	if l.market == "spot" {
		i.spot = s.makeSpot(c, l, i)
	}
	i.phases = []phase{{at: c.now, seen: c.now, state: pending}}
	if why := s.stillborn(c, l); why != nil {
		i.reason = [2]string{why.Code, why.Code + ": " + why.Message}
		s.enter(i, c.now.Add(s.cfg.StartTime), terminated)
		return i
	}
	s.begin(i, c.now)
	return i
}

// stillborn tells why an instance that was accepted never runs, nil if it does. A
// caller that may not use a key finds out like this ("Instance terminates
// immediately", User Guide).
func (s *Server) stillborn(c *call, l *plan) *Error {
	for _, b := range l.blocks {
		if b.kms != "" && !c.key.may("kms:CreateGrant") {
			return &Error{Code: "Client.InternalError", Message: "Client error on launch"}
		}
	}
	return c.fault.Dies
}

// begin has a pending instance run, with its machine if there is a Host.
func (s *Server) begin(i *instance, at time.Time) {
	if s.cfg.Host != nil {
		s.startMachine(i)
		return
	}
	s.enter(i, at.Add(s.cfg.StartTime), running)
}

func (s *Server) makeENI(c *call, l *plan, i *instance, index int, nic *params) *eni {
	groups := l.groups
	if nic.has("SecurityGroupId") {
		groups = nil
		for _, id := range nic.strs("SecurityGroupId") {
			if g := s.groups[id]; g != nil {
				groups = append(groups, g)
			}
		}
	}
	if len(groups) == 0 {
		for _, g := range s.groups { // the default group of the VPC
			if g.VPC == l.subnet.VPC && g.Name == "default" {
				groups = append(groups, g)
			}
		}
	}
	want := nic.str("PrivateIpAddress")
	if index == 0 && want == "" {
		want = l.p.str("PrivateIpAddress")
	}
	e := &eni{resource: s.newResource("eni-", c.now, maps.Clone(l.tags["network-interface"])), subnet: l.subnet,
		addr: s.nextAddress(l.subnet, want), groups: groups, description: nic.str("Description"), instance: i, index: index,
		attachment: s.newID("eni-attach-"), attached: c.now, deleteOnTermination: true}
	// The kind of address that DHCP servers and guests see on the real thing: locally
	// administered, beginning with 02 or 06.
	e.mac = fmt.Sprintf("02:%02x:%02x:%02x:%02x:%02x", s.random.IntN(256), s.random.IntN(256), s.random.IntN(256), s.random.IntN(256), s.random.IntN(256))
	if nic.has("DeleteOnTermination") {
		e.deleteOnTermination = nic.bool("DeleteOnTermination")
	}
	public := l.subnet.PublicIPs && index == 0
	if nic.has("AssociatePublicIpAddress") {
		public = nic.bool("AssociatePublicIpAddress")
	}
	if public {
		e.public = netip.AddrFrom4([4]byte{198, 51, 100, byte(1 + s.random.IntN(254))}) // RFC 5737
	}
	s.enis[e.id] = e
	i.enis = append(i.enis, e)
	return e
}

func (s *Server) makeVolume(c *call, l *plan, i *instance, b block) *volume {
	v := &volume{resource: s.newResource("vol-", c.now, maps.Clone(b.tags)), gib: b.gib, kind: b.kind, kms: b.kms, snapshot: b.snapshot,
		encrypted: b.encrypted, zone: l.subnet.Zone, iops: b.iops, throughput: b.throughput, instance: i, device: b.device,
		deleteOnTermination: b.deleteOnTermination, attached: c.now}
	if b.encrypted && v.kms == "" {
		v.kms = "arn:aws:kms:" + s.cfg.Region + ":" + s.cfg.Account + ":key/aws-managed-ebs"
	}
	switch {
	case b.kind == "gp3":
		v.iops, v.throughput = max(v.iops, 3000), max(v.throughput, 125)
	case b.kind == "gp2":
		v.iops = min(max(100, 3*b.gib), 16000)
	}
	s.volumes[v.id] = v
	i.volumes = append(i.volumes, v)
	return v
}

// makeRemains makes what a launch that failed on the way leaves behind: a volume and
// an interface that belong to no instance.
func (s *Server) makeRemains(c *call, l *plan) {
	nobody := &instance{}
	e := s.makeENI(c, l, nobody, 0, l.nics[0])
	e.instance = nil
	for _, b := range l.blocks[:min(1, len(l.blocks))] {
		s.makeVolume(c, l, nobody, b).instance = nil
	}
}

// hostname is the private DNS name of an address.
func (s *Server) hostname(a netip.Addr) string {
	suffix := "." + s.cfg.Region + ".compute.internal"
	if s.cfg.Region == "us-east-1" {
		suffix = ".ec2.internal"
	}
	return "ip-" + strings.ReplaceAll(a.String(), ".", "-") + suffix
}
