// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// nodeMode is CRI's NamespaceMode NODE, podMode its POD.
const (
	nodeMode = 2
	podMode  = 0
)

// attempt is a pod or a container that asks for what a class excludes.
type attempt struct {
	// namespaces are the pod's namespace options.
	namespaces map[string]any
	// container is added to the configuration of a container in an ordinary pod; nil:
	// the pod itself is what must be refused.
	container map[string]any
}

// attempts by class of excluded.md. The paths are on every machine.
var attempts = map[string]attempt{
	"host network": {namespaces: map[string]any{"network": nodeMode}},
	"host PID":     {namespaces: map[string]any{"pid": nodeMode}},
	"host IPC":     {namespaces: map[string]any{"ipc": nodeMode}},
	"host path": {container: map[string]any{
		"mounts": []any{map[string]any{"host_path": "/srv", "container_path": "/data"}},
	}},
	"host device": {container: map[string]any{
		"devices": []any{map[string]any{"host_path": "/dev/loop-control", "container_path": "/dev/loop-control", "permissions": "rwm"}},
	}},
}

// refusal is the answer to an attempt.
type refusal struct {
	class string
	err   error // what is wrong with it; nil: it was refused with the words of excluded.md
}

func (r refusal) word() string {
	if r.err != nil {
		return "FAILED"
	}
	return "ok"
}

// refusals asks for what each class excludes.
func refusals(ctx context.Context, bed *testbed.Bed, ex exclusions) []refusal {
	var out []refusal
	have := map[string]bool{}
	for _, c := range ex {
		if c.NotRun {
			continue
		}
		have[c.Name] = true
		a, ok := attempts[c.Name]
		if !ok {
			out = append(out, refusal{c.Name, errors.New("is a class of excluded.md that this program cannot ask for")})
			continue
		}
		out = append(out, refusal{c.Name, a.check(ctx, bed, c)})
	}
	for _, name := range slices.Sorted(maps.Keys(attempts)) {
		if !have[name] {
			out = append(out, refusal{name, errors.New("is no class of excluded.md")})
		}
	}
	return out
}

func (a attempt) check(ctx context.Context, bed *testbed.Bed, c class) error {
	err := a.try(ctx, bed, strings.ReplaceAll(strings.ToLower(c.Name), " ", "-"))
	if err == nil {
		return errors.New("was not refused")
	}
	// crictl quotes what it was told.
	if told := strings.ReplaceAll(err.Error(), `\"`, `"`); !strings.Contains(told, c.Error) {
		return fmt.Errorf("was refused with other words than excluded.md has: %s", told)
	}
	return nil
}

// try makes the pod, and the container, and removes them. The error is what CRI
// answered.
func (a attempt) try(ctx context.Context, bed *testbed.Bed, name string) error {
	dir := filepath.Join(bed.Out, "refused")
	namespaces := a.namespaces
	if namespaces == nil {
		namespaces = map[string]any{"pid": podMode}
	}
	pod, err := writeConfig(filepath.Join(dir, name+"-pod.json"), map[string]any{
		"metadata": map[string]any{"name": name, "namespace": "default", "uid": name, "attempt": 1},
		"linux":    map[string]any{"security_context": map[string]any{"namespace_options": namespaces}},
	})
	if err != nil {
		return nil // nothing was asked, so nothing was refused
	}
	id, err := bed.Crictl(ctx, "runp", "--runtime", testbed.Handler, pod)
	if err != nil {
		if a.container != nil {
			return fmt.Errorf("the pod around it: %w", err)
		}
		return err
	}
	defer bed.Crictl(context.WithoutCancel(ctx), "rmp", "-f", id)
	if a.container == nil {
		return nil
	}
	config := map[string]any{
		"metadata": map[string]any{"name": name},
		"image":    map[string]any{"image": testbed.BusyboxImage},
		"command":  []string{"sleep", "1000"},
		"linux":    map[string]any{},
	}
	maps.Copy(config, a.container)
	file, err := writeConfig(filepath.Join(dir, name+".json"), config)
	if err != nil {
		return nil
	}
	container, err := bed.Crictl(ctx, "create", "--no-pull", id, file, pod)
	if err != nil {
		return err
	}
	_, err = bed.Crictl(ctx, "start", container) // this is where containerd has the runtime create it
	return err
}

func writeConfig(path string, v any) (string, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, b, 0o644)
}
