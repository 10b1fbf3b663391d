// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/forward"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/caa/sandbox"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/loopback"
	"github.com/kata-remote/kata-remote/netns/vxlan"
)

type podNetwork = podvmconfig.PodNetwork

// nodeNetwork is the kernel's network on this node, in the words of the records.
type nodeNetwork struct{}

// Inspect reads the pod's network. One interface is carried into the VM: the one
// with the default route, as the peer pods of others have it.
func (nodeNetwork) Inspect(ctx context.Context, path string) (podNetwork, error) {
	ifaces, err := netns.Inspect(ctx, path)
	if err != nil {
		return podNetwork{}, err
	}
	return describe(ifaces[0])
}

// describe puts an interface in the words of apf.json.
func describe(i netns.Interface) (podNetwork, error) {
	n := podNetwork{
		PodIP: i.Addrs[0], PodHWAddr: i.HWAddr.String(), Interface: i.Name, MTU: i.MTU,
		Routes: []podvmconfig.Route{}, Neighbors: []podvmconfig.Neighbor{},
	}
	if len(i.Addrs) > 1 {
		n.PodIPs = i.Addrs
	}
	if len(i.HWAddr) == 0 {
		return n, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(
			"interface %s has no hardware address, and only Ethernet can be carried into a VM", i.Name))
	}
	for _, r := range i.Routes {
		route := podvmconfig.Route{Dst: r.Dst.String(), Dev: i.Name, Protocol: r.Protocol, Scope: r.Scope}
		if r.Gateway.IsValid() {
			route.GW = r.Gateway.String()
		}
		if r.Protocol == "ra" {
			route.Protocol = "static" // a stock forwarder takes static, boot, dhcp and kernel
		}
		n.Routes = append(n.Routes, route)
	}
	for _, nb := range i.Neighbors {
		n.Neighbors = append(n.Neighbors, podvmconfig.Neighbor{
			IP: nb.IP.String(), HWAddr: nb.HWAddr.String(), Dev: i.Name, State: nb.State,
		})
	}
	return n, nil
}

func (nodeNetwork) Ensure(ctx context.Context, t sandbox.NodeTunnel) error {
	v, err := nodeTunnel(t)
	if err != nil {
		return err
	}
	if err := vxlan.EnsureNode(ctx, v); err != nil {
		return err
	}
	if err := loopback.Ensure(ctx, t.NetNS, forward.Port); err != nil {
		// A kernel without NAT: the pod lacks `kubectl port-forward` and nothing else.
		slog.Warn("port-forward to this pod will not work", logkey.Error, err)
	}
	return nil
}

func (nodeNetwork) Remove(ctx context.Context, t sandbox.NodeTunnel) error {
	v, err := nodeTunnel(t)
	if err != nil {
		return err
	}
	return errors.Join(vxlan.RemoveNode(ctx, v), loopback.Remove(ctx, t.NetNS))
}

func nodeTunnel(t sandbox.NodeTunnel) (vxlan.NodeTunnel, error) {
	hw, err := net.ParseMAC(t.Pod.PodHWAddr)
	if err != nil {
		return vxlan.NodeTunnel{}, fmt.Errorf("hardware address of the pod: %w", err)
	}
	return vxlan.NodeTunnel{
		NetNS: t.NetNS, Device: t.Device, VNI: t.VNI, Port: t.Port,
		Local: t.Local.Addr(), Remote: t.Remote,
		MTU:          min(t.Pod.MTU, t.MTU-vxlan.Overhead(t.Remote)),
		PodInterface: t.Pod.Interface, PodAddrs: t.Pod.Addrs(), PodHWAddr: hw,
	}, nil
}

// defaultUnderlay is this node's address on the interface of its default route.
func defaultUnderlay(ctx context.Context) (cloud.Underlay, error) {
	addr, mtu, err := netns.DefaultRoute(ctx)
	if err != nil {
		return cloud.Underlay{}, err
	}
	return cloud.Underlay{Local: addr, MTU: mtu}, nil
}
