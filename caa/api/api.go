// SPDX-License-Identifier: Apache-2.0

// Package api serves the adaptor's socket: hypervisor.Hypervisor for shims, ours or
// stock, and peerpod.adaptor.v1.Admin for peerpodctl. It translates; what the calls
// do is in package sandbox. Classes of errors become gRPC codes here and nowhere
// else.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/hypervisorpb"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/caa/adminpb"
	"github.com/kata-remote/kata-remote/caa/sandbox"
)

// protocolVersion is what cloud-api-adaptor has always answered to Version. No
// runtime asks.
const protocolVersion = "0.0.0"

// shutdownTimeout is for answers under way when the adaptor stops.
const shutdownTimeout = time.Second

// sandboxes is the part of sandbox.Manager that is served.
type sandboxes interface {
	Create(context.Context, sandbox.Request) (string, error)
	Start(ctx context.Context, id string) error
	Stop(ctx context.Context, id string) error
	Infos() []sandbox.Info
}

// Serve answers on l until ctx ends. It closes l.
func Serve(ctx context.Context, l net.Listener, s sandboxes, log *slog.Logger) error {
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(intercept(log)))
	if err != nil {
		return err
	}
	hypervisorpb.RegisterHypervisorService(srv, &hypervisor{s})
	adminpb.RegisterAdminService(srv, &admin{s})
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if err := srv.Shutdown(wait); err != nil {
			srv.Close()
		}
	})
	err = srv.Serve(context.WithoutCancel(ctx), l)
	if stop() {
		srv.Close()
	} else {
		<-done
	}
	if errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}

// intercept turns errors into gRPC statuses and writes each call to the debug log.
func intercept(log *slog.Logger) ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
		begin := time.Now()
		resp, err := method(ctx, unmarshal)
		attrs := []any{
			logkey.RPC, strings.TrimPrefix(info.FullMethod, "/"),
			logkey.Duration, float64(time.Since(begin).Microseconds()) / 1000,
		}
		if err != nil {
			attrs = append(attrs, logkey.Error, err.Error())
		}
		log.Debug("call", attrs...)
		return resp, errgrpc.ToGRPC(err)
	}
}

type hypervisor struct{ s sandboxes }

func (h *hypervisor) CreateVM(ctx context.Context, r *hypervisorpb.CreateVMRequest) (*hypervisorpb.CreateVMResponse, error) {
	path, err := h.s.Create(ctx, sandbox.Request{ID: r.Id, Annotations: r.Annotations, NetNS: r.NetworkNamespacePath})
	if err != nil {
		return nil, err
	}
	return &hypervisorpb.CreateVMResponse{AgentSocketPath: path}, nil
}

func (h *hypervisor) StartVM(ctx context.Context, r *hypervisorpb.StartVMRequest) (*hypervisorpb.StartVMResponse, error) {
	if err := h.s.Start(ctx, r.Id); err != nil {
		return nil, err
	}
	return &hypervisorpb.StartVMResponse{}, nil
}

func (h *hypervisor) StopVM(ctx context.Context, r *hypervisorpb.StopVMRequest) (*hypervisorpb.StopVMResponse, error) {
	if err := h.s.Stop(ctx, r.Id); err != nil {
		return nil, err
	}
	return &hypervisorpb.StopVMResponse{}, nil
}

func (h *hypervisor) Version(context.Context, *hypervisorpb.VersionRequest) (*hypervisorpb.VersionResponse, error) {
	return &hypervisorpb.VersionResponse{Version: protocolVersion}, nil
}

type admin struct{ s sandboxes }

func (a *admin) ListSandboxes(_ context.Context, r *adminpb.ListSandboxesRequest) (*adminpb.ListSandboxesResponse, error) {
	infos := a.s.Infos()
	if r.Id != "" {
		exact := slices.IndexFunc(infos, func(i sandbox.Info) bool { return i.ID == r.Id })
		if exact >= 0 {
			infos = infos[exact : exact+1]
		} else {
			infos = slices.DeleteFunc(infos, func(i sandbox.Info) bool { return !strings.HasPrefix(i.ID, r.Id) })
		}
		switch len(infos) {
		case 0:
			return nil, errdefs.ErrNotFound.WithMessage(fmt.Sprintf("no sandbox %q on this node; peerpodctl sandbox list shows those there are", r.Id))
		case 1:
		default:
			return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%q fits %d sandboxes; give more of the id", r.Id, len(infos)))
		}
	}
	slices.SortFunc(infos, func(x, y sandbox.Info) int { return x.Created.Compare(y.Created) })
	resp := &adminpb.ListSandboxesResponse{}
	for _, i := range infos {
		resp.Sandboxes = append(resp.Sandboxes, view(i))
	}
	return resp, nil
}

// view takes from a record what may be seen.
func view(i sandbox.Info) *adminpb.Sandbox {
	v := &adminpb.Sandbox{
		Id: i.ID, State: i.State.String(), Reason: i.Reason,
		PodNamespace: i.Pod.Namespace, PodName: i.Pod.Name, Netns: i.NetNS, AgentSocket: i.AgentSocket,
		Provider: i.Instance.Provider, InstanceName: i.Instance.Name, InstanceId: string(i.Instance.ID),
		InstanceType: i.Instance.Plan.Type, Vcpus: uint32(i.Instance.Plan.VCPUs), MemoryMib: uint32(i.Instance.Plan.MemoryMiB),
		CreatedUnixNano: i.Created.UnixNano(), ChangedUnixNano: i.Changed.UnixNano(),
		Connections: int32(i.Connections),
	}
	for _, t := range i.Tunnels {
		v.Tunnels = append(v.Tunnels, &adminpb.Tunnel{Interface: t.Pod.Interface, Device: t.Device, Vni: t.VNI})
	}
	if len(i.Tunnels) > 0 {
		v.Vni, v.VxlanPort, v.TunnelDevice = i.Tunnels[0].VNI, uint32(i.Tunnels[0].Port), i.Tunnels[0].Device
	}
	if i.Instance.Addr.IsValid() {
		v.Address = i.Instance.Addr.String()
	}
	if !i.Lease.IsZero() {
		v.LeaseUnixNano = i.Lease.UnixNano()
	}
	for _, s := range i.Steps {
		v.Steps = append(v.Steps, &adminpb.Step{Name: s.Name, Milliseconds: s.Millis})
	}
	return v
}
