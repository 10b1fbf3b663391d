// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/opencontainers/cgroups"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	Init()
	goleak.VerifyTestMain(m)
}

// patience bounds what a test waits for; a machine busy with other tests is slow.
const patience = 60 * time.Second

// guest is an agent behind a real socket, on libcontainer and this machine's kernel.
type guest struct {
	t      testing.TB
	dir    string
	agent  *Agent
	socket string
	*client
}

// client is one connection.
type client struct {
	conn net.Conn
	rpc  *ttrpc.Client
	agentpb.AgentServiceService
	health agentpb.HealthService
	podvm  podvmpb.PodVMClient
}

var guests atomic.Int32

func newGuest(t testing.TB, change ...func(*Config)) *guest {
	t.Helper()
	// Not t.TempDir: the name of a test would make the socket's path too long.
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	parent := fmt.Sprintf("/peerpod-test-%d-%d", os.Getpid(), guests.Add(1))
	cfg := Config{
		StateDir: filepath.Join(dir, "state"), CgroupParent: parent, Version: "test",
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	for _, f := range change {
		f(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	a.Register(srv)
	g := &guest{t: t, dir: dir, agent: a, socket: filepath.Join(dir, "s")}
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served, ran := make(chan error, 1), make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l) }()
	go func() { ran <- a.Run(ctx) }()
	g.client = g.dial()
	t.Cleanup(func() {
		g.client.close()
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		srv.Close()
		<-served
		g.checkClean(parent)
	})
	return g
}

// checkClean holds the agent to leaving nothing: no mount, no cgroup, no file.
func (g *guest) checkClean(parent string) {
	g.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		g.t.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, g.dir+"/") {
			g.t.Errorf("left mounted: %s", line)
		}
	}
	roots, err := filepath.Glob("/sys/fs/cgroup/*" + parent)
	if cgroups.IsCgroup2UnifiedMode() {
		roots, err = []string{"/sys/fs/cgroup" + parent}, nil
	}
	if err != nil {
		g.t.Error(err)
	}
	for _, dir := range roots {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			g.t.Errorf("a container's cgroup is left in %s: %v", dir, err)
		}
	}
	left, _ := filepath.Glob(g.dir + "/state/*/*")
	for _, path := range left {
		if path != g.dir+"/state/shared/containers" {
			g.t.Errorf("left behind: %s", path)
		}
	}
	os.RemoveAll(g.dir)
}

func (g *guest) dial() *client {
	g.t.Helper()
	conn, err := net.Dial("unix", g.socket)
	if err != nil {
		g.t.Fatal(err)
	}
	rpc := ttrpc.NewClient(conn)
	return &client{conn: conn, rpc: rpc, AgentServiceService: agentpb.NewAgentServiceClient(rpc), health: agentpb.NewHealthClient(rpc), podvm: podvmpb.NewPodVMClient(rpc)}
}

func (c *client) close() {
	c.rpc.Close()
	c.conn.Close()
}

func (g *guest) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	g.t.Cleanup(cancel)
	return ctx
}

// must fails the test on an error.
func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatalf("%v", err)
		}
		return v
	}
}

func (g *guest) sandbox() {
	g.t.Helper()
	must[any](g.t)(g.CreateSandbox(g.ctx(), &agentpb.CreateSandboxRequest{SandboxId: "sandbox", Hostname: "pod-host"}))
}

// rootfs makes a root file system out of busybox.
func (g *guest) rootfs() string {
	g.t.Helper()
	dir := filepath.Join(g.dir, "rootfs")
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	for _, d := range []string{"bin", "proc", "dev", "tmp", "etc", "vol", "sys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			g.t.Fatal(err)
		}
	}
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), box, 0o755); err != nil {
		g.t.Fatal(err)
	}
	for _, name := range []string{"sh", "cat", "sleep", "echo", "hostname", "stty", "head", "kill", "true", "ls", "yes", "dd", "nc", "id", "readlink", "tail", "mount", "printf", "touch"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", name)); err != nil {
			g.t.Fatal(err)
		}
	}
	return dir
}

// spec is an ordinary container that runs a shell command.
func (g *guest) spec(command string) *agentpb.Spec {
	return &agentpb.Spec{
		Version: "1.0.2",
		Root:    &agentpb.Root{Path: g.rootfs()},
		Process: &agentpb.Process{
			Args: []string{"/bin/sh", "-c", command}, Cwd: "/", User: &agentpb.User{},
			Env: []string{"PATH=/bin"},
			Capabilities: &agentpb.LinuxCapabilities{
				Bounding: []string{"CAP_KILL", "CAP_CHOWN"}, Effective: []string{"CAP_KILL", "CAP_CHOWN"}, Permitted: []string{"CAP_KILL", "CAP_CHOWN"},
			},
		},
		Mounts: []*agentpb.Mount{
			{Destination: "/proc", Source: "proc", Type: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Source: "tmpfs", Type: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Source: "devpts", Type: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
		},
		Linux: &agentpb.Linux{Namespaces: []*agentpb.LinuxNamespace{{Type: "ipc"}, {Type: "uts"}, {Type: "mount"}}},
	}
}

// create creates a container.
func (g *guest) create(id string, spec *agentpb.Spec) {
	g.t.Helper()
	must[any](g.t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec}))
}

