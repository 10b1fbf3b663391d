// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"net/netip"
	"slices"
	"sort"
	"strings"
)

// known checks that all of a request's ids, which its list parameter names, are keys
// of m.
func known[T any](c *call, param, prefix string, m map[string]T) error {
	if err := wellFormed(prefix, c.strs(param)...); err != nil {
		return err
	}
	var missing []string
	for _, id := range c.strs(param) {
		if _, ok := m[id]; !ok {
			missing = append(missing, id)
		}
	}
	if len(missing) > 0 {
		return unknownID(prefix, missing...)
	}
	return nil
}

func (s *Server) describeSubnets(c *call) (obj, error) {
	if err := known(c, "SubnetId", "subnet-", s.subnets); err != nil {
		return nil, err
	}
	var all []*subnet
	for _, n := range s.subnets {
		if ids := c.strs("SubnetId"); len(ids) == 0 || slices.Contains(ids, n.ID) {
			all = append(all, n)
		}
	}
	sort.Slice(all, func(a, b int) bool { return all[a].ID < all[b].ID })
	all, err := filtered(c, all, func(n *subnet) map[string]string { return n.tags }, attrs[*subnet]{
		"subnet-id":         one(func(n *subnet) string { return n.ID }),
		"vpc-id":            one(func(n *subnet) string { return n.VPC }),
		"availability-zone": one(func(n *subnet) string { return n.Zone }),
		"availabilityZone":  one(func(n *subnet) string { return n.Zone }),
		"cidr-block":        one(func(n *subnet) string { return n.CIDR.String() }),
		"state":             one(func(*subnet) string { return "available" }),
	})
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, n := range all {
		isDefault := slices.ContainsFunc(s.vpcs, func(v VPC) bool { return v.Default && v.ID == n.VPC })
		set = append(set, obj{"subnetId": n.ID, "subnetArn": "arn:aws:ec2:" + s.cfg.Region + ":" + s.cfg.Account + ":subnet/" + n.ID,
			"state": "available", "ownerId": s.cfg.Account, "vpcId": n.VPC, "cidrBlock": n.CIDR.Masked().String(), "availabilityZone": n.Zone,
			"availabilityZoneId": s.zoneID(n.Zone), "ipv6Native": false, "privateDnsNameOptionsOnLaunch": obj{"hostnameType": "ip-name",
				"enableResourceNameDnsARecord": false, "enableResourceNameDnsAAAARecord": false},
			"availableIpAddressCount": max(0, s.freeAddresses(n)), "defaultForAz": isDefault, "mapPublicIpOnLaunch": n.PublicIPs,
			"assignIpv6AddressOnCreation": false, "ipv6CidrBlockAssociationSet": []obj{}, "tagSet": tagSet(n.tags)})
	}
	return obj{"subnetSet": set}, c.dryRun()
}

func (s *Server) describeVpcs(c *call) (obj, error) {
	byID := map[string]VPC{}
	for _, v := range s.vpcs {
		byID[v.ID] = v
	}
	if err := known(c, "VpcId", "vpc-", byID); err != nil {
		return nil, err
	}
	all := slices.DeleteFunc(slices.Clone(s.vpcs), func(v VPC) bool {
		ids := c.strs("VpcId")
		return len(ids) > 0 && !slices.Contains(ids, v.ID)
	})
	all, err := filtered(c, all, func(VPC) map[string]string { return nil }, attrs[VPC]{
		"vpc-id":                            one(func(v VPC) string { return v.ID }),
		"cidr":                              one(func(v VPC) string { return v.CIDR.String() }),
		"cidr-block-association.cidr-block": one(func(v VPC) string { return v.CIDR.String() }),
		"is-default":                        one(func(v VPC) string { return map[bool]string{true: "true", false: "false"}[v.Default] }),
		"isDefault":                         one(func(v VPC) string { return map[bool]string{true: "true", false: "false"}[v.Default] }),
		"state":                             one(func(VPC) string { return "available" }),
	})
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, v := range all {
		set = append(set, obj{"vpcId": v.ID, "ownerId": s.cfg.Account, "state": "available", "cidrBlock": v.CIDR.String(), "isDefault": v.Default,
			"cidrBlockAssociationSet": []obj{{"associationId": "vpc-cidr-assoc-" + strings.TrimPrefix(v.ID, "vpc-"), "cidrBlock": v.CIDR.String(),
				"cidrBlockState": obj{"state": "associated"}}},
			"dhcpOptionsId": "dopt-0123456789abcdef0", "instanceTenancy": "default", "tagSet": []obj{}})
	}
	return obj{"vpcSet": set}, c.dryRun()
}

// rule is one source of one permission of a security group.
type rule struct {
	id, protocol      string
	from, to          int
	cidr, cidr6       string
	group, prefixList string
	description       string
	tags              map[string]string
}

