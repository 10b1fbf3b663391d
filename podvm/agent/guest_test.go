// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

func TestGuestDetails(t *testing.T) {
	g := newGuest(t)
	r := must[*agentpb.GuestDetailsResponse](t)(g.GetGuestDetails(g.ctx(), &agentpb.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true}))
	if d := r.AgentDetails; d.Version != "test" || d.InitDaemon || !slices.Equal(d.StorageHandlers, storageDriverNames()) || !slices.Contains(d.StorageHandlers, "local") {
		t.Errorf("details: %v", d)
	}
	if r.SupportMemHotplugProbe {
		t.Error("memory is said to be pluggable, and MemHotplugByProbe is not there")
	}
	path := filepath.Join(t.TempDir(), "size")
	if n, err := memoryBlock(path); n != 0 || err != nil {
		t.Errorf("a kernel that plugs no memory: %d, %v", n, err)
	}
	for text, want := range map[string]uint64{"8000000\n": 128 << 20, "x\n": 0} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if n, err := memoryBlock(path); n != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v", text, n, err)
		}
	}
}

// A policy that would not be enforced is not taken.
func TestSetPolicyFails(t *testing.T) {
	g := newGuest(t)
	_, err := g.SetPolicy(g.ctx(), &agentpb.SetPolicyRequest{Policy: "package agent_policy\ndefault AllowRequestsFailingPolicy := true"})
	wantClass(t, "SetPolicy", err, errdefs.ErrFailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "io.katacontainers.config.agent.policy") {
		t.Errorf("the error does not say what to change: %v", err)
	}
}

// The figures are in the format that Prometheus reads, and are this machine's.
func TestMetrics(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "sleep 1000")
	text := must[*agentpb.Metrics](t)(g.GetMetrics(g.ctx(), &agentpb.GetMetricsRequest{})).Metrics
	typed, values := map[string]bool{}, map[string]float64{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if f := strings.Fields(line); strings.HasPrefix(line, "# ") {
			if f[1] == "TYPE" && (typed[f[2]] || f[3] != "gauge" && f[3] != "counter") {
				t.Errorf("%q", line)
			}
			typed[f[2]] = typed[f[2]] || f[1] == "TYPE"
			continue
		}
		name, value, _ := strings.Cut(line, " ")
		v, err := strconv.ParseFloat(value, 64)
		family, labels, _ := strings.Cut(name, "{")
		if err != nil || !typed[family] || labels != "" && !strings.HasSuffix(labels, `"}`) {
			t.Errorf("%q: %v", line, err)
		}
		values[name] = v
	}
	for _, name := range []string{
		`kata_guest_load{item="load15"}`, `kata_guest_meminfo{item="memtotal"}`, `kata_guest_cpu_time{cpu="total",item="idle"}`,
		"kata_agent_total_rss", "kata_agent_total_vm", "peerpod_agent_max_resident_bytes",
	} {
		if v, ok := values[name]; !ok || v <= 0 && !strings.Contains(name, "load") {
			t.Errorf("%s is %v, %v", name, v, ok)
		}
	}
	if values[`peerpod_agent_containers{state="running"}`] != 1 {
		t.Errorf("containers that run: %v", values[`peerpod_agent_containers{state="running"}`])
	}
}
