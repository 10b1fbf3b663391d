// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestToGRPC(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{errors.New("anything"), codes.Internal},
		{fmt.Errorf("x: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument},
		{fmt.Errorf("x: %w", errdefs.ErrNotFound), codes.NotFound},
		{fmt.Errorf("x: %w", errdefs.ErrAlreadyExists), codes.AlreadyExists},
		{fmt.Errorf("x: %w", errdefs.ErrPermissionDenied), codes.PermissionDenied},
		{fmt.Errorf("x: %w", errdefs.ErrResourceExhausted), codes.ResourceExhausted},
		{fmt.Errorf("x: %w", errdefs.ErrFailedPrecondition), codes.FailedPrecondition},
		{fmt.Errorf("x: %w", errdefs.ErrAborted), codes.Aborted},
		{fmt.Errorf("x: %w", errdefs.ErrOutOfRange), codes.OutOfRange},
		{fmt.Errorf("x: %w", errdefs.ErrNotImplemented), codes.Unimplemented},
		{fmt.Errorf("x: %w", errdefs.ErrInternal), codes.Internal},
		{fmt.Errorf("x: %w", errdefs.ErrUnavailable), codes.Unavailable},
		{fmt.Errorf("x: %w", context.Canceled), codes.Canceled},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
	} {
		if got := status.Code(toGRPC(tc.err)); got != tc.want {
			t.Errorf("%v: %v, want %v", tc.err, got, tc.want)
		}
	}
}