func (r rule) same(o rule) bool {
	return r.protocol == o.protocol && r.from == o.from && r.to == o.to && r.cidr == o.cidr && r.cidr6 == o.cidr6 &&
		r.group == o.group && r.prefixList == o.prefixList
}

func (s *Server) describeGroups(c *call) (obj, error) {
	if err := known(c, "GroupId", "sg-", s.groups); err != nil {
		return nil, err
	}
	var all []*group
	for _, g := range s.groups {
		ids, names := c.strs("GroupId"), c.strs("GroupName")
		if len(ids)+len(names) == 0 || slices.Contains(ids, g.ID) || slices.Contains(names, g.Name) {
			all = append(all, g)
		}
	}
	for _, n := range c.strs("GroupName") {
		if !slices.ContainsFunc(all, func(g *group) bool { return g.Name == n }) {
			return nil, errorf(400, "InvalidGroup.NotFound", "The security group '%s' does not exist", n)
		}
	}
	sort.Slice(all, func(a, b int) bool { return all[a].ID < all[b].ID })
	all, err := filtered(c, all, func(g *group) map[string]string { return g.tags }, attrs[*group]{
		"group-id":    one(func(g *group) string { return g.ID }),
		"group-name":  one(func(g *group) string { return g.Name }),
		"vpc-id":      one(func(g *group) string { return g.VPC }),
		"owner-id":    one(func(*group) string { return s.cfg.Account }),
		"description": one(func(g *group) string { return g.Name }),
	})
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, g := range all {
		set = append(set, obj{"groupId": g.ID, "groupName": g.Name, "groupDescription": g.Name, "ownerId": s.cfg.Account, "vpcId": g.VPC,
			"securityGroupArn": "arn:aws:ec2:" + s.cfg.Region + ":" + s.cfg.Account + ":security-group/" + g.ID,
			"ipPermissions":    s.permissions(g.rules), "tagSet": tagSet(g.tags),
			"ipPermissionsEgress": s.permissions([]rule{{protocol: "-1", cidr: "0.0.0.0/0"}})})
	}
	return obj{"securityGroupInfo": set}, c.dryRun()
}

// permissions groups rules as replies have them: by protocol and ports.
func (s *Server) permissions(rules []rule) []obj {
	out := []obj{}
	for i, r := range rules {
		if slices.ContainsFunc(rules[:i], func(o rule) bool { return o.protocol == r.protocol && o.from == r.from && o.to == r.to }) {
			continue
		}
		p := obj{"ipProtocol": r.protocol, "groups": []obj{}, "ipRanges": []obj{}, "ipv6Ranges": []obj{}, "prefixListIds": []obj{}}
		if r.protocol != "-1" {
			p["fromPort"], p["toPort"] = r.from, r.to
		}
		for _, o := range rules[i:] {
			if o.protocol != r.protocol || o.from != r.from || o.to != r.to {
				continue
			}
			switch {
			case o.cidr != "":
				p["ipRanges"] = append(p["ipRanges"].([]obj), obj{"cidrIp": o.cidr, "description": o.description})
			case o.cidr6 != "":
				p["ipv6Ranges"] = append(p["ipv6Ranges"].([]obj), obj{"cidrIpv6": o.cidr6, "description": o.description})
			case o.group != "":
				p["groups"] = append(p["groups"].([]obj), obj{"groupId": o.group, "userId": s.cfg.Account, "description": o.description})
			case o.prefixList != "":
				p["prefixListIds"] = append(p["prefixListIds"].([]obj), obj{"prefixListId": o.prefixList, "description": o.description})
			}
		}
		out = append(out, p)
	}
	return out
}

