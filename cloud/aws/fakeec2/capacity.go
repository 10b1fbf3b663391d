// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"net/netip"
	"slices"
	"sort"
)

// Capacity is how many instances may be there at once of a type, in a zone, of a
// market ("spot" or "on-demand"); an empty field stands for all. Free is how many
// more there may be, beyond those there are when it is set.
type Capacity struct {
	Type, Zone, Market string
	Free               int
}

// SetCapacity limits what can be launched from now on, in place of an earlier limit
// on the same instances. A negative Free removes the limit.
func (s *Server) SetCapacity(c Capacity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.capacities = slices.DeleteFunc(s.capacities, func(o *Capacity) bool {
		return o.Type == c.Type && o.Zone == c.Zone && o.Market == c.Market
	})
	if c.Free >= 0 {
		c.Free += s.count(c)
		s.capacities = append(s.capacities, &c) // Free is now the most there may be
	}
}

// count is how many of the instances there are that c limits.
func (s *Server) count(c Capacity) int {
	now, n := s.cfg.Now(), 0
	for _, i := range s.instances {
		if i.alive(now) && c.covers(i.typ.Name, i.subnet.Zone, i.market) {
			n++
		}
	}
	return n
}

func (c Capacity) covers(typ, zone, market string) bool {
	return (c.Type == "" || c.Type == typ) && (c.Zone == "" || c.Zone == zone) && (c.Market == "" || c.Market == market)
}

// SetQuota limits the account's vCPUs: of "standard", "g" and "p" instances on
// demand, and of "spot" ones. A negative number removes the limit.
func (s *Server) SetQuota(name string, vcpus int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.quotas[name] = vcpus; vcpus < 0 {
		delete(s.quotas, name)
	}
}

// findRoom checks quota, capacity and addresses, and chooses the subnet if the
// request leaves it open.
func (s *Server) findRoom(c *call, l *plan) error {
	quota := l.typ.quota()
	if l.market == "spot" {
		quota = "spot"
	}
	if limit, ok := s.quotas[quota]; ok {
		used := 0
		for _, i := range s.instances {
			if q := i.typ.quota(); i.alive(c.now) && (i.market == "spot" && quota == "spot" || i.market != "spot" && q == quota) {
				used += i.typ.VCPUs
			}
		}
		if used+l.p.num("MinCount")*l.typ.VCPUs > limit {
			if quota == "spot" {
				return errorf(400, "MaxSpotInstanceCountExceeded", "Max spot instance count exceeded")
			}
			return errorf(400, "VcpuLimitExceeded", "You have requested more vCPU capacity than your current vCPU limit of %d allows for the "+
				"instance bucket that the specified instance type belongs to. Please visit http://aws.amazon.com/contact-us/ec2-request "+
				"to request an adjustment to this limit.", limit)
		}
		l.n = min(l.n, (limit-used)/l.typ.VCPUs)
	}
	open := l.subnet == nil
	candidates := []*subnet{l.subnet}
	if open {
		candidates = s.defaultSubnets(l.p.at("Placement").str("AvailabilityZone"))
	}
	var free []string // zones where there is room
	for _, n := range s.subnets {
		if s.room(c, l, n) >= l.p.num("MinCount") && !slices.Contains(free, n.Zone) {
			free = append(free, n.Zone)
		}
	}
	sort.Strings(free)
	for _, n := range candidates {
		if room := s.room(c, l, n); room >= l.p.num("MinCount") {
			l.subnet, l.n = n, min(l.n, room)
			return s.checkAddresses(l)
		}
	}
	if open && l.p.at("Placement").str("AvailabilityZone") == "" {
		return errorf(500, "InsufficientInstanceCapacity", "We currently do not have sufficient %s capacity in the region you requested. "+
			"Our system will be working on provisioning additional capacity.", l.typ.Name)
	}
	zone := l.p.at("Placement").str("AvailabilityZone")
	if !open {
		zone = l.subnet.Zone
	}
	if l.typ.Zones != nil && !slices.Contains(l.typ.Zones, zone) {
		return errorf(400, "Unsupported", "Your requested instance type (%s) is not supported in your requested Availability Zone (%s). "+
			"Please retry your request by not specifying an Availability Zone%s.", l.typ.Name, zone, describeZonesText(l.typ.Zones))
	}
	if l.market == "spot" {
		return errorf(500, "InsufficientInstanceCapacity", "There is no Spot capacity available that matches your request.")
	}
	return errorf(500, "InsufficientInstanceCapacity", "We currently do not have sufficient %s capacity in the Availability Zone you requested (%s). "+
		"Our system will be working on provisioning additional capacity. You can currently get %s capacity by not specifying an "+
		"Availability Zone in your request%s.", l.typ.Name, zone, l.typ.Name, describeZonesText(free))
}

