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

// TestSandboxAPI runs pods that containerd 2 makes through the Sandbox API: nothing in
// containerd stands for the pod, and everything else is as with the other handler.
func TestSandboxAPI(t *testing.T) {
	bed := newBed(t, "e2e-sandboxapi")
	bed.Generation = testbed.Generations(bed.Bin)["containerd 2"]
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	plain, err := RunPod(ctx, bed, "plain", "", nil) // the CNI's bridge stays
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Remove(context.WithoutCancel(ctx))
	before, err := TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	clean := func(t *testing.T) {
		t.Helper()
		if err := within(ctx, func(context.Context) error { return leftBehind(before) }); err != nil {
			t.Error(err)
		}
	}
	t.Run("life", func(t *testing.T) {
		sandboxLife(ctx, t, bed)
		clean(t)
	})
	for _, victim := range []string{"containerd-shim-kata", "qemu-system"} {
		t.Run(victim+" is killed", func(t *testing.T) {
			p, c := sandboxPod(ctx, t, bed)
			if err := killOne(victim); err != nil {
				t.Fatal(err)
			}
			if code, err := c.Wait(ctx); err != nil || code == 0 {
				t.Errorf("the container ended with %d, %v", code, err)
			}
			if err := within(ctx, func(ctx context.Context) error { return p.is(ctx, "SANDBOX_NOTREADY") }); err != nil {
				t.Error(err)
			}
			if err := p.Remove(ctx); err != nil {
				t.Error(err)
			}
			clean(t)
		})
	}
}

// sandboxPod runs a pod whose containers share their processes, with one container.
func sandboxPod(ctx context.Context, t *testing.T, bed *testbed.Bed) (*Pod, *Container) {
	t.Helper()
	p, err := runPod(ctx, bed, "api", testbed.SandboxHandler, nil, sharedProcesses)
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Run(ctx, "app", "sh", "-c", "echo hello; exec sleep 1000")
	if err != nil {
		t.Fatal(err)
	}
	return p, c
}

// is tells whether the pod is in a state of CRI's.
func (p *Pod) is(ctx context.Context, want string) error {
	out, err := p.bed.Crictl(ctx, "inspectp", "-o", "json", p.ID)
	if err != nil {
		return err
	}
	var s struct {
		Status struct {
			State string `json:"state"`
		} `json:"status"`
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return err
	}
	if s.Status.State != want {
		return fmt.Errorf("pod is %s, not %s", s.Status.State, want)
	}
	return nil
}

