// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"fmt"
	"maps"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// checkProcess refuses what the protocol has no field for and a user would miss. Left
// out without a word are the labels of the node's security modules (AppArmor, SELinux),
// which name policies that are loaded on the node and not in the guest, and the node's
// scheduler: its policies, I/O priorities and CPU affinities.
func checkProcess(p *specs.Process) error {
	if p == nil {
		return nil
	}
	if u := p.User.Umask; u != nil && *u != defaultUmask {
		return fmt.Errorf("process.user.umask %#o cannot be told to the agent, whose processes begin with %#o: set it in the command, with sh -c 'umask ...': %w", *u, defaultUmask, errdefs.ErrInvalidArgument)
	}
	return nil
}

// defaultUmask is what a process begins with in the guest, as everywhere.
const defaultUmask = 0o022

// ExecProcess is Process for one that is added to a container; what cannot be had is
// InvalidArgument.
func ExecProcess(p *specs.Process) (*agentpb.Process, error) {
	if err := checkProcess(p); err != nil {
		return nil, err
	}
	return Process(p), nil
}

// Process is p in the protocol's form, all of it that checkProcess does not name.
func Process(p *specs.Process) *agentpb.Process {
	if p == nil {
		return nil
	}
	out := &agentpb.Process{
		Terminal: p.Terminal, Args: p.Args, Env: p.Env, Cwd: p.Cwd, NoNewPrivileges: p.NoNewPrivileges,
		User: &agentpb.User{UID: p.User.UID, GID: p.User.GID, AdditionalGids: p.User.AdditionalGids, Username: p.User.Username},
	}
	if s := p.ConsoleSize; s != nil {
		out.ConsoleSize = &agentpb.Box{Height: uint32(s.Height), Width: uint32(s.Width)}
	}
	if c := p.Capabilities; c != nil {
		out.Capabilities = &agentpb.LinuxCapabilities{Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient}
	}
	for _, r := range p.Rlimits {
		out.Rlimits = append(out.Rlimits, &agentpb.POSIXRlimit{Type: r.Type, Hard: r.Hard, Soft: r.Soft})
	}
	if p.OOMScoreAdj != nil {
		out.OOMScoreAdj = int64(*p.OOMScoreAdj)
	}
	return out
}

// Resources is r in the protocol's form, without what names things of the node: its
// CPU sets, NUMA nodes, block devices, huge pages and traffic classes. The protocol has
// no field for files of cgroup v2 (unified): those that say the same as one of its
// fields are put there, and override it as they do in a runtime that knows them; the
// others are hints about memory that only a kubelet gives, and are left out.
func Resources(r *specs.LinuxResources) *agentpb.LinuxResources {
	if r == nil {
		return nil
	}
	r = fold(r)
	out := &agentpb.LinuxResources{}
	for _, d := range r.Devices {
		out.Devices = append(out.Devices, &agentpb.LinuxDeviceCgroup{Allow: d.Allow, Type: d.Type, Major: number(d.Major, -1), Minor: number(d.Minor, -1), Access: d.Access})
	}
	if m := r.Memory; m != nil {
		out.Memory = &agentpb.LinuxMemory{
			Limit: number(m.Limit, 0), Reservation: number(m.Reservation, 0), Swap: number(m.Swap, 0),
			Kernel: number(m.Kernel, 0), KernelTCP: number(m.KernelTCP, 0), //nolint:staticcheck // deprecated, but part of the contract
			Swappiness: number(m.Swappiness, 0), DisableOOMKiller: number(m.DisableOOMKiller, false),
		}
	}
	if c := r.CPU; c != nil {
		out.CPU = &agentpb.LinuxCPU{
			Shares: number(c.Shares, 0), Quota: number(c.Quota, 0), Period: number(c.Period, 0),
			RealtimeRuntime: number(c.RealtimeRuntime, 0), RealtimePeriod: number(c.RealtimePeriod, 0),
		}
	}
	if r.Pids != nil {
		out.Pids = &agentpb.LinuxPids{Limit: pidsLimit(r.Pids)}
	}
	return out
}

