// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/opencontainers/cgroups"
	"google.golang.org/protobuf/testing/protocmp"
)

// Every number has its place: user is not system, swap not memory.
func TestStatsFields(t *testing.T) {
	data := func(n uint64) cgroups.MemoryData {
		return cgroups.MemoryData{Usage: n, MaxUsage: n + 1, Failcnt: n + 2, Limit: n + 3}
	}
	blk := func(op string) []cgroups.BlkioStatEntry {
		return []cgroups.BlkioStatEntry{{Major: 8, Minor: 1, Op: op, Value: 70}, {Major: 9, Minor: 2, Op: op, Value: 71}}
	}
	got := toCgroupStats(&cgroups.Stats{
		CpuStats: cgroups.CpuStats{
			CpuUsage:       cgroups.CpuUsage{TotalUsage: 1, PercpuUsage: []uint64{2, 3}, UsageInKernelmode: 4, UsageInUsermode: 5},
			ThrottlingData: cgroups.ThrottlingData{Periods: 6, ThrottledPeriods: 7, ThrottledTime: 8},
		},
		MemoryStats: cgroups.MemoryStats{
			Cache: 9, Usage: data(10), SwapUsage: data(20), KernelUsage: data(30), UseHierarchy: true, Stats: map[string]uint64{"rss": 40},
		},
		PidsStats: cgroups.PidsStats{Current: 50, Limit: 51},
		BlkioStats: cgroups.BlkioStats{
			IoServiceBytesRecursive: blk("bytes"), IoServicedRecursive: blk("serviced"), IoQueuedRecursive: blk("queued"),
			IoServiceTimeRecursive: blk("servicetime"), IoWaitTimeRecursive: blk("waittime"), IoMergedRecursive: blk("merged"),
			IoTimeRecursive: blk("time"), SectorsRecursive: blk("sectors"),
		},
		HugetlbStats: map[string]cgroups.HugetlbStats{"2MB": {Usage: 60, MaxUsage: 61, Failcnt: 62}},
	})
	mem := func(n uint64) *agentpb.MemoryData {
		return &agentpb.MemoryData{Usage: n, MaxUsage: n + 1, Failcnt: n + 2, Limit: n + 3}
	}
	entries := func(op string) []*agentpb.BlkioStatsEntry {
		return []*agentpb.BlkioStatsEntry{{Major: 8, Minor: 1, Op: op, Value: 70}, {Major: 9, Minor: 2, Op: op, Value: 71}}
	}
	want := &agentpb.CgroupStats{
		CpuStats: &agentpb.CpuStats{
			CpuUsage:       &agentpb.CpuUsage{TotalUsage: 1, PercpuUsage: []uint64{2, 3}, UsageInKernelmode: 4, UsageInUsermode: 5},
			ThrottlingData: &agentpb.ThrottlingData{Periods: 6, ThrottledPeriods: 7, ThrottledTime: 8},
		},
		MemoryStats: &agentpb.MemoryStats{
			Cache: 9, Usage: mem(10), SwapUsage: mem(20), KernelUsage: mem(30), UseHierarchy: true, Stats: map[string]uint64{"rss": 40},
		},
		PidsStats: &agentpb.PidsStats{Current: 50, Limit: 51},
		BlkioStats: &agentpb.BlkioStats{
			IoServiceBytesRecursive: entries("bytes"), IoServicedRecursive: entries("serviced"), IoQueuedRecursive: entries("queued"),
			IoServiceTimeRecursive: entries("servicetime"), IoWaitTimeRecursive: entries("waittime"), IoMergedRecursive: entries("merged"),
			IoTimeRecursive: entries("time"), SectorsRecursive: entries("sectors"),
		},
		HugetlbStats: map[string]*agentpb.HugetlbStats{"2MB": {Usage: 60, MaxUsage: 61, Failcnt: 62}},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What an update says is put in, and nothing else changes.
func TestMerge(t *testing.T) {
	forty, fifty := int64(40), int64(50)
	have := cgroups.Resources{Memory: 1, MemorySwap: 2, CpuShares: 3, CpuWeight: 4, CpuQuota: 5, CpuPeriod: 6, CpusetCpus: "0", PidsLimit: &forty}
	got := merge(have, &cgroups.Resources{Memory: 10, CpuQuota: -1, PidsLimit: &fifty})
	want := have
	want.Memory, want.CpuQuota, want.PidsLimit = 10, -1, &fifty
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
