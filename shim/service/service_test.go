// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/shimtest"
	"github.com/kata-remote/kata-remote/shim/stdio"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestPod goes through the life of a pod, with our agent and with a stock one's
// calls for the streams.
func TestPod(t *testing.T) {
	for _, features := range [][]extension.Feature{ours, {extension.Rootfs}} {
		t.Run(fmt.Sprint(features), func(t *testing.T) { testPod(t, newEnv(t, features)) })
	}
}

func testPod(t *testing.T, e *env) {
	e.pod()
	vm := e.adaptor.VM("pod")
	if vm == nil || vm.NetworkNamespacePath != e.netns || vm.Annotations[annotation.SandboxName] != "web" || len(vm.Annotations) != 9 {
		t.Fatalf("CreateVM: %v", vm)
	}
	out, errs := e.fifo("out"), e.fifo("err")
	out.collect()
	errs.collect()
	e.must(e.create("job", "pod", stdio.Config{Stdout: out.path, Stderr: errs.path}, "exit", "7"))
	e.start("job", "")
	if got := e.wait("job", ""); got != 7 {
		t.Errorf("exit status %d, want 7", got)
	}
	if o, x := string(<-out.done), string(<-errs.done); o != "out" || x != "err" {
		t.Errorf("output %q, %q", o, x)
	}
	if s, err := e.svc.State(e.ctx, &taskapi.StateRequest{ID: "job"}); err != nil || s.Status != task.Status_STOPPED || s.ExitStatus != 7 {
		t.Errorf("state %v, %v", s, err)
	}
	if got := e.delete("job", ""); got != 7 {
		t.Errorf("delete says %d", got)
	}
	e.checkTrace("job", "", "create", "start", "exit", "delete")

	in, out := e.fifo("in"), e.fifo("out")
	out.collect()
	e.exec("app", "x", stdio.Config{Stdin: in.path, Stdout: out.path}, "cat")
	e.start("app", "x")
	w, err := os.OpenFile(in.path, os.O_WRONLY, 0)
	e.must(err)
	if _, err := w.Write(flood[:1<<20]); err != nil {
		t.Fatal(err)
	}
	_, err = e.svc.CloseIO(e.ctx, &taskapi.CloseIORequest{ID: "app", ExecID: "x", Stdin: true})
	e.must(err)
	w.Close()
	if got := e.wait("app", "x"); got != 0 {
		t.Errorf("cat ended with %d", got)
	}
	if !bytes.Equal(<-out.done, flood[:1<<20]) {
		t.Error("input came back changed")
	}
	e.delete("app", "x")
	e.checkTrace("app", "x", "exec-added", "exec-started", "exit")

	if _, err := e.svc.Pause(e.ctx, &taskapi.PauseRequest{ID: "app"}); err != nil {
		t.Error(err)
	}
	if s, _ := e.svc.State(e.ctx, &taskapi.StateRequest{ID: "app"}); s.GetStatus() != task.Status_PAUSED {
		t.Errorf("state %v", s)
	}
	if _, err := e.svc.Resume(e.ctx, &taskapi.ResumeRequest{ID: "app"}); err != nil {
		t.Error(err)
	}
	e.kill("app", "", syscall.SIGTERM)
	if got := e.wait("app", ""); got != 143 {
		t.Errorf("SIGTERM: status %d", got)
	}
	e.delete("app", "")
	e.checkTrace("app", "", "create", "start", "paused", "resumed", "exit", "delete")
	e.kill("pod", "", syscall.SIGKILL)
	if got := e.wait("pod", ""); got != 137 {
		t.Errorf("SIGKILL: status %d", got)
	}
	e.delete("pod", "")
	e.checkTrace("pod", "", "create", "start", "exit", "delete")
	e.svc.Close()
	if got := e.adaptor.Stops(); !cmp.Equal(got, []string{"pod"}) {
		t.Errorf("StopVM of %v", got)
	}
}

