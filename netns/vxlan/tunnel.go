// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/netns"
)

const (
	// OverheadIPv4 is what the tunnel adds to an Ethernet payload over an IPv4
	// underlay, in bytes: inner Ethernet 14, VXLAN 8, UDP 8, IPv4 20 (RFC 7348 §5).
	OverheadIPv4 = 50
	// OverheadIPv6 is the same over IPv6, whose header has 40 bytes.
	OverheadIPv6 = 70

	maxVNI  = 1<<24 - 1
	maxName = 15 // IFNAMSIZ less its final NUL

	minMTU4 = 576  // what every IPv4 host must take (RFC 791)
	minMTU6 = 1280 // below this the kernel turns IPv6 off (RFC 8200 §5)
	maxMTU  = 65535 - OverheadIPv6
)

// Overhead returns by how many bytes the tunnel's MTU must be smaller than the
// underlay's when the far end is remote: 50 for IPv4, 70 for IPv6.
func Overhead(remote netip.Addr) int {
	if remote.Unmap().Is4() {
		return OverheadIPv4
	}
	return OverheadIPv6
}

// CarriedMTU returns the MTU of a tunnel in bytes: the smaller of the CNI's and the
// underlay's less Overhead. With IPv6 among the pod's addresses it is not less than IPv6
// asks of a link, as long as the CNI's is not: an underlay of IPv4 fragments the tunnel's
// largest packets then. One of IPv6 does not (ip6_fragment wants skb->ignore_df, Linux
// 6.18), and is too small for such a pod.
func CarriedMTU(cni, underlay int, remote netip.Addr, addrs []netip.Prefix) int {
	mtu := min(cni, underlay-Overhead(remote))
	ipv6 := slices.ContainsFunc(addrs, func(a netip.Prefix) bool { return a.Addr().Unmap().Is6() })
	if ipv6 && remote.Unmap().Is4() {
		return max(mtu, min(cni, minMTU6))
	}
	return mtu
}

// NodeTunnel is the wanted state of a tunnel's node end. It is plain data: the
// caller records it before EnsureNode and hands the same to RemoveNode.
type NodeTunnel struct {
	// NetNS is the path of the pod's network namespace.
	NetNS string
	// Device is the name of the VXLAN device, unique on the node, 1 to 15 bytes.
	Device string
	// VNI is 1 to 2²⁴−1 and unique on the node for its Port.
	VNI uint32
	// Port is the UDP port of both ends.
	Port uint16
	// Local is the node's address, Remote the pod VM's. Of one family.
	Local, Remote netip.Addr
	// MTU is the largest IP packet the tunnel carries, in bytes: see CarriedMTU.
	MTU int
	// PodInterface is the CNI's interface in NetNS.
	PodInterface string
	// PodAddrs are the addresses of PodInterface; they tell which IP versions need
	// path MTU handling.
	PodAddrs []netip.Prefix
	// PodHWAddr is the MAC address of PodInterface and of the interface in the VM.
	PodHWAddr net.HardwareAddr
}

// Validate returns every problem of t at once, as InvalidArgument. Ensure calls it.
func (t NodeTunnel) Validate() error {
	errs := []error{
		checkNetNS(t.NetNS),
		checkName("device", t.Device),
		checkName("pod interface", t.PodInterface),
		checkEnds(t.VNI, t.Port, t.Remote),
		checkMTU(t.MTU, t.PodAddrs),
		checkHWAddr(t.PodHWAddr),
	}
	switch {
	case !t.Local.IsValid():
		errs = append(errs, invalid("local address is missing"))
	case t.Local.Unmap().Is4() != t.Remote.Unmap().Is4():
		errs = append(errs, invalid("local address %s and remote address %s are not of one family", t.Local, t.Remote))
	}
	if t.Device == t.PodInterface {
		errs = append(errs, invalid("device and pod interface have the same name %q", t.Device))
	}
	return errors.Join(errs...)
}

