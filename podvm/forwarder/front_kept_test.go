// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// An exit is told to all who ask, whenever they ask, until the container is removed.
func TestFrontKeepsExits(t *testing.T) {
	w, gate := newWorld(t)
	gone, r, ctx := w.dial(), w.dial(), context30(t)
	must[any](t)(r.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "pod"}))
	w.container(r, "c", "gated")
	ask := &agentpb.WaitProcessRequest{ContainerId: "c", ExecId: "c"}
	lost := make(chan error, 1)
	go func() {
		_, err := gone.WaitProcess(ctx, ask)
		lost <- err
	}()
	w.called("WaitProcess", 1)
	gone.client.Close()
	if err := <-lost; !errors.Is(err, ttrpc.ErrClosed) {
		t.Errorf("wait on a closed connection: %v", err)
	}
	statuses := make(chan int32, 2)
	for _, exec := range []string{"c", ""} { // one and the same process
		go func() {
			resp, err := r.WaitProcess(ctx, &agentpb.WaitProcessRequest{ContainerId: "c", ExecId: exec})
			if err != nil {
				t.Error(err)
			}
			statuses <- resp.GetStatus()
		}()
	}
	close(gate)
	for range 2 {
		if s := <-statuses; s != 3 {
			t.Errorf("status %d, want 3", s)
		}
	}
	if s := must[*agentpb.WaitProcessResponse](t)(w.dial().WaitProcess(ctx, ask)).Status; s != 3 {
		t.Errorf("status %d for one who asks late, want 3", s)
	}
	// The agent has forgotten the process with its output; a reader learns of the end.
	read := &agentpb.ReadStreamRequest{ContainerId: "c", ExecId: "c", Len: 100}
	if out, err := w.dial().ReadStdout(ctx, read); err != nil || len(out.Data) != 0 {
		t.Errorf("read after the exit: %v, %v; want the end", out, err)
	}
	read.ExecId = "never"
	if _, err := r.ReadStdout(ctx, read); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("read of a process that never was: %v", err)
	}
	// A process of the same name is another one.
	for _, want := range []string{"one\n", "two\n"} {
		must[any](t)(r.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "c", ExecId: "x", Process: &agentpb.Process{Args: []string{"echo", strings.TrimSpace(want)}}}))
		out := must[*agentpb.ReadStreamResponse](t)(r.ReadStdout(ctx, &agentpb.ReadStreamRequest{ContainerId: "c", ExecId: "x", Len: 100}))
		if string(out.Data) != want {
			t.Errorf("output %q, want %q", out.Data, want)
		}
		must[any](t)(r.WaitProcess(ctx, &agentpb.WaitProcessRequest{ContainerId: "c", ExecId: "x"}))
	}
	asked := slices.DeleteFunc(w.agent.Calls(), func(c string) bool { return c != "WaitProcess" })
	if len(asked) != 3 { // for the container, and for each exec
		t.Errorf("the agent was asked %d times, want 3", len(asked))
	}
	must[any](t)(r.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{ContainerId: "c"}))
	if _, err := r.WaitProcess(ctx, ask); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("wait for a container that was removed: %v", err)
	}
}

// What the agent says to a client that has gone is for the next.
func TestFrontKeepsWhatNobodyTook(t *testing.T) {
	t.Run("answered before", func(t *testing.T) { keepsWhatNobodyTook(t, true) })
	t.Run("still open", func(t *testing.T) { keepsWhatNobodyTook(t, false) })
}

func keepsWhatNobodyTook(t *testing.T, early bool) {
	w, gate := newWorld(t)
	r, ctx := w.dial(), context30(t)
	must[any](t)(r.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "pod"}))
	w.container(r, "c", "gated")
	read := &agentpb.ReadStreamRequest{ContainerId: "c", ExecId: "c", Len: 32768}
	ended := make(chan error, 2)
	gone := w.dial()
	go func() { _, err := gone.ReadStdout(ctx, read); ended <- err }()
	go func() { _, err := gone.GetOOMEvent(ctx, &agentpb.GetOOMEventRequest{}); ended <- err }()
	w.called("ReadStdout", 1)
	w.called("GetOOMEvent", 1)
	gone.client.Close()
	<-ended
	<-ended
	until(t, "the front learns that the client has gone", func() bool {
		l := w.link()
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, c := range l.calls {
			if len(c.waiters) > 0 {
				return false
			}
		}
		return len(l.calls) == 2
	})
	if early { // the answers come before the next client
		close(gate)
		w.agent.OOM("c")
		until(t, "the agent has answered", func() bool {
			l := w.link()
			l.mu.Lock()
			defer l.mu.Unlock()
			return len(l.left) == 2
		})
	}
	type answer struct {
		text string
		err  error
	}
	got := make(chan answer, 2)
	go func() {
		resp, err := r.ReadStdout(ctx, read)
		got <- answer{string(resp.GetData()), err}
	}()
	go func() {
		resp, err := r.GetOOMEvent(ctx, &agentpb.GetOOMEventRequest{})
		got <- answer{resp.GetContainerId(), err}
	}()
	if !early {
		close(gate)
		w.agent.OOM("c")
	}
	var texts []string
	for range 2 {
		a := <-got
		if a.err != nil {
			t.Error(a.err)
		}
		texts = append(texts, a.text)
	}
	slices.Sort(texts)
	if want := []string{"c", "through\n"}; !slices.Equal(texts, want) {
		t.Errorf("got %q, want %q", texts, want)
	}
}

// A reader on a new connection takes over from one that still seems to be there.
func TestFrontNewestReaderCounts(t *testing.T) {
	w, gate := newWorld(t)
	old, r, ctx := w.dial(), w.dial(), context30(t)
	must[any](t)(r.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "pod"}))
	w.container(r, "c", "gated")
	read := &agentpb.ReadStreamRequest{ContainerId: "c", ExecId: "c", Len: 32768}
	ended := make(chan error, 1)
	go func() { _, err := old.ReadStdout(ctx, read); ended <- err }()
	w.called("ReadStdout", 1)
	got := make(chan string, 1)
	go func() {
		resp, err := r.ReadStdout(ctx, read)
		if err != nil {
			t.Error(err)
		}
		got <- string(resp.GetData())
	}()
	if err := <-ended; status.Code(err) != codes.Aborted {
		t.Errorf("the older reader got %v, want Aborted", err)
	}
	close(gate)
	if out := <-got; out != "through\n" {
		t.Errorf("the newer reader got %q", out)
	}
}
