// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/service"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

// flood is more than any buffer between here and there, and repeats nowhere.
var flood = func() []byte {
	b := make([]byte, 0, 4<<20)
	for h := sha256.Sum256(nil); len(b) < cap(b); h = sha256.Sum256(h[:]) {
		b = append(b, h[:]...)
	}
	return b
}()

var shimPrograms = map[string]agenttest.Program{
	"pause": func(ctx context.Context, p *agenttest.Proc) int {
		select {
		case <-ctx.Done():
		case s := <-p.Signals:
			return 128 + int(s)
		}
		return 0
	},
	"cat": func(ctx context.Context, p *agenttest.Proc) int {
		defer context.AfterFunc(ctx, func() { p.Stdin.(io.Closer).Close() })()
		if _, err := io.Copy(p.Stdout, p.Stdin); err != nil {
			return 1
		}
		return 0
	},
	"flood": func(_ context.Context, p *agenttest.Proc) int {
		if _, err := p.Stdout.Write(flood); err != nil {
			return 1
		}
		fmt.Fprintln(p.Stderr, "end")
		return 3
	},
}

// shim is ours, before a stock adaptor.
type shim struct {
	t       *testing.T
	ctx     context.Context
	svc     *service.Service
	sink    *shimtest.Sink
	netns   string
	options *anypb.Any
}

func newShim(t *testing.T, a *stockAdaptor) *shim {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	s := &shim{t: t, ctx: ctx, netns: shimtest.NetNS(t), sink: shimtest.NewSink(t)}
	path := filepath.Join(a.dir, "configuration.toml")
	if err := os.WriteFile(path, fmt.Appendf(nil, "[hypervisor.remote]\nremote_hypervisor_socket = %q\n", a.socket()), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(&runtimeoptions.Options{ConfigPath: path})
	if err != nil {
		t.Fatal(err)
	}
	s.options = &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: b}
	s.svc = service.New(service.Config{Namespace: "k8s.io", Events: service.NewEvents(s.sink.Address, "k8s.io")})
	t.Cleanup(s.svc.Close)
	return s
}

// create makes a container whose image the guest pulls.
func (s *shim) create(id, stdin, stdout, stderr string, args ...string) error {
	a := map[string]string{
		annotation.ContainerType: annotation.ContainerTypeContainer, annotation.SandboxID: "pod",
		annotation.SandboxName: "web", annotation.SandboxNamespace: "shop",
		annotation.ImageName: "registry.example/tools/busybox:1", annotation.ForceGuestPull: "true",
	}
	if id == "pod" {
		a[annotation.ContainerType] = annotation.ContainerTypeSandbox
	}
	_, err := s.svc.Create(s.ctx, &taskapi.CreateTaskRequest{
		ID: id, Bundle: shimtest.Bundle(s.t, shimtest.Spec(s.netns, a, args...)), Options: s.options,
		Stdin: stdin, Stdout: stdout, Stderr: stderr,
	})
	return err
}

func (s *shim) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *shim) start(id, exec string) {
	s.t.Helper()
	_, err := s.svc.Start(s.ctx, &taskapi.StartRequest{ID: id, ExecID: exec})
	s.must(err)
}

func (s *shim) wait(id, exec string, want uint32) {
	s.t.Helper()
	r, err := s.svc.Wait(s.ctx, &taskapi.WaitRequest{ID: id, ExecID: exec})
	s.must(err)
	if r.ExitStatus != want {
		s.t.Errorf("%s %s ended with %d, want %d", id, exec, r.ExitStatus, want)
	}
}

func (s *shim) delete(id, exec string) {
	s.t.Helper()
	_, err := s.svc.Delete(s.ctx, &taskapi.DeleteRequest{ID: id, ExecID: exec})
	s.must(err)
}

