// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// StatePermanent is the state of every Neighbor.
const StatePermanent = "permanent"

var families = []int{unix.AF_INET, unix.AF_INET6}

// Route protocols that a CNI plugin, the kernel or a DHCP client gives its routes;
// those of routing daemons are not the pod's to carry. Names as in iproute2.
var protocolNames = map[int]string{
	unix.RTPROT_KERNEL: "kernel",
	unix.RTPROT_BOOT:   "boot",
	unix.RTPROT_STATIC: "static",
	unix.RTPROT_DHCP:   "dhcp",
	unix.RTPROT_RA:     "ra",
}

var scopeNames = map[int]string{
	unix.RT_SCOPE_UNIVERSE: "universe",
	unix.RT_SCOPE_SITE:     "site",
	unix.RT_SCOPE_LINK:     "link",
	unix.RT_SCOPE_HOST:     "host",
	unix.RT_SCOPE_NOWHERE:  "nowhere",
}

// dumpAttempts bounds the repetition of a dump that the kernel says was interrupted
// by a change in the middle (NLM_F_DUMP_INTR). A namespace that changes during five
// dumps in a row is being set up by somebody else; then the error stands.
const dumpAttempts = 5

// retryDump repeats list while it answers that the dump was interrupted.
func retryDump[T any](list func() ([]T, error)) ([]T, error) {
	var out []T
	var err error
	for range dumpAttempts {
		out, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return out, err
}

// linkLocal6 reports an IPv6 link-local address. IPv4's 169.254.0.0/16 is not meant:
// some CNIs give pods such addresses.
func linkLocal6(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() }

// prefix converts the netlink library's form, IPv4-mapped addresses unmapped.
func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || (ones == 0 && bits == 0) {
		return netip.Prefix{}, false
	}
	p := netip.PrefixFrom(a.Unmap(), ones)
	return p, p.IsValid()
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
