// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/opencontainers/runc/libcontainer/seccomp"
)

// What the process part of a spec asks for, as a process in the container sees it.

// say runs a container with a spec and returns all it printed.
func (g *guest) say(id string, spec *agentpb.Spec) string {
	g.t.Helper()
	g.create(id, spec)
	g.start(id)
	out := g.readAll(id, "")
	g.wait(id, "")
	return out
}

// try runs one more process in a container and returns what it printed.
func (g *guest) try(id, execID string, p *agentpb.Process, user *agentpb.StringUser) string {
	g.t.Helper()
	p.Env = append(p.Env, "PATH=/bin")
	must[any](g.t)(g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: id, ExecId: execID, Process: p, StringUser: user}))
	out := g.readAll(id, execID)
	g.wait(id, execID)
	return out
}

// put writes a file of the root file system that the test's containers share.
func (g *guest) put(name, text string) {
	g.t.Helper()
	path := filepath.Join(g.rootfs(), name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		g.t.Fatal(err)
	}
}

func shell(command string) []string { return []string{"/bin/sh", "-c", command} }

const capabilityLines = "busybox grep ^Cap /proc/self/status | busybox tr -s '\\t\\n' '  '"

func TestCapabilities(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	bind, kill, chown := "CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_CHOWN" // bits 10, 5 and 0
	spec := g.spec(capabilityLines + "; busybox tail -f /dev/null")
	spec.Process.Args = []string{"/bin/sh", "-c", capabilityLines}
	spec.Process.User = &agentpb.User{UID: 1000}
	spec.Process.Capabilities = &agentpb.LinuxCapabilities{
		Bounding: []string{bind, kill, chown}, Permitted: []string{bind, kill}, Inheritable: []string{bind, kill}, Effective: []string{bind, kill}, Ambient: []string{bind},
	}
	// A process of an ordinary user has after execve what is ambient.
	if got, want := g.say("user", spec), "CapInh: 0000000000000420 CapPrm: 0000000000000400 CapEff: 0000000000000400 CapBnd: 0000000000000421 CapAmb: 0000000000000400 "; got != want {
		t.Errorf("user: %q, want %q", got, want)
	}
	spec = g.spec(capabilityLines)
	spec.Process.Capabilities = &agentpb.LinuxCapabilities{}
	if got := g.say("none", spec); strings.Trim(got, "CapInhPrmEffBndAmb: 0") != "" {
		t.Errorf("none: %q", got)
	}
	g.run("main", "busybox tail -f /dev/null") // kill and chown
	for id, tc := range map[string]struct {
		caps *agentpb.LinuxCapabilities
		want string
	}{
		"more":      {&agentpb.LinuxCapabilities{Bounding: []string{bind, kill}, Permitted: []string{bind, kill}, Effective: []string{bind, kill}}, "CapEff: 0000000000000420 "},
		"fewer":     {&agentpb.LinuxCapabilities{Bounding: []string{kill}, Permitted: []string{kill}, Effective: []string{kill}}, "CapEff: 0000000000000020 "},
		"inherited": {nil, "CapEff: 0000000000000021 "},
	} {
		if got := g.try("main", id, &agentpb.Process{Args: shell(capabilityLines), Capabilities: tc.caps}, nil); !strings.Contains(got, tc.want) {
			t.Errorf("exec with %s: %q, want %q", id, got, tc.want)
		}
	}
}

