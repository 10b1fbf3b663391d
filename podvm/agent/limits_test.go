// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/opencontainers/cgroups"
)

// limited runs a container that waits, with limits.
func (g *guest) limited(id string, r *agentpb.LinuxResources) {
	g.t.Helper()
	spec := g.spec("busybox tail -f /dev/null")
	spec.Linux.Resources = r
	g.create(id, spec)
	g.start(id)
}

func (g *guest) updateTo(id string, r *agentpb.LinuxResources) {
	g.t.Helper()
	must[any](g.t)(g.UpdateContainer(g.ctx(), &agentpb.UpdateContainerRequest{ContainerId: id, Resources: r}))
}

func (g *guest) stats(id string) *agentpb.CgroupStats {
	g.t.Helper()
	return must[*agentpb.StatsContainerResponse](g.t)(g.StatsContainer(g.ctx(), &agentpb.StatsContainerRequest{ContainerId: id})).CgroupStats
}

// A limit of processes is one: forks beyond it fail, and an update moves it.
func TestPidsLimit(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	for _, tc := range []struct{ update, children int64 }{{0, 18}, {30, 28}, {-1, 40}} {
		id := fmt.Sprintf("limit%d", tc.children)
		g.limited(id, &agentpb.LinuxResources{Pids: &agentpb.LinuxPids{Limit: 20}})
		if tc.update != 0 {
			g.updateTo(id, &agentpb.LinuxResources{Pids: &agentpb.LinuxPids{Limit: tc.update}})
		}
		// The shell ends at the first child it cannot have. Beside the children there
		// are the first process and the shell.
		out, _ := g.output(id, "forks", "i=0; while [ $i -lt 40 ]; do busybox tail -f /dev/null </dev/null >/dev/null & echo $i; i=$((i+1)); done 2>/dev/null")
		if got := int64(len(strings.Fields(out))); got != tc.children {
			t.Errorf("with a limit of 20, updated to %d: %d children, want %d", tc.update, got, tc.children)
		}
	}
}

// A limit of memory moves up and down in place, with that of memory and swap where
// the two are one; what uses more is killed.
func TestMemoryLimitMoves(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.limited("main", &agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{Limit: 64 << 20, Swap: 64 << 20}})
	for _, limit := range []int64{128 << 20, 256 << 20, 48 << 20} {
		g.updateTo("main", &agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{Limit: limit}})
		if got := g.stats("main").MemoryStats.Usage.Limit; got != uint64(limit) {
			t.Errorf("the limit is %d, not %d", got, limit)
		}
	}
	g.exec("main", "hungry", "x=0123456789abcdef; while :; do x=$x$x; done", false)
	if got := g.wait("main", "hungry"); got != 137 {
		t.Errorf("a process beyond the limit: status %d", got)
	}
	if cgroups.IsCgroup2UnifiedMode() {
		return // there the kernel takes every limit, and kills until it holds
	}
	if _, err := g.UpdateContainer(g.ctx(), &agentpb.UpdateContainerRequest{ContainerId: "main", Resources: &agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{Limit: 4096}}}); err == nil {
		t.Error("a limit below what is used was taken")
	}
	if got := g.stats("main").MemoryStats.Usage.Limit; got != 48<<20 {
		t.Errorf("after an update that failed the limit is %d", got)
	}
}

// A quota of processor time is kept: a process that wants more is throttled.
func TestCPUQuota(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.limited("main", &agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Quota: 20_000, Period: 100_000}})
	g.exec("main", "busy", "while :; do :; done", false)
	eventually(t, "it is throttled", func() bool { return g.stats("main").CpuStats.ThrottlingData.ThrottledPeriods > 0 })
	g.updateTo("main", &agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Quota: -1}})
	c, err := g.agent.container("main", errdefs.ErrNotFound)
	if err != nil {
		t.Fatal(err)
	}
	if c.resources.CpuQuota != -1 || c.resources.CpuPeriod != 100_000 {
		t.Errorf("quota %d, period %d", c.resources.CpuQuota, c.resources.CpuPeriod)
	}
	// Without a quota no further period is throttled, though time is used.
	before := g.stats("main").CpuStats
	eventually(t, "time is used", func() bool { return g.stats("main").CpuStats.CpuUsage.TotalUsage > before.CpuUsage.TotalUsage+200e6 })
	if after := g.stats("main").CpuStats.ThrottlingData; after.ThrottledPeriods > before.ThrottlingData.ThrottledPeriods+1 {
		t.Errorf("throttled: %v, then %v", before.ThrottlingData, after)
	}
}

// A set of processors is what processes may run on; one that does not exist is
// refused.
func TestCPUSet(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.limited("main", &agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Cpus: "0", Mems: "0"}})
	allowed := func(execID string) string {
		out, _ := g.output("main", execID, "busybox awk '/^Cpus_allowed_list/ {print $2}' /proc/self/status")
		return strings.TrimSpace(out)
	}
	if got := allowed("exec1"); got != "0" {
		t.Errorf("processors %q", got)
	}
	for _, bad := range []string{"4000", "x"} {
		if _, err := g.UpdateContainer(g.ctx(), &agentpb.UpdateContainerRequest{ContainerId: "main", Resources: &agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Cpus: bad}}}); err == nil {
			t.Errorf("processors %s were taken", bad)
		}
		if got := allowed("after-" + bad); got != "0" {
			t.Errorf("processors after a failed update: %q", got)
		}
	}
}

// A paused container makes no progress and, resumed, goes on where it was.
func TestPauseKeepsProgress(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "i=0; while read x; do i=$((i+1)); echo $i; done")
	step := func() int {
		t.Helper()
		must[any](t)(g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: "main", Data: []byte("\n")}))
		out := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "main", Len: 100}))
		n, err := strconv.Atoi(strings.TrimSpace(string(out.Data)))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for round := 1; round <= 3; round++ {
		if got := step(); got != round {
			t.Errorf("step %d, want %d", got, round)
		}
		must[any](t)(g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: "main"}))
		// While it is frozen it can be measured and updated.
		g.stats("main")
		g.updateTo("main", &agentpb.LinuxResources{Pids: &agentpb.LinuxPids{Limit: int64(100 + round)}})
		must[any](t)(g.ResumeContainer(g.ctx(), &agentpb.ResumeContainerRequest{ContainerId: "main"}))
	}
	if got := fmt.Sprint(g.stats("main").PidsStats.Limit); got != "103" {
		t.Errorf("limit %s", got)
	}
}