// room is how many instances can be launched in the subnet's zone.
func (s *Server) room(c *call, l *plan, n *subnet) int {
	if l.typ.Zones != nil && !slices.Contains(l.typ.Zones, n.Zone) {
		return 0
	}
	room := l.n
	for _, limit := range s.capacities {
		if limit.covers(l.typ.Name, n.Zone, l.market) {
			room = min(room, limit.Free-s.count(*limit))
		}
	}
	return room
}

// defaultSubnets are those of the default VPC, in the order of their zones.
func (s *Server) defaultSubnets(zone string) []*subnet {
	var out []*subnet
	for _, n := range s.subnets {
		isDefault := slices.ContainsFunc(s.vpcs, func(v VPC) bool { return v.Default && v.ID == n.VPC })
		if isDefault && (zone == "" || n.Zone == zone) {
			out = append(out, n)
		}
	}
	sort.Slice(out, func(a, b int) bool { return out[a].Zone+out[a].ID < out[b].Zone+out[b].ID })
	return out
}

// checkAddresses tells whether the subnet has as many as the launch needs.
func (s *Server) checkAddresses(l *plan) error {
	need := l.n * len(l.nics)
	if want := l.p.str("PrivateIpAddress"); want != "" {
		addr, _ := netip.ParseAddr(want)
		if !l.subnet.CIDR.Contains(addr) {
			return errorf(400, "InvalidParameterValue", "Address %s does not fall within the subnet's address range", want)
		}
		if s.taken(l.subnet)[addr] {
			return errorf(400, "InvalidIPAddress.InUse", "Address %s is in use.", want)
		}
	}
	if s.freeAddresses(l.subnet) < need {
		return errorf(400, "InsufficientFreeAddressesInSubnet", "There are not enough free addresses in subnet '%s' to satisfy the requested number of instances.", l.subnet.ID)
	}
	return nil
}

// taken are the addresses of a subnet's interfaces.
func (s *Server) taken(n *subnet) map[netip.Addr]bool {
	used := map[netip.Addr]bool{n.Gateway: true}
	now := s.cfg.Now()
	for _, e := range s.enis {
		if e.subnet == n && e.exists(now) {
			used[e.addr] = true
		}
	}
	return used
}

// freeAddresses is how many a subnet still has. The first four and the last are the
// service's own ("Subnet sizing", VPC User Guide).
func (s *Server) freeAddresses(n *subnet) int {
	limit := n.Free
	if limit == 0 {
		limit = 1<<(32-n.CIDR.Bits()) - 5
	}
	used := s.taken(n)
	return limit - (len(used) - 1)
}

// nextAddress is the first free one, or want if that is given.
func (s *Server) nextAddress(n *subnet, want string) netip.Addr {
	if a, err := netip.ParseAddr(want); err == nil {
		return a
	}
	used := s.taken(n)
	a := n.CIDR.Masked().Addr()
	for range 4 {
		a = a.Next()
	}
	for used[a] {
		a = a.Next()
	}
	return a
}
