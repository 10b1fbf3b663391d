// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"net/http"
	"slices"
	"strings"
)

// Leaks lists what still exists of what is billed and carries all of these tags: the
// ids of virtual machines, interfaces, disks, public addresses, images and versions,
// sorted. What hangs on a machine with the tags counts whether it has them or not. No
// tags: everything there is. It sees through every lag; a deletion that is under way
// still counts, until the clock has passed its end.
func (s *Server) Leaks(tags map[string]string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.catchUp(s.cfg.Now())
	found := map[string]bool{}
	for _, r := range s.resources {
		if !slices.Contains(billed, r.kind.name) || !tagged(r, tags) || r.image != nil && r.upload == nil {
			continue
		}
		found[r.id] = true
		if r.vm != nil {
			for _, k := range append(slices.Clone(r.vm.nics), r.vm.disks...) {
				if part := s.resources[k]; part != nil {
					found[part.id] = true
				}
			}
		}
	}
	return sortedKeys(found)
}

// billed are the kinds that must not be left behind. An image that was there from the
// start does not count.
var billed = []string{"Microsoft.Compute/virtualMachines", "Microsoft.Compute/disks", "Microsoft.Compute/images", "Microsoft.Compute/galleries/images/versions",
	"Microsoft.Network/networkInterfaces", "Microsoft.Network/publicIPAddresses"}

func tagged(r *resource, want map[string]string) bool {
	have := object(r.doc, "tags")
	for k, v := range want {
		ok := false
		for name, value := range have {
			ok = ok || strings.EqualFold(name, k) && value == v
		}
		if !ok {
			return false
		}
	}
	return true
}

// VM is what is known of a virtual machine without asking through the API.
type VM struct {
	ID, Name, Size, Zone string
	Spot                 bool
	State, Power         string // provisioningState and power state
	UserData, CustomData string // base64
	Tags                 map[string]string
	MAC, Addr            string
	MachineID            string // on the Host
}

// VMs lists the virtual machines there are, by name.
func (s *Server) VMs() []VM {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.catchUp(s.cfg.Now())
	var out []VM
	for _, k := range sortedKeys(s.resources) {
		r := s.resources[k]
		if r.vm == nil {
			continue
		}
		m := r.vm
		v := VM{ID: r.id, Name: r.name, Size: m.size.Name, Zone: m.zone, Spot: m.spot, State: text(r.doc, "properties.provisioningState"), Power: m.power,
			UserData: m.userData, CustomData: m.customData, Tags: map[string]string{}, MachineID: m.id}
		for k, t := range object(r.doc, "tags") {
			v.Tags[k], _ = t.(string)
		}
		if len(m.nics) > 0 {
			if nic := s.resources[m.nics[0]]; nic != nil {
				v.MAC, v.Addr = nic.nic.mac, nic.nic.addr.String()
			}
		}
		out = append(out, v)
	}
	return out
}

// Console is what the machine behind a virtual machine has printed, as boot
// diagnostics would show it.
func (s *Server) Console(vmID string) ([]byte, error) {
	s.mu.Lock()
	vm := s.resources[key(vmID)]
	s.mu.Unlock()
	if vm == nil || vm.vm == nil || s.cfg.Host == nil {
		return nil, &apiError{status: http.StatusNotFound, code: "ResourceNotFound", message: "there is no machine behind " + vmID}
	}
	return s.cfg.Host.Console(vm.vm.id)
}