// TestReconnect breaks the connection again and again while output flows, and takes
// the agent's socket away for a while: not one byte is lost or repeated, the exit
// is right, and a process started afterwards runs.
func TestReconnect(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	out := e.fifo("out")
	e.exec("app", "x", stdio.Config{Stdout: out.path}, "flood")
	e.start("app", "x")
	r, err := os.Open(out.path)
	e.must(err)
	defer r.Close()
	var got []byte
	buf := make([]byte, 64<<10)
	for cut := 1 << 20; ; {
		n, err := r.Read(buf)
		got = append(got, buf[:n]...)
		if errors.Is(err, io.EOF) {
			break
		}
		e.must(err)
		if len(got) >= cut {
			if cut += 2 << 20; cut == 11<<20 {
				e.adaptor.Break()
				time.AfterFunc(300*time.Millisecond, e.adaptor.Connect)
			} else {
				e.adaptor.Cut()
			}
		}
	}
	if !bytes.Equal(got, flood) {
		i := 0
		for i < min(len(got), len(flood)) && got[i] == flood[i] {
			i++
		}
		t.Fatalf("%d bytes, want %d; they differ from %d on", len(got), len(flood), i)
	}
	if s := e.wait("app", "x"); s != 3 {
		t.Errorf("exit status %d, want 3", s)
	}
	e.exec("app", "y", stdio.Config{}, "exit", "9")
	e.start("app", "y")
	if s := e.wait("app", "y"); s != 9 {
		t.Errorf("exit status %d after reconnect, want 9", s)
	}
	e.checkTrace("app", "x", "exec-added", "exec-started", "exit")
}

