// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"golang.org/x/sys/unix"
)

// pauseSpec is what the shim sends for a pod's sandbox.
func pauseSpec() *agentpb.Spec {
	return &agentpb.Spec{
		Version:     "1.0.2",
		Annotations: map[string]string{annotation.ContainerType: annotation.ContainerTypeSandbox},
		Root:        &agentpb.Root{Readonly: true},
		Process:     &agentpb.Process{Args: []string{"/the/images/own"}, Cwd: "/", User: &agentpb.User{}},
		Mounts:      []*agentpb.Mount{{Destination: "/proc", Source: "proc", Type: "proc"}},
		Linux: &agentpb.Linux{
			Namespaces: []*agentpb.LinuxNamespace{{Type: "pid"}, {Type: "mount"}},
			Resources:  &agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Shares: 2}},
		},
	}
}

// pause creates and starts a sandbox container and returns its process.
func (g *guest) pause(id string) int {
	g.t.Helper()
	must[any](g.t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: pauseSpec(), SandboxPidns: true}))
	g.start(id)
	return g.pausePID(id)
}

func (g *guest) pausePID(id string) int {
	g.t.Helper()
	c := must[*container](g.t)(g.agent.container(id, errdefs.ErrNotFound))
	return must[residence](g.t)(c.runner.first()).pid
}

func (g *guest) signal(id string, sig unix.Signal) {
	g.t.Helper()
	must[any](g.t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: id, Signal: uint32(sig)}))
}

// shared creates and starts a container in the sandbox's pid namespace.
func (g *guest) shared(id, command string) {
	g.t.Helper()
	must[any](g.t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: g.spec(command), SandboxPidns: true}))
	g.start(id)
}

func TestPauseLife(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "pause", ExecId: "pause", OCI: pauseSpec()}))
	_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "pause", OCI: pauseSpec()})
	wantClass(t, "create twice", err, errdefs.ErrAlreadyExists)
	_, err = g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: "pause"})
	wantClass(t, "freeze what is not started", err, errdefs.ErrFailedPrecondition)
	g.start("pause")
	_, err = g.StartContainer(g.ctx(), &agentpb.StartContainerRequest{ContainerId: "pause"})
	wantClass(t, "start twice", err, errdefs.ErrFailedPrecondition)

	_, err = g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: "pause", ExecId: "shell", Process: &agentpb.Process{Args: []string{"/bin/sh"}}})
	wantClass(t, "exec", err, errdefs.ErrFailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "another container of the pod") {
		t.Errorf("exec: the sentence says not what to do: %v", err)
	}
	_, err = g.TtyWinResize(g.ctx(), &agentpb.TtyWinResizeRequest{ContainerId: "pause", Row: 1, Column: 1})
	wantClass(t, "resize", err, errdefs.ErrUnavailable)
	_, err = g.GetDiagnosticData(g.ctx(), &agentpb.GetDiagnosticDataRequest{ContainerId: "pause", LogType: "termination_log"})
	wantClass(t, "termination message", err, errdefs.ErrNotFound)
	must[any](t)(g.CloseStdin(g.ctx(), &agentpb.CloseStdinRequest{ContainerId: "pause"}))

	// Signals that are not for it change nothing; the last of them would end any
	// other program.
	for _, sig := range []unix.Signal{unix.SIGUSR1, unix.SIGCHLD, unix.SIGHUP} {
		g.signal("pause", sig)
	}
	g.signal("pause", unix.SIGTERM)
	for range 2 { // kept
		if got := g.wait("pause", "pause"); got != 0 {
			t.Errorf("status %d after SIGTERM", got)
		}
	}
	if got := g.readAll("pause", ""); got != "" {
		t.Errorf("it said %q", got)
	}
	st := must[*agentpb.StatsContainerResponse](t)(g.StatsContainer(g.ctx(), &agentpb.StatsContainerRequest{ContainerId: "pause"}))
	if st.CgroupStats.PidsStats.Current != 0 {
		t.Errorf("%d processes after its end", st.CgroupStats.PidsStats.Current)
	}
	g.remove("pause")
	_, err = g.WaitProcess(g.ctx(), &agentpb.WaitProcessRequest{ContainerId: "pause"})
	wantClass(t, "wait for a removed container", err, errdefs.ErrInternal)
}

