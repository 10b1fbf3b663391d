// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// unimplemented answers the calls of AgentService that this agent does not have:
// those that plug memory, processors, swap or larger disks into a machine, whose size
// the cloud has fixed, and those that tune the memory agent, a daemon of another guest.
// None is sent to the guest of a remote hypervisor. service embeds it.
type unimplemented struct{}

func notHere[T any](rpc string) (*T, error) {
	return nil, toGRPC(fmt.Errorf("%s: this agent does not have the call: %w", rpc, errdefs.ErrNotImplemented))
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

func (unimplemented) ResizeVolume(context.Context, *agentpb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return notHere[emptypb.Empty]("ResizeVolume")
}
