// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// statsTimeout is what a guest has to tell its figures, and a guest that is known to
// hang is not asked: containerd collects them one after the other, for all pods of the
// node (core/metrics, plugins/services/tasks), and gives 2 s to what it bounds itself.
const statsTimeout = 2 * time.Second

// Usage asks the guest how much the container uses.
func (c *Container) Usage(ctx context.Context) (*agentpb.StatsContainerResponse, error) {
	if c.cfg.Conn.Hung() {
		return nil, fmt.Errorf("figures of container %s: %w", c.cfg.ID, guest.ErrSilent)
	}
	return guest.AgentWithin(ctx, c.cfg.Conn, statsTimeout, agentpb.AgentServiceService.StatsContainer, &agentpb.StatsContainerRequest{ContainerId: c.cfg.ID})
}

// Metrics has the form that this node's containerd expects, io.containerd.cgroups.v1.Metrics
// or v2.Metrics by the node's cgroup mode, whatever the guest's is. kills is how many
// times the guest's kernel killed for want of memory: containerd 2.4 takes the reason
// OOMKilled from there (internal/cri/server/events.go).
func Metrics(r *agentpb.StatsContainerResponse, kills uint64) proto.Message {
	if unified() {
		return metricsV2(r, kills)
	}
	return metricsV1(r, kills)
}

// unified tells whether the node has only the cgroup v2 hierarchy.
func unified() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// memory looks values up in the guest's memory.stat under any of their names: those
// of cgroup v2 and of v1 differ.
type memory map[string]uint64

func (m memory) of(names ...string) uint64 {
	for _, n := range names {
		if v, ok := m[n]; ok {
			return v
		}
	}
	return 0
}

// unlimited is how the kernel's "max" reads, and what a limit is that an agent does not
// tell: containerd subtracts from limits.
const unlimited = math.MaxUint64

func limit(n uint64) uint64 {
	if n == 0 {
		return unlimited
	}
	return n
}

// swap tells memory and swap together, as cgroup v1 counts, and swap alone, as v2 does.
// Agents on libcontainer and those of v1 tell the former; one that tells less than the
// memory alone, as kata's on v2 does, tells the latter.
func swap(mem *agentpb.MemoryStats) (both, alone *agentpb.MemoryData) {
	of := func(f func(*agentpb.MemoryData) uint64) (uint64, uint64) {
		m, s := f(mem.GetUsage()), f(mem.GetSwapUsage())
		if s < m {
			return m + s, s
		}
		return s, s - m
	}
	both, alone = &agentpb.MemoryData{Failcnt: mem.GetSwapUsage().GetFailcnt()}, &agentpb.MemoryData{}
	both.Usage, alone.Usage = of((*agentpb.MemoryData).GetUsage)
	both.MaxUsage, alone.MaxUsage = of((*agentpb.MemoryData).GetMaxUsage)
	both.Limit, alone.Limit = unlimited, unlimited
	if m, s := limit(mem.GetUsage().GetLimit()), limit(mem.GetSwapUsage().GetLimit()); s != unlimited && (s >= m || m == unlimited) {
		both.Limit, alone.Limit = s, s
		if m != unlimited {
			alone.Limit = s - m
		}
	} else if s != unlimited { // less than the memory's: swap alone
		both.Limit, alone.Limit = m+s, s
	}
	return both, alone
}

func metricsV1(r *agentpb.StatsContainerResponse, kills uint64) *v1.Metrics {
	s := r.GetCgroupStats()
	cpu, mem := s.GetCpuStats(), s.GetMemoryStats()
	st := memory(mem.GetStats())
	m := &v1.Metrics{
		Pids: &v1.PidsStat{Current: s.GetPidsStats().GetCurrent(), Limit: s.GetPidsStats().GetLimit()},
		CPU: &v1.CPUStat{
			Usage: &v1.CPUUsage{
				Total: cpu.GetCpuUsage().GetTotalUsage(), Kernel: cpu.GetCpuUsage().GetUsageInKernelmode(),
				User: cpu.GetCpuUsage().GetUsageInUsermode(), PerCPU: cpu.GetCpuUsage().GetPercpuUsage(),
			},
			Throttling: &v1.Throttle{
				Periods: cpu.GetThrottlingData().GetPeriods(), ThrottledPeriods: cpu.GetThrottlingData().GetThrottledPeriods(),
				ThrottledTime: cpu.GetThrottlingData().GetThrottledTime(),
			},
		},
		Memory: memoryV1(mem, st),
		Blkio:  blkioV1(s.GetBlkioStats()),

		MemoryOomControl: &v1.MemoryOomControl{OomKill: kills},
	}
	for _, size := range sortedKeys(s.GetHugetlbStats()) {
		h := s.GetHugetlbStats()[size]
		m.Hugetlb = append(m.Hugetlb, &v1.HugetlbStat{Pagesize: size, Usage: h.Usage, Max: h.MaxUsage, Failcnt: h.Failcnt})
	}
	for _, n := range r.GetNetworkStats() {
		m.Network = append(m.Network, &v1.NetworkStat{
			Name: n.Name, RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		})
	}
	return m
}

