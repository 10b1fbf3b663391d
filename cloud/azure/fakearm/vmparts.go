// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"cmp"
	"fmt"
	"strings"
	"time"
)

// vmDocument is what GET shows of a request: no secret, and what the service adds.
func (s *Server) vmDocument(c *call, vm *resource) map[string]any {
	doc := clone(c.body)
	m := vm.vm
	doc["location"] = s.cfg.Region
	for _, secret := range []string{"properties.userData", "properties.osProfile.customData", "properties.osProfile.adminPassword"} {
		drop(doc, secret)
	}
	put(doc, "properties.hardwareProfile.vmSize", m.size.Name)
	put(doc, "properties.vmId", m.uuid)
	put(doc, "properties.timeCreated", c.now.UTC().Format(time.RFC3339Nano))
	if object(doc, "properties.osProfile") != nil {
		put(doc, "properties.osProfile.requireGuestProvisionSignal", true)
		put(doc, "properties.osProfile.allowExtensionOperations", true)
		put(doc, "properties.osProfile.secrets", []any{})
	}
	if list(doc, "properties.storageProfile.dataDisks") == nil {
		put(doc, "properties.storageProfile.dataDisks", []any{})
	}
	if id := text(doc, "properties.storageProfile.imageReference.id"); id != "" {
		put(doc, "properties.storageProfile.imageReference.exactVersion", id[strings.LastIndex(id, "/")+1:])
	}
	return doc
}

// makeParts makes what a machine needs and does not have yet: interfaces with their
// addresses, and disks. After an error the caller puts back what there was.
func (s *Server) makeParts(c *call, vm *resource) *apiError {
	m := vm.vm
	m.nics, m.disks = nil, nil
	var refs []any
	for i, n := range list(vm.doc, "properties.networkProfile.networkInterfaceConfigurations") {
		nic, err := s.inlineNIC(c, vm, n.(map[string]any))
		if err != nil {
			return err
		}
		m.nics = append(m.nics, key(nic.id))
		refs = append(refs, map[string]any{"id": nic.id, "properties": map[string]any{"deleteOption": nic.nic.option, "primary": i == 0}})
	}
	for _, n := range list(vm.doc, "properties.networkProfile.networkInterfaces") {
		ref := n.(map[string]any)
		nic := s.resources[key(text(ref, "id"))]
		nic.nic.option = cmp.Or(text(ref, "properties.deleteOption"), "Detach")
		put(nic.doc, "properties.virtualMachine", map[string]any{"id": vm.id})
		m.nics = append(m.nics, key(nic.id))
		refs = append(refs, ref)
	}
	put(vm.doc, "properties.networkProfile", map[string]any{"networkInterfaces": refs})
	s.osDisk(c, vm)
	for i, d := range list(vm.doc, "properties.storageProfile.dataDisks") {
		s.dataDisk(c, vm, i, d.(map[string]any))
	}
	return nil
}

// osDisk makes or attaches the disk that the machine starts from. It carries the
// machine's tags, as disks made with a machine do.
func (s *Server) osDisk(c *call, vm *resource) {
	m := vm.vm
	od := object(vm.doc, "properties.storageProfile.osDisk")
	od["osType"] = cmp.Or(text(od, "osType"), "Linux")
	option := cmp.Or(text(od, "deleteOption"), "Detach")
	if m.ephemeral() {
		option = "Delete"
	}
	od["deleteOption"] = option
	if od["diskSizeGB"] == nil && m.image != nil {
		od["diskSizeGB"] = float64(max(m.image.SizeGB, 1))
	}
	if id := text(od, "managedDisk.id"); id != "" { // createOption Attach
		d := s.resources[key(id)]
		d.disk.option = option
		put(d.doc, "managedBy", vm.id)
		put(d.doc, "properties.diskState", "Attached")
		m.disks = append(m.disks, key(id))
		return
	}
	name := cmp.Or(text(od, "name"), fmt.Sprintf("%s_OsDisk_1_%s", vm.name, strings.ReplaceAll(newUUID(), "-", "")))
	od["name"] = name
	id := s.cfg.id(vm.group, "Microsoft.Compute/disks", name)
	sku := cmp.Or(text(od, "managedDisk.storageAccountType"), "Standard_LRS")
	put(od, "managedDisk.storageAccountType", sku)
	put(od, "managedDisk.id", id)
	if s.resources[key(id)] == nil {
		s.newDisk(c.now, vm, id, sku, number(od, "diskSizeGB"), text(vm.doc, "properties.storageProfile.imageReference.id"))
	}
	d := s.resources[key(id)]
	d.disk.option = option
	m.disks = append(m.disks, key(id))
}

