// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// unimplemented answers the calls of AgentService that this agent does not have.
// None of them is sent to the guest of a remote hypervisor on the path of a pod's
// life. service embeds it: a call is added by giving service a method of that name
// and deleting the one here.
type unimplemented struct{}

func notHere[T any](rpc string) (*T, error) {
	return nil, toGRPC(fmt.Errorf("%s: this agent does not have the call: %w", rpc, errdefs.ErrNotImplemented))
}

func (unimplemented) UpdateEphemeralMounts(context.Context, *agentpb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("UpdateEphemeralMounts")
}

func (unimplemented) UpdateInterface(context.Context, *agentpb.UpdateInterfaceRequest) (*typespb.Interface, error) {
	return notHere[typespb.Interface]("UpdateInterface")
}

func (unimplemented) UpdateRoutes(context.Context, *agentpb.UpdateRoutesRequest) (*agentpb.Routes, error) {
	return notHere[agentpb.Routes]("UpdateRoutes")
}

func (unimplemented) AddARPNeighbors(context.Context, *agentpb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("AddARPNeighbors")
}

func (unimplemented) GetIPTables(context.Context, *agentpb.GetIPTablesRequest) (*agentpb.GetIPTablesResponse, error) {
	return notHere[agentpb.GetIPTablesResponse]("GetIPTables")
}

func (unimplemented) SetIPTables(context.Context, *agentpb.SetIPTablesRequest) (*agentpb.SetIPTablesResponse, error) {
	return notHere[agentpb.SetIPTablesResponse]("SetIPTables")
}

func (unimplemented) MemAgentMemcgSet(context.Context, *agentpb.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("MemAgentMemcgSet")
}

func (unimplemented) MemAgentCompactSet(context.Context, *agentpb.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("MemAgentCompactSet")
}

func (unimplemented) OnlineCPUMem(context.Context, *agentpb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("OnlineCPUMem")
}

func (unimplemented) MemHotplugByProbe(context.Context, *agentpb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("MemHotplugByProbe")
}

func (unimplemented) AddSwap(context.Context, *agentpb.AddSwapRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("AddSwap")
}

func (unimplemented) AddSwapPath(context.Context, *agentpb.AddSwapPathRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("AddSwapPath")
}

func (unimplemented) GetVolumeStats(context.Context, *agentpb.VolumeStatsRequest) (*agentpb.VolumeStatsResponse, error) {
	return notHere[agentpb.VolumeStatsResponse]("GetVolumeStats")
}

func (unimplemented) ResizeVolume(context.Context, *agentpb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("ResizeVolume")
}

func (unimplemented) SetPolicy(context.Context, *agentpb.SetPolicyRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("SetPolicy")
}
