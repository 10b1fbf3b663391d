// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// toSpec says in the runtime specification's types what a request says in the
// protocol's. The protocol has no presence for scalars: a zero number of a resource
// means that nothing was said. Windows and Solaris are left out.
func toSpec(p *agentpb.Spec) *specs.Spec {
	s := &specs.Spec{
		Version:     p.GetVersion(),
		Hostname:    p.GetHostname(),
		Annotations: p.GetAnnotations(),
		Process:     toProcess(p.GetProcess()),
		Hooks:       toHooks(p.GetHooks()),
		Linux:       toLinux(p.GetLinux()),
	}
	if r := p.GetRoot(); r != nil {
		s.Root = &specs.Root{Path: r.Path, Readonly: r.Readonly}
	}
	for _, m := range p.GetMounts() {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: m.Destination, Source: m.Source, Type: m.Type, Options: m.Options})
	}
	return s
}

// toProcess converts a process. Zero OOMScoreAdj is what a process inherits from the
// agent and is left unset.
func toProcess(p *agentpb.Process) *specs.Process {
	if p == nil {
		return nil
	}
	s := &specs.Process{
		Terminal:        p.Terminal,
		Args:            p.Args,
		Env:             p.Env,
		Cwd:             p.Cwd,
		NoNewPrivileges: p.NoNewPrivileges,
		ApparmorProfile: p.ApparmorProfile,
		SelinuxLabel:    p.SelinuxLabel,
	}
	if b := p.ConsoleSize; b != nil {
		s.ConsoleSize = &specs.Box{Height: uint(b.Height), Width: uint(b.Width)}
	}
	if u := p.User; u != nil {
		s.User = specs.User{UID: u.UID, GID: u.GID, AdditionalGids: u.AdditionalGids, Username: u.Username}
	}
	if c := p.Capabilities; c != nil {
		s.Capabilities = &specs.LinuxCapabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, r := range p.Rlimits {
		s.Rlimits = append(s.Rlimits, specs.POSIXRlimit{Type: r.Type, Hard: r.Hard, Soft: r.Soft})
	}
	if p.OOMScoreAdj != 0 {
		adj := int(p.OOMScoreAdj)
		s.OOMScoreAdj = &adj
	}
	return s
}

func toHooks(p *agentpb.Hooks) *specs.Hooks {
	if p == nil {
		return nil
	}
	list := func(in []*agentpb.Hook) (out []specs.Hook) {
		for _, h := range in {
			hook := specs.Hook{Path: h.Path, Args: h.Args, Env: h.Env}
			if h.Timeout != 0 {
				t := int(h.Timeout)
				hook.Timeout = &t
			}
			out = append(out, hook)
		}
		return out
	}
	return &specs.Hooks{
		Prestart:        list(p.Prestart), //nolint:staticcheck // runtimes still send it
		CreateRuntime:   list(p.CreateRuntime),
		CreateContainer: list(p.CreateContainer),
		StartContainer:  list(p.StartContainer),
		Poststart:       list(p.Poststart),
		Poststop:        list(p.Poststop),
	}
}

func toLinux(p *agentpb.Linux) *specs.Linux {
	if p == nil {
		return nil
	}
	s := &specs.Linux{
		UIDMappings:       toIDMappings(p.UIDMappings),
		GIDMappings:       toIDMappings(p.GIDMappings),
		Sysctl:            p.Sysctl,
		Resources:         toResources(p.Resources),
		CgroupsPath:       p.CgroupsPath,
		Seccomp:           toSeccomp(p.Seccomp),
		RootfsPropagation: p.RootfsPropagation,
		MaskedPaths:       p.MaskedPaths,
		ReadonlyPaths:     p.ReadonlyPaths,
		MountLabel:        p.MountLabel,
	}
	for _, n := range p.Namespaces {
		s.Namespaces = append(s.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(n.Type), Path: n.Path})
	}
	for _, d := range p.Devices {
		mode, uid, gid := os.FileMode(d.FileMode), d.UID, d.GID
		s.Devices = append(s.Devices, specs.LinuxDevice{
			Path: d.Path, Type: d.Type, Major: d.Major, Minor: d.Minor, FileMode: &mode, UID: &uid, GID: &gid,
		})
	}
	if r := p.IntelRdt; r != nil {
		s.IntelRdt = &specs.LinuxIntelRdt{L3CacheSchema: r.L3CacheSchema}
	}
	return s
}

func toIDMappings(in []*agentpb.LinuxIDMapping) (out []specs.LinuxIDMapping) {
	for _, m := range in {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.ContainerID, HostID: m.HostID, Size: m.Size})
	}
	return out
}