// TestManyShortProcesses starts processes that end at once, many at a time: each has
// its events once and in order.
func TestManyShortProcesses(t *testing.T) {
	const workers, each = 8, 150
	e := newEnv(t, ours)
	e.pod()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				id := fmt.Sprintf("x-%d-%d", w, i)
				e.exec("app", id, stdio.Config{}, "exit", "5")
				if _, err := e.svc.Start(e.ctx, &taskapi.StartRequest{ID: "app", ExecID: id}); err != nil {
					t.Error(err)
					return
				}
				if r, err := e.svc.Wait(e.ctx, &taskapi.WaitRequest{ID: "app", ExecID: id}); err != nil || r.ExitStatus != 5 {
					t.Errorf("%v, %v", r, err)
					return
				}
				if _, err := e.svc.Delete(e.ctx, &taskapi.DeleteRequest{ID: "app", ExecID: id}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	list, err := e.sink.WaitFor(e.ctx, func(l []*types.Envelope) bool { return len(l) >= 4+3*workers*each })
	e.must(err)
	per := map[string][]string{}
	for _, env := range list {
		for _, m := range []struct {
			topic string
			id    func() string
		}{
			{"/tasks/exec-added", func() string { m := &events.TaskExecAdded{}; proto.Unmarshal(env.Event.Value, m); return m.ExecID }},
			{"/tasks/exec-started", func() string { m := &events.TaskExecStarted{}; proto.Unmarshal(env.Event.Value, m); return m.ExecID }},
			{"/tasks/exit", func() string { m := &events.TaskExit{}; proto.Unmarshal(env.Event.Value, m); return m.ID }},
		} {
			if env.Topic == m.topic {
				id := m.id()
				per[id] = append(per[id], env.Topic)
			}
		}
	}
	want := []string{"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"}
	if len(per) != workers*each {
		t.Errorf("events of %d processes, want %d", len(per), workers*each)
	}
	for id, got := range per {
		if !cmp.Equal(got, want) {
			t.Errorf("%s: %v", id, got)
		}
	}
}

// TestUnreadOutput has a process whose output nobody reads: other calls go on, and
// when somebody reads all of it comes.
func TestUnreadOutput(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	out := e.fifo("out")
	e.exec("app", "x", stdio.Config{Stdout: out.path}, "flood")
	e.start("app", "x")
	for i := range 50 {
		id := fmt.Sprint("y", i)
		e.exec("app", id, stdio.Config{}, "exit", "1")
		e.start("app", id)
		e.wait("app", id)
	}
	out.collect()
	if !bytes.Equal(<-out.done, flood) {
		t.Error("output is not what was written")
	}
}

// TestInputClosedEarly has a client that is done with the input before the process
// was started.
func TestInputClosedEarly(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	in, out := e.fifo("in"), e.fifo("out")
	out.collect()
	e.exec("app", "x", stdio.Config{Stdin: in.path, Stdout: out.path}, "cat")
	_, err := e.svc.CloseIO(e.ctx, &taskapi.CloseIORequest{ID: "app", ExecID: "x", Stdin: true})
	e.must(err)
	e.start("app", "x")
	if got := e.wait("app", "x"); got != 0 {
		t.Errorf("status %d", got)
	}
	if b := <-out.done; len(b) > 0 {
		t.Errorf("output %q", b)
	}
}

// TestResize sets the size of a terminal, before the start and after it.
func TestResize(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	e.must(e.create("tty", "pod", stdio.Config{Terminal: true}, "pause"))
	resize := func(rows, columns uint32) {
		t.Helper()
		_, err := e.svc.ResizePty(e.ctx, &taskapi.ResizePtyRequest{ID: "tty", Height: rows, Width: columns})
		e.must(err)
	}
	resize(10, 20)
	resize(24, 80)
	if rows, _ := e.agent.TerminalSize("tty"); rows != 0 {
		t.Error("the guest was asked before there was a terminal")
	}
	e.start("tty", "")
	if rows, columns := e.agent.TerminalSize("tty"); rows != 24 || columns != 80 {
		t.Errorf("%dx%d after the start", rows, columns)
	}
	resize(50, 132)
	if rows, columns := e.agent.TerminalSize("tty"); rows != 50 || columns != 132 {
		t.Errorf("%dx%d", rows, columns)
	}
	if _, err := e.svc.ResizePty(e.ctx, &taskapi.ResizePtyRequest{ID: "app", Height: 1, Width: 1}); err == nil {
		t.Error("a container without a terminal was given a size")
	}
}

// TestStartFails has a command that does not exist: the error says so, waiters
// return, and there is no exit without a start.
func TestStartFails(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	e.exec("app", "x", stdio.Config{}, "nonesuch")
	if _, err := e.svc.Start(e.ctx, &taskapi.StartRequest{ID: "app", ExecID: "x"}); err == nil || !strings.Contains(err.Error(), "executable file not found") {
		t.Errorf("start: %v", err)
	}
	if got := e.wait("app", "x"); got != 255 {
		t.Errorf("status %d", got)
	}
	e.delete("app", "x")
	if err := e.create("bad", "pod", stdio.Config{}, "nonesuch"); err == nil {
		t.Error("create of a missing command succeeded")
	}
	if _, err := e.svc.State(e.ctx, &taskapi.StateRequest{ID: "bad"}); !errdefs.IsNotFound(err) {
		t.Errorf("state of what was not created: %v", err)
	}
	e.checkTrace("app", "x", "exec-added")
}

// TestRollback has starts that fail at each stage: the pod VM is given back before
// Create returns.
func TestRollback(t *testing.T) {
	t.Run("StartVM", func(t *testing.T) {
		e := newEnv(t, ours)
		e.adaptor.OnStart = func(context.Context) error {
			return fmt.Errorf("no capacity for t3.small in zone a: %w", errdefs.ErrResourceExhausted)
		}
		err := e.create("pod", "pod", stdio.Config{}, "pause")
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no capacity") {
			t.Errorf("got %v", err)
		}
		if got := e.adaptor.Stops(); !slices.Contains(got, "pod") {
			t.Errorf("StopVM of %v", got)
		}
	})
	t.Run("caller leaves", func(t *testing.T) {
		e := newEnv(t, ours)
		ctx, cancel := context.WithCancel(e.ctx)
		e.adaptor.OnStart = func(sctx context.Context) error {
			cancel()
			<-sctx.Done()
			return sctx.Err()
		}
		_, err := e.svc.Create(ctx, &taskapi.CreateTaskRequest{ID: "pod", Bundle: e.bundle("pod", "pod", "pause"), Options: e.options})
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "runtimeRequestTimeout") {
			t.Errorf("got %v", err)
		}
		if got := e.adaptor.Stops(); !slices.Contains(got, "pod") {
			t.Errorf("StopVM of %v", got)
		}
	})
	t.Run("container", func(t *testing.T) {
		e := newEnv(t, []extension.Feature{extension.Rootfs, extension.Streams}) // an agent that runs what the image says
		if err := e.create("pod", "pod", stdio.Config{}, "nonesuch"); err == nil {
			t.Error("no error")
		}
		if got := e.adaptor.Stops(); !slices.Contains(got, "pod") {
			t.Errorf("StopVM of %v", got)
		}
	})
	t.Run("no adaptor", func(t *testing.T) {
		e := newEnv(t, ours)
		e.adaptor.Down()
		err := e.create("pod", "pod", stdio.Config{}, "pause")
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "cloud-api-adaptor") {
			t.Errorf("got %v", err)
		}
	})
}