// fold puts what unified says into the fields that mean the same.
func fold(r *specs.LinuxResources) *specs.LinuxResources {
	if len(r.Unified) == 0 {
		return r
	}
	out := *r
	memory, cpu, pids := specs.LinuxMemory{}, specs.LinuxCPU{}, specs.LinuxPids{}
	if r.Memory != nil {
		memory = *r.Memory
	}
	if r.CPU != nil {
		cpu = *r.CPU
	}
	if r.Pids != nil {
		pids = *r.Pids
	}
	limit := func(key string, to **int64) bool {
		v, ok := r.Unified[key]
		if !ok {
			return false
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if v == "max" {
			n, err = -1, nil
		}
		if err != nil {
			return false
		}
		*to = &n
		out.Memory, out.CPU, out.Pids = &memory, &cpu, &pids
		return true
	}
	limit("memory.max", &memory.Limit)
	limit("memory.low", &memory.Reservation)
	limit("pids.max", &pids.Limit)
	var swap *int64
	if limit("memory.swap.max", &swap) {
		// The field is the sum of both.
		if *swap >= 0 && memory.Limit != nil && *memory.Limit > 0 {
			*swap += *memory.Limit
		} else {
			*swap = -1
		}
		memory.Swap = swap
	}
	if quota, period, ok := strings.Cut(r.Unified["cpu.max"], " "); ok {
		q, err := strconv.ParseInt(quota, 10, 64)
		if quota == "max" {
			q, err = -1, nil
		}
		if p, perr := strconv.ParseUint(period, 10, 64); err == nil && perr == nil {
			cpu.Quota, cpu.Period = &q, &p
			out.Memory, out.CPU, out.Pids = &memory, &cpu, &pids
		}
	}
	return &out
}

func number[T any](p *T, missing T) T {
	if p == nil {
		return missing
	}
	return *p
}

func pidsLimit(p *specs.LinuxPids) int64 { return number(p.Limit, 0) }

func mounts(in []specs.Mount) (out []*agentpb.Mount) {
	for _, m := range in {
		out = append(out, &agentpb.Mount{Destination: m.Destination, Source: m.Source, Type: m.Type, Options: m.Options})
	}
	return out
}

func idMappings(in []specs.LinuxIDMapping) (out []*agentpb.LinuxIDMapping) {
	for _, m := range in {
		out = append(out, &agentpb.LinuxIDMapping{HostID: m.HostID, ContainerID: m.ContainerID, Size: m.Size})
	}
	return out
}

func devices(in []specs.LinuxDevice) (out []*agentpb.LinuxDevice) {
	for _, d := range in {
		x := &agentpb.LinuxDevice{Path: d.Path, Type: d.Type, Major: d.Major, Minor: d.Minor, UID: number(d.UID, 0), GID: number(d.GID, 0)}
		if d.FileMode != nil {
			x.FileMode = uint32(*d.FileMode)
		}
		out = append(out, x)
	}
	return out
}

func seccomp(s *specs.LinuxSeccomp) *agentpb.LinuxSeccomp {
	if s == nil {
		return nil
	}
	out := &agentpb.LinuxSeccomp{DefaultAction: string(s.DefaultAction)}
	for _, a := range s.Architectures {
		out.Architectures = append(out.Architectures, string(a))
	}
	for _, f := range s.Flags {
		out.Flags = append(out.Flags, string(f))
	}
	for _, c := range s.Syscalls {
		x := &agentpb.LinuxSyscall{Names: c.Names, Action: string(c.Action)}
		if c.ErrnoRet != nil {
			x.ErrnoRet = &agentpb.LinuxSyscall_Errnoret{Errnoret: uint32(*c.ErrnoRet)}
		}
		for _, a := range c.Args {
			x.Args = append(x.Args, &agentpb.LinuxSeccompArg{Index: uint64(a.Index), Value: a.Value, ValueTwo: a.ValueTwo, Op: string(a.Op)})
		}
		out.Syscalls = append(out.Syscalls, x)
	}
	return out
}

func annotations(in map[string]string, drop []string, add map[string]string) map[string]string {
	out := maps.Clone(in)
	if out == nil {
		out = map[string]string{}
	}
	for _, k := range drop {
		delete(out, k)
	}
	maps.Copy(out, add)
	return out
}
