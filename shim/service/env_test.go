// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/service"
	"github.com/kata-remote/kata-remote/shim/shimtest"
	"github.com/kata-remote/kata-remote/shim/stdio"
)

// programs are what containers of these tests can run.
var programs = map[string]agenttest.Program{
	"pause": func(ctx context.Context, p *agenttest.Proc) int {
		select {
		case <-ctx.Done():
		case s := <-p.Signals:
			return 128 + int(s)
		}
		return 0
	},
	"echo": func(_ context.Context, p *agenttest.Proc) int {
		fmt.Fprintln(p.Stdout, strings.Join(p.Args[1:], " "))
		return 0
	},
	"exit": func(_ context.Context, p *agenttest.Proc) int {
		var n int
		fmt.Sscan(p.Args[1], &n)
		fmt.Fprint(p.Stdout, "out")
		fmt.Fprint(p.Stderr, "err")
		return n
	},
	"cat": func(ctx context.Context, p *agenttest.Proc) int {
		defer context.AfterFunc(ctx, func() { p.Stdin.(io.Closer).Close() })()
		if _, err := io.Copy(p.Stdout, p.Stdin); err != nil {
			return 1
		}
		return 0
	},
	"flood": func(_ context.Context, p *agenttest.Proc) int {
		_, err := p.Stdout.Write(flood)
		if err != nil {
			return 1
		}
		return 3
	},
}

// flood is more than any buffer between here and there, and repeats nowhere.
var flood = func() []byte {
	b := make([]byte, 0, 24<<20)
	for h := sha256.Sum256(nil); len(b) < cap(b); h = sha256.Sum256(h[:]) {
		b = append(b, h[:]...)
	}
	return b
}()

var ours = []extension.Feature{extension.Rootfs, extension.Streams, extension.Pause}

// env is a service with everything around it.
type env struct {
	t       *testing.T
	ctx     context.Context
	svc     *service.Service
	agent   *agenttest.Agent
	adaptor *shimtest.Adaptor
	sink    *shimtest.Sink
	hung    atomic.Pointer[chan struct{}] // see hang
	netns   string
	options *anypb.Any
}

func newEnv(t *testing.T, features []extension.Feature) *env {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	e := &env{t: t, ctx: ctx, netns: shimtest.NetNS(t)}
	e.agent = &agenttest.Agent{Programs: programs, Features: features, Fault: e.fault}
	e.adaptor = shimtest.NewAdaptor(t, e.agent)
	e.sink = shimtest.NewSink(t)
	b, err := proto.Marshal(&runtimeoptions.Options{ConfigPath: e.adaptor.ConfigFile()})
	if err != nil {
		t.Fatal(err)
	}
	e.options = &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: b}
	e.svc = service.New(service.Config{Namespace: "k8s.io", Events: service.NewEvents(e.sink.Address, "k8s.io")})
	t.Cleanup(e.svc.Close)
	return e
}

func (e *env) bundle(id, sandbox string, args ...string) string {
	a := map[string]string{annotation.ContainerType: annotation.ContainerTypeContainer, annotation.SandboxID: sandbox,
		annotation.SandboxName: "web", annotation.SandboxNamespace: "shop"}
	switch sandbox {
	case id:
		a[annotation.ContainerType] = annotation.ContainerTypeSandbox
	case "":
		a = nil
	}
	return shimtest.Bundle(e.t, shimtest.Spec(e.netns, a, args...))
}

func (e *env) create(id, sandbox string, io stdio.Config, args ...string) error {
	_, err := e.svc.Create(e.ctx, &taskapi.CreateTaskRequest{
		ID: id, Bundle: e.bundle(id, sandbox, args...), Options: e.options,
		Stdin: io.Stdin, Stdout: io.Stdout, Stderr: io.Stderr, Terminal: io.Terminal,
	})
	return err
}

