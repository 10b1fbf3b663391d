// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/opencontainers/runc/libcontainer/apparmor"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
)

// What a spec asks for is what a process sees.
func TestSpecIsKept(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec(`id -u; id -g; id -G; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; touch /tmp/f || echo readonly
cat /proc/sys/kernel/shm_rmid_forced; cat /etc/masked; echo x > /proc/sys/vm/swappiness || echo protected; ls -l /dev/my; pwd; echo $GREETING; echo $HOME`)
	spec.Process.User = &agentpb.User{UID: 1000, GID: 2000, AdditionalGids: []uint32{3000}}
	spec.Process.NoNewPrivileges = true
	spec.Process.Cwd = "/vol"
	spec.Process.Env = append(spec.Process.Env, "GREETING=hello")
	spec.Process.Capabilities = &agentpb.LinuxCapabilities{
		Bounding: []string{"CAP_NET_BIND_SERVICE"}, Effective: []string{"CAP_NET_BIND_SERVICE"}, Permitted: []string{"CAP_NET_BIND_SERVICE"},
		Inheritable: []string{"CAP_NET_BIND_SERVICE"}, Ambient: []string{"CAP_NET_BIND_SERVICE"},
	}
	spec.Root.Readonly = true
	spec.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1"}
	spec.Linux.MaskedPaths = []string{"/etc/masked"}
	spec.Linux.ReadonlyPaths = []string{"/proc/sys"}
	spec.Linux.Devices = []*agentpb.LinuxDevice{{Path: "/dev/my", Type: "c", Major: 1, Minor: 3, FileMode: 0o640, UID: 7, GID: 8}}
	root := g.rootfs()
	for name, text := range map[string]string{"/etc/masked": "secret\n", "/bin/grep": ""} {
		if name == "/bin/grep" {
			if err := symlink("busybox", root+name); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := writeFile(root+name, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	g.create("main", spec)
	g.start("main")
	got := strings.Split(g.readAll("main", ""), "\n")
	want := []string{"1000", "2000", "2000 3000", "NoNewPrivs:\t1", "CapEff:\t0000000000000400", "readonly", "1", "protected", "crw-r-----    1 7        8           1,   3 ", "/vol", "hello", "/", ""}
	for i, line := range got { // the date of the device is now
		if strings.HasPrefix(line, "crw") {
			got[i] = line[:44]
		}
	}
	if len(got) > 5 && strings.HasPrefix(got[3], "Cap") { // the order is the kernel's
		got[3], got[4] = got[4], got[3]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// A process added has the container's rights where the request has none.
	g.run("two", "sleep 1000")
	if out, _ := g.output("two", "exec1", "while read l; do case $l in CapEff*) echo $l;; esac; done < /proc/self/status"); out != "CapEff: 0000000000000021\n" {
		t.Errorf("exec: %q", out)
	}
}

func TestSeccomp(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec("hostname x; touch /tmp/filtered || echo refused")
	spec.Linux.Seccomp = &agentpb.LinuxSeccomp{
		DefaultAction: "SCMP_ACT_ALLOW",
		Syscalls: []*agentpb.LinuxSyscall{{
			Names: []string{"utimensat", "utimes", "utime"}, Action: "SCMP_ACT_ERRNO", ErrnoRet: &agentpb.LinuxSyscall_Errnoret{Errnoret: 1},
		}},
	}
	details := must[*agentpb.GuestDetailsResponse](t)(g.GetGuestDetails(g.ctx(), &agentpb.GuestDetailsRequest{}))
	if details.AgentDetails.SupportsSeccomp != seccomp.Enabled {
		t.Errorf("supports_seccomp is %v", details.AgentDetails.SupportsSeccomp)
	}
	if diff := cmp.Diff([]string{"peerpod.rootfs.v1", "peerpod.streams.v1", "peerpod.pause.v1", "peerpod.volumes.v1", "peerpod.forward.v1"}, details.AgentDetails.ExtraFeatures); diff != "" {
		t.Errorf("features (-want +got):\n%s", diff)
	}
	_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: spec})
	if !seccomp.Enabled {
		wantClass(t, "a profile without support", err, errdefs.ErrFailedPrecondition)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	g.start("main")
	if out := g.readAll("main", ""); out != "refused\n" {
		t.Errorf("output %q", out)
	}
}

func TestPlacement(t *testing.T) {
	spec := &specs.Spec{
		Hostname: "from-the-node",
		Linux: &specs.Linux{
			CgroupsPath: "kubepods-besteffort.slice:cri-containerd:abc",
			Namespaces: []specs.LinuxNamespace{
				{Type: "pid", Path: "/proc/1/ns/pid"}, {Type: "network", Path: "/run/netns/cni-1"}, {Type: "ipc"}, {Type: "mount"}, {Type: "cgroup"}, {Type: "time"}, {Type: "user"},
			},
		},
	}
	place(spec, placement{ipc: "/i", uts: "/u", net: "/n", pid: "/p", cgroup: "/peerpod/c", hostname: true})
	want := []specs.LinuxNamespace{
		{Type: "mount"}, {Type: "pid", Path: "/p"}, {Type: "ipc", Path: "/i"}, {Type: "uts", Path: "/u"}, {Type: "network", Path: "/n"}, {Type: "cgroup"},
	}
	if diff := cmp.Diff(want, spec.Linux.Namespaces); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if spec.Linux.CgroupsPath != "/peerpod/c" || spec.Hostname != "" {
		t.Errorf("cgroup %s, hostname %q", spec.Linux.CgroupsPath, spec.Hostname)
	}
}

func TestRlimits(t *testing.T) {
	got, err := rlimits([]specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 2, Soft: 1}})
	if err != nil || len(got) != 1 || got[0].Type != 7 || got[0].Hard != 2 || got[0].Soft != 1 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := rlimits([]specs.POSIXRlimit{{Type: "RLIMIT_TYPO"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown type: %v", err)
	}
}

// Profiles of the node's security modules do not keep a container from starting in a
// guest without them.
func TestProfilesOfAbsentModules(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec("exit 4")
	if !apparmor.IsEnabled() {
		spec.Process.ApparmorProfile = "cri-containerd.apparmor.d"
	}
	if !selinux.GetEnabled() {
		spec.Process.SelinuxLabel, spec.Linux.MountLabel = "system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0"
	}
	g.create("main", spec)
	g.start("main")
	if got := g.wait("main", ""); got != 4 {
		t.Errorf("status %d", got)
	}
}