// validateNode checks the tunnels of one pod.
func validateNode(ts []NodeTunnel) error {
	if len(ts) == 0 {
		return invalid("a pod has at least one tunnel")
	}
	var errs []error
	for i, t := range ts {
		errs = append(errs, t.Validate())
		if t.NetNS != ts[0].NetNS {
			errs = append(errs, invalid("tunnels of two network namespaces, %s and %s, at once", ts[0].NetNS, t.NetNS))
		}
		for _, o := range ts[:i] {
			if o.Device == t.Device || o.PodInterface == t.PodInterface || (o.VNI == t.VNI && o.Port == t.Port) {
				errs = append(errs, invalid("tunnels %s (VNI %d, %s) and %s (VNI %d, %s) have something in common",
					o.Device, o.VNI, o.PodInterface, t.Device, t.VNI, t.PodInterface))
			}
		}
	}
	return errors.Join(errs...)
}

// GuestTunnel is the wanted state of a tunnel's guest end.
type GuestTunnel struct {
	// NetNS is the path of the pod's namespace in the VM; the caller has made it.
	NetNS string
	// Device is the name the device bears while it is made, before it gets Pod.Name,
	// when the caller's namespace has an interface of that name: 1 to 15 bytes, in use
	// neither there nor in NetNS.
	Device string
	// VNI and Port are those of the node end.
	VNI  uint32
	Port uint16
	// Remote is the worker node's address.
	Remote netip.Addr
	// Pod is the CNI's interface as Inspect found it on the node: the name, MAC,
	// MTU, addresses, routes and neighbours that the pod must see.
	Pod netns.Interface
}

// Validate returns every problem of t at once, as InvalidArgument. Ensure calls it.
func (t GuestTunnel) Validate() error {
	errs := []error{
		checkNetNS(t.NetNS),
		checkName("device", t.Device),
		checkName("pod interface", t.Pod.Name),
		checkEnds(t.VNI, t.Port, t.Remote),
		checkMTU(t.Pod.MTU, t.Pod.Addrs),
		checkHWAddr(t.Pod.HWAddr),
	}
	for _, r := range t.Pod.Routes {
		if _, err := routeOf(r); err != nil {
			errs = append(errs, err)
		}
	}
	for _, n := range t.Pod.Neighbors {
		if !n.IP.IsValid() || len(n.HWAddr) == 0 {
			errs = append(errs, invalid("neighbour %s %s: address or MAC is missing", n.IP, n.HWAddr))
		}
	}
	return errors.Join(errs...)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func checkNetNS(path string) error {
	if path == "" {
		return invalid("path of the pod's network namespace is missing")
	}
	return nil
}

func checkName(what, name string) error {
	if name == "" || len(name) > maxName {
		return invalid("%s name %q must have 1 to %d bytes", what, name, maxName)
	}
	return nil
}

func checkEnds(vni uint32, port uint16, remote netip.Addr) error {
	var errs []error
	if vni == 0 || vni > maxVNI {
		errs = append(errs, invalid("VNI %d is not in 1 to %d", vni, maxVNI))
	}
	if port == 0 {
		errs = append(errs, invalid("UDP port is missing"))
	}
	if !remote.IsValid() || remote.IsUnspecified() || remote.IsMulticast() {
		errs = append(errs, invalid("remote address %s is not a host's", remote))
	}
	return errors.Join(errs...)
}

func checkMTU(mtu int, addrs []netip.Prefix) error {
	if len(addrs) == 0 {
		return invalid("the pod has no address")
	}
	low := minMTU4
	for _, a := range addrs {
		if !a.IsValid() {
			return invalid("a pod address is not valid")
		}
		if a.Addr().Is6() {
			low = minMTU6
		}
	}
	if mtu < low || mtu > maxMTU {
		return invalid("MTU %d is not in %d to %d", mtu, low, maxMTU)
	}
	return nil
}

func checkHWAddr(a net.HardwareAddr) error {
	if len(a) != 6 || a[0]&1 != 0 {
		return invalid("MAC address %q is not a host's Ethernet address", a)
	}
	return nil
}