// TestPolicy has a pod that wants its agent to enforce a policy: it is set before
// anything else, or the pod does not start.
func TestPolicy(t *testing.T) {
	text := "package agent_policy"
	pod := func(e *env, policy string) error {
		return e.createFrom("pod", shimtest.Spec(e.netns, map[string]string{
			annotation.ContainerType: annotation.ContainerTypeSandbox, annotation.SandboxID: "pod", annotation.Policy: policy,
		}, "pause"))
	}
	e := newEnv(t, ours)
	e.agent.Policies = true
	e.must(pod(e, base64.StdEncoding.EncodeToString([]byte(text))))
	calls := e.agent.Calls()
	if e.agent.Policy() != text || slices.Index(calls, "SetPolicy") > slices.Index(calls, "CreateSandbox") {
		t.Errorf("policy %q, calls %v", e.agent.Policy(), calls)
	}
	e = newEnv(t, ours)
	err := pod(e, base64.StdEncoding.EncodeToString([]byte(text)))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), annotation.Policy) {
		t.Errorf("an agent without policies: %v", err)
	}
	if got := e.adaptor.Stops(); !slices.Contains(got, "pod") {
		t.Errorf("StopVM of %v", got)
	}
	e = newEnv(t, ours)
	if err := pod(e, "!"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), annotation.Policy) {
		t.Errorf("no base64: %v", err)
	}
	if vm := e.adaptor.VM("pod"); vm != nil {
		t.Errorf("a machine was asked for: %v", vm)
	}
}

// TestRefusedBeforeTheMachine has pods that want what only the node has: Create says
// so, and nobody is asked for a machine.
func TestRefusedBeforeTheMachine(t *testing.T) {
	without := func(kind specs.LinuxNamespaceType) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind })
		}
	}
	for want, change := range map[string]func(*specs.Spec){
		"hostNetwork": without(specs.NetworkNamespace),
		"hostPID":     without(specs.PIDNamespace),
		"hostIPC":     without(specs.IPCNamespace),
		"/dev/sda": func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda", Type: "b", Major: 8}}
		},
	} {
		e := newEnv(t, ours)
		spc := shimtest.Spec(e.netns, map[string]string{annotation.ContainerType: annotation.ContainerTypeSandbox, annotation.SandboxID: "pod"}, "pause")
		change(spc)
		_, err := e.svc.Create(e.ctx, &taskapi.CreateTaskRequest{ID: "pod", Bundle: shimtest.Bundle(t, spc), Options: e.options})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "another machine") {
			t.Errorf("%s: %v", want, err)
		}
		if vm := e.adaptor.VM("pod"); vm != nil || len(e.adaptor.Stops()) > 0 {
			t.Errorf("%s: a machine was asked for: %v", want, vm)
		}
	}
}

