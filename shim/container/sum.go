// SPDX-License-Identifier: Apache-2.0

package container

import (
	"slices"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// Sum is what several containers of one pod use together. Nil members count nothing.
// Their network is one and the same, so its figures are taken once; a limit of the sum
// is the sum of the limits, or none where one container has none.
func Sum(list []*agentpb.StatsContainerResponse) *agentpb.StatsContainerResponse {
	cpu, throttling := &agentpb.CpuUsage{}, &agentpb.ThrottlingData{}
	mem := &agentpb.MemoryStats{Usage: &agentpb.MemoryData{}, SwapUsage: &agentpb.MemoryData{}, KernelUsage: &agentpb.MemoryData{}, Stats: map[string]uint64{}}
	out := &agentpb.StatsContainerResponse{CgroupStats: &agentpb.CgroupStats{
		CpuStats:    &agentpb.CpuStats{CpuUsage: cpu, ThrottlingData: throttling},
		MemoryStats: mem, PidsStats: &agentpb.PidsStats{}, BlkioStats: &agentpb.BlkioStats{},
	}}
	for _, r := range list {
		if r == nil {
			continue
		}
		s := r.GetCgroupStats()
		u, t := s.GetCpuStats().GetCpuUsage(), s.GetCpuStats().GetThrottlingData()
		cpu.TotalUsage += u.GetTotalUsage()
		cpu.UsageInKernelmode += u.GetUsageInKernelmode()
		cpu.UsageInUsermode += u.GetUsageInUsermode()
		throttling.Periods += t.GetPeriods()
		throttling.ThrottledPeriods += t.GetThrottledPeriods()
		throttling.ThrottledTime += t.GetThrottledTime()
		m := s.GetMemoryStats()
		mem.Cache += m.GetCache()
		for _, x := range []struct{ to, from *agentpb.MemoryData }{{mem.Usage, m.GetUsage()}, {mem.SwapUsage, m.GetSwapUsage()}, {mem.KernelUsage, m.GetKernelUsage()}} {
			addMemory(x.to, x.from)
		}
		for k, v := range m.GetStats() {
			mem.Stats[k] += v
		}
		out.CgroupStats.PidsStats.Current += s.GetPidsStats().GetCurrent()
		b := out.CgroupStats.BlkioStats
		b.IoServiceBytesRecursive = addEntries(b.IoServiceBytesRecursive, s.GetBlkioStats().GetIoServiceBytesRecursive())
		b.IoServicedRecursive = addEntries(b.IoServicedRecursive, s.GetBlkioStats().GetIoServicedRecursive())
		if len(out.NetworkStats) == 0 {
			out.NetworkStats = r.GetNetworkStats()
		}
	}
	return out
}

// addMemory adds figures of memory. A limit of 0 is none.
func addMemory(to, from *agentpb.MemoryData) {
	to.Usage += from.GetUsage()
	to.MaxUsage += from.GetMaxUsage()
	to.Failcnt += from.GetFailcnt()
	limit := from.GetLimit()
	switch {
	case limit == 0 || limit >= unlimited-to.Limit:
		to.Limit = unlimited
	case to.Limit != unlimited:
		to.Limit += limit
	}
}

// addEntries adds figures by device and operation.
func addEntries(to, from []*agentpb.BlkioStatsEntry) []*agentpb.BlkioStatsEntry {
	for _, e := range from {
		i := slices.IndexFunc(to, func(x *agentpb.BlkioStatsEntry) bool {
			return x.Major == e.Major && x.Minor == e.Minor && x.Op == e.Op
		})
		if i < 0 {
			to = append(to, &agentpb.BlkioStatsEntry{Major: e.Major, Minor: e.Minor, Op: e.Op, Value: e.Value})
		} else {
			to[i].Value += e.Value
		}
	}
	return to
}
