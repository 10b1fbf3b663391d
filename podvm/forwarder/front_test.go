// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

const testNetNS = "/run/netns/podns"

// world is a front on a unix socket before a stock agent.
type world struct {
	t      *testing.T
	agent  *agenttest.Stock
	front  *front
	socket string
	dir    string
}

// shortDir has a name that leaves room for a socket's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "front")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// serveAgent runs ServeAgent on a unix socket until the test ends.
func serveAgent(t *testing.T, dir, agent string) (f *front, socket string) {
	t.Helper()
	socket = filepath.Join(dir, "front.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, agent), socket
}

func serveOn(t *testing.T, l net.Listener, agent string) *front {
	t.Helper()
	f := &front{cfg: FrontConfig{Socket: agent, PodNetNS: testNetNS, Log: slog.New(slog.DiscardHandler)}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.serveAll(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return f
}

// serveStock runs a stock agent until the test ends, or it ends itself.
func serveStock(t *testing.T, a *agenttest.Stock) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Serve(ctx) }()
	t.Cleanup(func() {
		a.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// newWorld makes both. gate releases the program "gated" to print a line and end with
// status 3.
func newWorld(t *testing.T) (w *world, gate chan struct{}) {
	t.Helper()
	gate = make(chan struct{})
	dir := shortDir(t)
	w = &world{t: t, dir: dir, agent: &agenttest.Stock{Dir: filepath.Join(dir, "kata"), Agent: &agenttest.Agent{Programs: map[string]agenttest.Program{
		"gated": func(ctx context.Context, p *agenttest.Proc) int {
			select {
			case <-gate:
			case <-ctx.Done():
				return 1
			}
			fmt.Fprintln(p.Stdout, "through")
			return 3
		},
		"echo": func(_ context.Context, p *agenttest.Proc) int {
			fmt.Fprintln(p.Stdout, strings.Join(p.Args[1:], " "))
			return 0
		},
	}}}}
	serveStock(t, w.agent)
	w.front, w.socket = serveAgent(t, dir, w.agent.Socket())
	return w, gate
}

// link is the connection to the agent.
func (w *world) link() *link {
	w.front.mu.Lock()
	defer w.front.mu.Unlock()
	return w.front.link
}

// runtime is one client.
type runtime struct {
	agentpb.AgentServiceService
	health agentpb.HealthService
	client *ttrpc.Client
}

func (w *world) dial() *runtime {
	w.t.Helper()
	conn, err := net.Dial("unix", w.socket)
	if err != nil {
		w.t.Fatal(err)
	}
	return newRuntime(w.t, conn)
}

func newRuntime(t *testing.T, conn net.Conn) *runtime {
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() { c.Close() })
	return &runtime{agentpb.NewAgentServiceClient(c), agentpb.NewHealthClient(c), c}
}

func context30(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// must fails the test on an error.
func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// container makes a container that runs args.
func (w *world) container(r *runtime, id string, args ...string) {
	w.t.Helper()
	ctx := context30(w.t)
	root := "/run/kata-containers/" + id + "/rootfs"
	must[any](w.t)(r.CreateContainer(ctx, &agentpb.CreateContainerRequest{
		ContainerId: id, ExecId: id, Storages: []*agentpb.Storage{{Driver: "image_guest_pull", MountPoint: root}},
		OCI: &agentpb.Spec{Root: &agentpb.Root{Path: root}, Process: &agentpb.Process{Args: args}},
	}))
	must[any](w.t)(r.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: id}))
}

// until waits for a condition that nothing announces.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// called waits until the agent has been called n times by the name.
func (w *world) called(method string, n int) {
	w.t.Helper()
	until(w.t, fmt.Sprintf("%d calls of %s", n, method), func() bool {
		got := 0
		for _, c := range w.agent.Calls() {
			if c == method {
				got++
			}
		}
		return got >= n
	})
}

// The agent removes its own socket; clients come and go all the same, and the port of
// the pod VM authenticates them first.
func TestFrontOutlivesTheAgentsSocket(t *testing.T) {
	s := newSandbox(t)
	inner, err := Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(inner, s.serverConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	agent := &agenttest.Stock{Dir: filepath.Join(shortDir(t), "kata"), Agent: new(agenttest.Agent)}
	serveOn(t, l, agent.Socket())
	dial := func() *runtime {
		conn, err := tls.Dial("tcp", inner.Addr().String(), s.clientConfig(t, s.client))
		if err != nil {
			t.Fatal(err)
		}
		return newRuntime(t, conn)
	}
	ctx := context30(t)
	// The agent starts after us: the client waits, it is not refused.
	first := dial()
	checked := make(chan error, 1)
	go func() {
		_, err := first.health.Check(ctx, &agentpb.CheckRequest{})
		checked <- err
	}()
	serveStock(t, agent)
	if err := <-checked; err != nil {
		t.Fatal(err)
	}
	must[any](t)(first.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "pod"}))
	if _, err := os.Stat(agent.Socket()); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the agent's socket is still there: %v", err)
	}
	must[any](t)(dial().GetGuestDetails(ctx, &agentpb.GuestDetailsRequest{}))
	first.client.Close()
	must[any](t)(dial().GetGuestDetails(ctx, &agentpb.GuestDetailsRequest{}))
	if n := agent.Connections(); n != 1 {
		t.Errorf("the agent has %d connections, want 1", n)
	}
	// With its sandbox the agent ends, and its clients get the last reply before.
	last := dial()
	must[any](t)(last.DestroySandbox(ctx, &agentpb.DestroySandboxRequest{}))
	until(t, "the agent's end to reach its client", func() bool {
		_, err = last.health.Check(ctx, &agentpb.CheckRequest{})
		return err != nil
	})
	if !errors.Is(err, ttrpc.ErrClosed) {
		t.Errorf("call to an agent that has ended: %v", err)
	}
}

