// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// The calls about the pod's network; podnet has what they do.

func (s *service) UpdateInterface(_ context.Context, req *agentpb.UpdateInterfaceRequest) (*typespb.Interface, error) {
	return reply(s.a.net.UpdateInterface(req.Interface))
}

func (s *service) UpdateRoutes(_ context.Context, req *agentpb.UpdateRoutesRequest) (*agentpb.Routes, error) {
	list, err := s.a.net.UpdateRoutes(req.GetRoutes().GetRoutes())
	return reply(&agentpb.Routes{Routes: list}, err)
}

func (s *service) ListInterfaces(context.Context, *agentpb.ListInterfacesRequest) (*agentpb.Interfaces, error) {
	list, err := s.a.net.Interfaces()
	return reply(&agentpb.Interfaces{Interfaces: list}, err)
}

func (s *service) ListRoutes(context.Context, *agentpb.ListRoutesRequest) (*agentpb.Routes, error) {
	list, err := s.a.net.Routes()
	return reply(&agentpb.Routes{Routes: list}, err)
}

func (s *service) AddARPNeighbors(_ context.Context, req *agentpb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return empty(s.a.net.AddNeighbors(req.GetNeighbors().GetARPNeighbors()))
}

func (s *service) GetIPTables(ctx context.Context, req *agentpb.GetIPTablesRequest) (*agentpb.GetIPTablesResponse, error) {
	data, err := s.a.net.IPTables(ctx, req.IsIpv6)
	return reply(&agentpb.GetIPTablesResponse{Data: data}, err)
}

func (s *service) SetIPTables(ctx context.Context, req *agentpb.SetIPTablesRequest) (*agentpb.SetIPTablesResponse, error) {
	data, err := s.a.net.SetIPTables(ctx, req.IsIpv6, req.Data)
	return reply(&agentpb.SetIPTablesResponse{Data: data}, err)
}
