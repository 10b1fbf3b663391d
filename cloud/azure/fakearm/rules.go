// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// putGroup makes a network security group with the rules in it.
func (s *Server) putGroup(c *call, old *resource) (*reply, *apiError) {
	rules := list(c.body, "properties.securityRules")
	seen := map[string]bool{}
	for i, r := range rules {
		if err := checkRule(r.(map[string]any), fmt.Sprintf("properties.securityRules[%d]", i)); err != nil {
			return nil, err
		}
		k := text(r, "properties.direction") + fmt.Sprint(number(r, "properties.priority"))
		if seen[k] {
			return nil, badRequest("SecurityRuleConflict", "", "Security rules of %s have the same Priority and Direction.", c.path.names[0])
		}
		seen[k] = true
	}
	doc := clone(c.body)
	doc["location"] = s.cfg.Region
	drop(doc, "properties.securityRules")
	put(doc, "properties.provisioningState", "Succeeded")
	r, status := old, http.StatusOK
	if old == nil {
		r, status = s.add(c.now, c.path.kind(), c.path.id(s), doc), http.StatusCreated
	} else {
		old.doc = doc
		for _, k := range sortedKeys(s.resources) { // a PUT replaces the rules
			if strings.HasPrefix(k, key(old.id)+"/securityrules/") {
				delete(s.resources, k)
			}
		}
	}
	for _, rule := range rules {
		d := clone(rule.(map[string]any))
		put(d, "properties.provisioningState", "Succeeded")
		s.add(c.now, kinds["microsoft.network/networksecuritygroups/securityrules"], r.id+"/securityRules/"+text(d, "name"), d)
	}
	return s.begun(c, r, status)
}

// putRule makes one rule of a group.
func (s *Server) putRule(c *call, old *resource) (*reply, *apiError) {
	id := c.path.id(s)
	group, err := s.parent(c, "/securityRules/")
	if err != nil {
		return nil, err
	}
	if err := checkRule(c.body, ""); err != nil {
		return nil, err
	}
	for _, k := range sortedKeys(s.resources) {
		o := s.resources[k]
		if strings.HasPrefix(k, key(group.id)+"/securityrules/") && o != old &&
			number(o.doc, "properties.priority") == number(c.body, "properties.priority") && text(o.doc, "properties.direction") == text(c.body, "properties.direction") {
			return nil, badRequest("SecurityRuleConflict", "", "Security rule %s conflicts with rule %s. Rules cannot have the same Priority and Direction. To learn more, see aka.ms/nsgrules.", c.path.names[1], o.name)
		}
	}
	if old != nil {
		old.doc = clone(c.body)
		return s.begun(c, old, http.StatusOK)
	}
	return s.begun(c, s.add(c.now, c.path.kind(), id, clone(c.body)), http.StatusCreated)
}

// checkRule: what a security rule must say (API reference of SecurityRule).
func checkRule(rule map[string]any, at string) *apiError {
	bad := func(field, format string, args ...any) *apiError {
		return badRequest("InvalidSecurityRule", join(at, "properties."+field), format, args...)
	}
	if p := number(rule, "properties.priority"); p < 100 || p > 4096 {
		return bad("priority", "Security rule has invalid Priority. Value provided: %g. Priority has to be from 100 to 4096.", p)
	}
	for _, side := range []string{"source", "destination"} {
		one, many := text(rule, "properties."+side+"PortRange"), list(rule, "properties."+side+"PortRanges")
		if (one == "") == (len(many) == 0) {
			return bad(side+"PortRange", "Security rule must have exactly one of %sPortRange and %sPortRanges.", side, side)
		}
		for _, r := range append(many, one) {
			if text, _ := r.(string); text != "" && !goodPorts(text) {
				return badRequest("SecurityRuleInvalidPortRange", join(at, "properties."+side+"PortRange"), "Security rule has invalid Port range. Value provided: %s. Value should be an integer OR integer range with '-' delimiter. Valid range 0-65535.", text)
			}
		}
		one, many = text(rule, "properties."+side+"AddressPrefix"), list(rule, "properties."+side+"AddressPrefixes")
		groups := list(rule, "properties."+side+"ApplicationSecurityGroups")
		if one == "" && len(many) == 0 && len(groups) == 0 {
			return bad(side+"AddressPrefix", "Security rule must specify %sAddressPrefix, %sAddressPrefixes or %sApplicationSecurityGroups.", side, side, side)
		}
		for _, r := range append(many, one) {
			if text, _ := r.(string); text != "" && !goodPrefix(text) {
				return badRequest("SecurityRuleInvalidAddressPrefix", join(at, "properties."+side+"AddressPrefix"), "Security rule has invalid Address prefix. Value provided: %s.", text)
			}
		}
	}
	return nil
}

