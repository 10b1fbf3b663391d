// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
)

// unimplemented is what a stock agent answers to a call that a remote virtual
// machine has no use for.
func unimplemented(method string) error {
	return errgrpc.ToGRPC(fmt.Errorf("%s: %w", method, errdefs.ErrNotImplemented))
}

func (service) UpdateEphemeralMounts(context.Context, *agentpb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("UpdateEphemeralMounts")
}

func (service) RemoveStaleVirtiofsShareMounts(context.Context, *agentpb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("RemoveStaleVirtiofsShareMounts")
}

func (service) UpdateInterface(context.Context, *agentpb.UpdateInterfaceRequest) (*typespb.Interface, error) {
	return nil, unimplemented("UpdateInterface")
}

func (service) UpdateRoutes(context.Context, *agentpb.UpdateRoutesRequest) (*agentpb.Routes, error) {
	return nil, unimplemented("UpdateRoutes")
}

func (service) ListInterfaces(context.Context, *agentpb.ListInterfacesRequest) (*agentpb.Interfaces, error) {
	return nil, unimplemented("ListInterfaces")
}

func (service) ListRoutes(context.Context, *agentpb.ListRoutesRequest) (*agentpb.Routes, error) {
	return nil, unimplemented("ListRoutes")
}

func (service) AddARPNeighbors(context.Context, *agentpb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("AddARPNeighbors")
}

func (service) GetIPTables(context.Context, *agentpb.GetIPTablesRequest) (*agentpb.GetIPTablesResponse, error) {
	return nil, unimplemented("GetIPTables")
}

func (service) SetIPTables(context.Context, *agentpb.SetIPTablesRequest) (*agentpb.SetIPTablesResponse, error) {
	return nil, unimplemented("SetIPTables")
}

func (service) GetMetrics(context.Context, *agentpb.GetMetricsRequest) (*agentpb.Metrics, error) {
	return nil, unimplemented("GetMetrics")
}

func (service) MemAgentMemcgSet(context.Context, *agentpb.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return nil, unimplemented("MemAgentMemcgSet")
}

func (service) MemAgentCompactSet(context.Context, *agentpb.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return nil, unimplemented("MemAgentCompactSet")
}

func (service) OnlineCPUMem(context.Context, *agentpb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("OnlineCPUMem")
}

func (service) ReseedRandomDev(context.Context, *agentpb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("ReseedRandomDev")
}

func (service) MemHotplugByProbe(context.Context, *agentpb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("MemHotplugByProbe")
}

func (service) AddSwap(context.Context, *agentpb.AddSwapRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("AddSwap")
}

func (service) AddSwapPath(context.Context, *agentpb.AddSwapPathRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("AddSwapPath")
}

func (service) GetVolumeStats(context.Context, *agentpb.VolumeStatsRequest) (*agentpb.VolumeStatsResponse, error) {
	return nil, unimplemented("GetVolumeStats")
}

func (service) ResizeVolume(context.Context, *agentpb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return nil, unimplemented("ResizeVolume")
}
