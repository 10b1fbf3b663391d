// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// protocolVersion is what kata-agents answer to Version as grpc_version.
const protocolVersion = "0.0.1"

// health is grpc.Health.
type health struct{ a *Agent }

var _ agentpb.HealthService = (*health)(nil)

func (h *health) Check(context.Context, *agentpb.CheckRequest) (*agentpb.HealthCheckResponse, error) {
	return &agentpb.HealthCheckResponse{Status: agentpb.HealthCheckResponse_SERVING}, nil
}

func (h *health) Version(context.Context, *agentpb.CheckRequest) (*agentpb.VersionCheckResponse, error) {
	return &agentpb.VersionCheckResponse{GrpcVersion: protocolVersion, AgentVersion: h.a.cfg.Version}, nil
}

// GetGuestDetails tells what this agent can do. Memory is not hot plugged.
func (s *service) GetGuestDetails(context.Context, *agentpb.GuestDetailsRequest) (*agentpb.GuestDetailsResponse, error) {
	d := &agentpb.AgentDetails{
		Version:         s.a.cfg.Version,
		InitDaemon:      os.Getpid() == 1,
		SupportsSeccomp: seccomp.Enabled,
		StorageHandlers: storageDriverNames(),
		ExtraFeatures:   []string{string(extension.Rootfs), string(extension.Streams), string(extension.Pause)},
	}
	return &agentpb.GuestDetailsResponse{AgentDetails: d}, nil
}

// SetGuestDateTime sets the guest's clock.
func (s *service) SetGuestDateTime(_ context.Context, req *agentpb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	if req.Sec < 0 || req.Usec < 0 || req.Usec >= 1_000_000 {
		return empty(fmt.Errorf("%d.%06d is no time: %w", req.Sec, req.Usec, errdefs.ErrInvalidArgument))
	}
	if err := s.a.setClock(time.Unix(req.Sec, req.Usec*1000)); err != nil {
		return empty(fmt.Errorf("set the clock: %w", err))
	}
	return empty(nil)
}

func setClock(t time.Time) error {
	tv := unix.NsecToTimeval(t.UnixNano())
	return unix.Settimeofday(&tv)
}

// rndReseedCRNG is RNDRESEEDCRNG of linux/random.h: _IO('R', 0x07).
const rndReseedCRNG = 0x5207

// ReseedRandomDev mixes data into the kernel's random number generator.
func (s *service) ReseedRandomDev(_ context.Context, req *agentpb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return empty(fmt.Errorf("reseed: %w", err))
	}
	defer f.Close()
	if _, err := f.Write(req.Data); err != nil {
		return empty(fmt.Errorf("reseed: %w", err))
	}
	if err := unix.IoctlSetInt(int(f.Fd()), rndReseedCRNG, 0); err != nil {
		return empty(fmt.Errorf("reseed: %w", err))
	}
	return empty(nil)
}

// GetMetrics returns a few numbers about the agent in Prometheus' text format.
func (s *service) GetMetrics(context.Context, *agentpb.GetMetricsRequest) (*agentpb.Metrics, error) {
	states := map[ContainerState]int{}
	s.a.mu.Lock()
	list := make([]*container, 0, len(s.a.containers))
	for _, c := range s.a.containers {
		list = append(list, c)
	}
	s.a.mu.Unlock()
	for _, c := range list {
		c.mu.Lock()
		states[c.state]++
		c.mu.Unlock()
	}
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return nil, toGRPC(err)
	}
	var b strings.Builder
	b.WriteString("# HELP peerpod_agent_containers Containers of the pod by state.\n# TYPE peerpod_agent_containers gauge\n")
	for i, name := range containerStateNames {
		fmt.Fprintf(&b, "peerpod_agent_containers{state=%q} %d\n", strings.ToLower(name), states[ContainerState(i)])
	}
	b.WriteString("# HELP peerpod_agent_cpu_seconds_total Processor time of the agent.\n# TYPE peerpod_agent_cpu_seconds_total counter\n")
	fmt.Fprintf(&b, "peerpod_agent_cpu_seconds_total %.3f\n", time.Duration(ru.Utime.Nano()+ru.Stime.Nano()).Seconds())
	b.WriteString("# HELP peerpod_agent_max_resident_bytes Most memory the agent ever had resident.\n# TYPE peerpod_agent_max_resident_bytes gauge\n")
	fmt.Fprintf(&b, "peerpod_agent_max_resident_bytes %d\n", ru.Maxrss*1024)
	return &agentpb.Metrics{Metrics: b.String()}, nil
}

// family is an address's family in the protocol.
func family(ip net.IP) typespb.IPFamily {
	if ip.To4() != nil {
		return typespb.IPFamily_v4
	}
	return typespb.IPFamily_v6
}

// ListInterfaces lists the pod's interfaces.
func (s *service) ListInterfaces(context.Context, *agentpb.ListInterfacesRequest) (*agentpb.Interfaces, error) {
	h, err := s.a.podNetlink()
	if err != nil {
		return nil, toGRPC(err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, toGRPC(fmt.Errorf("list the pod's interfaces: %w", err))
	}
	out := &agentpb.Interfaces{}
	for _, l := range links {
		at := l.Attrs()
		i := &typespb.Interface{
			Device: at.Name, Name: at.Name, Mtu: uint64(at.MTU), HwAddr: at.HardwareAddr.String(), Type: l.Type(), RawFlags: at.RawFlags,
		}
		addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, toGRPC(fmt.Errorf("list the addresses of %s: %w", at.Name, err))
		}
		for _, addr := range addrs {
			ones, _ := addr.Mask.Size()
			i.IPAddresses = append(i.IPAddresses, &typespb.IPAddress{Family: family(addr.IP), Address: addr.IP.String(), Mask: fmt.Sprint(ones)})
		}
		out.Interfaces = append(out.Interfaces, i)
	}
	return out, nil
}

// ListRoutes lists the main routing table of the pod, both families.
func (s *service) ListRoutes(context.Context, *agentpb.ListRoutesRequest) (*agentpb.Routes, error) {
	h, err := s.a.podNetlink()
	if err != nil {
		return nil, toGRPC(err)
	}
	defer h.Close()
	out := &agentpb.Routes{}
	for fam, proto := range map[int]typespb.IPFamily{netlink.FAMILY_V4: typespb.IPFamily_v4, netlink.FAMILY_V6: typespb.IPFamily_v6} {
		routes, err := h.RouteList(nil, fam)
		if err != nil {
			if errors.Is(err, unix.EAFNOSUPPORT) {
				continue // a kernel without IPv6
			}
			return nil, toGRPC(fmt.Errorf("list the pod's routes: %w", err))
		}
		for _, r := range routes {
			one := &typespb.Route{Scope: uint32(r.Scope), Family: proto, Flags: uint32(r.Flags), Mtu: uint32(r.MTU)}
			if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
				one.Device = l.Attrs().Name
			}
			if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
				one.Dest = r.Dst.String()
			}
			if r.Gw != nil {
				one.Gateway = r.Gw.String()
			}
			if r.Src != nil {
				one.Source = r.Src.String()
			}
			out.Routes = append(out.Routes, one)
		}
	}
	return out, nil
}
