// SPDX-License-Identifier: Apache-2.0

package container

import (
	"encoding/json"
	"flag"
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
				Stats:       map[string]uint64{"anon": 41, "file": 42, "inactive_file": 43, "active_file": 44, "pgfault": 45, "pgmajfault": 46, "file_mapped": 47, "kernel_stack": 48, "slab": 49},
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
	for name, m := range map[string]any{"testdata/metrics-v1.golden": metricsV1(sample()), "testdata/metrics-v2.golden": metricsV2(sample())} {
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
	metricsV1(&agentpb.StatsContainerResponse{}) // an agent that says nothing is no reason to crash
	metricsV2(&agentpb.StatsContainerResponse{})
}
