// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func options(t *testing.T, url string, o *runtimeoptions.Options) *anypb.Any {
	t.Helper()
	b, err := proto.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: url, Value: b}
}

// kataFile has the keys of kata's configuration-remote.toml.
const kataFile = `
[hypervisor.remote]
remote_hypervisor_socket = "/run/peerpod/other.sock"
remote_hypervisor_timeout = 90
enable_annotations = ["machine_type", "default_memory"]
disable_selinux = false
guest_hook_path = ""
default_vcpus = 1
[agent.kata]
dial_timeout = 30
kernel_modules = []
[runtime]
internetworking_model = "none"
disable_guest_seccomp = true
experimental = []
`

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "configuration-remote.toml")
	if err := os.WriteFile(path, []byte(kataFile), 0o600); err != nil {
		t.Fatal(err)
	}
	defaults := Config{Socket: DefaultSocket, Timeout: DefaultTimeout}
	kata := Config{Socket: "/run/peerpod/other.sock", Timeout: 90 * time.Second}
	pull := Config{Socket: DefaultSocket, Timeout: DefaultTimeout, GuestPull: true}
	const url = "runtimeoptions.v1.Options"
	for name, c := range map[string]struct {
		in   *anypb.Any
		want Config
	}{
		"nothing":      {nil, defaults},
		"empty":        {&anypb.Any{}, defaults},
		"runc":         {&anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{1, 2, 3}}, defaults},
		"no path":      {options(t, url, &runtimeoptions.Options{}), defaults},
		"path":         {options(t, url, &runtimeoptions.Options{ConfigPath: path}), kata},
		"old type":     {options(t, "cri.runtimeoptions.v1.Options", &runtimeoptions.Options{ConfigPath: path}), kata},
		"type's host":  {options(t, "types.googleapis.com/"+url, &runtimeoptions.Options{ConfigPath: path}), kata},
		"body":         {options(t, url, &runtimeoptions.Options{ConfigBody: []byte(kataFile)}), kata},
		"pull":         {options(t, url, &runtimeoptions.Options{ConfigBody: []byte("guest_pull = true")}), pull},
		"pull, table":  {options(t, url, &runtimeoptions.Options{ConfigBody: []byte("[runtime]\nguest_pull = true\nexperimental_force_guest_pull = false")}), pull},
		"pull, kata's": {options(t, url, &runtimeoptions.Options{ConfigBody: []byte("[runtime]\nexperimental_force_guest_pull = true")}), pull},
		"no pull":      {options(t, url, &runtimeoptions.Options{ConfigBody: []byte("guest_pull = false")}), defaults},
		"empty socket": {options(t, url, &runtimeoptions.Options{ConfigBody: []byte("[hypervisor.remote]\nremote_hypervisor_socket = \"\"\nremote_hypervisor_timeout = 0")}), defaults},
	} {
		if got, err := Load(c.in); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	body := func(s string) *anypb.Any {
		return options(t, url, &runtimeoptions.Options{ConfigBody: []byte(s)})
	}
	for name, c := range map[string]struct {
		in   *anypb.Any
		want string
	}{
		"unknown type":  {&anypb.Any{TypeUrl: "example.org/x.Options"}, "x.Options"},
		"garbage":       {&anypb.Any{TypeUrl: url, Value: []byte{0xff}}, "runtime options"},
		"relative path": {options(t, url, &runtimeoptions.Options{ConfigPath: "x.toml"}), "not absolute"},
		"missing file":  {options(t, url, &runtimeoptions.Options{ConfigPath: "/nonesuch.toml"}), "/nonesuch.toml"},
		"misspelt":      {body("[hypervisor.remote]\nremote_hypervisor_sokcet = \"/x\""), "remote_hypervisor_sokcet"},
		"qemu":          {body("[hypervisor.qemu]\npath = \"/x\""), "hypervisor.qemu"},
		"bad socket":    {body("[hypervisor.remote]\nremote_hypervisor_socket = \"x\""), "absolute"},
		"bad timeout":   {body("[hypervisor.remote]\nremote_hypervisor_timeout = \"soon\""), "seconds"},
		"syntax":        {body("["), "options of the runtime handler"},
		"stray":         {body("socket = 1"), "unknown key socket"},
		"bad pull":      {body("guest_pull = \"yes\""), "guest_pull is neither true nor false"},
	} {
		if _, err := Load(c.in); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
