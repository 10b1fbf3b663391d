// SPDX-License-Identifier: Apache-2.0

// Package guestnet makes the pod VM's networks: the VM's own interface, over which
// the adaptor and the tunnel's packets come, and the pod's interface, which is the
// guest end of the tunnel in a network namespace of its own.
package guestnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/vxlan"
)

// device is the name the tunnel has in messages and until it has its final one.
const device = "vxlan0"

// Tunnel translates the pod's network out of the pod VM's configuration.
// InvalidArgument names the key.
func Tunnel(netNS string, n *podvmconfig.PodNetwork) (vxlan.GuestTunnel, error) {
	t := vxlan.GuestTunnel{
		NetNS:  netNS,
		Device: device,
		VNI:    n.VXLANID,
		Port:   n.VXLANPort,
		Remote: n.WorkerNodeIP.Addr(),
		Pod:    netns.Interface{Name: n.Interface, MTU: n.MTU, Addrs: n.Addrs()},
	}
	hw, err := net.ParseMAC(n.PodHWAddr)
	if err != nil {
		return t, bad("pod-hw-addr", "%q is not a MAC address", n.PodHWAddr)
	}
	t.Pod.HWAddr = hw
	for i, r := range n.Routes {
		key := fmt.Sprintf("routes[%d].", i)
		if r.Dev != "" && r.Dev != n.Interface {
			continue // of another interface of the pod, which the tunnel does not carry
		}
		route := netns.Route{Protocol: r.Protocol, Scope: r.Scope}
		if route.Dst, err = netip.ParsePrefix(r.Dst); err != nil {
			return t, bad(key+"dst", "%q is not a prefix", r.Dst)
		}
		if r.GW != "" {
			if route.Gateway, err = netip.ParseAddr(r.GW); err != nil {
				return t, bad(key+"gw", "%q is not an address", r.GW)
			}
		}
		t.Pod.Routes = append(t.Pod.Routes, route)
	}
	for i, e := range n.Neighbors {
		key := fmt.Sprintf("neighbors[%d].", i)
		if e.Dev != "" && e.Dev != n.Interface {
			continue
		}
		neigh := netns.Neighbor{State: e.State}
		if neigh.IP, err = netip.ParseAddr(e.IP); err != nil {
			return t, bad(key+"ip", "%q is not an address", e.IP)
		}
		if neigh.HWAddr, err = net.ParseMAC(e.HWAddr); err != nil {
			return t, bad(key+"hw-addr", "%q is not a MAC address", e.HWAddr)
		}
		t.Pod.Neighbors = append(t.Pod.Neighbors, neigh)
	}
	return t, nil
}

func bad(key, format string, a ...any) error {
	return fmt.Errorf("pod-network.%s %s: %w", key, fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

// Ensure makes the pod's network namespace at netNS, unless it is there, and the
// guest end of the tunnel in it. It may be repeated.
func Ensure(ctx context.Context, netNS string, n *podvmconfig.PodNetwork) error {
	t, err := Tunnel(netNS, n)
	if err != nil {
		return err
	}
	if err := netns.Create(netNS); err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
		return err
	}
	return vxlan.EnsureGuest(ctx, t)
}