func TestRlimitsNoNewPrivsAndOOMScore(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	look := "ulimit -Sn; ulimit -Hn; ulimit -Sc; busybox grep NoNewPrivs /proc/self/status; cat /proc/self/oom_score_adj"
	spec := g.spec(look + "; echo .; busybox tail -f /dev/null")
	spec.Process.Rlimits = []*agentpb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE"}}
	spec.Process.NoNewPrivileges = true
	spec.Process.OOMScoreAdj = 321
	g.create("main", spec)
	g.start("main")
	want := "100\n200\n0\nNoNewPrivs:\t1\n321\n"
	var got string
	for !strings.HasSuffix(got, ".\n") {
		got += string(must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "main", Len: 1000})).Data)
	}
	if got != want+".\n" {
		t.Errorf("first process: %q, want %q", got, want)
	}
	if got := g.try("main", "same", &agentpb.Process{Args: shell(look)}, nil); got != want {
		t.Errorf("exec: %q, want %q", got, want)
	}
	if got := g.try("main", "other", &agentpb.Process{Args: shell(look), Rlimits: []*agentpb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 50, Hard: 60}}}, nil); !strings.HasPrefix(got, "50\n60\n") {
		t.Errorf("exec with its own limits: %q", got)
	}
	g.run("plain", "busybox tail -f /dev/null")
	if got := g.try("plain", "nnp", &agentpb.Process{Args: shell(look), NoNewPrivileges: true}, nil); !strings.Contains(got, "NoNewPrivs:\t1\n") {
		t.Errorf("exec with no_new_privs: %q", got)
	}
	if got := g.try("plain", "not", &agentpb.Process{Args: shell(look)}, nil); !strings.Contains(got, "NoNewPrivs:\t0\n0\n") {
		t.Errorf("exec without: %q", got)
	}
}

func TestSeccompProfiles(t *testing.T) {
	if !seccomp.Enabled {
		t.Fatal("the tests of seccomp need the build tag seccomp")
	}
	g := newGuest(t)
	g.sandbox()
	call := func(action string, errno *agentpb.LinuxSyscall_Errnoret, args []*agentpb.LinuxSeccompArg, names ...string) *agentpb.LinuxSeccomp {
		s := &agentpb.LinuxSyscall{Names: names, Action: action, Args: args}
		if errno != nil {
			s.ErrnoRet = errno
		}
		return &agentpb.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Architectures: []string{"SCMP_ARCH_X86_64"}, Syscalls: []*agentpb.LinuxSyscall{s}}
	}
	for i, tc := range []struct {
		name    string
		profile *agentpb.LinuxSeccomp
		command string
		want    string
		status  int32
	}{
		{"the default errno", call("SCMP_ACT_ERRNO", nil, nil, "mkdir", "mkdirat"), "busybox mkdir /tmp/a 2>&1", "mkdir: can't create directory '/tmp/a': Operation not permitted\n", 1},
		{"an errno of its own", call("SCMP_ACT_ERRNO", &agentpb.LinuxSyscall_Errnoret{Errnoret: 38}, nil, "mkdir", "mkdirat"), "busybox mkdir /tmp/a 2>&1", "mkdir: can't create directory '/tmp/a': Function not implemented\n", 1},
		{"a death", call("SCMP_ACT_KILL_PROCESS", nil, nil, "mkdir", "mkdirat"), "exec busybox mkdir /tmp/a", "", 159},
		// kill(2) of signal 10 alone.
		{"an argument", call("SCMP_ACT_ERRNO", nil, []*agentpb.LinuxSeccompArg{{Index: 1, Value: 10, Op: "SCMP_CMP_EQ"}}, "kill"), "trap 'echo got' USR1 USR2; kill -10 $$ 2>/dev/null || echo refused; kill -12 $$; :", "refused\ngot\n", 0},
		{"names the kernel does not have", call("SCMP_ACT_ERRNO", nil, nil, "no_such_call"), "echo fine", "fine\n", 0},
	} {
		spec := g.spec(tc.command)
		spec.Linux.Seccomp = tc.profile
		id := fmt.Sprintf("profile%d", i)
		if got := g.say(id, spec); got != tc.want || g.wait(id, "") != tc.status {
			t.Errorf("%s: %q, status %d; want %q, %d", tc.name, got, g.wait(id, ""), tc.want, tc.status)
		}
	}
	for _, bad := range []*agentpb.LinuxSeccomp{call("SCMP_ACT_NOTIFY", nil, nil, "mkdir"), {DefaultAction: "SCMP_ACT_NOTIFY"}, {DefaultAction: "SCMP_ACT_TYPO"}} {
		spec := g.spec("true")
		spec.Linux.Seccomp = bad
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "refused", OCI: spec})
		wantClass(t, bad.String(), err, errdefs.ErrInvalidArgument)
		if err == nil || !strings.Contains(err.Error(), "SCMP_ACT_") {
			t.Errorf("%v does not name the action", err)
		}
	}
}

