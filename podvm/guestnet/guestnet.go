// SPDX-License-Identifier: Apache-2.0

// Package guestnet makes the pod VM's networks: the VM's own interface, over which
// the adaptor and the tunnels' packets come, and the pod's interfaces, each the guest end
// of a tunnel, in a network namespace of their own. docs/network.md has a drawing.
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

// Tunnels translates the pod's networks out of the pod VM's configuration.
// InvalidArgument names the key.
func Tunnels(netNS string, c *podvmconfig.Config) ([]vxlan.GuestTunnel, error) {
	var out []vxlan.GuestTunnel
	for i, n := range c.Networks() {
		key := "pod-network"
		if i > 0 {
			key = podvmconfig.MoreKey(i - 1)
		}
		t, err := tunnel(netNS, &n)
		if err != nil {
			return nil, fmt.Errorf("%s.%w", key, err)
		}
		// The name the device has in messages and until it has its final one.
		t.Device = fmt.Sprintf("vxlan%d", i)
		out = append(out, t)
	}
	return out, nil
}

func tunnel(netNS string, n *podvmconfig.PodNetwork) (vxlan.GuestTunnel, error) {
	t := vxlan.GuestTunnel{
		NetNS:  netNS,
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
	for _, list := range []struct {
		key    string
		routes []podvmconfig.Route
	}{{"routes", n.Routes}, {"table-routes", n.TableRoutes}} {
		for i, r := range list.routes {
			if r.Dev != "" && r.Dev != n.Interface {
				continue // of another interface of the pod, which has its own network
			}
			one, err := route(fmt.Sprintf("%s[%d].", list.key, i), r)
			if err != nil {
				return t, err
			}
			t.Pod.Routes = append(t.Pod.Routes, one)
		}
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

func route(key string, r podvmconfig.Route) (netns.Route, error) {
	out := netns.Route{Protocol: r.Protocol, Scope: r.Scope, Metric: r.Metric, Table: r.Table}
	var err error
	if out.Dst, err = netip.ParsePrefix(r.Dst); err != nil {
		return out, bad(key+"dst", "%q is not a prefix", r.Dst)
	}
	for _, a := range []struct {
		key, value string
		to         *netip.Addr
	}{{"gw", r.GW, &out.Gateway}, {"src", r.Src, &out.Src}} {
		if a.value == "" {
			continue
		}
		if *a.to, err = netip.ParseAddr(a.value); err != nil {
			return out, bad(key+a.key, "%q is not an address", a.value)
		}
	}
	return out, nil
}

// Rules translates the pod's routing rules. InvalidArgument names the key.
func Rules(c *podvmconfig.Config) ([]netns.Rule, error) {
	var out []netns.Rule
	for i, r := range c.Rules {
		one := netns.Rule{IPv6: r.IPv6, Priority: r.Priority, IIF: r.IIF, OIF: r.OIF, Mark: r.Mark, Mask: r.Mask, Table: r.Table}
		for _, a := range []struct {
			key, value string
			to         *netip.Prefix
		}{{"from", r.From, &one.Src}, {"to", r.To, &one.Dst}} {
			if a.value == "" {
				continue
			}
			p, err := netip.ParsePrefix(a.value)
			if err != nil || p.Addr().Is6() != r.IPv6 {
				return nil, bad(fmt.Sprintf("rules[%d].%s", i, a.key), "%q is not a prefix of the rule's IP version", a.value)
			}
			*a.to = p
		}
		out = append(out, one)
	}
	return out, nil
}

func bad(key, format string, a ...any) error {
	return fmt.Errorf("%s %s: %w", key, fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

// Ensure makes the pod's network namespace at netNS, unless it is there, and in it the
// guest ends of the tunnels, with the pod's routes and rules. It may be repeated.
//
// The devices are all that the namespace has besides lo. No route, veth or bridge leads
// from it to the VM's own network: what the pod sends leaves by a tunnel, to the node.
func Ensure(ctx context.Context, netNS string, c *podvmconfig.Config) error {
	tunnels, err := Tunnels(netNS, c)
	if err != nil {
		return err
	}
	rules, err := Rules(c)
	if err != nil {
		return err
	}
	if err := netns.Create(netNS); err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
		return err
	}
	if err := vxlan.EnsureGuest(ctx, tunnels...); err != nil || len(rules) == 0 {
		return err
	}
	return vxlan.EnsureGuestRules(ctx, netNS, rules)
}