// run creates and starts one.
func (g *guest) run(id, command string) {
	g.t.Helper()
	g.create(id, g.spec(command))
	g.start(id)
}

func (g *guest) start(id string) {
	g.t.Helper()
	must[any](g.t)(g.StartContainer(g.ctx(), &agentpb.StartContainerRequest{ContainerId: id}))
}

func (g *guest) exec(id, execID, command string, tty bool) {
	g.t.Helper()
	must[any](g.t)(g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: id, ExecId: execID, Process: &agentpb.Process{
		Args: []string{"/bin/sh", "-c", command}, Env: []string{"PATH=/bin", "TERM=xterm"}, Terminal: tty,
	}}))
}

func (g *guest) wait(id, execID string) int32 {
	g.t.Helper()
	return must[*agentpb.WaitProcessResponse](g.t)(g.WaitProcess(g.ctx(), &agentpb.WaitProcessRequest{ContainerId: id, ExecId: execID})).Status
}

func (g *guest) remove(id string) {
	g.t.Helper()
	must[any](g.t)(g.RemoveContainer(g.ctx(), &agentpb.RemoveContainerRequest{ContainerId: id}))
}

// readAll reads a stream to its end with the standard calls.
func (g *guest) readAll(id, execID string) string {
	g.t.Helper()
	var all bytes.Buffer
	for {
		r := must[*agentpb.ReadStreamResponse](g.t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: id, ExecId: execID, Len: 32768}))
		if len(r.Data) == 0 {
			return all.String()
		}
		all.Write(r.Data)
	}
}

// output runs a command in a new process and returns what it printed and its status.
func (g *guest) output(id, execID, command string) (string, int32) {
	g.t.Helper()
	g.exec(id, execID, command, false)
	out := g.readAll(id, execID)
	return out, g.wait(id, execID)
}

// eventually waits for a condition that nothing announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// class brings an error that came over the wire back to its class.
func class(err error) error {
	if err == nil {
		return nil
	}
	native := errgrpc.ToNative(err)
	for _, c := range classes {
		if errors.Is(native, c) {
			return c
		}
	}
	return errdefs.ErrUnknown
}

func wantClass(t *testing.T, what string, err, want error) {
	t.Helper()
	if got := class(err); got != want {
		t.Errorf("%s: got %v (class %v), want class %v", what, err, got, want)
	}
}

func TestContainerLife(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.create("pause", g.spec(`trap "exit 9" TERM; echo up; while :; do sleep 0.1; done`))
	g.start("pause")
	read := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "pause", Len: 100}))
	if string(read.Data) != "up\n" {
		t.Fatalf("output %q", read.Data)
	}
	if out, status := g.output("pause", "exec1", "hostname; exit 7"); out != "pod-host\n" || status != 7 {
		t.Fatalf("exec: %q, status %d", out, status)
	}
	must[any](t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: "pause", Signal: 15}))
	for range 2 { // statuses are kept
		if got := g.wait("pause", "pause"); got != 9 {
			t.Fatalf("status %d, want 9", got)
		}
		if got := g.wait("pause", "exec1"); got != 7 {
			t.Fatalf("status of the exec %d, want 7", got)
		}
	}
	// A later container works, though the first has ended.
	g.run("second", "exit 3")
	if got := g.wait("second", ""); got != 3 {
		t.Fatalf("status %d, want 3", got)
	}
	g.remove("pause")
	g.remove("second")
	_, err := g.WaitProcess(g.ctx(), &agentpb.WaitProcessRequest{ContainerId: "pause"})
	wantClass(t, "wait for a removed container", err, errdefs.ErrInternal)
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
}

func TestExitStatus(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "sleep 1000")
	for i, tc := range []struct {
		command string
		want    int32
	}{
		{"exit 0", 0}, {"exit 1", 1}, {"exit 123", 123}, {"exit 255", 255},
		{"kill -9 $$", 137}, {"kill -15 $$", 143}, {"kill -11 $$", 139}, {"nosuchcommand", 127},
	} {
		id := fmt.Sprintf("exec%d", i)
		g.exec("main", id, tc.command, false)
		if got := g.wait("main", id); got != tc.want {
			t.Errorf("%q: status %d, want %d", tc.command, got, tc.want)
		}
	}
	must[any](t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: "main", Signal: 9}))
	if got := g.wait("main", ""); got != 137 {
		t.Errorf("killed container: status %d, want 137", got)
	}
}