func TestUsersByName(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	// An absolute link is one within the container.
	g.put("data/passwd", "root:x:0:0::/root:/bin/sh\nalice:x:1001:2001::/home/alice:/bin/sh\n")
	g.put("etc/group", "root:x:0:\nstaff:x:2001:\naudio:x:63:alice\nvideo:x:44:alice,bob\n")
	if err := os.Symlink("/data/passwd", filepath.Join(g.rootfs(), "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	const look = "id -u; id -g; id -G; echo $HOME"
	alice := "1001\n2001\n2001 44 63\n/home/alice\n"
	create := func(id string, u *agentpb.User, s *agentpb.StringUser) (string, error) {
		spec := g.spec(look)
		spec.Process.User = u
		if _, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: spec, StringUser: s}); err != nil {
			return "", err
		}
		g.start(id)
		return g.readAll(id, ""), nil
	}
	g.run("main", "busybox tail -f /dev/null")
	for i, tc := range []struct {
		u    *agentpb.User
		s    *agentpb.StringUser
		want string
	}{
		{&agentpb.User{Username: "alice"}, nil, alice},
		{&agentpb.User{Username: "alice:video"}, nil, "1001\n44\n44\n/home/alice\n"},
		{&agentpb.User{Username: "1001", AdditionalGids: []uint32{7}}, nil, "1001\n2001\n2001 7 44 63\n/home/alice\n"},
		{&agentpb.User{}, &agentpb.StringUser{Uid: "alice"}, alice},
		{&agentpb.User{Username: "root"}, &agentpb.StringUser{Uid: "alice", Gid: "staff"}, "1001\n2001\n2001\n/home/alice\n"},
		{&agentpb.User{UID: 5, GID: 6}, &agentpb.StringUser{AdditionalGids: []string{"audio", "99"}}, "5\n6\n6 63 99\n/\n"},
		{&agentpb.User{UID: 5, GID: 6, AdditionalGids: []uint32{8, 9}}, nil, "5\n6\n6 8 9\n/\n"},
	} {
		got, err := create(fmt.Sprintf("user%d", i), tc.u, tc.s)
		if err != nil || got != tc.want {
			t.Errorf("create, %v, %v: %q, %v; want %q", tc.u, tc.s, got, err, tc.want)
		}
		if got := g.try("main", fmt.Sprintf("exec%d", i), &agentpb.Process{Args: shell(look), User: tc.u}, tc.s); got != tc.want {
			t.Errorf("exec, %v, %v: %q, want %q", tc.u, tc.s, got, tc.want)
		}
	}
	for _, tc := range []struct {
		u    *agentpb.User
		s    *agentpb.StringUser
		says string
	}{
		{&agentpb.User{Username: "mallory"}, nil, "mallory"},
		{nil, &agentpb.StringUser{Uid: "alice", Gid: "nogroup"}, "nogroup"},
		{nil, &agentpb.StringUser{AdditionalGids: []string{"nogroup"}}, "nogroup"},
	} {
		_, err := create("refused", tc.u, tc.s)
		wantClass(t, "create as "+tc.says, err, errdefs.ErrInvalidArgument)
		if err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), "/etc/group") {
			t.Errorf("%v does not say %q, and where it was looked for", err, tc.says)
		}
		_, err = g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: "main", ExecId: "refused", StringUser: tc.s, Process: &agentpb.Process{Args: []string{"/bin/true"}, User: tc.u}})
		wantClass(t, "exec as "+tc.says, err, errdefs.ErrInvalidArgument)
	}
	// A fifo in the place of the file does not hold the agent up.
	if err := os.Remove(filepath.Join(g.rootfs(), "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	if err := mkfifo(filepath.Join(g.rootfs(), "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	_, err := create("fifo", &agentpb.User{Username: "alice"}, nil)
	wantClass(t, "a fifo for /etc/passwd", err, errdefs.ErrInvalidArgument)
}

func TestUmaskAndDirectory(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec("umask; pwd; busybox stat -c %a:%u . ; echo .; busybox tail -f /dev/null")
	spec.Process.Cwd = "/made/by/the/runtime" // as runc does
	g.create("main", spec)
	g.start("main")
	var got string
	for !strings.HasSuffix(got, ".\n") {
		got += string(must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "main", Len: 1000})).Data)
	}
	if want := "0022\n/made/by/the/runtime\n755:0\n.\n"; got != want {
		t.Errorf("first process: %q, want %q", got, want)
	}
	if got := g.try("main", "exec1", &agentpb.Process{Args: shell("umask; pwd"), Cwd: "/vol"}, nil); got != "0022\n/vol\n" {
		t.Errorf("exec: %q", got)
	}
	for _, cwd := range []string{"/nowhere", "relative", "/bin/busybox"} {
		_, err := g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: "main", ExecId: "bad", Process: &agentpb.Process{Args: []string{"/bin/true"}, Cwd: cwd}})
		if err == nil || !strings.Contains(err.Error(), cwd) {
			t.Errorf("exec in %s: %v", cwd, err)
		}
	}
}

