// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/vmnote"
	"github.com/kata-remote/kata-remote/shim/spec"
)

// TestRelease: with nobody to tell, word is left, once, whatever the number of
// attempts, and delivered when somebody answers.
func TestRelease(t *testing.T) {
	dir := t.TempDir()
	n := vmnote.Note{Sandbox: "s", Socket: filepath.Join(dir, "none.sock")}
	for range 2 {
		if err := Release(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "stop", "*")); len(left) != 1 {
		t.Errorf("word is left in %v", left)
	}
	if err := vmnote.Deliver(t.Context(), n.Socket, Hypervisor{n.Socket}.StopVM); !errdefs.IsUnavailable(err) {
		t.Errorf("delivery without an adaptor: %v", err)
	}
}

func limits(quota int64, period uint64, memory int64) *specs.Linux {
	return &specs.Linux{Resources: &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}, Memory: &specs.LinuxMemory{Limit: &memory}}}
}

func TestAnnotations(t *testing.T) {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write([]byte("version = \"0.1.0\""))
	w.Close()
	empty := map[string]string{
		annotation.SandboxName: "", annotation.SandboxNamespace: "", annotation.MachineType: "", annotation.Image: "",
		annotation.DefaultVCPUs: "0", annotation.DefaultMemory: "0", annotation.DefaultGPUs: "0", annotation.DefaultGPUModel: "", annotation.InitData: "",
	}
	for name, c := range map[string]struct {
		role  spec.Role
		in    map[string]string
		linux *specs.Linux
		want  map[string]string // beyond empty
	}{
		"nothing": {spec.RoleSandbox, nil, &specs.Linux{}, nil},
		"pod": {spec.RoleSandbox, map[string]string{
			annotation.SandboxName: "web", annotation.SandboxNamespace: "shop", annotation.MachineType: "m5.large", "app": "x",
			annotation.SandboxCPUQuota: "150000", annotation.SandboxCPUPeriod: "100000", annotation.SandboxMemory: "268435457",
			annotation.DefaultMemory: "256", annotation.DefaultVCPUs: "1",
		}, &specs.Linux{}, map[string]string{
			annotation.SandboxName: "web", annotation.SandboxNamespace: "shop", annotation.MachineType: "m5.large",
			annotation.DefaultVCPUs: "3", annotation.DefaultMemory: "513",
		}},
		"requests": {spec.RoleSandbox, map[string]string{annotation.SandboxCPUQuota: "-1", annotation.SandboxCPUPeriod: "100000", annotation.SandboxCPUShares: "1500"}, &specs.Linux{}, map[string]string{annotation.DefaultVCPUs: "2"}},
		"none":     {spec.RoleSandbox, map[string]string{annotation.SandboxCPUShares: "2"}, &specs.Linux{}, nil},
		"CRI-O":    {spec.RoleSandbox, map[string]string{annotation.CRIOSandboxName: "web", annotation.CRIOSandboxNamespace: "shop"}, &specs.Linux{}, map[string]string{annotation.SandboxName: "web", annotation.SandboxNamespace: "shop"}},
		"single":   {spec.RoleSingle, nil, limits(50000, 100000, 64<<20), map[string]string{annotation.SandboxName: "id", annotation.SandboxNamespace: "default", annotation.DefaultVCPUs: "1", annotation.DefaultMemory: "576"}},
		"initdata": {spec.RoleSandbox, map[string]string{annotation.InitData: base64.StdEncoding.EncodeToString(z.Bytes())}, &specs.Linux{}, map[string]string{annotation.InitData: "version = \"0.1.0\""}},
	} {
		want := map[string]string{}
		for k, v := range empty {
			want[k] = v
		}
		for k, v := range c.want {
			want[k] = v
		}
		got, err := vmAnnotations(&specs.Spec{Annotations: c.in, Linux: c.linux}, c.role, "id")
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v\n%s", name, err, d)
		}
	}
	for key, value := range map[string]string{
		annotation.HypervisorPrefix + "kernel": "/x", annotation.DefaultVCPUs: "two", annotation.DefaultMemory: "-1",
		annotation.DefaultGPUs: "1.5", annotation.InitData: "!", annotation.SandboxMemory: "much",
	} {
		_, err := vmAnnotations(&specs.Spec{Annotations: map[string]string{key: value}, Linux: &specs.Linux{}}, spec.RoleSandbox, "id")
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), key) {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
}
