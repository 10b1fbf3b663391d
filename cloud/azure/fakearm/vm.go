// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"fmt"
	"hash/fnv"
	"maps"
	"net/http"
	"strings"
	"time"
)

// machine is what there is of a virtual machine besides its document.
type machine struct {
	id      string // on the Host
	uuid    string // vmId
	size    Size
	zone    string
	spot    bool
	image   *Image
	request map[string]any // the PUT that it was last made of
	// userData and customData are base64; GET never shows customData.
	userData, customData string
	nics, disks          []string // keys of what hangs on it

	power    string // of its PowerState
	real     bool   // there is, or will be, a machine on the Host
	last     chan struct{}
	failure  *apiError
	failedAt time.Time
	since    time.Time // of its power state

	events      []scheduledEvent
	incarnation int
	reported    func(now time.Time) // the guest's report of being ready; nil: nobody waits for it
	held        *pool               // whose capacity it holds
}

func (m *machine) ephemeral() bool {
	return at(m.request, "properties.storageProfile.osDisk.diffDiskSettings.option") != nil
}

// putVM creates or updates a virtual machine.
func (s *Server) putVM(c *call, old *resource) (*reply, *apiError) {
	if none, match := c.r.Header.Get("If-None-Match"), c.r.Header.Get("If-Match"); none == "*" && old != nil || match != "" && (old == nil || match != "*" && match != etag(old)) {
		return nil, &apiError{status: http.StatusPreconditionFailed, code: "PreconditionFailed", message: "The condition of If-None-Match or If-Match is not met by the resource as it is."}
	}
	if old != nil {
		switch state := text(old.doc, "properties.provisioningState"); {
		case state == "Deleting":
			return nil, conflict("OperationNotAllowed", old.name, "Operation 'PUT' is not allowed on VM '%s' since the VM is marked for deletion. You can only retry the Delete operation (or wait for an ongoing one to complete).", old.name)
		case old.op != nil:
			return nil, conflict("Conflict", old.name, "The request failed due to conflict with a concurrent request. To resolve it, please refer to https://aka.ms/activitylog to get more details on the conflicting requests.")
		}
	}
	plan, err := s.checkVM(c, old)
	if err != nil {
		return nil, err
	}
	if old != nil && (text(old.doc, "properties.provisioningState") != "Failed" || old.vm.power == "running") {
		return s.replaceVM(c, old, plan)
	}
	if err := s.checkQuota(plan, old); err != nil {
		return nil, err
	}
	vm := old
	var m *machine
	if vm == nil {
		m = &machine{uuid: newUUID(), power: ""}
		m.id = s.cfg.MachinePrefix + m.uuid[:13]
		vm = s.add(c.now, c.path.kind(), c.path.id(s), map[string]any{})
		vm.vm = m
	} else {
		m = vm.vm
	}
	m.size, m.zone, m.spot, m.image, m.request = plan.size, plan.zone, plan.spot, plan.image, clone(c.body)
	m.userData, m.customData = text(c.body, "properties.userData"), text(c.body, "properties.osProfile.customData")
	m.failure = nil
	vm.doc = s.vmDocument(c, vm)
	before := maps.Clone(s.resources)
	if old == nil {
		delete(before, key(vm.id))
	}
	if err := s.makeParts(c, vm); err != nil {
		s.resources = before
		return nil, err
	}
	if c.fault != nil && c.fault.Leave {
		delete(s.resources, key(vm.id))
		s.orphan(c.now, vm)
		return nil, c.fault.err()
	}
	return s.create(c, vm)
}

// create begins the creation of a machine whose parts are there.
func (s *Server) create(c *call, vm *resource) (*reply, *apiError) {
	m := vm.vm
	put(vm.doc, "properties.provisioningState", "Creating")
	vm.failed = func(now time.Time, err *apiError) { s.failVM(now, vm, err) }
	full := s.allocate(m)
	d := s.cfg.Timing.Create
	if full != nil {
		d = s.cfg.Timing.Fail
	}
	op := s.begin(c, vm, d, func(now time.Time) *apiError {
		if full != nil {
			return full
		}
		if m.failure != nil {
			return m.failure
		}
		put(vm.doc, "properties.provisioningState", "Succeeded")
		return nil
	})
	if full == nil && !(c.fault != nil && c.fault.AtEnd && c.fault.Code != provisioningTimedOut) {
		s.awaitReport(c.now, vm, op)
		op.waits++
		m.power = "starting"
		s.after(c.now.Add(s.cfg.Timing.Start), func(now time.Time) {
			if op.status == "InProgress" {
				s.switchOn(now, vm, op)
			}
		})
	}
	return s.accepted(c, http.StatusCreated, op, false, s.view(c, vm)), nil
}