// ServeAgent returns while a client waits for an agent that never comes.
func TestFrontEndsWithoutAgent(t *testing.T) {
	dir := shortDir(t)
	_, socket := serveAgent(t, dir, filepath.Join(dir, "none.sock"))
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
}

func TestFrontRewrites(t *testing.T) {
	w, _ := newWorld(t)
	r, ctx := w.dial(), context30(t)
	must[any](t)(r.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "pod", Hostname: "web", Dns: []string{"nameserver 10.0.0.10", "search svc"}}))
	if sb := w.agent.Sandbox(); sb.SandboxId != "pod" || sb.Hostname != "web" || len(sb.Dns) != 0 {
		t.Errorf("the agent was asked for sandbox %v, want it without dns", sb)
	}
	there := filepath.Join(w.dir, "there")
	if err := os.WriteFile(there, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing, storage := filepath.Join(w.dir, "a/b/c"), filepath.Join(w.dir, "storage")
	req := &agentpb.CreateContainerRequest{
		ContainerId: "c", Storages: []*agentpb.Storage{{Driver: "image_guest_pull", MountPoint: "/root"}, {Driver: "local", MountPoint: storage}},
		OCI: &agentpb.Spec{
			Root: &agentpb.Root{Path: "/root"}, Process: &agentpb.Process{Args: []string{"echo"}},
			Mounts: []*agentpb.Mount{
				{Destination: "/1", Source: missing, Type: "bind"},
				{Destination: "/2", Source: there, Type: "bind"},
				{Destination: "/3", Source: storage + "/sub", Options: []string{"rbind"}},
				{Destination: "/proc", Source: "proc", Type: "proc"},
				{Destination: "/tmp", Source: filepath.Join(w.dir, "tmpfs"), Type: "tmpfs"},
			},
			Linux: &agentpb.Linux{Namespaces: []*agentpb.LinuxNamespace{{Type: "ipc", Path: "/ipc"}, {Type: "network", Path: "/of/the/node"}, {Type: "mount"}}},
		},
	}
	// A field of a newer protocol.
	req.OCI.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 4000, protowire.VarintType), 77))
	must[any](t)(r.CreateContainer(ctx, req))
	got := w.agent.Container("c")
	want := proto.CloneOf(req)
	want.OCI.Linux.Namespaces = []*agentpb.LinuxNamespace{{Type: "ipc", Path: "/ipc"}, {Type: "mount"}, {Type: "network", Path: testNetNS}}
	if !proto.Equal(got, want) {
		t.Errorf("the agent was asked for\n%v\nwant\n%v", got, want)
	}
	if st, err := os.Stat(missing); err != nil || !st.IsDir() {
		t.Errorf("what is to be mounted was not made: %v", err)
	}
	for _, path := range []string{storage, filepath.Join(w.dir, "tmpfs")} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was made, and is not the forwarder's to make: %v", path, err)
		}
	}
	if b, err := os.ReadFile(there); err != nil || string(b) != "x" {
		t.Errorf("a file that was there: %q, %v", b, err)
	}
	must[any](t)(r.CreateContainer(ctx, &agentpb.CreateContainerRequest{
		ContainerId: "d", Storages: req.Storages, OCI: &agentpb.Spec{Root: &agentpb.Root{Path: "/root"}, Process: &agentpb.Process{Args: []string{"echo"}}},
	}))
	if ns := w.agent.Container("d").OCI.Linux.Namespaces; len(ns) != 1 || ns[0].Path != testNetNS {
		t.Errorf("namespaces of a specification without any: %v", ns)
	}
}

