// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"cmp"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// nicState is what there is of an interface besides its document.
type nicState struct {
	subnet   *Subnet
	addr     netip.Addr
	mac      string // "02:0d:3a:00:00:01"
	option   string // deleteOption in the machine's networkProfile
	reserved time.Time
	by       string // machine that it is reserved for
}

// checkNetwork is the networkProfile of a machine.
func (s *Server) checkNetwork(c *call, p *plan, old *resource) *apiError {
	np := object(c.body, "properties.networkProfile")
	refs, configs := list(np, "networkInterfaces"), list(np, "networkInterfaceConfigurations")
	by := "Microsoft.Compute/virtualMachines/write"
	switch {
	case len(refs)+len(configs) == 0:
		return invalid("networkProfile", "Virtual Machine %s must have at least one network interface.", c.path.names[0])
	case len(refs) > 0 && len(configs) > 0:
		return invalid("networkProfile", "Parameters 'networkInterfaces' and 'networkInterfaceConfigurations' cannot be used together.")
	case len(configs) > 0 && text(np, "networkApiVersion") == "":
		return invalid("networkProfile.networkApiVersion", "Required parameter 'networkProfile.networkApiVersion' is missing (null): networkInterfaceConfigurations need it.")
	}
	primary := 0
	for _, n := range append(refs, configs...) {
		if flag(n, "properties.primary") {
			primary++
		}
	}
	if n := len(refs) + len(configs); n > 2 || n == 2 && primary != 1 {
		return badRequest("VirtualMachineMustHaveOneNetworkInterfaceAsPrimary", "networkProfile", "Virtual machine %s must have one network interface set as the primary, and at most 2; got %d, %d of them primary.", c.path.names[0], n, primary)
	}
	for _, n := range refs {
		nic := s.resources[key(text(n, "id"))]
		if nic == nil || nic.nic == nil {
			return notFoundReference(text(n, "id"), c.path.id(s))
		}
		if err := c.linked("Microsoft.Network/networkInterfaces/join/action", nic.id, by); err != nil {
			return err
		}
		if err := s.nicFree(c.now, nic, c.path.id(s)); err != nil {
			return err
		}
	}
	for i, n := range configs {
		if err := s.checkConfiguration(c, p, i, n.(map[string]any), old); err != nil {
			return err
		}
	}
	return nil
}

func notFoundReference(id, by string) *apiError {
	return badRequest("InvalidResourceReference", "", "Resource %s referenced by resource %s was not found. Please make sure that the referenced resource exists, and that both resources are in the same region.", id, by)
}

func (s *Server) checkConfiguration(c *call, p *plan, i int, n map[string]any, old *resource) *apiError {
	by := "Microsoft.Compute/virtualMachines/write"
	where := fmt.Sprintf("networkInterfaceConfigurations[%d]", i)
	if sg := text(n, "properties.networkSecurityGroup.id"); sg != "" {
		if r := s.resources[key(sg)]; r == nil || r.kind.name != "Microsoft.Network/networkSecurityGroups" {
			return notFoundReference(sg, where)
		}
		if err := c.linked("Microsoft.Network/networkSecurityGroups/join/action", sg, by); err != nil {
			return err
		}
	}
	if flag(n, "properties.enableAcceleratedNetworking") && !p.size.Accelerated {
		return badRequest("VMSizeIsNotPermittedToEnableAcceleratedNetworking", where, "Virtual machine size %s is not permitted to enable accelerated networking.", p.size.Name)
	}
	ips := list(n, "properties.ipConfigurations")
	if len(ips) == 0 {
		return invalid(where+".ipConfigurations", "Required parameter 'ipConfigurations' is missing (null).")
	}
	for _, ip := range ips {
		sn := text(ip, "properties.subnet.id")
		if sn == "" {
			return invalid(where+".ipConfigurations.subnet", "Required parameter 'subnet' is missing (null).")
		}
		if err := c.linked("Microsoft.Network/virtualNetworks/subnets/join/action", sn, by); err != nil {
			return err
		}
		if s.subnet(sn) == nil {
			return notFoundReference(sn, where)
		}
		if pub := object(ip, "properties.publicIPAddressConfiguration"); pub != nil {
			if text(pub, "sku.name") != "Standard" {
				return badRequest("PublicIPBasicSkuIsRetired", where+".publicIPAddressConfiguration.sku", "Basic public IP addresses cannot be created any more: use sku Standard.")
			}
			if text(pub, "properties.publicIPAllocationMethod") == "Dynamic" {
				return badRequest("StandardSkuPublicIPAddressesMustBeStatic", where+".publicIPAddressConfiguration", "Standard sku publicIp %s must have AllocationMethod set to Static.", text(pub, "name"))
			}
		}
	}
	return nil
}