// The environment of a command is the spec's: what libcontainer's children are told
// does not reach it.
func TestEnvironmentIsTheSpecs(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", `echo "$GOMAXPROCS|$PATH|"; tail -f /dev/null`)
	if out := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "main", Len: 100})); string(out.Data) != "|/bin|\n" {
		t.Errorf("first process: %q", out.Data)
	}
	if out, _ := g.output("main", "exec1", `echo "$GOMAXPROCS|$PATH|"`); out != "|/bin|\n" {
		t.Errorf("exec: %q", out)
	}
}

func TestExecOfMissingCommandFailsAtOnce(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "sleep 1000")
	_, err := g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: "main", ExecId: "missing", Process: &agentpb.Process{Args: []string{"/bin/nosuchthing"}}})
	wantClass(t, "exec of a missing command", err, errdefs.ErrInternal)
	if err == nil || !strings.Contains(err.Error(), "/bin/nosuchthing") {
		t.Errorf("the error does not name the command: %v", err)
	}
	// The id is free again.
	if out, status := g.output("main", "missing", "echo now"); out != "now\n" || status != 0 {
		t.Errorf("exec with the id of a failed one: %q, %d", out, status)
	}
	spec := g.spec("")
	spec.Process.Args = []string{"nosuchthing"}
	_, err = g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "other", OCI: spec})
	if err == nil || !strings.Contains(err.Error(), "nosuchthing") {
		t.Errorf("create with a missing command: %v", err)
	}
	g.run("other", "exit 4")
	if got := g.wait("other", ""); got != 4 {
		t.Errorf("status %d of a container whose id a failed one had", got)
	}
}

func TestTerminal(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec("stty size; read line; echo got $line; stty size; exit 5")
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &agentpb.Box{Height: 11, Width: 22}
	g.create("tty", spec)
	g.start("tty")
	var text string
	for !strings.Contains(text, "11 22") {
		r := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "tty", Len: 1000}))
		if len(r.Data) == 0 {
			t.Fatalf("the terminal ended after %q", text)
		}
		text += string(r.Data)
	}
	must[any](t)(g.TtyWinResize(g.ctx(), &agentpb.TtyWinResizeRequest{ContainerId: "tty", Row: 33, Column: 44}))
	must[any](t)(g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: "tty", Data: []byte("hello\n")}))
	rest := g.readAll("tty", "")
	if !strings.Contains(rest, "got hello") || !strings.Contains(rest, "33 44") {
		t.Errorf("terminal said %q", rest)
	}
	if got := g.wait("tty", ""); got != 5 {
		t.Errorf("status %d, want 5", got)
	}
	g.run("plain", "sleep 1000")
	_, err := g.TtyWinResize(g.ctx(), &agentpb.TtyWinResizeRequest{ContainerId: "plain", Row: 1, Column: 1})
	wantClass(t, "resize without a terminal", err, errdefs.ErrUnavailable)
	g.exec("plain", "shell", "stty size; exit 6", true)
	if got := g.wait("plain", "shell"); got != 6 {
		t.Errorf("exec with a terminal: status %d", got)
	}
}

// The user's command must not hold descriptors of the agent, nor the agent those of
// processes that are gone.
func TestNoDescriptorIsLeaked(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "sleep 1000")
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	round := func(i int) {
		id := fmt.Sprintf("e%d-%d", i, i)
		out, _ := g.output("main", id, "ls /proc/self/fd | tail -n 1")
		if strings.TrimSpace(out) != "3" { // ls's own
			t.Errorf("a process was given more than its three descriptors: %q", out)
		}
		g.exec("main", id+"t", "echo x", true)
		g.wait("main", id+"t")
		cid := fmt.Sprintf("box%d", i)
		g.run(cid, "echo hi")
		g.wait(cid, "")
		g.remove(cid)
		_, err := g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: "main", ExecId: id + "f", Process: &agentpb.Process{Args: []string{"/nothing"}}})
		if err == nil {
			t.Error("exec of nothing worked")
		}
	}
	round(0)
	var before int
	eventually(t, "descriptors settle", func() bool { n := count(); same := n == before; before = n; return same })
	for i := 1; i < 6; i++ {
		round(i)
	}
	eventually(t, fmt.Sprintf("descriptors are back at %d", before), func() bool { return count() <= before })
}

// busyboxHash hashes with the machine's own tool: an independent witness.
func hashOf(t *testing.T, b []byte) string {
	t.Helper()
	cmd := exec.Command("/bin/busybox", "sha256sum")
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))[0]
}

// writeFile writes without creating: a fifo stays one.
func writeFile(path string, data []byte) error { return os.WriteFile(path, data, 0o644) }

func symlink(target, path string) error { return os.Symlink(target, path) }

func mkfifo(path string) error { return unix.Mkfifo(path, 0o644) }