// sandboxLife goes through the life of one pod.
func sandboxLife(ctx context.Context, t *testing.T, bed *testbed.Bed) {
	p, app := sandboxPod(ctx, t, bed)
	dirs, err := filepath.Glob("/run/containerd-testbed/state/io.containerd.runtime.v2.task/k8s.io/*")
	if err != nil || len(dirs) != 2 { // the runc pod's sandbox, and app
		t.Errorf("tasks in containerd: %v, %v", dirs, err)
	}
	second, err := p.Run(ctx, "second", "sh", "-c", "cat /etc/hostname; exec sleep 1000")
	if err != nil {
		t.Fatal(err)
	}
	for c, want := range map[*Container]string{app: "hello\n", second: "api\n"} {
		if err := within(ctx, func(context.Context) error {
			if log, err := c.Log("stdout"); err != nil || log != want {
				return fmt.Errorf("log %q, %v, want %q", log, err, want)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	for command, want := range map[string]string{
		"ps -o args":              "/pause",
		"cat /etc/hosts":          "localhost",
		"df -P /dev/shm":          "/dev/shm",
		"touch /dev/shm/from-app": "",
		"cat /proc/sys/net/ipv4/ip_unprivileged_port_start": "0",
	} {
		if out, err := app.Exec(ctx, strings.Fields(command)...); err != nil || !strings.Contains(out, want) {
			t.Errorf("%s: %q, %v", command, out, err)
		}
	}
	if out, err := second.Exec(ctx, "ls", "/dev/shm"); err != nil || out != "from-app" {
		t.Errorf("shared memory: %q, %v", out, err)
	}
	if out, err := second.Exec(ctx, "ps", "-o", "args"); err != nil || strings.Count(out, "sleep 1000") != 2 {
		t.Errorf("shared processes: %q, %v", out, err)
	}
	checkStats(ctx, t, p, app)
	bed.Containerd.Kill()
	if err := bed.RestartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if err := within(ctx, func(ctx context.Context) error { return p.is(ctx, "SANDBOX_READY") }); err != nil {
		t.Error(err)
	}
	if out, err := app.Exec(ctx, "echo", "still here"); err != nil || out != "still here" {
		t.Errorf("exec after a restart of containerd: %q, %v", out, err)
	}
	third, err := p.Run(ctx, "third", "sh", "-c", "exit 7")
	if err != nil {
		t.Fatalf("a container after a restart of containerd: %v", err)
	}
	if code, err := third.Wait(ctx); err != nil || code != 7 {
		t.Errorf("it ended with %d, %v", code, err)
	}
	if _, err := bed.Crictl(ctx, "rm", third.ID); err != nil {
		t.Error(err)
	}
	if err := p.is(ctx, "SANDBOX_READY"); err != nil {
		t.Error(err)
	}
	if _, err := bed.Crictl(ctx, "stopp", p.ID); err != nil {
		t.Error(err)
	}
	if err := p.is(ctx, "SANDBOX_NOTREADY"); err != nil {
		t.Error(err)
	}
	if err := p.Remove(ctx); err != nil {
		t.Error(err)
	}
	if pods, err := bed.Crictl(ctx, "pods", "-q", "--name", "api"); err != nil || pods != "" {
		t.Errorf("pods: %q, %v", pods, err)
	}
	if _, err := os.Stat("/run/containerd-testbed/state/io.containerd.sandbox.controller.v1.shim/k8s.io/" + p.ID); err == nil {
		t.Error("the bundle is left")
	}
}

// figure is a number of the CRI's, which JSON has as text.
type figure struct {
	Value uint64 `json:"value,string"`
}

// usage is what the CRI tells of a container or a pod.
type usage struct {
	CPU struct {
		UsageCoreNanoSeconds figure `json:"usageCoreNanoSeconds"`
	} `json:"cpu"`
	Memory struct {
		WorkingSetBytes figure `json:"workingSetBytes"`
		UsageBytes      figure `json:"usageBytes"`
	} `json:"memory"`
}

func (u usage) check() error {
	if u.CPU.UsageCoreNanoSeconds.Value == 0 || u.Memory.WorkingSetBytes.Value == 0 || u.Memory.UsageBytes.Value < u.Memory.WorkingSetBytes.Value || u.Memory.UsageBytes.Value > 1<<40 {
		return fmt.Errorf("figures: %+v", u)
	}
	return nil
}

// checkStats looks at what the kubelet would see of a container and of its pod.
func checkStats(ctx context.Context, t *testing.T, p *Pod, c *Container) {
	t.Helper()
	checkContainerStats(ctx, t, p.bed, c)
	if err := within(ctx, func(ctx context.Context) error {
		out, err := p.bed.Crictl(ctx, "statsp", "-o", "json", "--id", p.ID)
		if err != nil {
			return err
		}
		var s struct {
			Stats []struct {
				Linux struct {
					usage
					Network struct {
						DefaultInterface struct {
							Name    string `json:"name"`
							RxBytes figure `json:"rxBytes"`
						} `json:"defaultInterface"`
					} `json:"network"`
					Process struct {
						ProcessCount figure `json:"processCount"`
					} `json:"process"`
				} `json:"linux"`
			} `json:"stats"`
		}
		if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Stats) != 1 {
			return fmt.Errorf("%s: %v", out, err)
		}
		l := s.Stats[0].Linux
		if l.Network.DefaultInterface.Name != "eth0" || l.Process.ProcessCount.Value == 0 {
			return fmt.Errorf("figures of the pod: %+v", l)
		}
		return l.check()
	}); err != nil {
		t.Errorf("pod: %v", err)
	}
}