// nicFree tells whether a machine may have an interface.
func (s *Server) nicFree(now time.Time, nic *resource, vm string) *apiError {
	if by := text(nic.doc, "properties.virtualMachine.id"); by != "" && !strings.EqualFold(by, vm) {
		return nicInUse(nic, by)
	}
	if now.Before(nic.nic.reserved) && !strings.EqualFold(nic.nic.by, vm) {
		return nicReserved(nic)
	}
	return nil
}

func nicInUse(nic *resource, by string) *apiError {
	return badRequest("NicInUse", "", "Network Interface %s is used by existing resource %s. In order to delete the network interface, it must be dissociated from the resource. To learn more, see aka.ms/deletenic.", nic.id, by)
}

func nicReserved(nic *resource) *apiError {
	return badRequest("NicReservedForAnotherVm", "", "Nic(s) in request is reserved for another Virtual Machine for 180 seconds. Please provide another nic(s) or retry after 180 seconds. Reserved VM: %s", nic.nic.by)
}

// newNIC makes an interface with an address in its subnet.
func (s *Server) newNIC(c *call, id string, doc map[string]any) (*resource, *apiError) {
	st := &nicState{}
	for _, ip := range list(doc, "properties.ipConfigurations") {
		ip := ip.(map[string]any)
		snID := text(ip, "properties.subnet.id")
		sn := s.subnet(snID)
		if sn == nil {
			return nil, notFoundReference(snID, id)
		}
		a, err := s.freeAddress(sn)
		if err != nil {
			return nil, err
		}
		if want := text(ip, "properties.privateIPAddress"); want != "" && text(ip, "properties.privateIPAllocationMethod") == "Static" {
			if a, err = s.staticAddress(sn, want); err != nil {
				return nil, err
			}
		}
		put(ip, "properties.privateIPAddress", a.String())
		if st.subnet == nil {
			st.subnet, st.addr = sn, a
		}
	}
	s.serial++
	st.mac = fmt.Sprintf("02:0d:3a:%02x:%02x:%02x", s.serial>>16&0xff, s.serial>>8&0xff, s.serial&0xff)
	put(doc, "properties.macAddress", strings.ToUpper(strings.ReplaceAll(st.mac, ":", "-")))
	put(doc, "properties.resourceGuid", newUUID())
	r := s.add(c.now, kinds["microsoft.network/networkinterfaces"], id, doc)
	r.nic = st
	return r, nil
}

// subnet finds one by its id.
func (s *Server) subnet(id string) *Subnet {
	r := s.resources[key(id)]
	if r == nil || r.kind.name != "Microsoft.Network/virtualNetworks/subnets" {
		return nil
	}
	cidr, err := netip.ParsePrefix(text(r.doc, "properties.addressPrefix"))
	if err != nil {
		return nil
	}
	sn := &Subnet{Name: r.name, CIDR: cidr, Gateway: cidr.Masked().Addr().Next()}
	for _, have := range s.cfg.Subnets {
		if strings.EqualFold(s.cfg.SubnetID(have), id) && have.Gateway.IsValid() {
			sn.Gateway = have.Gateway
		}
	}
	return sn
}

// freeAddress is the lowest free one: Azure keeps the first four of a subnet and the
// last for itself.
func (s *Server) freeAddress(sn *Subnet) (netip.Addr, *apiError) {
	used := s.addresses()
	a := sn.CIDR.Masked().Addr()
	for range 4 {
		a = a.Next()
	}
	for ; sn.CIDR.Contains(a) && sn.CIDR.Contains(a.Next()); a = a.Next() {
		if !used[a] && a != sn.Gateway {
			return a, nil
		}
	}
	return a, badRequest("SubnetIsFull", "", "Subnet %s with address prefix %s does not have enough capacity for 1 IP addresses.", sn.Name, sn.CIDR)
}

func (s *Server) staticAddress(sn *Subnet, want string) (netip.Addr, *apiError) {
	a, err := netip.ParseAddr(want)
	if err != nil || !sn.CIDR.Contains(a) {
		return a, badRequest("PrivateIPAddressNotInSubnet", "", "Private static IP address %s does not belong to the range of subnet prefix %s.", want, sn.CIDR)
	}
	if s.addresses()[a] {
		return a, badRequest("PrivateIPAddressInUse", "", "IP address %s is allocated already.", want)
	}
	return a, nil
}