// set returns a pointer to v, or nil for zero, which in the protocol says nothing.
func set[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

// toResources converts limits. Device numbers of rules keep -1, "any".
func toResources(p *agentpb.LinuxResources) *specs.LinuxResources {
	if p == nil {
		return nil
	}
	s := &specs.LinuxResources{BlockIO: toBlockIO(p.BlockIO)}
	for _, d := range p.Devices {
		major, minor := d.Major, d.Minor
		s.Devices = append(s.Devices, specs.LinuxDeviceCgroup{
			Allow: d.Allow, Type: d.Type, Major: &major, Minor: &minor, Access: d.Access,
		})
	}
	if m := p.Memory; m != nil {
		s.Memory = &specs.LinuxMemory{
			Limit: set(m.Limit), Reservation: set(m.Reservation), Swap: set(m.Swap),
			Kernel: set(m.Kernel), KernelTCP: set(m.KernelTCP), //nolint:staticcheck // carried, and ignored by libcontainer
			Swappiness: set(m.Swappiness), DisableOOMKiller: set(m.DisableOOMKiller),
		}
	}
	if c := p.CPU; c != nil {
		s.CPU = &specs.LinuxCPU{
			Shares: set(c.Shares), Quota: set(c.Quota), Period: set(c.Period),
			RealtimeRuntime: set(c.RealtimeRuntime), RealtimePeriod: set(c.RealtimePeriod),
			Cpus: c.Cpus, Mems: c.Mems,
		}
	}
	if p.Pids != nil {
		s.Pids = &specs.LinuxPids{Limit: set(p.Pids.Limit)}
	}
	for _, h := range p.HugepageLimits {
		s.HugepageLimits = append(s.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	if n := p.Network; n != nil {
		s.Network = &specs.LinuxNetwork{ClassID: set(n.ClassID)}
		for _, i := range n.Priorities {
			s.Network.Priorities = append(s.Network.Priorities, specs.LinuxInterfacePriority{Name: i.Name, Priority: i.Priority})
		}
	}
	return s
}

func toBlockIO(p *agentpb.LinuxBlockIO) *specs.LinuxBlockIO {
	if p == nil {
		return nil
	}
	s := &specs.LinuxBlockIO{Weight: set(uint16(p.Weight)), LeafWeight: set(uint16(p.LeafWeight))}
	for _, d := range p.WeightDevice {
		w := specs.LinuxWeightDevice{Weight: set(uint16(d.Weight)), LeafWeight: set(uint16(d.LeafWeight))}
		w.Major, w.Minor = d.Major, d.Minor
		s.WeightDevice = append(s.WeightDevice, w)
	}
	throttles := func(in []*agentpb.LinuxThrottleDevice) (out []specs.LinuxThrottleDevice) {
		for _, d := range in {
			t := specs.LinuxThrottleDevice{Rate: d.Rate}
			t.Major, t.Minor = d.Major, d.Minor
			out = append(out, t)
		}
		return out
	}
	s.ThrottleReadBpsDevice = throttles(p.ThrottleReadBpsDevice)
	s.ThrottleWriteBpsDevice = throttles(p.ThrottleWriteBpsDevice)
	s.ThrottleReadIOPSDevice = throttles(p.ThrottleReadIOPSDevice)
	s.ThrottleWriteIOPSDevice = throttles(p.ThrottleWriteIOPSDevice)
	return s
}

func toSeccomp(p *agentpb.LinuxSeccomp) *specs.LinuxSeccomp {
	if p == nil {
		return nil
	}
	s := &specs.LinuxSeccomp{DefaultAction: specs.LinuxSeccompAction(p.DefaultAction)}
	for _, a := range p.Architectures {
		s.Architectures = append(s.Architectures, specs.Arch(a))
	}
	for _, f := range p.Flags {
		s.Flags = append(s.Flags, specs.LinuxSeccompFlag(f))
	}
	for _, c := range p.Syscalls {
		call := specs.LinuxSyscall{Names: c.Names, Action: specs.LinuxSeccompAction(c.Action)}
		if e, ok := c.ErrnoRet.(*agentpb.LinuxSyscall_Errnoret); ok {
			ret := uint(e.Errnoret)
			call.ErrnoRet = &ret
		}
		for _, a := range c.Args {
			call.Args = append(call.Args, specs.LinuxSeccompArg{Index: uint(a.Index), Value: a.Value, ValueTwo: a.ValueTwo, Op: specs.LinuxSeccompOperator(a.Op)})
		}
		s.Syscalls = append(s.Syscalls, call)
	}
	return s
}
