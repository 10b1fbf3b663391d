// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"golang.org/x/sys/unix"
)

// metrics writes Prometheus' text format.
type metrics struct{ strings.Builder }

// family begins a metric. kind is gauge or counter.
func (m *metrics) family(name, kind, help string) {
	fmt.Fprintf(m, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one value. labels are names and values in turn.
func (m *metrics) sample(name string, value float64, labels ...string) {
	m.WriteString(name)
	for i := 0; i+1 < len(labels); i += 2 {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		fmt.Fprintf(m, "%s%s=%q", sep, labels[i], labels[i+1])
	}
	if len(labels) > 0 {
		m.WriteString("}")
	}
	fmt.Fprintf(m, " %s\n", strconv.FormatFloat(value, 'f', -1, 64))
}

// GetMetrics returns figures about the agent, the guest and the pod's network in
// Prometheus' text format. Those that a kata-agent has too have its names and labels
// (kata-containers 4.1, docs/design/kata-metrics.md).
func (s *service) GetMetrics(context.Context, *agentpb.GetMetricsRequest) (*agentpb.Metrics, error) {
	m := &metrics{}
	s.a.containerMetrics(m)
	for _, f := range []func(*metrics) error{agentMetrics, loadMetrics, memoryMetrics, cpuMetrics, s.a.networkMetrics} {
		if err := f(m); err != nil {
			return nil, toGRPC(fmt.Errorf("measure the guest: %w", err))
		}
	}
	return &agentpb.Metrics{Metrics: m.String()}, nil
}

func (a *Agent) containerMetrics(m *metrics) {
	states := make([]int, len(containerStateNames))
	a.mu.Lock()
	list := make([]*container, 0, len(a.containers))
	for _, c := range a.containers {
		list = append(list, c)
	}
	a.mu.Unlock()
	for _, c := range list {
		c.mu.Lock()
		states[c.state]++
		c.mu.Unlock()
	}
	m.family("peerpod_agent_containers", "gauge", "Containers of the pod by state.")
	for i, n := range states {
		m.sample("peerpod_agent_containers", float64(n), "state", strings.ToLower(containerStateNames[i]))
	}
}

func agentMetrics(m *metrics) error {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return err
	}
	m.family("peerpod_agent_cpu_seconds_total", "counter", "Processor time of the agent.")
	m.sample("peerpod_agent_cpu_seconds_total", time.Duration(ru.Utime.Nano()+ru.Stime.Nano()).Seconds())
	m.family("peerpod_agent_max_resident_bytes", "gauge", "Most memory the agent ever had resident.")
	m.sample("peerpod_agent_max_resident_bytes", float64(ru.Maxrss)*1024)
	// proc_pid_statm(5): size and resident, in pages.
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return err
	}
	var size, resident float64
	if _, err := fmt.Fscan(bytes.NewReader(b), &size, &resident); err != nil {
		return fmt.Errorf("/proc/self/statm: %w", err)
	}
	page := float64(os.Getpagesize())
	m.family("kata_agent_total_vm", "gauge", "Agent process total VM size, bytes.")
	m.sample("kata_agent_total_vm", size*page)
	m.family("kata_agent_total_rss", "gauge", "Agent process total RSS size, bytes.")
	m.sample("kata_agent_total_rss", resident*page)
	return nil
}

func loadMetrics(m *metrics) error {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	m.family("kata_guest_load", "gauge", "Guest system load.")
	for i, f := range strings.Fields(string(b)) {
		if i > 2 {
			break
		}
		v, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return fmt.Errorf("/proc/loadavg: %w", err)
		}
		m.sample("kata_guest_load", v, "item", []string{"load1", "load5", "load15"}[i])
	}
	return nil
}

// memoryItems are lines of /proc/meminfo.
var memoryItems = []string{"MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "Shmem", "Slab", "SReclaimable", "AnonPages", "Mapped"}

func memoryMetrics(m *metrics) error {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err
	}
	m.family("kata_guest_meminfo", "gauge", "Guest memory, kibibytes.")
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		if f := strings.Fields(rest); len(f) > 0 && slices.Contains(memoryItems, name) {
			v, err := strconv.ParseFloat(f[0], 64)
			if err != nil {
				return fmt.Errorf("/proc/meminfo: %s: %w", name, err)
			}
			m.sample("kata_guest_meminfo", v, "item", strings.ToLower(name))
		}
	}
	return nil
}

// cpuItems are the columns of /proc/stat (proc_stat(5)), in hundredths of a second.
var cpuItems = []string{"user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"}

func cpuMetrics(m *metrics) error {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return err
	}
	m.family("kata_guest_cpu_time", "counter", "Guest CPU time, hundredths of a second.")
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) == 0 || !strings.HasPrefix(f[0], "cpu") {
			break
		}
		cpu := strings.TrimPrefix(f[0], "cpu")
		if cpu == "" {
			cpu = "total"
		}
		for i, value := range f[1:min(len(f), len(cpuItems)+1)] {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return fmt.Errorf("/proc/stat: %w", err)
			}
			m.sample("kata_guest_cpu_time", v, "cpu", cpu, "item", cpuItems[i])
		}
	}
	return nil
}

func (a *Agent) networkMetrics(m *metrics) error {
	list, err := a.net.Stats()
	if err != nil {
		return err
	}
	m.family("kata_guest_netdev_stat", "counter", "Traffic of the pod's interfaces.")
	for _, n := range list {
		for _, i := range []struct {
			item  string
			value uint64
		}{
			{"recv_bytes", n.RxBytes}, {"recv_packets", n.RxPackets}, {"recv_errs", n.RxErrors}, {"recv_drop", n.RxDropped},
			{"sent_bytes", n.TxBytes}, {"sent_packets", n.TxPackets}, {"sent_errs", n.TxErrors}, {"sent_drop", n.TxDropped},
		} {
			m.sample("kata_guest_netdev_stat", float64(i.value), "interface", n.Name, "item", i.item)
		}
	}
	return nil
}