func (s *Server) addresses() map[netip.Addr]bool {
	used := map[netip.Addr]bool{}
	for _, r := range s.resources {
		if r.nic != nil {
			used[r.nic.addr] = true
		}
	}
	return used
}

// putNIC makes an interface by itself.
func (s *Server) putNIC(c *call, old *resource) (*reply, *apiError) {
	if len(list(c.body, "properties.ipConfigurations")) == 0 {
		return nil, badRequest("NetworkInterfaceMustHaveIpConfiguration", "", "Network interface %s must have at least one IP configuration.", c.path.names[0])
	}
	doc := clone(c.body)
	doc["location"] = s.cfg.Region
	id := c.path.id(s)
	for i, ip := range list(doc, "properties.ipConfigurations") {
		ip := ip.(map[string]any)
		ip["id"] = id + "/ipConfigurations/" + text(ip, "name")
		put(ip, "properties.primary", i == 0)
		put(ip, "properties.provisioningState", "Succeeded")
		put(ip, "properties.privateIPAddressVersion", cmp.Or(text(ip, "properties.privateIPAddressVersion"), "IPv4"))
		put(ip, "properties.privateIPAllocationMethod", cmp.Or(text(ip, "properties.privateIPAllocationMethod"), "Dynamic"))
		sn := text(ip, "properties.subnet.id")
		if err := c.linked("Microsoft.Network/virtualNetworks/subnets/join/action", sn, "Microsoft.Network/networkInterfaces/write"); err != nil {
			return nil, err
		}
	}
	if old != nil {
		for k, v := range doc {
			if k != "properties" {
				old.doc[k] = v
			}
		}
		return s.begun(c, old, http.StatusOK)
	}
	nic, err := s.newNIC(c, id, doc)
	if err != nil {
		return nil, err
	}
	return s.begun(c, nic, http.StatusCreated)
}

// begun answers a PUT with an operation that ends in provisioningState Succeeded.
func (s *Server) begun(c *call, r *resource, status int) (*reply, *apiError) {
	put(r.doc, "properties.provisioningState", "Updating")
	r.failed = func(time.Time, *apiError) { put(r.doc, "properties.provisioningState", "Failed") }
	op := s.begin(c, r, s.cfg.Timing.Other, func(time.Time) *apiError {
		put(r.doc, "properties.provisioningState", "Succeeded")
		return nil
	})
	return s.accepted(c, status, op, false, s.view(c, r)), nil
}

// deleteNIC refuses while a machine has the interface, or one has just failed to.
func (s *Server) deleteNIC(c *call, nic *resource) (*reply, *apiError) {
	if by := text(nic.doc, "properties.virtualMachine.id"); by != "" {
		return nil, nicInUse(nic, by)
	}
	if c.now.Before(nic.nic.reserved) {
		return nil, nicReserved(nic)
	}
	return s.removing(c, nic, func(now time.Time) {
		// An address that it had stays, and is free: deleteOption is about machines.
		for _, ip := range list(nic.doc, "properties.ipConfigurations") {
			if pip := s.resources[key(text(ip, "properties.publicIPAddress.id"))]; pip != nil {
				drop(pip.doc, "properties.ipConfiguration")
			}
		}
		s.erase(now, nic)
	})
}

// removing answers a DELETE with an operation.
func (s *Server) removing(c *call, r *resource, gone func(now time.Time)) (*reply, *apiError) {
	if text(r.doc, "properties.provisioningState") == "Deleting" && r.op != nil {
		return s.accepted(c, http.StatusAccepted, r.op, true, nil), nil
	}
	s.preempt(r.op, c.now)
	put(r.doc, "properties.provisioningState", "Deleting")
	r.failed = func(time.Time, *apiError) { put(r.doc, "properties.provisioningState", "Failed") }
	op := s.begin(c, r, s.cfg.Timing.Other, func(now time.Time) *apiError {
		gone(now)
		return nil
	})
	return s.accepted(c, http.StatusAccepted, op, true, nil), nil
}