// The codes that runtimes rely on (kata-containers 4.1, src/agent/src/rpc.rs).
//
// Long: one table, a call and its code in each row.
func TestCodes(t *testing.T) {
	g := newGuest(t)
	ctx := g.ctx()
	process := &agentpb.Process{Args: []string{"/bin/true"}}

	early := func(what string, err error) {
		t.Helper()
		if got := status.Code(err); got != codes.FailedPrecondition {
			t.Errorf("%s without a sandbox: %v", what, err)
		}
	}
	_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "early", OCI: g.spec("true")})
	early("CreateContainer", err)

	g.sandbox()
	g.sandbox() // again: nothing happens
	_, err = g.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "another"})
	early("another CreateSandbox", err)

	g.run("run", "sleep 1000")
	g.exec("run", "exec", "exit 0", false)
	g.create("created", g.spec("sleep 1000"))
	g.run("ended", "exit 0")
	g.wait("ended", "")

	for _, tc := range []struct {
		name string
		call func() error
		want codes.Code
	}{
		{"start unknown", func() error {
			_, err := g.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: "no-such"})
			return err
		}, codes.Internal},
		{"remove unknown", func() error {
			_, err := g.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{ContainerId: "no-such"})
			return err
		}, codes.Internal},
		{"wait unknown", func() error {
			_, err := g.WaitProcess(ctx, &agentpb.WaitProcessRequest{ContainerId: "no-such"})
			return err
		}, codes.Internal},
		{"signal unknown", func() error {
			_, err := g.SignalProcess(ctx, &agentpb.SignalProcessRequest{ContainerId: "no-such", Signal: 9})
			return err
		}, codes.InvalidArgument},
		{"exec unknown", func() error {
			_, err := g.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "no-such", ExecId: "ee", Process: process})
			return err
		}, codes.InvalidArgument},
		{"stats unknown", func() error {
			_, err := g.StatsContainer(ctx, &agentpb.StatsContainerRequest{ContainerId: "no-such"})
			return err
		}, codes.InvalidArgument},
		{"update unknown", func() error {
			_, err := g.UpdateContainer(ctx, &agentpb.UpdateContainerRequest{ContainerId: "no-such"})
			return err
		}, codes.InvalidArgument},
		{"pause unknown", func() error {
			_, err := g.PauseContainer(ctx, &agentpb.PauseContainerRequest{ContainerId: "no-such"})
			return err
		}, codes.InvalidArgument},
		{"resume unknown", func() error {
			_, err := g.ResumeContainer(ctx, &agentpb.ResumeContainerRequest{ContainerId: "no-such"})
			return err
		}, codes.InvalidArgument},
		{"read unknown", func() error {
			_, err := g.ReadStdout(ctx, &agentpb.ReadStreamRequest{ContainerId: "no-such", Len: 1})
			return err
		}, codes.InvalidArgument},
		{"write unknown", func() error {
			_, err := g.WriteStdin(ctx, &agentpb.WriteStreamRequest{ContainerId: "no-such"})
			return err
		}, codes.InvalidArgument},
		{"close unknown", func() error {
			_, err := g.CloseStdin(ctx, &agentpb.CloseStdinRequest{ContainerId: "no-such"})
			return err
		}, codes.InvalidArgument},
		{"resize unknown", func() error {
			_, err := g.TtyWinResize(ctx, &agentpb.TtyWinResizeRequest{ContainerId: "no-such"})
			return err
		}, codes.InvalidArgument},
		{"wait unknown exec", func() error {
			_, err := g.WaitProcess(ctx, &agentpb.WaitProcessRequest{ContainerId: "run", ExecId: "no-such"})
			return err
		}, codes.NotFound},
		{"signal unknown exec", func() error {
			_, err := g.SignalProcess(ctx, &agentpb.SignalProcessRequest{ContainerId: "run", ExecId: "no-such", Signal: 9})
			return err
		}, codes.NotFound},
		{"read unknown exec", func() error {
			_, err := g.ReadStderr(ctx, &agentpb.ReadStreamRequest{ContainerId: "run", ExecId: "no-such", Len: 1})
			return err
		}, codes.NotFound},
		{"signal what has ended", func() error {
			_, err := g.SignalProcess(ctx, &agentpb.SignalProcessRequest{ContainerId: "ended", Signal: 15})
			return err
		}, codes.NotFound},
		{"kill what has ended", func() error {
			_, err := g.SignalProcess(ctx, &agentpb.SignalProcessRequest{ContainerId: "ended", Signal: 9})
			return err
		}, codes.NotFound},
		{"signal of no kind", func() error {
			_, err := g.SignalProcess(ctx, &agentpb.SignalProcessRequest{ContainerId: "run", Signal: 1000})
			return err
		}, codes.InvalidArgument},
		{"duplicate container", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "run", OCI: g.spec("true")})
			return err
		}, codes.AlreadyExists},
		{"duplicate exec", func() error {
			_, err := g.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "run", ExecId: "exec", Process: process})
			return err
		}, codes.AlreadyExists},
		{"exec with the container's id", func() error {
			_, err := g.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "run", ExecId: "run", Process: process})
			return err
		}, codes.AlreadyExists},
		{"exec without an id", func() error {
			_, err := g.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "run", Process: process})
			return err
		}, codes.InvalidArgument},
		{"exec of nothing", func() error {
			_, err := g.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "run", ExecId: "nothing"})
			return err
		}, codes.InvalidArgument},
		{"exec before start", func() error {
			_, err := g.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "created", ExecId: "ee", Process: process})
			return err
		}, codes.FailedPrecondition},
		{"exec after the end", func() error {
			_, err := g.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: "ended", ExecId: "ee", Process: process})
			return err
		}, codes.FailedPrecondition},
		{"start twice", func() error {
			_, err := g.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: "run"})
			return err
		}, codes.FailedPrecondition},
		{"start after the end", func() error {
			_, err := g.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: "ended"})
			return err
		}, codes.FailedPrecondition},
		{"resume what runs", func() error {
			_, err := g.ResumeContainer(ctx, &agentpb.ResumeContainerRequest{ContainerId: "run"})
			return err
		}, codes.FailedPrecondition},
		{"bad id", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "../x", OCI: g.spec("true")})
			return err
		}, codes.InvalidArgument},
		{"reserved id", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "shared", OCI: g.spec("true")})
			return err
		}, codes.InvalidArgument},
		{"no spec", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "new"})
			return err
		}, codes.InvalidArgument},
		{"no root", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "new", OCI: &agentpb.Spec{Process: process, Root: &agentpb.Root{Path: "/nowhere"}}})
			return err
		}, codes.InvalidArgument},
		{"no command", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "new", OCI: &agentpb.Spec{Root: &agentpb.Root{Path: g.rootfs()}}})
			return err
		}, codes.InvalidArgument},
		{"devices", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "new", OCI: g.spec("true"), Devices: []*agentpb.Device{{Id: "gpu0", ContainerPath: "/dev/gpu"}}})
			return err
		}, codes.InvalidArgument},
		{"resize without tty", func() error {
			_, err := g.TtyWinResize(ctx, &agentpb.TtyWinResizeRequest{ContainerId: "run"})
			return err
		}, codes.Unavailable},
		{"read of no length", func() error { _, err := g.ReadStdout(ctx, &agentpb.ReadStreamRequest{ContainerId: "run"}); return err }, codes.InvalidArgument},
		{"unknown log", func() error {
			_, err := g.GetDiagnosticData(ctx, &agentpb.GetDiagnosticDataRequest{ContainerId: "run", LogType: "x"})
			return err
		}, codes.InvalidArgument},
		{"no termination log", func() error {
			_, err := g.GetDiagnosticData(ctx, &agentpb.GetDiagnosticDataRequest{ContainerId: "run", LogType: "termination_log"})
			return err
		}, codes.NotFound},
		{"clock", func() error { _, err := g.SetGuestDateTime(ctx, &agentpb.SetGuestDateTimeRequest{Sec: -1}); return err }, codes.InvalidArgument},
		{"unknown storage", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "new", OCI: g.spec("true"), Storages: []*agentpb.Storage{{Driver: "blk", MountPoint: g.agent.cfg.StateDir + "/x"}}})
			return err
		}, codes.InvalidArgument},
		{"storage outside", func() error {
			_, err := g.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: "new", OCI: g.spec("true"), Storages: []*agentpb.Storage{{Driver: "local", MountPoint: g.agent.cfg.StateDir + "/../x"}}})
			return err
		}, codes.InvalidArgument},
	} {
		if err := tc.call(); status.Code(err) != tc.want {
			t.Errorf("%s: %v, want code %v", tc.name, err, tc.want)
		}
	}
}