func goodPorts(p string) bool {
	if p == "*" {
		return true
	}
	lo, hi, ranged := strings.Cut(p, "-")
	a, err := strconv.ParseUint(lo, 10, 16)
	if err != nil || !ranged {
		return err == nil
	}
	b, err := strconv.ParseUint(hi, 10, 16)
	return err == nil && a <= b
}

// goodPrefix: an address, a prefix, "*", or a service tag, which is a word.
func goodPrefix(p string) bool {
	if p == "*" {
		return true
	}
	if strings.ContainsAny(p, "/:") || p[0] >= '0' && p[0] <= '9' {
		if strings.Contains(p, "/") {
			_, err := netip.ParsePrefix(p)
			return err == nil
		}
		_, err := netip.ParseAddr(p)
		return err == nil
	}
	return strings.IndexFunc(p, func(r rune) bool { return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '.') }) < 0
}

// putSubnet makes a subnet of a network.
func (s *Server) putSubnet(c *call, old *resource) (*reply, *apiError) {
	id := c.path.id(s)
	if _, err := s.parent(c, "/subnets/"); err != nil {
		return nil, err
	}
	cidr, err := netip.ParsePrefix(text(c.body, "properties.addressPrefix"))
	if err != nil || cidr.Masked() != cidr {
		return nil, badRequest("InvalidCIDRNotation", "properties.addressPrefix", "The address prefix %s in resource %s has an invalid CIDR notation.", text(c.body, "properties.addressPrefix"), id)
	}
	if old != nil {
		merge(old.doc, clone(c.body))
		return s.begun(c, old, http.StatusOK)
	}
	return s.begun(c, s.add(c.now, c.path.kind(), id, clone(c.body)), http.StatusCreated)
}

// putSimple makes a resource without rules of its own.
func (s *Server) putSimple(c *call, old *resource) (*reply, *apiError) {
	doc := clone(c.body)
	doc["location"] = s.cfg.Region
	drop(doc, "properties.subnets")
	if old != nil {
		old.doc = doc
		return s.begun(c, old, http.StatusOK)
	}
	r := s.add(c.now, c.path.kind(), c.path.id(s), doc)
	for _, sn := range list(c.body, "properties.subnets") {
		d := clone(sn.(map[string]any))
		put(d, "properties.provisioningState", "Succeeded")
		s.add(c.now, kinds["microsoft.network/virtualnetworks/subnets"], r.id+"/subnets/"+text(d, "name"), d)
	}
	return s.begun(c, r, http.StatusCreated)
}

// patchSimple changes tags, and what else the shape of the PATCH lets through.
func (s *Server) patchSimple(c *call, r *resource) (*reply, *apiError) {
	merge(r.doc, clone(c.body))
	return s.begun(c, r, http.StatusOK)
}

func (s *Server) deleteSimple(c *call, r *resource) (*reply, *apiError) {
	return s.removing(c, r, func(now time.Time) {
		s.dropUpload(r.upload)
		s.erase(now, r)
	})
}

// deleteParent refuses while the resource has children.
func (s *Server) deleteParent(c *call, r *resource) (*reply, *apiError) {
	for _, k := range sortedKeys(s.resources) {
		if strings.HasPrefix(k, key(r.id)+"/") {
			return nil, conflict("CannotDeleteResource", "", "Can not delete resource before nested resources are deleted: %s.", s.resources[k].id)
		}
	}
	return s.deleteSimple(c, r)
}