// eraseNIC removes an interface with the addresses that go with it.
func (s *Server) eraseNIC(now time.Time, nic *resource) {
	for _, ip := range list(nic.doc, "properties.ipConfigurations") {
		if pip := s.resources[key(text(ip, "properties.publicIPAddress.id"))]; pip != nil {
			drop(pip.doc, "properties.ipConfiguration")
			if text(ip, "properties.publicIPAddress.properties.deleteOption") == "Delete" {
				s.erase(now, pip)
			}
		}
	}
	s.erase(now, nic)
}

// inlineAddress makes the public address of an inline interface. It carries its
// configuration's tags.
func (s *Server) inlineAddress(c *call, vm *resource, cfg map[string]any, ipConfig string) (string, *apiError) {
	id := s.cfg.id(vm.group, "Microsoft.Network/publicIPAddresses", text(cfg, "name"))
	if err := c.linked("Microsoft.Network/publicIPAddresses/write", id, "Microsoft.Compute/virtualMachines/write"); err != nil {
		return "", err
	}
	doc := map[string]any{"location": s.cfg.Region, "sku": map[string]any{"name": "Standard", "tier": "Regional"}, "properties": map[string]any{
		"provisioningState": "Succeeded", "publicIPAllocationMethod": "Static", "publicIPAddressVersion": "IPv4",
		"ipConfiguration": map[string]any{"id": ipConfig}}}
	if t := object(cfg, "tags"); t != nil {
		doc["tags"] = clone(t)
	}
	s.newAddress(c.now, id, doc)
	return id, nil
}

// newAddress makes a public address, of a range for documentation (RFC 5737, RFC 2544).
func (s *Server) newAddress(now time.Time, id string, doc map[string]any) *resource {
	s.serial++
	put(doc, "properties.ipAddress", fmt.Sprintf("198.18.%d.%d", s.serial>>8&0xff, s.serial&0xff))
	put(doc, "properties.idleTimeoutInMinutes", 4.0)
	return s.add(now, kinds["microsoft.network/publicipaddresses"], id, doc)
}

func (s *Server) putAddress(c *call, old *resource) (*reply, *apiError) {
	switch {
	case cmp.Or(text(c.body, "sku.name"), "Basic") == "Basic":
		return nil, badRequest("PublicIPBasicSkuIsRetired", "sku", "Basic public IP addresses cannot be created any more: use sku Standard.")
	case text(c.body, "properties.publicIPAllocationMethod") != "Static":
		return nil, badRequest("StandardSkuPublicIPAddressesMustBeStatic", "", "Standard sku publicIp %s must have AllocationMethod set to Static.", c.path.id(s))
	}
	if old != nil {
		merge(old.doc, clone(c.body))
		return s.begun(c, old, http.StatusOK)
	}
	doc := clone(c.body)
	doc["location"] = s.cfg.Region
	return s.begun(c, s.newAddress(c.now, c.path.id(s), doc), http.StatusCreated)
}

func (s *Server) deleteAddress(c *call, r *resource) (*reply, *apiError) {
	if by := text(r.doc, "properties.ipConfiguration.id"); by != "" {
		return nil, badRequest("PublicIPAddressCannotBeDeleted", "", "Public IP address %s can not be deleted since it is still allocated to resource %s. In order to delete the public IP, disassociate/detach the Public IP address from the resource.", r.id, by)
	}
	return s.removing(c, r, func(now time.Time) { s.erase(now, r) })
}

// deleteInUse removes a subnet or security group that nothing uses.
func (s *Server) deleteInUse(c *call, r *resource) (*reply, *apiError) {
	for _, k := range sortedKeys(s.resources) {
		nic := s.resources[k]
		if nic.nic == nil {
			continue
		}
		used := strings.EqualFold(text(nic.doc, "properties.networkSecurityGroup.id"), r.id)
		for _, ip := range list(nic.doc, "properties.ipConfigurations") {
			used = used || strings.EqualFold(text(ip, "properties.subnet.id"), r.id)
		}
		if used {
			code := "InUseNetworkSecurityGroupCannotBeDeleted"
			if strings.Contains(key(r.id), "/subnets/") {
				code = "InUseSubnetCannotBeDeleted"
			}
			return nil, badRequest(code, "", "%s %s is in use by %s and cannot be deleted.", r.kind.name, r.name, nic.id)
		}
	}
	return s.removing(c, r, func(now time.Time) {
		for _, k := range sortedKeys(s.resources) {
			if strings.HasPrefix(k, key(r.id)+"/") {
				s.erase(now, s.resources[k])
			}
		}
		s.erase(now, r)
	})
}
