// SPDX-License-Identifier: Apache-2.0

// Package podnet is the pod's network as the calls of the agent's protocol see it:
// interfaces, routes, neighbours and packet filter of the pod's network namespace.
//
// The guest end of the tunnel is set up before the agent answers, so a runtime that
// only runs pods changes nothing here. What a call asks for is a wanted state: what is
// so already is left alone, and connections over it live on.
package podnet

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Network is a pod's network. Its methods may be called concurrently.
type Network struct {
	path  string
	tools []string   // directories with iptables' programs
	mu    sync.Mutex // serialises changes
}

// New returns the network of the namespace at path. Empty: the caller's own, which is
// shown and never changed.
func New(path string) *Network { return &Network{path: path, tools: toolDirs} }

// open opens a netlink socket in the namespace. Close it. It is of the one family
// that is needed: a guest may lack the modules of the others.
func (n *Network) open() (*netlink.Handle, error) {
	if n.path == "" {
		return netlink.NewHandle(unix.NETLINK_ROUTE)
	}
	ns, err := netns.GetFromPath(n.path)
	if err != nil {
		return nil, fmt.Errorf("open the pod's network namespace: %w", err)
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
}

// change opens a socket to change something with. FailedPrecondition: there is no
// network that is the pod's alone.
func (n *Network) change() (*netlink.Handle, error) {
	if n.path == "" {
		return nil, fmt.Errorf("the pod has no network namespace of its own, and the guest's is not changed: %w", errdefs.ErrFailedPrecondition)
	}
	return n.open()
}

// family is an address's family in the protocol.
func family(ip net.IP) typespb.IPFamily {
	if ip.To4() != nil {
		return typespb.IPFamily_v4
	}
	return typespb.IPFamily_v6
}

// Interfaces lists the pod's interfaces.
func (n *Network) Interfaces() ([]*typespb.Interface, error) {
	h, err := n.open()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the pod's interfaces: %w", err)
	}
	var out []*typespb.Interface
	for _, l := range links {
		i, err := describe(h, l)
		if err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	return out, nil
}

func describe(h *netlink.Handle, l netlink.Link) (*typespb.Interface, error) {
	at := l.Attrs()
	i := &typespb.Interface{
		Device: at.Name, Name: at.Name, Mtu: uint64(at.MTU), HwAddr: at.HardwareAddr.String(), Type: l.Type(), RawFlags: at.RawFlags,
	}
	addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", at.Name, err)
	}
	for _, addr := range addrs {
		ones, _ := addr.Mask.Size()
		i.IPAddresses = append(i.IPAddresses, &typespb.IPAddress{Family: family(addr.IP), Address: addr.IP.String(), Mask: fmt.Sprint(ones)})
	}
	return i, nil
}

// Stats counts the traffic of the pod's interfaces but lo. Nothing where the network
// is not the pod's alone.
func (n *Network) Stats() ([]*agentpb.NetworkStats, error) {
	if n.path == "" {
		return nil, nil
	}
	h, err := n.open()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the pod's interfaces: %w", err)
	}
	var out []*agentpb.NetworkStats
	for _, l := range links {
		at := l.Attrs()
		if at.Name == "lo" || at.Statistics == nil {
			continue
		}
		s := at.Statistics
		out = append(out, &agentpb.NetworkStats{
			Name:    at.Name,
			RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
			TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
		})
	}
	return out, nil
}