// failVM leaves a machine as a failed creation does: it stays, with its interface and
// disk, and the interface is reserved for it for a while.
func (s *Server) failVM(now time.Time, vm *resource, err *apiError) {
	m := vm.vm
	put(vm.doc, "properties.provisioningState", "Failed")
	m.failure, m.failedAt = err, now
	if err.code == provisioningTimedOut {
		return // the machine runs
	}
	m.power = ""
	s.release(m)
	for _, k := range m.nics {
		if nic := s.resources[k]; nic != nil {
			nic.nic.reserved, nic.nic.by = now.Add(s.cfg.Timing.Reserve), vm.id
		}
	}
}

// orphan leaves the parts of a machine without it.
func (s *Server) orphan(now time.Time, vm *resource) {
	for _, k := range vm.vm.nics {
		if nic := s.resources[k]; nic != nil {
			drop(nic.doc, "properties.virtualMachine")
			nic.nic.reserved, nic.nic.by = now.Add(s.cfg.Timing.Reserve), vm.id
		}
	}
	for _, k := range vm.vm.disks {
		if d := s.resources[k]; d != nil {
			s.detachDisk(d)
		}
	}
}

// unchangeable are the properties that a PUT may not change once there is a machine.
var unchangeable = []string{"location", "zones", "plan", "properties.osProfile.computerName", "properties.osProfile.adminUsername",
	"properties.osProfile.adminPassword", "properties.osProfile.customData", "properties.osProfile.linuxConfiguration",
	"properties.storageProfile.imageReference", "properties.storageProfile.osDisk.name", "properties.storageProfile.osDisk.createOption",
	"properties.storageProfile.osDisk.diffDiskSettings", "properties.storageProfile.osDisk.managedDisk.storageAccountType",
	"properties.storageProfile.osDisk.managedDisk.securityProfile", "properties.securityProfile.securityType",
	"properties.securityProfile.uefiSettings", "properties.priority", "properties.networkProfile.networkInterfaceConfigurations",
	"properties.networkProfile.networkInterfaces", "properties.availabilitySet"}

// replaceVM is a PUT on a machine that exists.
func (s *Server) replaceVM(c *call, vm *resource, plan *plan) (*reply, *apiError) {
	for _, p := range unchangeable {
		a, b := at(vm.vm.request, p), at(c.body, p)
		if (b != nil || p == "zones") && !same(a, b) {
			name := strings.TrimPrefix(p, "properties.")
			return nil, conflict("PropertyChangeNotAllowed", name, "Changing property '%s' is not allowed.", name)
		}
	}
	return s.changeVM(c, vm, plan.size, http.StatusOK)
}

// patchVM changes a machine. Only tags, user data, size and scheduled events are
// taken.
func (s *Server) patchVM(c *call, vm *resource) (*reply, *apiError) {
	if vm.op != nil {
		return nil, conflict("Conflict", vm.name, "The request failed due to conflict with a concurrent request.")
	}
	for _, p := range unchangeable {
		if b := at(c.body, p); b != nil && !same(at(vm.vm.request, p), b) {
			name := strings.TrimPrefix(p, "properties.")
			return nil, conflict("PropertyChangeNotAllowed", name, "Changing property '%s' is not allowed.", name)
		}
	}
	size := vm.vm.size
	if name := text(c.body, "properties.hardwareProfile.vmSize"); name != "" {
		z, ok := s.sizes[strings.ToLower(name)]
		if !ok {
			return nil, badRequest("InvalidParameter", "vmSize", "The value '%s' provided for the VM size is not valid.", name)
		}
		size = z
	}
	return s.changeVM(c, vm, size, http.StatusOK)
}

func (s *Server) changeVM(c *call, vm *resource, size Size, status int) (*reply, *apiError) {
	m := vm.vm
	merge(m.request, clone(c.body))
	if _, ok := c.body["tags"]; ok {
		vm.doc["tags"] = clone(c.body["tags"])
	}
	if u := text(c.body, "properties.userData"); u != "" {
		if n, err := base64Bytes("userData", u); err != nil || n > maxUserData {
			return nil, badUserData()
		}
		m.userData = u
	}
	m.size = size
	put(vm.doc, "properties.hardwareProfile.vmSize", size.Name)
	put(vm.doc, "properties.provisioningState", "Updating")
	vm.failed = func(now time.Time, err *apiError) {
		put(vm.doc, "properties.provisioningState", "Failed")
		m.failure, m.failedAt = err, now
	}
	op := s.begin(c, vm, s.cfg.Timing.Update, func(time.Time) *apiError {
		put(vm.doc, "properties.provisioningState", "Succeeded")
		return nil
	})
	return s.accepted(c, status, op, false, s.view(c, vm)), nil
}