// Every call of the protocol is answered, with code Unimplemented where the agent
// does not have it, and never with a broken connection.
func TestEveryCallIsAnswered(t *testing.T) {
	g := newGuest(t)
	g.agent.clock = (&fakeClock{at: time.Now()}).clock()
	missing := map[string]bool{}
	u := reflect.TypeFor[unimplemented]()
	for i := range u.NumMethod() {
		missing[u.Method(i).Name] = true
	}
	iface, v := reflect.TypeFor[agentpb.AgentServiceService](), reflect.ValueOf(g.AgentServiceService)
	if n := iface.NumMethod(); n != 42 {
		t.Errorf("the service has %d calls, want 42", n)
	}
	for i := range iface.NumMethod() {
		m := iface.Method(i)
		if m.Name == "GetOOMEvent" {
			continue // waits
		}
		out := v.MethodByName(m.Name).Call([]reflect.Value{reflect.ValueOf(g.ctx()), reflect.New(m.Type.In(1).Elem())})
		err, _ := out[1].Interface().(error)
		if got := status.Code(err); (got == codes.Unimplemented) != missing[m.Name] || got == codes.Unknown {
			t.Errorf("%s: %v", m.Name, err)
		}
		if missing[m.Name] && !strings.Contains(err.Error(), m.Name) {
			t.Errorf("%s: the error does not name the call: %v", m.Name, err)
		}
	}
	if r, err := g.health.Check(g.ctx(), &agentpb.CheckRequest{}); err != nil || r.Status != agentpb.HealthCheckResponse_SERVING {
		t.Errorf("Check: %v, %v", r, err)
	}
	if r, err := g.health.Version(g.ctx(), &agentpb.CheckRequest{}); err != nil || r.GrpcVersion != "0.0.1" || r.AgentVersion != "test" {
		t.Errorf("Version: %v, %v", r, err)
	}
}
