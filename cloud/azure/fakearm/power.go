// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"context"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// vmActions are what can be asked of a machine besides.
var vmActions = map[string]func(*Server, *call, *resource) (*reply, *apiError){
	"GET instanceview": func(s *Server, c *call, vm *resource) (*reply, *apiError) {
		return &reply{status: http.StatusOK, body: s.instanceView(vm)}, nil
	},
	"POST deallocate": func(s *Server, c *call, vm *resource) (*reply, *apiError) {
		if vm.vm.ephemeral() {
			return nil, conflict("OperationNotAllowed", vm.name, "Operation 'deallocate' is not supported for VMs or VM Scale Set instances using ephemeral OS disks.")
		}
		return s.power(c, vm, "deallocating", "deallocated")
	},
	"POST poweroff": func(s *Server, c *call, vm *resource) (*reply, *apiError) {
		return s.power(c, vm, "stopping", "stopped")
	},
	"POST start": func(s *Server, c *call, vm *resource) (*reply, *apiError) {
		return s.power(c, vm, "starting", "running")
	},
	"POST restart": func(s *Server, c *call, vm *resource) (*reply, *apiError) {
		return s.power(c, vm, "starting", "running")
	},
	"POST simulateeviction": func(s *Server, c *call, vm *resource) (*reply, *apiError) {
		if !vm.vm.spot {
			return nil, conflict("OperationNotAllowed", vm.name, "Eviction can be simulated for Azure Spot virtual machines only.")
		}
		s.evict(c.now, vm)
		return &reply{status: http.StatusNoContent}, nil
	},
}

// power changes a machine's power state.
func (s *Server) power(c *call, vm *resource, during, then string) (*reply, *apiError) {
	if vm.op != nil {
		return nil, conflict("Conflict", vm.name, "The request failed due to conflict with a concurrent request.")
	}
	vm.failed = nil
	var op *operation
	op = s.begin(c, vm, s.cfg.Timing.Power, func(time.Time) *apiError {
		if then == "deallocated" {
			s.release(vm.vm)
		}
		return nil
	})
	if then == "running" {
		if full := s.allocate(vm.vm); full != nil {
			op.finish = func(time.Time) *apiError { return full }
		} else if vm.vm.power != "running" {
			op.waits++
			s.switchOn(c.now, vm, op)
		}
	} else {
		s.switchOff(vm, op, during, then)
	}
	return s.accepted(c, http.StatusAccepted, op, true, nil), nil
}

// behind runs do for a machine, after whatever runs for it already, and then done,
// with mu held. It needs mu.
func (s *Server) behind(m *machine, do func() error, done func(now time.Time, err error)) {
	before := m.last
	mine := make(chan struct{})
	m.last = mine
	s.work.Add(1)
	go func() {
		defer s.work.Done()
		defer close(mine)
		if before != nil {
			<-before
		}
		err := do()
		s.mu.Lock()
		defer s.mu.Unlock()
		done(s.cfg.Now(), err)
	}()
}

// switchOn starts what is behind a machine and releases the operation. It needs mu.
func (s *Server) switchOn(now time.Time, vm *resource, op *operation) {
	m := vm.vm
	m.power = "starting"
	on := func(now time.Time) {
		m.power, m.since = "running", now
		op.waits--
		s.settle(op, vm, now)
	}
	if s.cfg.Host == nil {
		on(now)
		return
	}
	m.real = true
	hm := s.hostMachine(vm)
	s.behind(m, func() error { return s.cfg.Host.Start(s.ctx, hm) }, func(now time.Time, err error) {
		if err != nil {
			s.cfg.Log.Error("start machine", "vm", vm.name, "error", err)
			m.failure = &apiError{status: http.StatusConflict, code: "VMStartTimedOut", message: "VM '" + vm.name + "' did not start in the allotted time: " + err.Error()}
		}
		on(now)
	})
}

// switchOff stops what is behind a machine and releases the operation (nil: there is
// none). It needs mu.
func (s *Server) switchOff(vm *resource, op *operation, during, then string) {
	m := vm.vm
	off := func(now time.Time) {
		m.power, m.since = then, now
		if op != nil {
			op.waits--
			s.settle(op, vm, now)
		}
	}
	if m.power != "" {
		m.power = during
	}
	if op != nil {
		op.waits++
	}
	if !m.real {
		off(s.cfg.Now())
		return
	}
	m.real = false
	s.behind(m, func() error { return s.cfg.Host.Stop(context.WithoutCancel(s.ctx), m.id) }, func(now time.Time, err error) {
		if err != nil {
			s.cfg.Log.Error("stop machine", "vm", vm.name, "error", err)
		}
		off(now)
	})
}

