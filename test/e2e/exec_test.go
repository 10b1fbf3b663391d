// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// TestContainers has what a container's user meets beyond its output: processes that are
// added to it, its limits and their change, its figures, and its end for want of
// memory. The kubelet reads all of it through the CRI.
func TestContainers(t *testing.T) {
	for name, g := range testbed.Generations(os.Getenv("PEERPOD_BIN")) {
		if name == "containerd 1.7" {
			continue // between the two: its CRI plugin handles containers as 1.6's does
		}
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, "e2e-containers")
			bed.Generation = g
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			if err := bed.StartContainerd(ctx); err != nil {
				t.Fatal(err)
			}
			if err := bed.StartAdaptor(ctx); err != nil {
				t.Fatal(err)
			}
			p, err := RunPod(ctx, bed, "containers", testbed.Handler, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Remove(context.WithoutCancel(ctx))
			t.Run("exec", func(t *testing.T) { checkExec(ctx, t, p) })
			t.Run("limits", func(t *testing.T) { checkLimits(ctx, t, p) })
			t.Run("out of memory", func(t *testing.T) { checkOOM(ctx, t, p) })
			t.Run("no such command", func(t *testing.T) { checkNoCommand(ctx, t, p) })
		})
	}
}

// checkExec adds processes to a container that has few rights.
func checkExec(ctx context.Context, t *testing.T, p *Pod) {
	c, err := p.RunWith(ctx, "exec", map[string]any{"security_context": map[string]any{
		"namespace_options":   map[string]any{"pid": 1},
		"capabilities":        map[string]any{"drop_capabilities": []string{"ALL"}, "add_capabilities": []string{"NET_BIND_SERVICE", "CHOWN"}},
		"run_as_user":         map[string]any{"value": 1000},
		"run_as_group":        map[string]any{"value": 2000},
		"supplemental_groups": []int{3000},
		"no_new_privs":        true,
	}}, "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	const rights = "grep -E ^(Cap|Uid|Gid|Groups|NoNewPrivs|Seccomp:)"
	of := func(pid string) string {
		t.Helper()
		out, err := c.Exec(ctx, append(strings.Fields(rights), "/proc/"+pid+"/status")...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	init, exec := of("1"), of("self")
	if init != exec || !strings.Contains(exec, "CapBnd:\t0000000000000401") || !strings.Contains(exec, "Groups:\t2000 3000") {
		t.Errorf("rights of an exec:\n%s\nof the container:\n%s", exec, init)
	}
	if _, err := c.Exec(ctx, "sh", "-c", "exit 123"); err == nil {
		t.Error("exit 123 is no error")
	} else if code, err := exitStatus(err); err != nil || code != 123 {
		t.Errorf("exit code %d, %v", code, err)
	}
	if _, err := c.Exec(ctx, "/no/such"); err == nil || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("no such command: %v", err)
	}
	if _, err := c.Exec(ctx, "/etc/passwd"); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("not a program: %v", err)
	}
	bed := p.bed
	_, err = bed.Crictl(ctx, "exec", "--sync", "--timeout", "1", c.ID, "sleep", "1000")
	if err == nil || !strings.Contains(err.Error(), "timeout 1s exceeded") {
		t.Errorf("time limit: %v", err)
	}
	if out, err := c.Exec(ctx, "ps", "-o", "args"); err != nil || strings.Count(out, "sleep 1000") != 1 {
		t.Errorf("after its time limit: %q, %v", out, err)
	}
	cmd, args := bed.CrictlCommand("exec", "-i", c.ID, "wc", "-c")
	if out, err := testbed.RunIn(ctx, strings.NewReader(strings.Repeat("x", 3<<20)), cmd, args...); err != nil || strings.TrimSpace(out) != fmt.Sprint(3<<20) {
		t.Errorf("input: %q, %v", out, err)
	}
}

// checkLimits changes the limits of a container that runs.
func checkLimits(ctx context.Context, t *testing.T, p *Pod) {
	c, err := p.RunWith(ctx, "limits", map[string]any{
		"security_context": ownProcesses["security_context"],
		"resources":        map[string]any{"memory_limit_in_bytes": 64 << 20, "cpu_period": 100000, "cpu_quota": 50000},
	}, "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	see := func(want ...string) {
		t.Helper()
		out, err := c.Exec(ctx, "sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")
		if err != nil || out != strings.Join(want, "\n") {
			t.Errorf("limits %q, %v, want %q", out, err, want)
		}
	}
	see("67108864", "50000 100000")
	if _, err := p.bed.Crictl(ctx, "update", "--memory", "100663296", "--cpu-period", "100000", "--cpu-quota", "70000", c.ID); err != nil {
		t.Error(err)
	}
	see("100663296", "70000 100000")
	checkContainerStats(ctx, t, p.bed, c)
}

// checkOOM has a container that takes more memory than it may.
func checkOOM(ctx context.Context, t *testing.T, p *Pod) {
	c, err := p.RunWith(ctx, "oom", map[string]any{
		"security_context": ownProcesses["security_context"],
		"resources":        map[string]any{"memory_limit_in_bytes": 16 << 20},
	}, "tail", "/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	if code, err := c.Wait(ctx); err != nil || code != 137 {
		t.Errorf("it ended with %d, %v", code, err)
	}
	if s, err := c.status(ctx); err != nil || s.Reason != "OOMKilled" {
		t.Errorf("reason %q, %v", s.Reason, err)
	}
}

// checkNoCommand has a container whose command does not exist.
func checkNoCommand(ctx context.Context, t *testing.T, p *Pod) {
	c, err := p.Run(ctx, "nothing", "/no/such")
	if err == nil || !strings.Contains(err.Error(), "/no/such") || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("start: %v", err)
	}
	if c == nil {
		return
	}
	if s, err := c.status(ctx); err != nil || s.ExitCode != 128 || s.Reason != "StartError" {
		t.Errorf("status %+v, %v", s, err)
	}
}

// checkContainerStats looks at what the kubelet would see of a container.
func checkContainerStats(ctx context.Context, t *testing.T, bed *testbed.Bed, c *Container) {
	t.Helper()
	if err := within(ctx, func(ctx context.Context) error {
		out, err := bed.Crictl(ctx, "stats", "-o", "json", "--id", c.ID)
		if err != nil {
			return err
		}
		var s struct {
			Stats []usage `json:"stats"`
		}
		if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Stats) != 1 {
			return fmt.Errorf("%s: %v", out, err)
		}
		return s.Stats[0].check()
	}); err != nil {
		t.Errorf("figures of %s: %v", filepath.Base(c.log), err)
	}
}