// createFrom creates a container of a spec of the test's own.
func (e *env) createFrom(id string, spc *specs.Spec) error {
	_, err := e.svc.Create(e.ctx, &taskapi.CreateTaskRequest{ID: id, Bundle: shimtest.Bundle(e.t, spc), Options: e.options})
	return err
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// pod makes and starts a sandbox and one container that waits.
func (e *env) pod() {
	e.t.Helper()
	for _, id := range []string{"pod", "app"} {
		e.must(e.create(id, "pod", stdio.Config{}, "pause"))
		e.start(id, "")
	}
}

func (e *env) start(id, exec string) {
	e.t.Helper()
	_, err := e.svc.Start(e.ctx, &taskapi.StartRequest{ID: id, ExecID: exec})
	e.must(err)
}

func (e *env) wait(id, exec string) uint32 {
	e.t.Helper()
	r, err := e.svc.Wait(e.ctx, &taskapi.WaitRequest{ID: id, ExecID: exec})
	e.must(err)
	return r.ExitStatus
}

func (e *env) kill(id, exec string, sig syscall.Signal) {
	e.t.Helper()
	_, err := e.svc.Kill(e.ctx, &taskapi.KillRequest{ID: id, ExecID: exec, Signal: uint32(sig)})
	e.must(err)
}

func (e *env) delete(id, exec string) uint32 {
	e.t.Helper()
	r, err := e.svc.Delete(e.ctx, &taskapi.DeleteRequest{ID: id, ExecID: exec})
	e.must(err)
	return r.ExitStatus
}

func (e *env) exec(id, exec string, r stdio.Config, args ...string) {
	e.t.Helper()
	b, err := json.Marshal(specs.Process{Args: args, Cwd: "/"})
	e.must(err)
	_, err = e.svc.Exec(e.ctx, &taskapi.ExecProcessRequest{
		ID: id, ExecID: exec, Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: b},
		Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal,
	})
	e.must(err)
}

// fifo makes a FIFO whose content is collected until its end.
type fifo struct {
	path string
	done chan []byte
}

func (e *env) fifo(name string) *fifo {
	e.t.Helper()
	f := &fifo{path: filepath.Join(e.t.TempDir(), name), done: make(chan []byte, 1)}
	e.must(unix.Mkfifo(f.path, 0o600))
	return f
}

func (f *fifo) collect() {
	go func() {
		r, err := os.Open(f.path)
		if err != nil {
			f.done <- []byte(err.Error())
			return
		}
		defer r.Close()
		b, _ := io.ReadAll(r)
		f.done <- b
	}()
}

// trace is what happened to one process, from the events.
func trace(list []*types.Envelope, container, exec string) (out []string) {
	for _, env := range list {
		m, err := anypb.UnmarshalNew(&anypb.Any{TypeUrl: "/" + env.Event.TypeUrl, Value: env.Event.Value}, proto.UnmarshalOptions{})
		if err != nil {
			return []string{err.Error()}
		}
		c, x := "", ""
		switch m := m.(type) {
		case *events.TaskCreate:
			c = m.ContainerID
		case *events.TaskStart:
			c = m.ContainerID
		case *events.TaskExit:
			if c = m.ContainerID; m.ID != m.ContainerID {
				x = m.ID
			}
		case *events.TaskDelete:
			c = m.ContainerID
		case *events.TaskExecAdded:
			c, x = m.ContainerID, m.ExecID
		case *events.TaskExecStarted:
			c, x = m.ContainerID, m.ExecID
		case *events.TaskOOM:
			c = m.ContainerID
		case *events.TaskPaused:
			c = m.ContainerID
		case *events.TaskResumed:
			c = m.ContainerID
		}
		if c == container && x == exec {
			out = append(out, strings.TrimPrefix(env.Topic, "/tasks/"))
		}
	}
	return out
}

func (e *env) checkTrace(container, exec string, want ...string) {
	e.t.Helper()
	var got []string
	_, err := e.sink.WaitFor(e.ctx, func(l []*types.Envelope) bool {
		got = trace(l, container, exec)
		return len(got) >= len(want)
	})
	if err != nil || !cmp.Equal(got, want) {
		e.t.Errorf("events of %s %s: %v (%v), want %v", container, exec, got, err, want)
	}
}