// hostMachine is what the Host is to start for a virtual machine.
func (s *Server) hostMachine(vm *resource) emulation.Machine {
	m := vm.vm
	hm := emulation.Machine{ID: m.id, VCPUs: m.size.VCPUs, MemoryMiB: m.size.MemoryMiB,
		Vendor: "Microsoft Corporation", Product: "Virtual Machine", AssetTag: azureAssetTag,
		Metadata: s.Metadata(vm.id), CDROM: s.provisioningDisc(vm),
		Exited: func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if m.power == "running" || m.power == "starting" {
				m.power, m.since = "stopped", s.cfg.Now()
			}
		}}
	if m.image != nil {
		hm.Image = m.image.Path
	}
	if len(m.nics) > 0 {
		if nic := s.resources[m.nics[0]]; nic != nil {
			hm.MAC = nic.nic.mac
			hm.Addr = netip.PrefixFrom(nic.nic.addr, nic.nic.subnet.CIDR.Bits())
			hm.Gateway = nic.nic.subnet.Gateway
		}
	}
	return hm
}

// azureAssetTag is the chassis asset tag of every Azure machine: guests tell by it
// where they are (cloud-init's and systemd's detection use the same).
const azureAssetTag = "7783-7084-3265-9085-8269-3286-77"

// pool is where machines of a size come from.
type pool struct {
	size, zone string
	spot       bool
}

// SetCapacity says how many more machines of a size a zone ("": without a zone) has;
// below 0 there is no end of them, as there is for what was never set. A creation
// beyond that is accepted and fails when its operation ends.
func (s *Server) SetCapacity(size, zone string, spot bool, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := pool{strings.ToLower(size), zone, spot}
	if n < 0 {
		delete(s.capacity, p)
		return
	}
	s.capacity[p] = n
}

// allocate takes a machine's place. It needs mu.
func (s *Server) allocate(m *machine) *apiError {
	if m.held != nil {
		return nil
	}
	p := pool{strings.ToLower(m.size.Name), m.zone, m.spot}
	n, limited := s.capacity[p]
	if limited && n == 0 {
		code := "AllocationFailed"
		if m.zone != "" {
			code = "ZonalAllocationFailed"
		}
		f := Fault{Code: code}
		return f.err()
	}
	if limited {
		s.capacity[p] = n - 1
	}
	m.held = &p
	return nil
}

// release gives it back. It needs mu.
func (s *Server) release(m *machine) {
	if m.held == nil {
		return
	}
	if n, limited := s.capacity[*m.held]; limited {
		s.capacity[*m.held] = n + 1
	}
	m.held = nil
}

// SetQuota limits the vCPUs of a family ("standardDASv5Family"), of all ("") or of
// spot machines ("lowPriorityCores"). Below 0: no limit.
func (s *Server) SetQuota(family string, vcpus int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if vcpus < 0 {
		delete(s.quota, strings.ToLower(family))
		return
	}
	s.quota[strings.ToLower(family)] = vcpus
}

// checkQuota refuses what is beyond one. It needs mu.
func (s *Server) checkQuota(p *plan, old *resource) *apiError {
	used := map[string]int{}
	for _, r := range s.resources {
		if r.vm == nil || r == old || r.vm.power == "deallocated" {
			continue
		}
		if r.vm.spot {
			used["lowprioritycores"] += r.vm.size.VCPUs
			continue
		}
		used[strings.ToLower(r.vm.size.Family)] += r.vm.size.VCPUs
		used[""] += r.vm.size.VCPUs
	}
	names := []string{strings.ToLower(p.size.Family), ""}
	if p.spot {
		names = []string{"lowprioritycores"}
	}
	for _, n := range names {
		if limit, ok := s.quota[n]; ok && used[n]+p.size.VCPUs > limit {
			what := p.size.Family
			if n == "" {
				what = "Total Regional"
			} else if p.spot {
				what = "LowPriorityCores"
			}
			return conflict("OperationNotAllowed", "", "Operation could not be completed as it results in exceeding approved %s Cores quota. Additional details - Deployment Model: Resource Manager, "+
				"Location: %s, Current Limit: %d, Current Usage: %d, Additional Required: %d, (Minimum) New Limit Required: %d. Submit a request for Quota increase at https://aka.ms/ProdportalCRP",
				what, s.cfg.Region, limit, used[n], p.size.VCPUs, used[n]+p.size.VCPUs)
		}
	}
	return nil
}