// deleteVM takes a machine away, and what hangs on it as far as its deleteOption says
// so. A creation that is under way is preempted.
func (s *Server) deleteVM(c *call, vm *resource) (*reply, *apiError) {
	m := vm.vm
	if text(vm.doc, "properties.provisioningState") == "Deleting" && vm.op != nil {
		return s.accepted(c, http.StatusAccepted, vm.op, true, nil), nil
	}
	for _, k := range m.nics {
		if nic := s.resources[k]; nic != nil && nic.nic.option == "Delete" {
			if err := c.linked("Microsoft.Network/networkInterfaces/delete", nic.id, "Microsoft.Compute/virtualMachines/delete"); err != nil {
				return nil, err
			}
		}
	}
	for _, k := range m.disks {
		if d := s.resources[k]; d != nil && d.disk.option == "Delete" && !m.ephemeral() {
			if err := c.linked("Microsoft.Compute/disks/delete", d.id, "Microsoft.Compute/virtualMachines/delete"); err != nil {
				return nil, err
			}
		}
	}
	s.preempt(vm.op, c.now)
	put(vm.doc, "properties.provisioningState", "Deleting")
	vm.failed = func(time.Time, *apiError) { put(vm.doc, "properties.provisioningState", "Failed") }
	d := s.cfg.Timing.Delete
	if c.query("forceDeletion") == "true" {
		d /= 3
	}
	op := s.begin(c, vm, d, func(now time.Time) *apiError {
		s.removeVM(now, vm)
		return nil
	})
	s.switchOff(vm, op, "stopping", "stopped")
	return s.accepted(c, http.StatusAccepted, op, true, nil), nil
}

// removeVM is the end of a DELETE, and of an eviction with policy Delete.
func (s *Server) removeVM(now time.Time, vm *resource) {
	m := vm.vm
	s.release(m)
	s.erase(now, vm)
	for _, k := range m.nics {
		nic := s.resources[k]
		if nic == nil {
			continue
		}
		drop(nic.doc, "properties.virtualMachine")
		if nic.nic.option == "Delete" && !now.Before(nic.nic.reserved) {
			s.eraseNIC(now, nic)
		}
	}
	for _, k := range m.disks {
		d := s.resources[k]
		if d == nil {
			continue
		}
		if d.disk.option == "Delete" {
			s.erase(now, d)
		} else {
			s.detachDisk(d)
		}
	}
}

// etag changes with what a machine is made of.
func etag(vm *resource) string {
	h := fnv.New64a()
	fmt.Fprint(h, vm.vm.uuid, vm.doc)
	return fmt.Sprintf(`"%x"`, h.Sum64())
}

// viewVM adds to a machine's document what the request asks for.
func (s *Server) viewVM(c *call, vm *resource, doc map[string]any) {
	doc["etag"] = etag(vm)
	for _, e := range strings.Split(c.query("$expand"), ",") {
		switch strings.ToLower(strings.TrimSpace(e)) {
		case "instanceview":
			put(doc, "properties.instanceView", s.instanceView(vm))
		case "userdata":
			put(doc, "properties.userData", vm.vm.userData)
		}
	}
}

// instanceView is the state of a machine as it runs.
func (s *Server) instanceView(vm *resource) map[string]any {
	m := vm.vm
	state := text(vm.doc, "properties.provisioningState")
	prov := map[string]any{"code": "ProvisioningState/" + strings.ToLower(state), "level": "Info", "displayStatus": "Provisioning " + strings.ToLower(state),
		"time": vm.made.UTC().Format(time.RFC3339Nano)}
	if state == "Failed" && m.failure != nil {
		prov["code"], prov["level"], prov["message"] = "ProvisioningState/failed/"+m.failure.code, "Error", m.failure.message
		prov["displayStatus"] = "Provisioning failed"
		prov["time"] = m.failedAt.UTC().Format(time.RFC3339Nano)
	}
	statuses := []any{prov}
	if m.power != "" {
		statuses = append(statuses, map[string]any{"code": "PowerState/" + m.power, "level": "Info", "displayStatus": "VM " + m.power})
	}
	view := map[string]any{"statuses": statuses}
	if name := text(vm.doc, "properties.osProfile.computerName"); name != "" && m.power == "running" {
		view["computerName"] = name
	}
	return view
}
