// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"fmt"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
)

// Names are those of the Task API. Versions 2 and 3 have the same messages, field by
// field, so one set of handlers serves both; containerd's package for version 3
// would also link a gRPC server.
var Names = []string{"containerd.task.v2.Task", "containerd.task.v3.Task"}

// Register adds the service to a server under all of its names, and the Sandbox API.
func (s *Service) Register(server *ttrpc.Server) {
	var api taskapi.TTRPCTaskService = s
	desc := &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State":      handle("State", api.State),
		"Create":     handle("Create", api.Create),
		"Start":      handle("Start", api.Start),
		"Delete":     handle("Delete", api.Delete),
		"Pids":       handle("Pids", api.Pids),
		"Pause":      handle("Pause", api.Pause),
		"Resume":     handle("Resume", api.Resume),
		"Checkpoint": handle("Checkpoint", api.Checkpoint),
		"Kill":       handle("Kill", api.Kill),
		"Exec":       handle("Exec", api.Exec),
		"ResizePty":  handle("ResizePty", api.ResizePty),
		"CloseIO":    handle("CloseIO", api.CloseIO),
		"Update":     handle("Update", api.Update),
		"Wait":       handle("Wait", api.Wait),
		"Stats":      handle("Stats", api.Stats),
		"Connect":    handle("Connect", api.Connect),
		"Shutdown":   handle("Shutdown", api.Shutdown),
	}}
	for _, name := range Names {
		server.RegisterService(name, desc)
	}
	server.RegisterService(SandboxName, s.sandboxAPI())
}

// handle is the edge of the service: it decodes, logs, and turns errors into gRPC's.
func handle[Req, Resp any](name string, f func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (_ any, err error) {
		var req Req
		if err := unmarshal(&req); err != nil {
			return nil, err
		}
		defer func() {
			if p := recover(); p != nil {
				log.G(ctx).Errorf("%s: panic: %v", name, p)
				err = errgrpc.ToGRPC(fmt.Errorf("%s: panic: %v: %w", name, p, errdefs.ErrInternal))
			}
		}()
		resp, err := f(ctx, &req)
		if err != nil {
			log.G(ctx).WithError(err).WithField("rpc", name).Debug("call failed")
			return nil, errgrpc.ToGRPC(err)
		}
		log.G(ctx).WithField("rpc", name).Trace("call")
		return resp, nil
	}
}