func TestPauseEnds(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	for _, tc := range []struct {
		name   string
		signal unix.Signal
		frozen bool
		want   int32
	}{
		{"terminated", unix.SIGTERM, false, 0}, {"interrupted", unix.SIGINT, false, 0},
		{"killed", unix.SIGKILL, false, 137}, {"killed-frozen", unix.SIGKILL, true, 137},
	} {
		pid := g.pause(tc.name)
		if tc.frozen {
			must[any](t)(g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: tc.name}))
		}
		g.signal(tc.name, tc.signal)
		if got := g.wait(tc.name, ""); got != tc.want {
			t.Errorf("%s: status %d, want %d", tc.name, got, tc.want)
		}
		if err := unix.Kill(pid, 0); err != unix.ESRCH {
			t.Errorf("%s: process %d: %v", tc.name, pid, err)
		}
		g.remove(tc.name)
	}
	// Not started, it ends as well, and starts no more.
	must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "created", OCI: pauseSpec()}))
	g.signal("created", unix.SIGTERM)
	if got := g.wait("created", ""); got != 0 {
		t.Errorf("not started: status %d", got)
	}
	_, err := g.StartContainer(g.ctx(), &agentpb.StartContainerRequest{ContainerId: "created"})
	wantClass(t, "start after the end", err, errdefs.ErrFailedPrecondition)
	g.remove("created")
	// Running, it is removed with all that it was in.
	pid := g.pause("removed")
	c := must[*container](t)(g.agent.container("removed", errdefs.ErrNotFound))
	g.remove("removed")
	if err := unix.Kill(pid, 0); err != unix.ESRCH || c.cgroup.Exists() {
		t.Errorf("removed: process %v, cgroup %v", err, c.cgroup.Exists())
	}
	g.pause("left") // the end of the test removes it
}

func TestPauseFreezesAndIsMeasured(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	pid := g.pause("pause")
	stats := must[*agentpb.StatsContainerResponse](t)
	if s := stats(g.StatsContainer(g.ctx(), &agentpb.StatsContainerRequest{ContainerId: "pause"})).CgroupStats; s.PidsStats.Current != 1 {
		t.Errorf("%d processes, want 1", s.PidsStats.Current)
	}
	must[any](t)(g.UpdateContainer(g.ctx(), &agentpb.UpdateContainerRequest{ContainerId: "pause", Resources: &agentpb.LinuxResources{Pids: &agentpb.LinuxPids{Limit: 7}}}))
	if s := stats(g.StatsContainer(g.ctx(), &agentpb.StatsContainerRequest{ContainerId: "pause"})).CgroupStats; s.PidsStats.Limit != 7 {
		t.Errorf("limit %d after the update, want 7", s.PidsStats.Limit)
	}
	must[any](t)(g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: "pause"}))
	must[any](t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: "pause", Signal: uint32(unix.SIGTERM)}))
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("frozen, it ended: %v", err)
	}
	must[any](t)(g.ResumeContainer(g.ctx(), &agentpb.ResumeContainerRequest{ContainerId: "pause"}))
	if got := g.wait("pause", ""); got != 0 {
		t.Errorf("status %d", got)
	}
}

// It can do nothing and reach nothing.
func TestPauseHasNothing(t *testing.T) {
	podns := podNetNS(t)
	g := newGuest(t, func(c *Config) { c.PodNetNS = podns })
	g.sandbox()
	dir := "/proc/" + strconv.Itoa(g.pause("pause")) + "/"
	read := func(name string) string { return string(must[[]byte](t)(os.ReadFile(dir + name))) }
	if got := read("comm"); got != "pause\n" {
		t.Errorf("comm %q", got)
	}
	if got := read("cmdline"); got != "/pause\x00" {
		t.Errorf("command line %q", got)
	}
	status := map[string]string{}
	for line := range strings.Lines(read("status")) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.Join(strings.Fields(value), " ")
	}
	for key, want := range map[string]string{
		"Uid": "65535 65535 65535 65535", "Gid": "65535 65535 65535 65535", "Groups": "", "NoNewPrivs": "1",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		"Threads": "1", "NSpid": fmt.Sprintf("%d 1", g.pausePID("pause")),
	} {
		if status[key] != want {
			t.Errorf("%s: %q, want %q", key, status[key], want)
		}
	}
	if got := len(must[[]os.DirEntry](t)(os.ReadDir(dir + "fd"))); got != 3 {
		t.Errorf("%d descriptors, want 3", got)
	}
	if left := must[[]os.DirEntry](t)(os.ReadDir(dir + "root")); len(left) != 0 {
		t.Errorf("its root has %v", left)
	}
	if got := strings.Count(read("mountinfo"), "\n"); got != 1 {
		t.Errorf("%d mounts, want 1:\n%s", got, read("mountinfo"))
	}
	if err := os.WriteFile(dir+"root/file", nil, 0o600); err == nil {
		t.Error("its root can be written")
	}
	ino := func(path string) uint64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	shared := filepath.Join(g.agent.cfg.StateDir, "sandbox/ns")
	for ns, pods := range map[string]string{"ipc": shared + "/ipc", "uts": shared + "/uts", "net": podns} {
		if ino(dir+"ns/"+ns) != ino(pods) {
			t.Errorf("its %s namespace is not the pod's", ns)
		}
	}
	for _, ns := range []string{"pid", "mnt"} {
		if ino(dir+"ns/"+ns) == ino("/proc/self/ns/"+ns) {
			t.Errorf("its %s namespace is the agent's", ns)
		}
	}
}

