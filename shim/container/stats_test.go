// SPDX-License-Identifier: Apache-2.0

package container

import (
	"encoding/json"
	"flag"
	"math"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sample has a different number in every field, from an agent on cgroup v2.
func sample() *agentpb.StatsContainerResponse {
	return &agentpb.StatsContainerResponse{
		CgroupStats: &agentpb.CgroupStats{
			CpuStats: &agentpb.CpuStats{
				CpuUsage:       &agentpb.CpuUsage{TotalUsage: 3_000_000, PercpuUsage: []uint64{1, 2}, UsageInKernelmode: 1_000_000, UsageInUsermode: 2_000_000},
				ThrottlingData: &agentpb.ThrottlingData{Periods: 11, ThrottledPeriods: 12, ThrottledTime: 13_000},
			},
			MemoryStats: &agentpb.MemoryStats{
				Cache: 21, Usage: &agentpb.MemoryData{Usage: 22, MaxUsage: 23, Failcnt: 24, Limit: 25},
				SwapUsage:   &agentpb.MemoryData{Usage: 26, MaxUsage: 27, Failcnt: 28, Limit: 29},
				KernelUsage: &agentpb.MemoryData{Usage: 30, MaxUsage: 31, Failcnt: 32, Limit: 33},
				Stats: map[string]uint64{"anon": 41, "file": 42, "inactive_file": 43, "active_file": 44, "pgfault": 45, "pgmajfault": 46, "file_mapped": 47, "kernel_stack": 48, "slab": 49,
					"sock": 101, "shmem": 102, "file_dirty": 103, "file_writeback": 104, "anon_thp": 105, "inactive_anon": 106, "active_anon": 107,
					"unevictable": 108, "slab_reclaimable": 109, "slab_unreclaimable": 110, "workingset_refault_file": 111, "workingset_activate_file": 112,
					"workingset_nodereclaim": 113, "pgrefill": 114, "pgscan": 115, "pgsteal": 116, "pgactivate": 117, "pgdeactivate": 118,
					"pglazyfree": 119, "pglazyfreed": 120, "thp_fault_alloc": 121, "thp_collapse_alloc": 122},
			},
			PidsStats: &agentpb.PidsStats{Current: 51, Limit: 52},
			BlkioStats: &agentpb.BlkioStats{
				IoServiceBytesRecursive: []*agentpb.BlkioStatsEntry{{Major: 8, Op: "Read", Value: 61}, {Major: 8, Op: "Write", Value: 62}, {Major: 9, Minor: 1, Op: "Read", Value: 63}},
				IoServicedRecursive:     []*agentpb.BlkioStatsEntry{{Major: 8, Op: "Read", Value: 64}, {Major: 8, Op: "Write", Value: 65}},
			},
			HugetlbStats: map[string]*agentpb.HugetlbStats{"2MB": {Usage: 71, MaxUsage: 72, Failcnt: 73}},
		},
		NetworkStats: []*agentpb.NetworkStats{{Name: "eth0", RxBytes: 81, RxPackets: 82, RxErrors: 83, RxDropped: 84, TxBytes: 85, TxPackets: 86, TxErrors: 87, TxDropped: 88}},
	}
}

// TestMetrics compares each field of both forms with what was right when it was
// looked at.
func TestMetrics(t *testing.T) {
	for name, m := range map[string]any{"testdata/metrics-v1.golden": metricsV1(sample(), 91), "testdata/metrics-v2.golden": metricsV2(sample(), 91)} {
		got, err := json.MarshalIndent(m, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, '\n')
		if *update {
			if err := os.WriteFile(name, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Errorf("%s (-want +got; -update accepts it):\n%s", name, d)
		}
	}
}

// TestNoLimit: containerd subtracts from a limit, so none must not read as 0; and an
// agent that says nothing is no reason to crash.
func TestNoLimit(t *testing.T) {
	for name, r := range map[string]*agentpb.StatsContainerResponse{
		"nothing": {},
		"no limit": {CgroupStats: &agentpb.CgroupStats{MemoryStats: &agentpb.MemoryStats{
			Usage: &agentpb.MemoryData{Usage: 5, Limit: math.MaxUint64}, SwapUsage: &agentpb.MemoryData{Usage: 5, Limit: math.MaxUint64},
		}}},
		"sum of nothing": Sum(nil),
	} {
		m1, m2 := metricsV1(r, 0).Memory, metricsV2(r, 0).Memory
		for field, n := range map[string]uint64{
			"v1 usage": m1.Usage.Limit, "v1 swap": m1.Swap.Limit, "v1 kernel": m1.Kernel.Limit,
			"v1 hierarchical": m1.HierarchicalMemoryLimit, "v1 hierarchical swap": m1.HierarchicalSwapLimit,
			"v2 usage": m2.UsageLimit, "v2 swap": m2.SwapLimit,
		} {
			if n != math.MaxUint64 {
				t.Errorf("%s: limit of %s is %d", name, field, n)
			}
		}
		if m2.SwapUsage != 0 {
			t.Errorf("%s: swap %d", name, m2.SwapUsage)
		}
	}
}

// TestSwap has what agents tell of it.
func TestSwap(t *testing.T) {
	for name, c := range map[string]struct{ memory, memoryLimit, swap, swapLimit, both, alone, bothLimit, aloneLimit uint64 }{
		"together": {100, 1000, 130, 1500, 130, 30, 1500, 500},
		"alone":    {100, 1000, 30, 500, 130, 30, 1500, 500},
		"no limit": {100, math.MaxUint64, 130, math.MaxUint64, 130, 30, math.MaxUint64, math.MaxUint64},
		"of swap":  {100, math.MaxUint64, 130, 500, 130, 30, 500, 500},
	} {
		both, alone := swap(&agentpb.MemoryStats{
			Usage: &agentpb.MemoryData{Usage: c.memory, Limit: c.memoryLimit}, SwapUsage: &agentpb.MemoryData{Usage: c.swap, Limit: c.swapLimit},
		})
		if both.Usage != c.both || alone.Usage != c.alone || both.Limit != c.bothLimit || alone.Limit != c.aloneLimit {
			t.Errorf("%s: both %v, alone %v", name, both, alone)
		}
	}
}

// TestSum: what adds up does, a limit of the sum is one only where all have one, and the
// network, which is one, is counted once.
func TestSum(t *testing.T) {
	s := Sum([]*agentpb.StatsContainerResponse{sample(), nil, sample()})
	g := s.CgroupStats
	for name, x := range map[string][2]uint64{
		"cpu":            {g.CpuStats.CpuUsage.TotalUsage, 6_000_000},
		"kernel":         {g.CpuStats.CpuUsage.UsageInKernelmode, 2_000_000},
		"user":           {g.CpuStats.CpuUsage.UsageInUsermode, 4_000_000},
		"throttled":      {g.CpuStats.ThrottlingData.ThrottledTime, 26_000},
		"memory":         {g.MemoryStats.Usage.Usage, 44},
		"memory's limit": {g.MemoryStats.Usage.Limit, 50},
		"inactive file":  {g.MemoryStats.Stats["inactive_file"], 86},
		"processes":      {g.PidsStats.Current, 102},
		"bytes read":     {g.BlkioStats.IoServiceBytesRecursive[0].Value, 122},
		"devices":        {uint64(len(g.BlkioStats.IoServiceBytesRecursive)), 3},
		"received":       {s.NetworkStats[0].RxBytes, 81},
		"interfaces":     {uint64(len(s.NetworkStats)), 1},
	} {
		if x[0] != x[1] {
			t.Errorf("%s: %d, want %d", name, x[0], x[1])
		}
	}
	free := sample()
	free.CgroupStats.MemoryStats.Usage.Limit = math.MaxUint64
	if got := Sum([]*agentpb.StatsContainerResponse{sample(), free, sample()}).CgroupStats.MemoryStats.Usage.Limit; got != math.MaxUint64 {
		t.Errorf("limit with one that has none: %d", got)
	}
}
