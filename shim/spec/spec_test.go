// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// load reads a spec from testdata. ctr.json is what ctr 1.6.20 wrote; cri.json and
// shared-pid.json are that with what containerd's CRI plugin sets.
func load(t *testing.T, name string) *specs.Spec {
	t.Helper()
	dir := t.TempDir()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestConvert compares with what was right when it was looked at, field by field.
func TestConvert(t *testing.T) {
	for _, name := range []string{"ctr.json", "cri.json", "shared-pid.json"} {
		t.Run(name, func(t *testing.T) {
			s := load(t, name)
			before, _ := json.Marshal(s)
			c, err := Convert(s, Options{ContainerID: "c1", RootPath: "/run/kata-containers/c1/rootfs", Mounts: s.Mounts, Seccomp: true, TerminationPath: "/dev/termination-log"})
			if err != nil {
				t.Fatal(err)
			}
			if after, _ := json.Marshal(s); string(after) != string(before) {
				t.Error("Convert changed its argument")
			}
			got, err := json.MarshalIndent(c, "", " ")
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", strings.TrimSuffix(name, ".json")+".golden")
			if *update {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(got)+"\n"); d != "" {
				t.Errorf("%s (-want +got; -update accepts it):\n%s", golden, d)
			}
			for _, host := range []string{"/proc/77", "kubepods", "apparmor", "container_t", "cc_init_data"} {
				if strings.Contains(string(got), host) {
					t.Errorf("%s of the node is in the guest's spec", host)
				}
			}
		})
	}
}

// TestRefused has what cannot be done in a pod VM.
func TestRefused(t *testing.T) {
	drop := func(kind specs.LinuxNamespaceType) func(*specs.Spec) {
		return func(s *specs.Spec) {
			var out []specs.LinuxNamespace
			for _, n := range s.Linux.Namespaces {
				if n.Type != kind {
					out = append(out, n)
				}
			}
			s.Linux.Namespaces = out
		}
	}
	for name, c := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"hostPID": {drop(specs.PIDNamespace), "hostPID"},
		"hostIPC": {drop(specs.IPCNamespace), "hostIPC"},
		"hook":    {func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/gpu"}}} }, "/bin/gpu"},
		"disk":    {func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda", Type: "b", Major: 8}} }, "privileged_without_host_devices"},
		"kvm": {func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232}}
		}, "/dev/kvm"},
	} {
		s := load(t, "cri.json")
		c.change(s)
		if _, err := Convert(s, Options{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := load(t, "cri.json")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: "/dev/null", Type: "c", Major: 1, Minor: 3}}
	if c, err := Convert(s, Options{}); err != nil || len(c.OCI.Linux.Devices) != 2 {
		t.Errorf("harmless devices: %v", err)
	}
}