func memoryV1(mem *agentpb.MemoryStats, st memory) *v1.MemoryStat {
	entry := func(d *agentpb.MemoryData) *v1.MemoryEntry {
		return &v1.MemoryEntry{Limit: limit(d.GetLimit()), Usage: d.GetUsage(), Max: d.GetMaxUsage(), Failcnt: d.GetFailcnt()}
	}
	both, _ := swap(mem)
	cache := mem.GetCache()
	if cache == 0 {
		cache = st.of("cache", "file")
	}
	total := func(name string, others ...string) uint64 {
		return st.of(append([]string{"total_" + name, name}, others...)...)
	}
	return &v1.MemoryStat{
		Cache: cache, RSS: st.of("rss", "anon"), RSSHuge: st.of("rss_huge", "anon_thp"),
		MappedFile: st.of("mapped_file", "file_mapped"), Dirty: st.of("dirty", "file_dirty"), Writeback: st.of("writeback", "file_writeback"),
		PgPgIn: st.of("pgpgin"), PgPgOut: st.of("pgpgout"), PgFault: st.of("pgfault"), PgMajFault: st.of("pgmajfault"),
		InactiveAnon: st.of("inactive_anon"), ActiveAnon: st.of("active_anon"),
		InactiveFile: st.of("inactive_file"), ActiveFile: st.of("active_file"), Unevictable: st.of("unevictable"),
		HierarchicalMemoryLimit: hierarchical(st, "hierarchical_memory_limit", mem.GetUsage().GetLimit()),
		HierarchicalSwapLimit:   hierarchical(st, "hierarchical_memsw_limit", both.Limit),
		TotalCache:              st.of("total_cache", "cache", "file"), TotalRSS: total("rss", "anon"), TotalRSSHuge: total("rss_huge", "anon_thp"),
		TotalMappedFile: total("mapped_file", "file_mapped"), TotalDirty: total("dirty", "file_dirty"), TotalWriteback: total("writeback", "file_writeback"),
		TotalPgPgIn: total("pgpgin"), TotalPgPgOut: total("pgpgout"), TotalPgFault: total("pgfault"), TotalPgMajFault: total("pgmajfault"),
		TotalInactiveAnon: total("inactive_anon"), TotalActiveAnon: total("active_anon"),
		TotalInactiveFile: total("inactive_file"), TotalActiveFile: total("active_file"), TotalUnevictable: total("unevictable"),
		Usage: entry(mem.GetUsage()), Swap: entry(both), Kernel: entry(mem.GetKernelUsage()),
	}
}

// hierarchical is a limit that cgroup v1 tells and v2 does not.
func hierarchical(st memory, name string, own uint64) uint64 {
	if n, ok := st[name]; ok {
		return n
	}
	return limit(own)
}

func blkioV1(b *agentpb.BlkioStats) *v1.BlkIOStat {
	list := func(in []*agentpb.BlkioStatsEntry) (out []*v1.BlkIOEntry) {
		for _, e := range in {
			out = append(out, &v1.BlkIOEntry{Op: e.Op, Major: e.Major, Minor: e.Minor, Value: e.Value, Device: fmt.Sprintf("%d:%d", e.Major, e.Minor)})
		}
		return out
	}
	return &v1.BlkIOStat{
		IoServiceBytesRecursive: list(b.GetIoServiceBytesRecursive()), IoServicedRecursive: list(b.GetIoServicedRecursive()),
		IoQueuedRecursive: list(b.GetIoQueuedRecursive()), IoServiceTimeRecursive: list(b.GetIoServiceTimeRecursive()),
		IoWaitTimeRecursive: list(b.GetIoWaitTimeRecursive()), IoMergedRecursive: list(b.GetIoMergedRecursive()),
		IoTimeRecursive: list(b.GetIoTimeRecursive()), SectorsRecursive: list(b.GetSectorsRecursive()),
	}
}