// TestPodEndsWithItsSandbox has the sandbox's container killed first: the others exit
// with 137, and can be deleted.
func TestPodEndsWithItsSandbox(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	e.kill("pod", "", syscall.SIGKILL)
	if got := e.wait("pod", ""); got != 137 {
		t.Errorf("sandbox: %d", got)
	}
	if got := e.wait("app", ""); got != 137 {
		t.Errorf("container: %d", got)
	}
	e.delete("app", "")
	e.delete("pod", "")
	e.checkTrace("app", "", "create", "start", "exit", "delete")
}

// TestSingle is what ctr does: no annotations, one container, a pod of its own.
func TestSingle(t *testing.T) {
	e := newEnv(t, ours)
	out := e.fifo("out")
	out.collect()
	e.must(e.create("solo", "", stdio.Config{Stdout: out.path, Terminal: true}, "echo", "hello"))
	e.start("solo", "")
	if got := e.wait("solo", ""); got != 0 {
		t.Errorf("status %d", got)
	}
	if got := string(<-out.done); got != "hello\n" {
		t.Errorf("output %q", got)
	}
	if vm := e.adaptor.VM("solo"); vm != nil && (vm.Annotations[annotation.SandboxName] != "solo" || vm.Annotations[annotation.SandboxNamespace] != "default") {
		t.Errorf("CreateVM: %v", vm)
	}
	e.delete("solo", "")
	e.svc.Close()
	if got := e.adaptor.Stops(); !cmp.Equal(got, []string{"solo"}) {
		t.Errorf("StopVM of %v", got)
	}
}

// TestOOM has the OOM event before the exit.
func TestOOM(t *testing.T) {
	e := newEnv(t, ours)
	e.pod()
	e.agent.OOM("app")
	e.checkTrace("app", "", "create", "start", "oom")
	e.kill("app", "", syscall.SIGTERM)
	e.wait("app", "")
	e.checkTrace("app", "", "create", "start", "oom", "exit")
}

// TestErrors has the classes that containerd acts upon.
func TestErrors(t *testing.T) {
	e := newEnv(t, ours)
	if _, err := e.svc.State(e.ctx, &taskapi.StateRequest{ID: "none"}); !errdefs.IsNotFound(err) {
		t.Errorf("state: %v", err)
	}
	if _, err := e.svc.Pids(e.ctx, &taskapi.PidsRequest{ID: "none"}); !errdefs.IsNotFound(err) {
		t.Errorf("pids: %v", err)
	}
	if _, err := e.svc.Checkpoint(e.ctx, &taskapi.CheckpointTaskRequest{}); !errdefs.IsNotImplemented(err) {
		t.Errorf("checkpoint: %v", err)
	}
	if err := e.create("app", "pod", stdio.Config{}, "pause"); !errdefs.IsNotFound(err) {
		t.Errorf("member without sandbox: %v", err)
	}
	e.pod()
	if err := e.create("app", "pod", stdio.Config{}, "pause"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("same id: %v", err)
	}
	if _, err := e.svc.Delete(e.ctx, &taskapi.DeleteRequest{ID: "app"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running container: %v", err)
	}
	if err := e.create("stream", "pod", stdio.Config{Stdout: "stream://x"}, "pause"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("stdio scheme: %v", err)
	}
	r, err := e.svc.Pids(e.ctx, &taskapi.PidsRequest{ID: "app"})
	if err != nil || len(r.Processes) != 1 || r.Processes[0].Pid != uint32(os.Getpid()) {
		t.Errorf("pids: %v, %v", r, err)
	}
	e.kill("app", "", syscall.SIGKILL)
	e.wait("app", "")
	if _, err := e.svc.Kill(e.ctx, &taskapi.KillRequest{ID: "app", Signal: 9}); !errdefs.IsNotFound(err) {
		t.Errorf("kill of a stopped container: %v", err)
	}
}