// Containers that share the sandbox's pid namespace see pause as process 1; it takes
// their orphans, and they end with it.
func TestPauseHoldsThePIDNamespace(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.pause("pause")
	g.shared("main", "cat /proc/1/comm /proc/1/cmdline; echo; readlink /proc/1/exe || echo hidden; exit 3")
	if got, want := g.readAll("main", ""), "pause\n/pause\x00\nhidden\n"; got != want {
		t.Errorf("process 1 is %q, want %q", got, want)
	}
	if got := g.wait("main", ""); got != 3 {
		t.Errorf("status %d", got)
	}
	g.shared("second", "sleep 1000")
	// The inner shell is gone before its child; that is then process 1's.
	out, _ := g.output("second", "orphan", "sh -c 'sleep 0.2 & echo $!'")
	orphan := strings.TrimSpace(out)
	gone, status := g.output("second", "look", "i=0; while [ -e /proc/"+orphan+" ]; do sleep 0.05; i=$((i+1)); [ $i -lt 1000 ] || exit 1; done; echo gone")
	if gone != "gone\n" || status != 0 {
		t.Errorf("the orphan %q was not reaped: %q, %d", orphan, gone, status)
	}
	g.signal("pause", unix.SIGKILL)
	if got := g.wait("second", ""); got != 137 {
		t.Errorf("status %d of a container whose process 1 was killed", got)
	}
}

// A pod's kernel settings come with its sandbox container and hold for the others.
func TestPauseSetsThePodsSysctls(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := pauseSpec()
	spec.Linux.Sysctl = map[string]string{"kernel.msgmax": "12345"}
	g.create("pause", spec)
	g.start("pause")
	g.run("main", "cat /proc/sys/kernel/msgmax")
	if got := g.readAll("main", ""); got != "12345\n" {
		t.Errorf("msgmax in the pod: %q", got)
	}
	if own := string(must[[]byte](t)(os.ReadFile("/proc/sys/kernel/msgmax"))); own == "12345\n" {
		t.Error("the machine's own setting was changed")
	}
	for key, want := range map[string]error{"kernel.panic": errdefs.ErrInvalidArgument, "net.ipv4.ip_forward": errdefs.ErrInvalidArgument, "kernel.shmnonsense": errdefs.ErrInvalidArgument, "fs.mqueue.nonsense": errdefs.ErrInternal} {
		spec.Linux.Sysctl = map[string]string{key: "1"}
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "bad", OCI: spec})
		wantClass(t, key, err, want)
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("the error does not name %s: %v", key, err)
		}
	}
}

// Only the sandbox may come without a root, and with one it is a container like any.
func TestPauseIsForTheSandboxOnly(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	for name, spec := range map[string]*agentpb.Spec{
		"another container": {Root: &agentpb.Root{}, Process: pauseSpec().Process, Annotations: map[string]string{annotation.ContainerType: annotation.ContainerTypeContainer}},
		"no pod":            {Root: &agentpb.Root{}, Process: pauseSpec().Process},
		"no root at all":    {Process: pauseSpec().Process},
	} {
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: spec})
		wantClass(t, name, err, errdefs.ErrInvalidArgument)
		if err == nil || !strings.Contains(err.Error(), "OCI.Root.Path") {
			t.Errorf("%s: the error does not name OCI.Root.Path: %v", name, err)
		}
	}
	hooks := pauseSpec()
	hooks.Hooks = &agentpb.Hooks{Poststop: []*agentpb.Hook{{Path: "/bin/true"}}}
	_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: hooks})
	wantClass(t, "hooks", err, errdefs.ErrInvalidArgument)

	rooted := g.spec("echo an image; exit 4")
	rooted.Annotations = pauseSpec().Annotations
	g.create("rooted", rooted)
	g.start("rooted")
	if out, status := g.readAll("rooted", ""), g.wait("rooted", ""); out != "an image\n" || status != 4 {
		t.Errorf("with a root: %q, %d", out, status)
	}
	crio := pauseSpec()
	crio.Annotations, crio.Root, crio.Process, crio.Linux = map[string]string{annotation.CRIOContainerType: annotation.ContainerTypeSandbox}, nil, nil, nil
	g.create("crio", crio)
	g.start("crio")
	g.signal("crio", unix.SIGINT)
	if got := g.wait("crio", ""); got != 0 {
		t.Errorf("CRI-O's sandbox: status %d", got)
	}
}

// What cannot be set up says why, and leaves nothing.
func TestPauseThatCannotBeSetUp(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	ns := filepath.Join(g.agent.cfg.StateDir, "sandbox/ns/ipc")
	paths := map[string]string{"join a namespace": "/proc/self/exe", "no such file": filepath.Join(g.dir, "absent")}
	for _, want := range slices.Sorted(maps.Keys(paths)) {
		g.agent.mu.Lock()
		g.agent.sandbox.ipc = paths[want]
		g.agent.mu.Unlock()
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "pause", OCI: pauseSpec()})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	g.agent.mu.Lock()
	g.agent.sandbox.ipc = ns
	g.agent.mu.Unlock()
	g.pause("pause")
}
