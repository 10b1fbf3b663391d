// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"bytes"
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const lines = 1 << 20

func start(t *testing.T, a *Agent) func() *ttrpc.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Serve(ctx, l) }()
	t.Cleanup(func() {
		a.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func() *ttrpc.Client {
		c, err := relay.Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		cl := ttrpc.NewClient(c)
		t.Cleanup(func() { cl.Close() })
		return cl
	}
}

// want is a large output that differs at every offset.
func want() []byte {
	b := make([]byte, lines)
	for i := range b {
		b[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return b
}

func testAgent() *Agent {
	return &Agent{
		Features: []extension.Feature{extension.Rootfs, extension.Streams},
		Programs: map[string]Program{
			"big": func(_ context.Context, p *Proc) int { p.Stdout.Write(want()); return 3 },
			"cat": func(_ context.Context, p *Proc) int { io.Copy(p.Stdout, p.Stdin); return 0 },
			"wait": func(ctx context.Context, p *Proc) int {
				select {
				case s := <-p.Signals:
					return 128 + int(s)
				case <-ctx.Done():
					return 0
				}
			},
		},
	}
}

func create(t *testing.T, c *ttrpc.Client, id string, args ...string) agentpb.AgentServiceService {
	t.Helper()
	ag := agentpb.NewAgentServiceClient(c)
	if _, err := ag.CreateSandbox(t.Context(), &agentpb.CreateSandboxRequest{SandboxId: "s"}); err != nil {
		t.Fatal(err)
	}
	if _, err := ag.CreateContainer(t.Context(), &agentpb.CreateContainerRequest{
		ContainerId: id, OCI: &agentpb.Spec{Root: &agentpb.Root{Path: "/r"}, Process: &agentpb.Process{Args: args}},
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := ag.StartContainer(t.Context(), &agentpb.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	return ag
}

func TestOutputResumesOnANewConnection(t *testing.T) {
	dial := start(t, testAgent())
	c := dial()
	ag := create(t, c, "c", "big")

	var got []byte
	for n := 0; ; n++ {
		cl := dial()
		st, err := podvmpb.NewPodVMClient(cl).ReadOutput(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Send(&podvmpb.ReadOutputRequest{ContainerId: "c", Stream: podvmpb.OutputStream_OUTPUT_STREAM_STDOUT, Offset: uint64(len(got)), Window: 200 << 10}); err != nil {
			t.Fatal(err)
		}
		eof := false
		for i := 0; !eof; i++ {
			r, err := st.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if r.Offset != uint64(len(got)) {
				t.Fatalf("chunk at %d, want %d", r.Offset, len(got))
			}
			got, eof = append(got, r.Data...), r.Eof
			if i == 2 && n < 4 {
				break // and leave the last chunks unacknowledged
			}
			st.Send(&podvmpb.ReadOutputRequest{Acked: uint64(len(got))})
		}
		cl.Close()
		if eof {
			break
		}
	}
	if !bytes.Equal(got, want()) {
		t.Fatalf("%d bytes differ from the %d written", len(got), lines)
	}
	for range 2 { // late waiters get the same answer
		r, err := ag.WaitProcess(t.Context(), &agentpb.WaitProcessRequest{ContainerId: "c", ExecId: "c"})
		if err != nil || r.Status != 3 {
			t.Fatalf("WaitProcess = %v, %v", r, err)
		}
	}
}

func TestInputIsTakenOnce(t *testing.T) {
	dial := start(t, testAgent())
	c := dial()
	ag := create(t, c, "c", "cat")
	ext := podvmpb.NewPodVMClient(c)
	for _, r := range []*podvmpb.WriteInputRequest{
		{ContainerId: "c", Offset: 0, Data: []byte("hello ")},
		{ContainerId: "c", Offset: 0, Data: []byte("hello ")},
		{ContainerId: "c", Offset: 3, Data: []byte("lo world")},
		{ContainerId: "c", Offset: 11, Eof: true},
	} {
		if _, err := ext.WriteInput(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	var got []byte
	for {
		r, err := ag.ReadStdout(t.Context(), &agentpb.ReadStreamRequest{ContainerId: "c", Len: 4})
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Data) == 0 {
			break
		}
		got = append(got, r.Data...)
	}
	if string(got) != "hello world" {
		t.Fatalf("got %q", got)
	}
}

func TestRefusals(t *testing.T) {
	dial := start(t, testAgent())
	c := dial()
	ag := create(t, c, "c", "wait")
	for name, tc := range map[string]struct {
		call func() error
		is   func(error) bool
	}{
		"second sandbox": {func() error {
			_, err := ag.CreateSandbox(t.Context(), &agentpb.CreateSandboxRequest{SandboxId: "other"})
			return err
		}, errdefs.IsFailedPrecondition},
		"container twice": {func() error {
			_, err := ag.CreateContainer(t.Context(), &agentpb.CreateContainerRequest{ContainerId: "c", OCI: &agentpb.Spec{Root: &agentpb.Root{}}})
			return err
		}, errdefs.IsAlreadyExists},
		"wait for an unknown exec": {func() error {
			_, err := ag.WaitProcess(t.Context(), &agentpb.WaitProcessRequest{ContainerId: "c", ExecId: "x"})
			return err
		}, errdefs.IsNotFound},
		"copy outside": {func() error {
			_, err := ag.CopyFile(t.Context(), &agentpb.CopyFileRequest{Path: sharedRoot + "../../etc/passwd"})
			return err
		}, errdefs.IsInvalidArgument},
		"resize without tty": {func() error {
			_, err := ag.TtyWinResize(t.Context(), &agentpb.TtyWinResizeRequest{ContainerId: "c"})
			return err
		}, errdefs.IsUnavailable},
		"swap": {func() error {
			_, err := ag.AddSwap(t.Context(), &agentpb.AddSwapRequest{})
			return err
		}, errdefs.IsNotImplemented},
		"input with a gap": {func() error {
			_, err := podvmpb.NewPodVMClient(c).WriteInput(t.Context(), &podvmpb.WriteInputRequest{ContainerId: "c", Offset: 9})
			return err
		}, errdefs.IsOutOfRange},
	} {
		if err := errgrpc.ToNative(tc.call()); !tc.is(err) {
			t.Errorf("%s: error = %v", name, err)
		}
	}
	if _, err := ag.SignalProcess(t.Context(), &agentpb.SignalProcessRequest{ContainerId: "c", Signal: 15}); err != nil {
		t.Fatal(err)
	}
	r, err := ag.WaitProcess(t.Context(), &agentpb.WaitProcessRequest{ContainerId: "c"})
	if err != nil || r.Status != 143 {
		t.Errorf("WaitProcess = %v, %v; want 143", r, err)
	}
}