func TestNetNS(t *testing.T) {
	s := load(t, "ctr.json")
	if p, err := NetNS(s); err != nil || p != "/run/netns/pod" {
		t.Errorf("%q, %v", p, err)
	}
	for i := range s.Linux.Namespaces {
		s.Linux.Namespaces[i].Path = ""
	}
	if _, err := NetNS(s); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "--with-ns network:/run/netns/NAME") {
		t.Errorf("no path: %v", err)
	}
	for name, ns := range map[string][]specs.LinuxNamespace{
		"no namespace":     nil,
		"the node's, open": {{Type: specs.NetworkNamespace, Path: "/proc/self/ns/net"}},
	} {
		s.Linux.Namespaces = ns
		if _, err := NetNS(s); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "hostNetwork") || !strings.Contains(err.Error(), "another machine") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestIdentity(t *testing.T) {
	for name, c := range map[string]struct {
		annotations map[string]string
		role        Role
		sandbox     string
		bad         bool
	}{
		"none":           {nil, RoleSingle, "me", false},
		"sandbox":        {map[string]string{annotation.ContainerType: "sandbox", annotation.SandboxID: "me"}, RoleSandbox, "me", false},
		"container":      {map[string]string{annotation.ContainerType: "container", annotation.SandboxID: "pod"}, RoleMember, "pod", false},
		"CRI-O":          {map[string]string{annotation.CRIOContainerType: "container", annotation.CRIOSandboxID: "pod"}, RoleMember, "pod", false},
		"no sandbox id":  {map[string]string{annotation.ContainerType: "container"}, 0, "", true},
		"something else": {map[string]string{annotation.ContainerType: "cow"}, 0, "", true},
	} {
		role, sandbox, err := Identity(&specs.Spec{Annotations: c.annotations}, "me")
		if role != c.role || sandbox != c.sandbox || errdefs.IsInvalidArgument(err) != c.bad {
			t.Errorf("%s: %d, %q, %v", name, role, sandbox, err)
		}
	}
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	if _, err := Read(dir); err == nil {
		t.Error("no file: no error")
	}
	for _, text := range []string{"{", "{}", `{"process":{}}`} {
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(dir); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// Files of cgroup v2 that have a field of the protocol are put there.
func TestUnified(t *testing.T) {
	old, shares := int64(1), uint64(512)
	r := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &old}, CPU: &specs.LinuxCPU{Shares: &shares},
		Unified: map[string]string{
			"memory.max": "1000", "memory.low": "300", "memory.swap.max": "200", "cpu.max": "50000 100000", "pids.max": "max",
			"memory.oom.group": "1", "memory.high": "900",
		},
	}
	want := &agentpb.LinuxResources{
		Memory: &agentpb.LinuxMemory{Limit: 1000, Reservation: 300, Swap: 1200},
		CPU:    &agentpb.LinuxCPU{Shares: 512, Quota: 50000, Period: 100000},
		Pids:   &agentpb.LinuxPids{Limit: -1},
	}
	if d := cmp.Diff(want, Resources(r), protocmp.Transform()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if *r.Memory.Limit != 1 || r.CPU.Quota != nil {
		t.Error("Resources changed its argument")
	}
	r.Unified = map[string]string{"cpu.max": "max 100000", "memory.swap.max": "max", "memory.max": "x"}
	want = &agentpb.LinuxResources{
		Memory: &agentpb.LinuxMemory{Limit: 1, Swap: -1}, CPU: &agentpb.LinuxCPU{Shares: 512, Quota: -1, Period: 100000}, Pids: &agentpb.LinuxPids{},
	}
	if d := cmp.Diff(want, Resources(r), protocmp.Transform()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// TestExecProcess has everything a process may ask for, and what of it reaches the
// guest.
func TestExecProcess(t *testing.T) {
	umask, adj := uint32(0o022), -5
	p := &specs.Process{
		Terminal: true, ConsoleSize: &specs.Box{Height: 24, Width: 80}, Args: []string{"sh"}, Env: []string{"A=b"}, Cwd: "/tmp",
		User:            specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3, 4}, Username: "u", Umask: &umask},
		Capabilities:    &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Effective: []string{"CAP_CHOWN"}, Inheritable: []string{"CAP_FOWNER"}, Permitted: []string{"CAP_SETUID"}, Ambient: []string{"CAP_SETGID"}},
		Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 20, Soft: 10}},
		NoNewPrivileges: true, OOMScoreAdj: &adj, ApparmorProfile: "node-profile", SelinuxLabel: "node-label",
	}
	got, err := ExecProcess(p)
	if err != nil {
		t.Fatal(err)
	}
	want := &agentpb.Process{
		Terminal: true, ConsoleSize: &agentpb.Box{Height: 24, Width: 80}, Args: []string{"sh"}, Env: []string{"A=b"}, Cwd: "/tmp",
		User:            &agentpb.User{UID: 1, GID: 2, AdditionalGids: []uint32{3, 4}, Username: "u"},
		Capabilities:    &agentpb.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Effective: []string{"CAP_CHOWN"}, Inheritable: []string{"CAP_FOWNER"}, Permitted: []string{"CAP_SETUID"}, Ambient: []string{"CAP_SETGID"}},
		Rlimits:         []*agentpb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 20, Soft: 10}},
		NoNewPrivileges: true, OOMScoreAdj: -5,
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	umask = 0o077
	if _, err := ExecProcess(p); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "umask 077") {
		t.Errorf("umask: %v", err)
	}
}