// ingress reads the group and the rules of an ingress request.
func (s *Server) ingress(c *call) (*group, []rule, error) {
	id := c.str("GroupId")
	if id == "" {
		return nil, nil, errorf(400, "MissingParameter", "The request must contain the parameter groupName or groupId")
	}
	if err := wellFormed("sg-", id); err != nil {
		return nil, nil, err
	}
	g := s.groups[id]
	if g == nil {
		return nil, nil, unknownID("sg-", id)
	}
	perms := c.all("IpPermissions")
	if c.has("IpProtocol") { // the short form, of one permission
		p := &params{text: map[string]string{}, subs: map[string][]*params{"IpRanges": {{text: map[string]string{"CidrIp": c.str("CidrIp")}}}}}
		for _, n := range []string{"IpProtocol", "FromPort", "ToPort"} {
			if c.has(n) {
				p.text[n] = c.str(n)
			}
		}
		perms = append(perms, p)
	}
	var rules []rule
	for _, p := range perms {
		base, err := protocolAndPorts(p)
		if err != nil {
			return nil, nil, err
		}
		add := func(set func(*rule), description string) {
			r := base
			r.description = description
			set(&r)
			rules = append(rules, r)
		}
		for _, x := range p.all("IpRanges") {
			pfx, err := netip.ParsePrefix(x.str("CidrIp"))
			if err != nil || !pfx.Addr().Is4() {
				return nil, nil, errorf(400, "InvalidParameterValue", "CIDR block %s is malformed", x.str("CidrIp"))
			}
			add(func(r *rule) { r.cidr = pfx.Masked().String() }, x.str("Description"))
		}
		for _, x := range p.all("Ipv6Ranges") {
			pfx, err := netip.ParsePrefix(x.str("CidrIpv6"))
			if err != nil || !pfx.Addr().Is6() {
				return nil, nil, errorf(400, "InvalidParameterValue", "CIDR block %s is malformed", x.str("CidrIpv6"))
			}
			add(func(r *rule) { r.cidr6 = pfx.Masked().String() }, x.str("Description"))
		}
		for _, x := range p.all("Groups") {
			if s.groups[x.str("GroupId")] == nil {
				return nil, nil, unknownID("sg-", x.str("GroupId"))
			}
			add(func(r *rule) { r.group = x.str("GroupId") }, x.str("Description"))
		}
		for _, x := range p.all("PrefixListIds") {
			add(func(r *rule) { r.prefixList = x.str("PrefixListId") }, x.str("Description"))
		}
	}
	if len(rules) == 0 {
		return nil, nil, errorf(400, "MissingParameter", "Either 'ipPermissions' or 'securityGroupRuleIds' should be provided.")
	}
	return g, rules, nil
}

func protocolAndPorts(p *params) (rule, error) {
	names := map[string]string{"tcp": "tcp", "6": "tcp", "udp": "udp", "17": "udp", "icmp": "icmp", "1": "icmp", "icmpv6": "icmpv6", "58": "icmpv6", "-1": "-1"}
	r := rule{protocol: names[p.str("IpProtocol")], from: p.num("FromPort"), to: p.num("ToPort")}
	switch {
	case r.protocol == "":
		return r, errorf(400, "InvalidParameterValue", "Invalid value '%s' for IP protocol. Unknown protocol.", p.str("IpProtocol"))
	case r.protocol == "-1":
		r.from, r.to = 0, 0
	case !p.has("FromPort") || !p.has("ToPort"):
		return r, errorf(400, "InvalidParameterValue", "Invalid value 'Must specify both from and to ports with TCP/UDP.' for portRange.")
	case r.from > r.to && r.to != -1 || r.from < -1 || r.to > 65535:
		return r, errorf(400, "InvalidParameterValue", "Invalid TCP/UDP port range (%d:%d)", r.from, r.to)
	}
	return r, nil
}

func (s *Server) authorizeIngress(c *call) (obj, error) {
	g, rules, err := s.ingress(c)
	if err != nil {
		return nil, err
	}
	tags, err := s.tagsFor(c, "security-group-rule")
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		if slices.ContainsFunc(g.rules, r.same) {
			peer := r.cidr + r.cidr6 + r.group + r.prefixList
			return nil, errorf(400, "InvalidPermission.Duplicate", "the specified rule \"peer: %s, %s, from port: %d, to port: %d, ALLOW\" already exists", peer, r.protocol, r.from, r.to)
		}
	}
	if len(g.rules)+len(rules) > 60 {
		return nil, errorf(400, "RulesPerSecurityGroupLimitExceeded", "The maximum number of rules per security group has been reached.")
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	set := []obj{}
	for _, r := range rules {
		r.id, r.tags = s.newID("sgr-"), tags["security-group-rule"]
		g.rules = append(g.rules, r)
		o := obj{"securityGroupRuleId": r.id, "groupId": g.ID, "groupOwnerId": s.cfg.Account, "isEgress": false, "ipProtocol": r.protocol,
			"fromPort": r.from, "toPort": r.to, "cidrIpv4": r.cidr, "cidrIpv6": r.cidr6, "prefixListId": r.prefixList,
			"description": r.description, "tagSet": tagSet(r.tags)}
		if r.group != "" {
			o["referencedGroupInfo"] = obj{"groupId": r.group, "userId": s.cfg.Account}
		}
		set = append(set, o)
	}
	return obj{"return": true, "securityGroupRuleSet": set}, nil
}

func (s *Server) revokeIngress(c *call) (obj, error) {
	g, rules, err := s.ingress(c)
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		if !slices.ContainsFunc(g.rules, r.same) {
			return nil, errorf(400, "InvalidPermission.NotFound", "The specified rule does not exist in this security group.")
		}
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	for _, r := range rules {
		g.rules = slices.DeleteFunc(g.rules, r.same)
	}
	return obj{"return": true}, nil
}
