// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// Pod is one pod on the bed, driven through CRI as the kubelet would.
type Pod struct {
	bed  *testbed.Bed
	Name string
	ID   string
	IP   string
	Logs string // folder of the containers' logs on the node
	// Took is how long `crictl runp` took: RunPodSandbox, and crictl's own start.
	Took   time.Duration
	config string // file with the pod's sandbox configuration
	linux  map[string]any
}

// Container is one container of a pod.
type Container struct {
	pod *Pod
	ID  string
	log string
}

// ownProcesses is what the kubelet asks for unless a pod says shareProcessNamespace: a
// process namespace for each container (NamespaceMode CONTAINER).
var ownProcesses = map[string]any{"security_context": map[string]any{"namespace_options": map[string]any{"pid": 1}}}

// podConfigs is where configurations for crictl stand, inside the bed.
const podConfigs = "/run/e2e"

// sharedProcesses is shareProcessNamespace: one process namespace for the pod
// (NamespaceMode POD).
var sharedProcesses = map[string]any{"security_context": map[string]any{"namespace_options": map[string]any{"pid": 0}}}

// RunPod runs a pod with the handler ("" is runc).
func RunPod(ctx context.Context, bed *testbed.Bed, name, handler string, annotations map[string]string) (*Pod, error) {
	return runPod(ctx, bed, name, handler, annotations, ownProcesses)
}

// runPod is RunPod with the Linux part of the configuration, which the pod's
// containers have too.
func runPod(ctx context.Context, bed *testbed.Bed, name, handler string, annotations map[string]string, linux map[string]any) (*Pod, error) {
	p := &Pod{bed: bed, Name: name, Logs: filepath.Join("/var/log/pods", name), config: filepath.Join(podConfigs, name+".json"), linux: linux}
	if err := writeJSON(p.config, map[string]any{
		"metadata":      map[string]any{"name": name, "namespace": "default", "uid": name + "-uid", "attempt": 1},
		"hostname":      name,
		"log_directory": p.Logs,
		"annotations":   annotations,
		"linux":         linux,
	}); err != nil {
		return nil, err
	}
	args := []string{"runp"}
	if handler != "" {
		args = append(args, "--runtime", handler)
	}
	var err error
	start := time.Now()
	if p.ID, err = bed.Crictl(ctx, append(args, p.config)...); err != nil {
		return nil, err
	}
	p.Took = time.Since(start)
	out, err := bed.Crictl(ctx, "inspectp", "-o", "json", p.ID)
	if err != nil {
		return p, err
	}
	var status struct {
		Status struct {
			State   string `json:"state"`
			Network struct {
				IP string `json:"ip"`
			} `json:"network"`
		} `json:"status"`
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return p, fmt.Errorf("read crictl inspectp: %w", err)
	}
	if p.IP = status.Status.Network.IP; p.IP == "" || status.Status.State != "SANDBOX_READY" {
		return p, fmt.Errorf("pod %s is %s with address %q", name, status.Status.State, p.IP)
	}
	return p, nil
}

// Run creates and starts a container from the busybox image.
func (p *Pod) Run(ctx context.Context, name string, command ...string) (*Container, error) {
	return p.run(ctx, name, nil, command...)
}

// RunWith is Run with the Linux part of the configuration.
func (p *Pod) RunWith(ctx context.Context, name string, linux map[string]any, command ...string) (*Container, error) {
	q := *p
	q.linux = linux
	return q.run(ctx, name, nil, command...)
}

// RunImage is Run with an image of the node by its name.
func (p *Pod) RunImage(ctx context.Context, name, image string, command ...string) (*Container, error) {
	return p.runImage(ctx, name, image, nil, command...)
}

// Mount is a folder or file of the node in a container, as the kubelet asks for it.
type Mount struct {
	HostPath      string `json:"host_path"`
	ContainerPath string `json:"container_path"`
	Readonly      bool   `json:"readonly"`
}

// run is Run with mounts.
func (p *Pod) run(ctx context.Context, name string, mounts []Mount, command ...string) (*Container, error) {
	return p.runImage(ctx, name, testbed.BusyboxImage, mounts, command...)
}

func (p *Pod) runImage(ctx context.Context, name, image string, mounts []Mount, command ...string) (*Container, error) {
	c := &Container{pod: p, log: filepath.Join(p.Logs, name+".log")}
	file := filepath.Join(podConfigs, p.Name+"-"+name+".json")
	if err := writeJSON(file, map[string]any{
		"metadata": map[string]any{"name": name},
		"image":    map[string]any{"image": image},
		"command":  command,
		"log_path": name + ".log",
		"linux":    p.linux,
		"mounts":   mounts,
	}); err != nil {
		return nil, err
	}
	var err error
	if c.ID, err = p.bed.Crictl(ctx, "create", "--no-pull", p.ID, file, p.config); err != nil {
		return nil, err
	}
	_, err = p.bed.Crictl(ctx, "start", c.ID)
	return c, err
}

// Remove stops and removes the pod.
func (p *Pod) Remove(ctx context.Context) error {
	_, err := p.bed.Crictl(ctx, "rmp", "-f", p.ID)
	return err
}

// Exec runs a command in the container and returns its output. A command that ends
// with another status than 0 is an error that names it.
func (c *Container) Exec(ctx context.Context, command ...string) (string, error) {
	return c.pod.bed.Crictl(ctx, append([]string{"exec", c.ID}, command...)...)
}

// status is what CRI says of a container.
type status struct {
	State    string `json:"state"`
	ExitCode int    `json:"exitCode"`
	Reason   string `json:"reason"`
}

func (c *Container) status(ctx context.Context) (status, error) {
	out, err := c.pod.bed.Crictl(ctx, "inspect", "-o", "json", c.ID)
	if err != nil {
		return status{}, err
	}
	var s struct {
		Status status `json:"status"`
	}
	return s.Status, json.Unmarshal([]byte(out), &s)
}

// Wait waits for the container's end and returns its exit code.
func (c *Container) Wait(ctx context.Context) (int, error) {
	var s status
	err := testbed.Poll(ctx, func(ctx context.Context) (err error) {
		if s, err = c.status(ctx); err == nil && s.State != "CONTAINER_EXITED" {
			err = fmt.Errorf("container %.12s is %s", c.ID, s.State)
		}
		return err
	})
	return s.ExitCode, err
}

// Log returns what containerd wrote of one stream ("stdout", "stderr"), without its
// time stamps.
func (c *Container) Log(stream string) (string, error) {
	b, err := os.ReadFile(c.log)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		// time stream F|P text: CRI's log format; P is a line that goes on.
		f := strings.SplitN(line, " ", 4)
		if len(f) != 4 {
			return "", fmt.Errorf("%s: unexpected line %q", c.log, line)
		}
		if f[1] == stream {
			text := f[3]
			if f[2] == "P" {
				text = strings.TrimSuffix(text, "\n")
			}
			out.WriteString(text)
		}
	}
	return out.String(), nil
}

// exitStatus returns the status a remote command ended with, from crictl's error.
func exitStatus(err error) (int, error) {
	var re *testbed.RunError
	if !errors.As(err, &re) {
		return 0, err
	}
	var code int
	if i := strings.LastIndex(re.Stderr, "exit code "); i >= 0 {
		if _, err := fmt.Sscanf(re.Stderr[i:], "exit code %d", &code); err == nil {
			return code, nil
		}
	}
	return 0, err
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}