func metricsV2(r *agentpb.StatsContainerResponse, kills uint64) *v2.Metrics {
	s := r.GetCgroupStats()
	cpu := s.GetCpuStats()
	m := &v2.Metrics{
		Pids: &v2.PidsStat{Current: s.GetPidsStats().GetCurrent(), Limit: s.GetPidsStats().GetLimit()},
		CPU: &v2.CPUStat{ // the guest counts nanoseconds
			UsageUsec: cpu.GetCpuUsage().GetTotalUsage() / 1000, UserUsec: cpu.GetCpuUsage().GetUsageInUsermode() / 1000,
			SystemUsec: cpu.GetCpuUsage().GetUsageInKernelmode() / 1000,
			NrPeriods:  cpu.GetThrottlingData().GetPeriods(), NrThrottled: cpu.GetThrottlingData().GetThrottledPeriods(),
			ThrottledUsec: cpu.GetThrottlingData().GetThrottledTime() / 1000,
		},
		Memory: memoryV2(s.GetMemoryStats()),
		Io:     ioV2(s.GetBlkioStats()),
	}
	m.MemoryEvents = &v2.MemoryEvents{Max: s.GetMemoryStats().GetUsage().GetFailcnt(), Oom: kills, OomKill: kills}
	for _, size := range sortedKeys(s.GetHugetlbStats()) {
		h := s.GetHugetlbStats()[size]
		m.Hugetlb = append(m.Hugetlb, &v2.HugeTlbStat{Pagesize: size, Current: h.Usage, Max: h.MaxUsage, Failcnt: h.Failcnt})
	}
	for _, n := range r.GetNetworkStats() {
		m.Network = append(m.Network, &v2.NetworkStat{
			Name: n.Name, RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		})
	}
	return m
}

func memoryV2(mem *agentpb.MemoryStats) *v2.MemoryStat {
	st := memory(mem.GetStats())
	_, alone := swap(mem)
	return &v2.MemoryStat{
		Anon: st.of("anon", "total_rss", "rss"), File: st.of("file", "total_cache", "cache"),
		KernelStack: st.of("kernel_stack"), Slab: st.of("slab"), Sock: st.of("sock"), Shmem: st.of("shmem", "total_shmem"),
		FileMapped: st.of("file_mapped", "total_mapped_file", "mapped_file"), FileDirty: st.of("file_dirty", "total_dirty", "dirty"),
		FileWriteback: st.of("file_writeback", "total_writeback", "writeback"), AnonThp: st.of("anon_thp", "total_rss_huge", "rss_huge"),
		InactiveAnon: st.of("inactive_anon"), ActiveAnon: st.of("active_anon"),
		InactiveFile: st.of("total_inactive_file", "inactive_file"), ActiveFile: st.of("total_active_file", "active_file"),
		Unevictable: st.of("unevictable"), SlabReclaimable: st.of("slab_reclaimable"), SlabUnreclaimable: st.of("slab_unreclaimable"),
		Pgfault: st.of("pgfault", "total_pgfault"), Pgmajfault: st.of("pgmajfault", "total_pgmajfault"),
		WorkingsetRefault: st.of("workingset_refault", "workingset_refault_file"), WorkingsetActivate: st.of("workingset_activate", "workingset_activate_file"),
		WorkingsetNodereclaim: st.of("workingset_nodereclaim"), Pgrefill: st.of("pgrefill"), Pgscan: st.of("pgscan"), Pgsteal: st.of("pgsteal"),
		Pgactivate: st.of("pgactivate"), Pgdeactivate: st.of("pgdeactivate"), Pglazyfree: st.of("pglazyfree"), Pglazyfreed: st.of("pglazyfreed"),
		ThpFaultAlloc: st.of("thp_fault_alloc"), ThpCollapseAlloc: st.of("thp_collapse_alloc"),
		Usage: mem.GetUsage().GetUsage(), UsageLimit: limit(mem.GetUsage().GetLimit()), MaxUsage: mem.GetUsage().GetMaxUsage(),
		SwapUsage: alone.Usage, SwapLimit: alone.Limit, SwapMaxUsage: alone.MaxUsage,
	}
}

// ioV2 gathers the guest's lists by operation into one entry per device.
func ioV2(b *agentpb.BlkioStats) *v2.IOStat {
	type device struct{ major, minor uint64 }
	entries := map[device]*v2.IOEntry{}
	out := &v2.IOStat{}
	entry := func(e *agentpb.BlkioStatsEntry) *v2.IOEntry {
		d := device{e.Major, e.Minor}
		if entries[d] == nil {
			entries[d] = &v2.IOEntry{Major: e.Major, Minor: e.Minor}
			out.Usage = append(out.Usage, entries[d])
		}
		return entries[d]
	}
	for _, e := range b.GetIoServiceBytesRecursive() {
		switch strings.ToLower(e.Op) {
		case "read", "rbytes":
			entry(e).Rbytes += e.Value
		case "write", "wbytes":
			entry(e).Wbytes += e.Value
		}
	}
	for _, e := range b.GetIoServicedRecursive() {
		switch strings.ToLower(e.Op) {
		case "read", "rios":
			entry(e).Rios += e.Value
		case "write", "wios":
			entry(e).Wios += e.Value
		}
	}
	return out
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