// The sentences that people and tests of Kubernetes know from runc, and the call they
// come with: no process exists afterwards.
func TestMissingCommandsAsRuncSaysIt(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "busybox tail -f /dev/null")
	g.put("noexec", "#!/bin/sh\n")
	for command, want := range map[string]string{
		"nosuchthing":      `exec: "nosuchthing": executable file not found in $PATH`,
		"/bin/nosuchthing": `exec: "/bin/nosuchthing": stat /bin/nosuchthing: no such file or directory`,
		"/noexec":          `exec: "/noexec": permission denied`,
		"/vol":             `exec: "/vol": is a directory`,
	} {
		spec := g.spec("")
		spec.Process.Args = []string{command}
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "bad", OCI: spec})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("create: %v does not say %q", err, want)
		}
		_, err = g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: "main", ExecId: "bad", Process: &agentpb.Process{Args: []string{command}, Env: []string{"PATH=/bin"}}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("exec: %v does not say %q", err, want)
		}
	}
	// What is there and is no program for this machine ends as a process does.
	g.put("garbage", "\x7fELFnot")
	if err := os.Chmod(filepath.Join(g.rootfs(), "garbage"), 0o755); err != nil {
		t.Fatal(err)
	}
	spec := g.spec("")
	spec.Process.Args = []string{"/garbage"}
	g.create("garbage", spec)
	g.start("garbage")
	if got := g.wait("garbage", ""); got != 255 {
		t.Errorf("garbage: status %d", got)
	}
}

func TestSysctls(t *testing.T) {
	path := podNetNS(t)
	g := newGuest(t, func(c *Config) { c.PodNetNS = path })
	g.sandbox()
	spec := g.spec("cat /proc/sys/kernel/shmmax /proc/sys/kernel/domainname /proc/sys/fs/mqueue/msg_max /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range")
	spec.Linux.Sysctl = map[string]string{
		"kernel.shmmax": "1048576", "kernel.domainname": "example.org", "fs.mqueue.msg_max": "77",
		"net.ipv4.ip_unprivileged_port_start": "99", "net/ipv4/ping_group_range": "5 6",
	}
	got := strings.Fields(g.say("main", spec))
	if diff := cmp.Diff([]string{"1048576", "example.org", "77", "99", "5", "6"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, key := range []string{"vm.swappiness", "kernel.hostname", "kernel.pid_max", "kernel.panic", "fs.file-max", "user.max_user_namespaces"} {
		spec := g.spec("true")
		spec.Linux.Sysctl = map[string]string{key: "1"}
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "refused", OCI: spec})
		wantClass(t, key, err, errdefs.ErrInvalidArgument)
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%v does not name %s", err, key)
		}
	}
}