// A call that this program does not know passes, with its deadline and metadata; so
// does the agent's answer.
func TestFrontPassesUnknownCalls(t *testing.T) {
	dir := shortDir(t)
	l, err := net.Listen("unix", filepath.Join(dir, "agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	var deadline time.Time
	var metadata ttrpc.MD
	srv.Register("grpc.Image", map[string]ttrpc.Method{
		"PullImage": func(ctx context.Context, um func(any) error) (any, error) {
			r := new(agentpb.CheckRequest)
			if err := um(r); err != nil {
				return nil, err
			}
			deadline, _ = ctx.Deadline()
			metadata, _ = ttrpc.GetMetadata(ctx)
			if r.Service == "" {
				return nil, status.Error(codes.DataLoss, "no image")
			}
			return &agentpb.VersionCheckResponse{AgentVersion: "got " + r.Service}, nil
		},
	})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		srv.Close()
		<-served
	})
	_, socket := serveAgent(t, dir, filepath.Join(dir, "agent.sock"))
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	r, ctx := newRuntime(t, conn), context30(t)
	resp := new(agentpb.VersionCheckResponse)
	err = r.client.Call(ttrpc.WithMetadata(ctx, ttrpc.MD{"traceparent": {"00-1"}}), "grpc.Image", "PullImage", &agentpb.CheckRequest{Service: "busybox"}, resp)
	if err != nil || resp.AgentVersion != "got busybox" {
		t.Errorf("got %v, %v", resp, err)
	}
	if want, _ := ctx.Deadline(); deadline.IsZero() || deadline.Sub(want).Abs() > patience {
		t.Errorf("the agent's deadline is %v, the client's %v", deadline, want)
	}
	if got, _ := metadata.Get("traceparent"); !slices.Equal(got, []string{"00-1"}) {
		t.Errorf("metadata %v", metadata)
	}
	err = r.client.Call(ctx, "grpc.Image", "PullImage", &agentpb.CheckRequest{}, resp)
	if st, _ := status.FromError(err); st.Code() != codes.DataLoss || st.Message() != "no image" {
		t.Errorf("the agent's error came as %v", err)
	}
	err = r.client.Call(ctx, "grpc.Image", "Other", &agentpb.CheckRequest{}, resp)
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a call that the agent does not know: %v", err)
	}
}

// A client that takes no replies holds up nobody else, and one that asks for too much
// is told so.
func TestFrontSlowClient(t *testing.T) {
	w, _ := newWorld(t)
	raw, err := net.Dial("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	body := must[[]byte](t)(proto.Marshal(&ttrpc.Request{Service: "grpc.Health", Method: "Version"}))
	stream := uint32(1)
	// More replies than any socket buffer holds.
	for range 2000 {
		if _, err := raw.Write(frame{stream: stream, kind: kindRequest, body: body}.bytes()); err != nil {
			t.Fatal(err)
		}
		stream += 2
	}
	w.called("Version", 1)
	must[any](t)(w.dial().health.Check(context30(t), &agentpb.CheckRequest{}))
}

func TestFrontRefuses(t *testing.T) {
	w, _ := newWorld(t)
	r, ctx := w.dial(), context30(t)
	st := must[podvmpb.PodVM_ReadOutputClient](t)(podvmpb.NewPodVMClient(r.client).ReadOutput(ctx))
	if _, err := st.Recv(); status.Code(err) != codes.Unimplemented {
		t.Errorf("a stream: %v, want Unimplemented", err)
	}
	raw, err := net.Dial("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	go raw.Write(frame{stream: 5, kind: kindRequest, body: make([]byte, maxBody+1)}.bytes())
	var h [headerSize]byte
	if _, err := io.ReadFull(raw, h[:]); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(h[4:9], []byte{0, 0, 0, 5, kindResponse}) {
		t.Errorf("header of the reply to a request that is too long: % x", h)
	}
	// The connection lives.
	must[any](t)(r.health.Check(ctx, &agentpb.CheckRequest{}))
	// What is no request ends it.
	if _, err := raw.Write(frame{stream: 7, kind: kindResponse}.bytes()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, raw); err != nil {
		t.Errorf("after a message that is no request: %v", err)
	}
}
