// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/opencontainers/cgroups"
)

// toCgroupStats says in the protocol's types what libcontainer measured.
func toCgroupStats(s *cgroups.Stats) *agentpb.CgroupStats {
	out := &agentpb.CgroupStats{
		CpuStats: &agentpb.CpuStats{
			CpuUsage: &agentpb.CpuUsage{
				TotalUsage:        s.CpuStats.CpuUsage.TotalUsage,
				PercpuUsage:       s.CpuStats.CpuUsage.PercpuUsage,
				UsageInKernelmode: s.CpuStats.CpuUsage.UsageInKernelmode,
				UsageInUsermode:   s.CpuStats.CpuUsage.UsageInUsermode,
			},
			ThrottlingData: &agentpb.ThrottlingData{
				Periods:          s.CpuStats.ThrottlingData.Periods,
				ThrottledPeriods: s.CpuStats.ThrottlingData.ThrottledPeriods,
				ThrottledTime:    s.CpuStats.ThrottlingData.ThrottledTime,
			},
		},
		MemoryStats: &agentpb.MemoryStats{
			Cache:        s.MemoryStats.Cache,
			Usage:        toMemoryData(s.MemoryStats.Usage),
			SwapUsage:    toMemoryData(s.MemoryStats.SwapUsage),
			KernelUsage:  toMemoryData(s.MemoryStats.KernelUsage),
			UseHierarchy: s.MemoryStats.UseHierarchy,
			Stats:        s.MemoryStats.Stats,
		},
		PidsStats: &agentpb.PidsStats{Current: s.PidsStats.Current, Limit: s.PidsStats.Limit},
		BlkioStats: &agentpb.BlkioStats{
			IoServiceBytesRecursive: toBlkio(s.BlkioStats.IoServiceBytesRecursive),
			IoServicedRecursive:     toBlkio(s.BlkioStats.IoServicedRecursive),
			IoQueuedRecursive:       toBlkio(s.BlkioStats.IoQueuedRecursive),
			IoServiceTimeRecursive:  toBlkio(s.BlkioStats.IoServiceTimeRecursive),
			IoWaitTimeRecursive:     toBlkio(s.BlkioStats.IoWaitTimeRecursive),
			IoMergedRecursive:       toBlkio(s.BlkioStats.IoMergedRecursive),
			IoTimeRecursive:         toBlkio(s.BlkioStats.IoTimeRecursive),
			SectorsRecursive:        toBlkio(s.BlkioStats.SectorsRecursive),
		},
	}
	for size, h := range s.HugetlbStats {
		if out.HugetlbStats == nil {
			out.HugetlbStats = make(map[string]*agentpb.HugetlbStats, len(s.HugetlbStats))
		}
		out.HugetlbStats[size] = &agentpb.HugetlbStats{Usage: h.Usage, MaxUsage: h.MaxUsage, Failcnt: h.Failcnt}
	}
	return out
}

func toMemoryData(m cgroups.MemoryData) *agentpb.MemoryData {
	return &agentpb.MemoryData{Usage: m.Usage, MaxUsage: m.MaxUsage, Failcnt: m.Failcnt, Limit: m.Limit}
}

func toBlkio(in []cgroups.BlkioStatEntry) (out []*agentpb.BlkioStatsEntry) {
	for _, e := range in {
		out = append(out, &agentpb.BlkioStatsEntry{Major: e.Major, Minor: e.Minor, Op: e.Op, Value: e.Value})
	}
	return out
}