// UpdateInterface gives the interface with the request's hardware address the
// request's name, MTU, addresses and the flag NOARP, brings it up, and returns it as
// it then is. An empty name and MTU 0 change nothing. "Link not found", which runtimes
// in the field know and try again after: there is none (kata-containers 4.1,
// src/agent/src/netlink.rs).
func (n *Network) UpdateInterface(req *typespb.Interface) (*typespb.Interface, error) {
	mac, err := net.ParseMAC(req.GetHwAddr())
	if err != nil {
		return nil, fmt.Errorf("interface %q: hwAddr %q is not a MAC address: %w", req.GetName(), req.GetHwAddr(), errdefs.ErrInvalidArgument)
	}
	want, err := addresses(req)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.change()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	link, err := byMAC(h, mac)
	if err != nil {
		return nil, err
	}
	if err := rename(h, link, req.Name); err != nil {
		return nil, err
	}
	if req.Mtu != 0 {
		if err := h.LinkSetMTU(link, int(req.Mtu)); err != nil {
			return nil, fmt.Errorf("set mtu %d of interface %s: %w", req.Mtu, link.Attrs().Name, classed(err))
		}
	}
	if req.RawFlags&unix.IFF_NOARP != 0 {
		if err := h.LinkSetARPOff(link); err != nil {
			return nil, fmt.Errorf("set NOARP of interface %s: %w", link.Attrs().Name, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring interface %s up: %w", link.Attrs().Name, err)
	}
	if err := setAddresses(h, link, want); err != nil {
		return nil, err
	}
	if link, err = h.LinkByIndex(link.Attrs().Index); err != nil {
		return nil, fmt.Errorf("look at interface %s: %w", req.Name, err)
	}
	return describe(h, link)
}

// classed adds the class to an error of the kernel about what it was asked for.
func classed(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

func addresses(req *typespb.Interface) ([]*netlink.Addr, error) {
	var out []*netlink.Addr
	for _, a := range req.IPAddresses {
		addr, err := netlink.ParseAddr(a.Address + "/" + a.Mask)
		if err != nil {
			return nil, fmt.Errorf("interface %q: %s/%s is not an address: %w", req.Name, a.Address, a.Mask, errdefs.ErrInvalidArgument)
		}
		if addr.IP.To4() == nil {
			// The runtime assigned the address; waiting for duplicates only delays.
			addr.Flags = unix.IFA_F_NODAD
		}
		out = append(out, addr)
	}
	return out, nil
}

func byMAC(h *netlink.Handle, mac net.HardwareAddr) (netlink.Link, error) {
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the pod's interfaces: %w", err)
	}
	for _, l := range links {
		if l.Attrs().HardwareAddr.String() == mac.String() {
			return l, nil
		}
	}
	return nil, fmt.Errorf("Link not found: none of the pod's %d interfaces has the address %s", len(links), mac)
}

// rename gives an interface a name. One that is up is taken down for it, as older
// kernels demand (Linux before 6.2, dev_change_name), which takes its routes.
func rename(h *netlink.Handle, link netlink.Link, name string) error {
	if name == "" || link.Attrs().Name == name {
		return nil
	}
	if _, err := h.LinkByName(name); err == nil {
		return fmt.Errorf("rename interface %s: another one has the name %s: %w", link.Attrs().Name, name, errdefs.ErrAlreadyExists)
	}
	if err := h.LinkSetDown(link); err != nil {
		return fmt.Errorf("take interface %s down: %w", link.Attrs().Name, err)
	}
	if err := h.LinkSetName(link, name); err != nil {
		return fmt.Errorf("rename interface %s to %s: %w", link.Attrs().Name, name, classed(err))
	}
	link.Attrs().Name = name
	return nil
}

// setAddresses adds the addresses that are missing and removes those that are not
// wanted, but for the link-local ones of IPv6, which the kernel gave.
func setAddresses(h *netlink.Handle, link netlink.Link, want []*netlink.Addr) error {
	if err := addMissing(h, link, want); err != nil {
		return err
	}
	have, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range have {
		if hasAddress(want, a) || a.IP.To4() == nil && a.IP.IsLinkLocalUnicast() {
			continue
		}
		// It may be gone: the second address of a network goes with the first.
		if err := h.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from interface %s: %w", a.IPNet, link.Attrs().Name, err)
		}
	}
	// And a wanted one may have gone that way.
	return addMissing(h, link, want)
}

// addMissing leaves an address that is there as it is, with its routes or without.
func addMissing(h *netlink.Handle, link netlink.Link, want []*netlink.Addr) error {
	have, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range want {
		if slices.ContainsFunc(have, func(b netlink.Addr) bool { return hasAddress([]*netlink.Addr{a}, b) }) {
			continue
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("add address %s to interface %s: %w", a.IPNet, link.Attrs().Name, classed(err))
		}
	}
	return nil
}

func hasAddress(list []*netlink.Addr, a netlink.Addr) bool {
	return slices.ContainsFunc(list, func(b *netlink.Addr) bool { return a.IPNet.String() == b.IPNet.String() })
}

// AddNeighbors adds entries to the pod's neighbour tables, permanent ones unless they
// say otherwise.
func (n *Network) AddNeighbors(in []*typespb.ARPNeighbor) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.change()
	if err != nil {
		return err
	}
	defer h.Close()
	for _, e := range in {
		ip := net.ParseIP(e.GetToIPAddress().GetAddress())
		if ip == nil {
			return fmt.Errorf("neighbor %q is not an IP address: %w", e.GetToIPAddress().GetAddress(), errdefs.ErrInvalidArgument)
		}
		link, err := byName(h, e.Device)
		if err != nil {
			return fmt.Errorf("neighbor %s: %w", ip, err)
		}
		neigh := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: ip, State: int(e.State), Flags: int(e.Flags), Family: netlink.FAMILY_V6}
		if ip.To4() != nil {
			neigh.Family = netlink.FAMILY_V4
		}
		if neigh.State == 0 {
			neigh.State = netlink.NUD_PERMANENT
		}
		if e.Lladdr != "" {
			if neigh.HardwareAddr, err = net.ParseMAC(e.Lladdr); err != nil {
				return fmt.Errorf("neighbor %s: lladdr %q is not a MAC address: %w", ip, e.Lladdr, errdefs.ErrInvalidArgument)
			}
		}
		if err := h.NeighSet(neigh); err != nil {
			return fmt.Errorf("add neighbor %s to interface %s: %w", ip, e.Device, classed(err))
		}
	}
	return nil
}

func byName(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, fmt.Errorf("Link not found: the pod has no interface %q", name)
	}
	return link, err
}