// output makes a FIFO and collects what comes out of it.
func (s *shim) output(name string) (path string, text <-chan []byte) {
	s.t.Helper()
	path = filepath.Join(s.t.TempDir(), name)
	s.must(unix.Mkfifo(path, 0o600))
	c := make(chan []byte, 1)
	go func() {
		f, err := os.Open(path)
		if err != nil {
			c <- []byte(err.Error())
			return
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		if err != nil {
			b = []byte(err.Error())
		}
		c <- b
	}()
	return path, c
}

// pod is a pod's life: a container whose output is far more than anybody keeps, one
// that is written to, an exec, and the end.
func (s *shim) pod(a *stockAdaptor) {
	s.must(s.create("pod", "", "", "", "pause"))
	s.start("pod", "")
	if r := a.request("pod"); len(r.GetAnnotations()) < 9 || r.NetworkNamespacePath != s.netns {
		s.t.Errorf("CreateVM was sent %v", r)
	}
	outPath, out := s.output("out")
	errPath, errs := s.output("err")
	s.must(s.create("app", "", outPath, errPath, "flood"))
	s.start("app", "")
	s.wait("app", "", 3)
	s.delete("app", "")
	if got := <-out; !bytes.Equal(got, flood) {
		s.t.Errorf("%d bytes of output came, want %d, the same", len(got), len(flood))
	}
	if got := string(<-errs); got != "end\n" {
		s.t.Errorf("stderr is %q", got)
	}

	s.must(s.create("box", "", "", "", "pause"))
	s.start("box", "")
	inPath := filepath.Join(s.t.TempDir(), "in")
	s.must(unix.Mkfifo(inPath, 0o600))
	outPath, out = s.output("exec-out")
	b, err := json.Marshal(specs.Process{Args: []string{"cat"}, Cwd: "/"})
	s.must(err)
	_, err = s.svc.Exec(s.ctx, &taskapi.ExecProcessRequest{
		ID: "box", ExecID: "x", Stdin: inPath, Stdout: outPath,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: b},
	})
	s.must(err)
	s.start("box", "x")
	in, err := os.OpenFile(inPath, os.O_WRONLY, 0)
	s.must(err)
	_, err = in.WriteString("hello\n")
	s.must(err)
	s.must(in.Close())
	_, err = s.svc.CloseIO(s.ctx, &taskapi.CloseIORequest{ID: "box", ExecID: "x", Stdin: true})
	s.must(err)
	s.wait("box", "x", 0)
	s.delete("box", "x")
	if got := string(<-out); got != "hello\n" {
		s.t.Errorf("the exec says %q", got)
	}
	for _, id := range []string{"box", "pod"} {
		_, err = s.svc.Kill(s.ctx, &taskapi.KillRequest{ID: id, Signal: 9, All: true})
		s.must(err)
		s.wait(id, "", 137)
		s.delete(id, "")
	}
	for deadline := time.Now().Add(patience); !slices.Equal(a.stopped(), []string{"pod"}); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("StopVM was called for %v, want pod, once", a.stopped())
		}
	}
	events, err := s.sink.WaitFor(s.ctx, func(l []*types.Envelope) bool {
		return count(l, "/tasks/exit") >= 4 && count(l, "/tasks/delete") >= 3
	})
	if err != nil || count(events, "/tasks/exit") != 4 {
		s.t.Errorf("%d exits were published (%v), want one for each of the four processes", count(events, "/tasks/exit"), err)
	}
}

func count(l []*types.Envelope, topic string) (n int) {
	for _, e := range l {
		if e.Topic == topic {
			n++
		}
	}
	return n
}

// serving runs an agent until the test ends.
func serving(t *testing.T, a *agenttest.Agent, serve func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- serve(ctx) }()
	t.Cleanup(func() {
		a.Close()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// Our shim, the stock adaptor and a stock agent: nothing but the calls of kata's own.
func TestShimWithStockAdaptorAndAgent(t *testing.T) {
	agent := &agenttest.Stock{Dir: filepath.Join(shortDir(t), "kata"), Agent: &agenttest.Agent{Programs: shimPrograms}}
	serving(t, agent.Agent, agent.Serve)
	a := newStockAdaptor(t, func() (net.Conn, error) { return net.Dial("unix", agent.Socket()) })
	s := newShim(t, a)
	s.pod(a)
	if calls := agent.Calls(); slices.Contains(calls, "ImportRootfs") || slices.Contains(calls, "ReadOutput") {
		t.Errorf("a stock agent was called by our extension: %v", calls)
	}
}

// Our shim and our agent with the stock adaptor between them: the agent advertises what
// the adaptor does not carry.
func TestShimWithStockAdaptorAndOurAgent(t *testing.T) {
	features := []extension.Feature{extension.Rootfs, extension.Streams, extension.Volumes, extension.Pause}
	agent := &agenttest.Agent{Programs: shimPrograms, Features: features}
	socket := filepath.Join(shortDir(t), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	serving(t, agent, func(ctx context.Context) error { return agent.Serve(ctx, l) })
	a := newStockAdaptor(t, func() (net.Conn, error) { return net.Dial("unix", socket) })
	s := newShim(t, a)
	s.pod(a)
}

// A root from the node has no way into a stock agent, and the error says so.
func TestShimRefusesNodeRootForStockAgent(t *testing.T) {
	agent := &agenttest.Stock{Dir: filepath.Join(shortDir(t), "kata"), Agent: &agenttest.Agent{Programs: shimPrograms}}
	serving(t, agent.Agent, agent.Serve)
	a := newStockAdaptor(t, func() (net.Conn, error) { return net.Dial("unix", agent.Socket()) })
	s := newShim(t, a)
	bundle := shimtest.Bundle(t, shimtest.Spec(s.netns, map[string]string{
		annotation.ContainerType: annotation.ContainerTypeSandbox, annotation.SandboxID: "pod",
		annotation.SandboxName: "web", annotation.SandboxNamespace: "shop",
	}, "pause"))
	_, err := s.svc.Create(s.ctx, &taskapi.CreateTaskRequest{ID: "pod", Bundle: bundle, Options: s.options})
	if err == nil || !strings.Contains(err.Error(), string(extension.Rootfs)) {
		t.Errorf("got %v, want that the agent lacks %s", err, extension.Rootfs)
	}
	for deadline := time.Now().Add(patience); !slices.Equal(a.stopped(), []string{"pod"}); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("StopVM was called for %v, want pod", a.stopped())
		}
	}
}
