// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/ttrpc"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/vmnote"
	"github.com/kata-remote/kata-remote/shim/sandbox"
	"github.com/kata-remote/kata-remote/shim/service"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

// binary is the shim, built for these tests.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "shim")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "containerd-shim-kata-remote-v2")
	if out, err := exec.Command("go", "build", "-o", binary, "../cmd/containerd-shim-kata-v2").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("build the shim: %v\n%s", err, out))
	}
	code := m.Run()
	os.RemoveAll(dir)
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func TestParseFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		want Flags
	}{
		{
			[]string{"-namespace", "k8s.io", "-address", "/run/c.sock", "-publish-binary", "/usr/bin/containerd", "-id", "x", "-debug", "start"},
			Flags{Namespace: "k8s.io", Address: "/run/c.sock", PublishBinary: "/usr/bin/containerd", ID: "x", Debug: true, Action: "start"},
		},
		{[]string{"--id=x", "-bundle", "/b", "delete"}, Flags{ID: "x", Bundle: "/b", Action: "delete"}},
		{[]string{"-new-thing", "7", "-id", "x", "start"}, Flags{ID: "x", Action: "start"}},
		{[]string{"-new-switch", "start"}, Flags{Action: "start"}},
		{[]string{"-pprof", "-info"}, Flags{Info: true}},
		{[]string{"-debug=false", "-v"}, Flags{Version: true}},
	} {
		if got := ParseFlags(c.args); got != c.want {
			t.Errorf("%v: %+v, want %+v", c.args, got, c.want)
		}
	}
}

// containerd is what a containerd is to a shim, for one test.
type containerd struct {
	t       *testing.T
	ctx     context.Context
	adaptor *shimtest.Adaptor
	sink    *shimtest.Sink
	socket  string
	netns   string
	leak    *os.File // passed on to start, when it is not nil
}

func newContainerd(t *testing.T) *containerd {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	agent := &agenttest.Agent{
		Features: []extension.Feature{extension.Rootfs, extension.Streams},
		Programs: map[string]agenttest.Program{
			"pause": func(ctx context.Context, p *agenttest.Proc) int {
				<-ctx.Done()
				return 0
			},
			"echo": func(_ context.Context, p *agenttest.Proc) int {
				fmt.Fprintln(p.Stdout, strings.Join(p.Args[1:], " "))
				return 4
			},
		},
	}
	return &containerd{
		t: t, ctx: ctx, adaptor: shimtest.NewAdaptor(t, agent), sink: shimtest.NewSink(t),
		socket: filepath.Join(t.TempDir(), "containerd.sock"), netns: shimtest.NetNS(t),
	}
}

func (c *containerd) command(bundle, id, action string, stdin io.Reader) *exec.Cmd {
	cmd := exec.CommandContext(c.ctx, binary, "-namespace", "k8s.io", "-address", c.socket, "-publish-binary", "/usr/bin/containerd", "-id", id, action)
	if action == actionDelete {
		cmd.Args = append(cmd.Args[:len(cmd.Args)-1], "-bundle", bundle, action)
	}
	cmd.Dir, cmd.Stdin = bundle, stdin
	if c.leak != nil {
		cmd.ExtraFiles = []*os.File{nil, nil, c.leak}
	}
	cmd.Env = append(os.Environ(), "TTRPC_ADDRESS="+c.sink.Address, "MAX_SHIM_VERSION=2", "GOMAXPROCS=2")
	return cmd
}