func (s *Server) dataDisk(c *call, vm *resource, i int, dd map[string]any) {
	name := cmp.Or(text(dd, "name"), fmt.Sprintf("%s_disk%d_%s", vm.name, i+2, strings.ReplaceAll(newUUID(), "-", "")))
	dd["name"] = name
	id := cmp.Or(text(dd, "managedDisk.id"), s.cfg.id(vm.group, "Microsoft.Compute/disks", name))
	sku := cmp.Or(text(dd, "managedDisk.storageAccountType"), "Standard_LRS")
	put(dd, "managedDisk.id", id)
	if s.resources[key(id)] == nil {
		s.newDisk(c.now, vm, id, sku, number(dd, "diskSizeGB"), "")
	}
	d := s.resources[key(id)]
	d.disk.option = cmp.Or(text(dd, "deleteOption"), "Detach")
	vm.vm.disks = append(vm.vm.disks, key(id))
}

func (s *Server) newDisk(now time.Time, vm *resource, id, sku string, sizeGB float64, image string) {
	creation := map[string]any{"createOption": "Empty"}
	if image != "" {
		creation = map[string]any{"createOption": "FromImage", "galleryImageReference": map[string]any{"id": image}}
	}
	doc := map[string]any{"location": s.cfg.Region, "managedBy": vm.id, "sku": map[string]any{"name": sku, "tier": strings.Split(sku, "_")[0]},
		"properties": map[string]any{"diskState": "Attached", "provisioningState": "Succeeded", "diskSizeGB": sizeGB, "osType": "Linux",
			"timeCreated": now.UTC().Format(time.RFC3339Nano), "uniqueId": newUUID(), "creationData": creation}}
	if t := object(vm.doc, "tags"); t != nil {
		doc["tags"] = clone(t)
	}
	if vm.vm.zone != "" {
		doc["zones"] = []any{vm.vm.zone}
	}
	r := s.add(now, kinds["microsoft.compute/disks"], id, doc)
	r.disk = &diskState{}
}

func (s *Server) detachDisk(d *resource) {
	delete(d.doc, "managedBy")
	put(d.doc, "properties.diskState", "Unattached")
}

// inlineNIC makes the interface of a networkInterfaceConfiguration. It carries the
// configuration's tags, not the machine's.
func (s *Server) inlineNIC(c *call, vm *resource, cfg map[string]any) (*resource, *apiError) {
	id := s.cfg.id(vm.group, "Microsoft.Network/networkInterfaces", text(cfg, "name"))
	by := "Microsoft.Compute/virtualMachines/write"
	if err := c.linked("Microsoft.Network/networkInterfaces/write", id, by); err != nil {
		return nil, err
	}
	if old := s.resources[key(id)]; old != nil {
		if err := s.nicFree(c.now, old, vm.id); err != nil {
			return nil, err
		}
		s.erase(c.now, old)
	}
	doc := map[string]any{"location": s.cfg.Region, "properties": map[string]any{"provisioningState": "Succeeded", "nicType": "Standard"}}
	if t := object(cfg, "tags"); t != nil {
		doc["tags"] = clone(t)
	}
	for _, p := range []string{"enableAcceleratedNetworking", "enableIPForwarding", "disableTcpStateTracking", "networkSecurityGroup"} {
		if v := at(cfg, "properties."+p); v != nil {
			put(doc, "properties."+p, v)
		}
	}
	var ips []any
	for i, ip := range list(cfg, "properties.ipConfigurations") {
		ip := ip.(map[string]any)
		out := map[string]any{"id": id + "/ipConfigurations/" + text(ip, "name"), "name": text(ip, "name"), "properties": map[string]any{
			"subnet": at(ip, "properties.subnet"), "primary": i == 0 || flag(ip, "properties.primary"), "privateIPAllocationMethod": "Dynamic",
			"privateIPAddressVersion": cmp.Or(text(ip, "properties.privateIPAddressVersion"), "IPv4"), "provisioningState": "Succeeded"}}
		if pub := object(ip, "properties.publicIPAddressConfiguration"); pub != nil {
			pip, err := s.inlineAddress(c, vm, pub, text(out, "id"))
			if err != nil {
				return nil, err
			}
			put(out, "properties.publicIPAddress", map[string]any{"id": pip, "properties": map[string]any{"deleteOption": cmp.Or(text(pub, "properties.deleteOption"), "Detach")}})
		}
		ips = append(ips, out)
	}
	put(doc, "properties.ipConfigurations", ips)
	nic, err := s.newNIC(c, id, doc)
	if err != nil {
		return nil, err
	}
	nic.nic.option = cmp.Or(text(cfg, "properties.deleteOption"), "Detach")
	put(nic.doc, "properties.virtualMachine", map[string]any{"id": vm.id})
	put(nic.doc, "properties.primary", true)
	return nic, nil
}
