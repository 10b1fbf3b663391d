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

// nodeNetwork is the kernel's network on this node, in the words of the records.
type nodeNetwork struct{}

// Inspect reads the pod's network, every interface of it that has an address.
func (nodeNetwork) Inspect(ctx context.Context, path string) (sandbox.PodNetworks, error) {
	pod, err := netns.Inspect(ctx, path)
	if err != nil {
		return sandbox.PodNetworks{}, err
	}
	out := sandbox.PodNetworks{LeftOut: pod.LeftOut}
	for _, i := range pod.Interfaces {
		n, err := describe(i)
		if err != nil {
			return out, err
		}
		out.Interfaces = append(out.Interfaces, n)
	}
	for _, r := range pod.Rules {
		out.Rules = append(out.Rules, podvmconfig.Rule{
			IPv6: r.IPv6, Priority: r.Priority, From: text(r.Src), To: text(r.Dst), IIF: r.IIF, OIF: r.OIF, Mark: r.Mark, Mask: r.Mask, Table: r.Table,
		})
	}
	return out, nil
}

// text is an address or prefix as text, "" for none.
func text[T interface {
	IsValid() bool
	String() string
}](v T) string {
	if !v.IsValid() {
		return ""
	}
	return v.String()
}

// describe puts an interface in the words of apf.json.
func describe(i netns.Interface) (podvmconfig.PodNetwork, error) {
	n := podvmconfig.PodNetwork{
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
		route := podvmconfig.Route{
			Dst: r.Dst.String(), GW: text(r.Gateway), Dev: i.Name, Protocol: r.Protocol, Scope: r.Scope,
			Src: text(r.Src), Metric: r.Metric, Table: r.Table,
		}
		if r.Protocol == "ra" {
			route.Protocol = "static" // a stock forwarder takes static, boot, dhcp and kernel
		}
		if r.Table == 0 {
			n.Routes = append(n.Routes, route)
		} else {
			n.TableRoutes = append(n.TableRoutes, route)
		}
	}
	for _, nb := range i.Neighbors {
		n.Neighbors = append(n.Neighbors, podvmconfig.Neighbor{
			IP: nb.IP.String(), HWAddr: nb.HWAddr.String(), Dev: i.Name, State: nb.State,
		})
	}
	return n, nil
}

func (nodeNetwork) Ensure(ctx context.Context, t sandbox.NodeTunnels) error {
	v, err := nodeTunnels(t)
	if err != nil {
		return err
	}
	if err := vxlan.EnsureNode(ctx, v...); err != nil {
		return err
	}
	if err := loopback.Ensure(ctx, t.NetNS, forward.Port); err != nil {
		// A kernel without NAT: the pod lacks `kubectl port-forward` and nothing else.
		slog.Warn("port-forward to this pod will not work", logkey.Error, err)
	}
	return nil
}

func (nodeNetwork) Remove(ctx context.Context, t sandbox.NodeTunnels) error {
	v, err := nodeTunnels(t)
	if err != nil {
		return err
	}
	return errors.Join(vxlan.RemoveNode(ctx, v...), loopback.Remove(ctx, t.NetNS))
}

func nodeTunnels(pod sandbox.NodeTunnels) ([]vxlan.NodeTunnel, error) {
	var out []vxlan.NodeTunnel
	for _, t := range pod.Tunnels {
		hw, err := net.ParseMAC(t.Pod.PodHWAddr)
		if err != nil {
			return nil, fmt.Errorf("hardware address of the pod's %s: %w", t.Pod.Interface, err)
		}
		out = append(out, vxlan.NodeTunnel{
			NetNS: pod.NetNS, Device: t.Device, VNI: t.VNI, Port: t.Port,
			Local: t.Local.Addr(), Remote: pod.Remote,
			MTU:          vxlan.CarriedMTU(t.Pod.MTU, t.MTU, pod.Remote, t.Pod.Addrs()),
			PodInterface: t.Pod.Interface, PodAddrs: t.Pod.Addrs(), PodHWAddr: hw,
		})
	}
	return out, nil
}

// defaultUnderlay is this node's address on the interface of its default route.
func defaultUnderlay(ctx context.Context) (cloud.Underlay, error) {
	addr, mtu, err := netns.DefaultRoute(ctx)
	if err != nil {
		return cloud.Underlay{}, err
	}
	return cloud.Underlay{Local: addr, MTU: mtu}, nil
}