// start runs start and returns what it printed.
func (c *containerd) start(bundle, id string, stdin io.Reader) string {
	c.t.Helper()
	out, err := c.command(bundle, id, actionStart, stdin).CombinedOutput()
	if err != nil {
		c.t.Fatalf("start: %v: %s", err, out)
	}
	c.t.Cleanup(func() { // ends a server that a failed test left
		if b, err := os.ReadFile(filepath.Join(bundle, "shim.pid")); err == nil {
			if pid, err := strconv.Atoi(string(b)); err == nil && alive(pid) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	return string(out)
}

func alive(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && exe == binary
}

func (c *containerd) dial(address string) *ttrpc.Client {
	c.t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		c.t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	c.t.Cleanup(func() { client.Close() })
	return client
}

// shutdown asks a shim to end. As in containerd, a connection that is closed before
// the answer was seen will do.
func (c *containerd) shutdown(address, id string) {
	c.t.Helper()
	err := c.dial(address).Call(c.ctx, service.Names[0], "Shutdown", &taskapi.ShutdownRequest{ID: id}, &emptypb.Empty{})
	if err != nil && !errors.Is(err, ttrpc.ErrClosed) {
		c.t.Errorf("shutdown: %v", err)
	}
}

func (c *containerd) options() *anypb.Any {
	b, err := proto.Marshal(&runtimeoptions.Options{ConfigPath: c.adaptor.ConfigFile()})
	if err != nil {
		c.t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: b}
}

func podAnnotations(kind, sandbox string) map[string]string {
	return map[string]string{annotation.ContainerType: kind, annotation.SandboxID: sandbox, annotation.SandboxName: "p", annotation.SandboxNamespace: "n"}
}

func (c *containerd) deleteBinary(bundle, id string) (*taskapi.DeleteResponse, string) {
	c.t.Helper()
	var out, errs bytes.Buffer
	cmd := c.command(bundle, id, actionDelete, nil)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		c.t.Fatalf("delete: %v: %s", err, errs.String())
	}
	var r taskapi.DeleteResponse
	if err := proto.Unmarshal(out.Bytes(), &r); err != nil {
		c.t.Fatal(err)
	}
	return &r, errs.String()
}

// waitGone waits for a process to end; it is a child of init by then.
func (c *containerd) waitGone(pid int) {
	c.t.Helper()
	for alive(pid) {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-c.ctx.Done():
			c.t.Fatalf("shim %d still runs", pid)
		}
	}
}

func shimPid(t *testing.T, bundle string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(bundle, "shim.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// TestBinary drives the real shim through a pod of two containers, as containerd
// does with version 2 of the Task API: start for each of them, delete at the end.
//
// Long: one life of one shim, where each step finds what the one before it left.
func TestBinary(t *testing.T) {
	c := newContainerd(t)
	pod := shimtest.Bundle(t, shimtest.Spec(c.netns, podAnnotations("sandbox", "pod"), "pause"))
	logFIFO := filepath.Join(pod, "log")
	if err := unix.Mkfifo(logFIFO, 0o700); err != nil { // nobody reads it
		t.Fatal(err)
	}
	leak, err := os.Create(filepath.Join(t.TempDir(), "leak"))
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	c.leak = leak
	address := c.start(pod, "pod", nil)
	if !strings.HasPrefix(address, "unix:///run/containerd/s/") || strings.ContainsAny(address, "\n {") {
		t.Fatalf("start printed %q", address)
	}
	app := shimtest.Bundle(t, shimtest.Spec(c.netns, podAnnotations("container", "pod"), "echo", "hello"))
	big := make([]byte, 64<<20)
	rand.Read(big)
	if err := os.WriteFile(filepath.Join(app, "rootfs/big"), big, 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	call := func(service, method string, req, resp proto.Message) {
		t.Helper()
		if err := c.dial(address).Call(c.ctx, service, method, req, resp); err != nil {
			t.Fatalf("%s: %v", method, err)
		}
	}
	v2, v3 := service.Names[0], service.Names[1]
	var created taskapi.CreateTaskResponse
	call(v2, "Create", &taskapi.CreateTaskRequest{ID: "pod", Bundle: pod, Options: c.options()}, &created)
	pid := shimPid(t, pod)
	if int(created.Pid) != pid {
		t.Errorf("pid %d, want the shim's, %d", created.Pid, pid)
	}
	call(v3, "Start", &taskapi.StartRequest{ID: "pod"}, &taskapi.StartResponse{})
	if again := c.start(app, "app", nil); again != address {
		t.Errorf("second container is at %q, want %q", again, address)
	}
	call(v2, "Create", &taskapi.CreateTaskRequest{ID: "app", Bundle: app, Stdout: "file://" + out}, &taskapi.CreateTaskResponse{})
	call(v2, "Start", &taskapi.StartRequest{ID: "app"}, &taskapi.StartResponse{})
	var exit taskapi.WaitResponse
	call(v3, "Wait", &taskapi.WaitRequest{ID: "app"}, &exit)
	if b, _ := os.ReadFile(out); exit.ExitStatus != 4 || string(b) != "hello\n" {
		t.Errorf("status %d, output %q", exit.ExitStatus, b)
	}
	call(v2, "Delete", &taskapi.DeleteRequest{ID: "app"}, &taskapi.DeleteResponse{})
	call(v2, "Shutdown", &taskapi.ShutdownRequest{ID: "app"}, &emptypb.Empty{}) // others are left
	c.deleteBinary(app, "app")
	if got := c.adaptor.Stops(); len(got) > 0 {
		t.Fatalf("StopVM of %v by the end of one container", got)
	}
	if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err != nil {
		t.Error(err)
	} else {
		for _, fd := range fds {
			if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name())); to == leak.Name() {
				t.Error("the shim holds a file that its starter was given by accident")
			}
		}
	}
	pss, peak := memory(t, pid, "smaps_rollup", "Pss:"), memory(t, pid, "status", "VmHWM:")
	t.Logf("PSS %d KiB, at most %d KiB", pss, peak)
	if pss > 16<<10 || peak > 40<<10 { // less than the root file system it streamed
		t.Errorf("the shim takes %d KiB, more than 16 MiB; at most %d KiB", pss, peak)
	}
	call(v2, "Kill", &taskapi.KillRequest{ID: "pod", Signal: 9}, &emptypb.Empty{})
	call(v2, "Wait", &taskapi.WaitRequest{ID: "pod"}, &exit)
	call(v2, "Delete", &taskapi.DeleteRequest{ID: "pod"}, &taskapi.DeleteResponse{})
	c.shutdown(address, "pod")
	c.waitGone(pid)
	if _, err := os.Stat(strings.TrimPrefix(address, "unix://")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket is left: %v", err)
	}
	if r, warn := c.deleteBinary(pod, "pod"); r.ExitStatus != 137 || warn != "" {
		t.Errorf("delete: %v, stderr %q", r, warn)
	}
	if got := c.adaptor.Stops(); !cmp.Equal(got, []string{"pod"}) {
		t.Errorf("StopVM of %v", got)
	}
	if b, err := os.ReadFile(filepath.Join(pod, PanicLog)); err != nil || len(b) > 0 {
		t.Errorf("panic.log: %q, %v", b, err)
	}
}

// memory is a line of a file in /proc/PID, in KiB.
func memory(t *testing.T, pid int, file, line string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(l, line); ok {
			n, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s", line)
	return 0
}

// TestDeleteAfterCrash kills the shim: delete gives the pod VM back and may be run
// again.
func TestDeleteAfterCrash(t *testing.T) {
	for _, down := range []bool{false, true} {
		t.Run(fmt.Sprintf("adaptor down %v", down), func(t *testing.T) {
			c := newContainerd(t)
			bundle := shimtest.Bundle(t, shimtest.Spec(c.netns, nil, "pause"))
			address := c.start(bundle, "solo", nil)
			client := c.dial(address)
			if err := client.Call(c.ctx, service.Names[0], "Create", &taskapi.CreateTaskRequest{ID: "solo", Bundle: bundle, Options: c.options()}, &taskapi.CreateTaskResponse{}); err != nil {
				t.Fatal(err)
			}
			if fi, err := os.Stat(filepath.Join(bundle, sandbox.RecordName)); err != nil || fi.Mode().Perm() != 0o600 {
				t.Fatalf("record: %v, %v", fi, err)
			}
			pid := shimPid(t, bundle)
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			c.waitGone(pid)
			if down {
				c.adaptor.Down()
			}
			for range 2 {
				if r, warn := c.deleteBinary(bundle, "solo"); r.ExitStatus != 137 || warn != "" {
					t.Errorf("delete: %v, %q", r, warn)
				}
			}
			if down {
				if c.adaptor.Stops() != nil {
					t.Error("stopped by an adaptor that is down")
				}
				os.Remove(c.adaptor.Socket)
				c.adaptor.Up()
				if err := vmnote.Deliver(c.ctx, c.adaptor.Socket, sandbox.Hypervisor{Socket: c.adaptor.Socket}.StopVM); err != nil {
					t.Error(err)
				}
			}
			if got := c.adaptor.Stops(); !cmp.Equal(got, []string{"solo"}) {
				t.Errorf("StopVM of %v", got)
			}
			// A dead shim's socket is in nobody's way.
			again := c.start(bundle, "solo", nil)
			c.shutdown(again, "solo")
			c.waitGone(shimPid(t, bundle))
		})
	}
}

// TestStdin has each thing a containerd may put there.
func TestStdin(t *testing.T) {
	c := newContainerd(t)
	options, err := proto.Marshal(c.options())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "s")
	params, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "solo", Namespace: "k8s.io", ContainerdVersion: "2.4.0", SocketDir: &dir})
	if err != nil {
		t.Fatal(err)
	}
	open, w, err := os.Pipe() // never closed by its writer
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	defer w.Close()
	for name, stdin := range map[string]io.Reader{"nothing": nil, "empty": strings.NewReader(""), "options": bytes.NewReader(options), "params": bytes.NewReader(params), "open": open} {
		t.Run(name, func(t *testing.T) {
			bundle := shimtest.Bundle(t, shimtest.Spec(c.netns, nil, "pause"))
			address := c.start(bundle, "solo", stdin)
			if name == "params" {
				var r struct {
					Version           int
					Address, Protocol string
				}
				if err := json.Unmarshal([]byte(address), &r); err != nil || r.Version != 2 || r.Protocol != "ttrpc" || !strings.HasPrefix(r.Address, "unix://"+dir) {
					t.Fatalf("answer %q: %v", address, err)
				}
				address = r.Address
			}
			var r taskapi.ConnectResponse
			client := c.dial(address)
			if err := client.Call(c.ctx, service.Names[0], "Connect", &taskapi.ConnectRequest{ID: "solo"}, &r); err != nil || int(r.ShimPid) != shimPid(t, bundle) {
				t.Errorf("connect: %v, %v", &r, err)
			}
			if again := c.start(bundle, "solo", nil); name != "params" && again != address {
				t.Errorf("a second start found %q, want %q", again, address)
			}
			c.shutdown(address, "solo")
			c.waitGone(int(r.ShimPid))
			if name == "params" { // the second start did not know the directory
				if b, err := os.ReadFile(filepath.Join(bundle, "address")); err == nil {
					c.shutdown(string(b), "solo")
					c.waitGone(shimPid(t, bundle))
				}
			}
		})
	}
}

// TestStartErrors says what is wrong.
func TestStartErrors(t *testing.T) {
	c := newContainerd(t)
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "config.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct{ bundle, want string }{
		"no sandbox":  {shimtest.Bundle(t, shimtest.Spec(c.netns, podAnnotations("container", "pod"), "pause")), "sandbox pod"},
		"broken spec": {broken, "config.json"},
	} {
		out, err := c.command(x.bundle, "x", actionStart, nil).CombinedOutput()
		if err == nil || !strings.Contains(string(out), x.want) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}

func TestInfo(t *testing.T) {
	out, err := exec.Command(binary, "-info").Output()
	var r types.RuntimeInfo
	if err == nil {
		err = proto.Unmarshal(out, &r)
	}
	if err != nil || r.Name != runtimeName {
		t.Errorf("%v, %v", &r, err)
	}
	var f features.Features
	if err := json.Unmarshal(r.GetFeatures().GetValue(), &f); err != nil || !slices.Contains(f.MountOptions, "rro") || f.Linux == nil {
		t.Errorf("features %s: %v", r.Features, err)
	}
}
