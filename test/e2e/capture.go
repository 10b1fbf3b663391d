// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/test/cloudbed"
)

// Capture counts, by kind, what passes a device of the node.
type Capture struct {
	fd   int
	stop [2]int // pipe: closed to end the reader
	done chan struct{}

	mu      sync.Mutex // guards the fields below
	tunnel  int        // UDP to or from the tunnel's port
	agent   int        // TCP to or from 15150
	cloud   int        // what a machine asks of its cloud: metadata, DHCP
	local   int        // ARP and neighbour discovery: how the two find each other
	strange []string   // anything else, at most a few
	others  int
}

// maxStrange bounds what is kept of unexpected packets.
const maxStrange = 5

// NewCapture starts counting on a device.
func NewCapture(device string) (*Capture, error) {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return nil, fmt.Errorf("capture on %s: %w", device, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	c := &Capture{fd: fd, done: make(chan struct{})}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Attrs().Index}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("capture on %s: %w", device, err)
	}
	if err := unix.Pipe2(c.stop[:], unix.O_CLOEXEC); err != nil {
		unix.Close(fd)
		return nil, err
	}
	go c.run()
	return c, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *Capture) run() {
	defer close(c.done)
	buf := make([]byte, 256)
	for {
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}, {Fd: int32(c.stop[0]), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if n, _, err := unix.Recvfrom(c.fd, buf, unix.MSG_DONTWAIT); err == nil {
			c.count(buf[:n])
		}
	}
}

// Stop ends counting and frees the socket.
func (c *Capture) Stop() {
	unix.Close(c.stop[1])
	<-c.done
	unix.Close(c.stop[0])
	unix.Close(c.fd)
}

// TunnelPort and ForwarderPort are what a pod VM and its node speak on.
const (
	TunnelPort    = 9000
	ForwarderPort = 15150
)

// Ports of DHCP (RFC 2131).
const (
	dhcpServer = 67
	dhcpClient = 68
)

func (c *Capture) count(frame []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch kind, what := classify(frame); kind {
	case kindTunnel:
		c.tunnel++
	case kindAgent:
		c.agent++
	case kindLocal:
		c.local++
	case kindCloud:
		c.cloud++
	default:
		c.others++
		if len(c.strange) < maxStrange {
			c.strange = append(c.strange, what)
		}
	}
}

type kind int

const (
	kindOther kind = iota
	kindTunnel
	kindAgent
	kindLocal
	kindCloud
)

// classify tells what an Ethernet frame is, and describes it.
func classify(f []byte) (kind, string) {
	if len(f) < 14 {
		return kindOther, fmt.Sprintf("%d bytes", len(f))
	}
	switch p := f[14:]; binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_ARP:
		return kindLocal, "ARP"
	case unix.ETH_P_IP:
		if len(p) < 20 {
			break
		}
		src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		return transport(p[9], p[int(p[0]&0xf)*4:], src, dst)
	case unix.ETH_P_IPV6:
		if len(p) < 40 {
			break
		}
		src, dst := netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
		// Link-local traffic of a device that comes up: neighbour discovery,
		// multicast listener reports (behind a hop-by-hop header).
		if (src.IsLinkLocalUnicast() || src.IsUnspecified()) && (p[6] == unix.IPPROTO_ICMPV6 || p[6] == 0) {
			return kindLocal, "ICMPv6"
		}
		return transport(p[6], p[40:], src, dst)
	}
	return kindOther, fmt.Sprintf("EtherType %#04x, %d bytes", binary.BigEndian.Uint16(f[12:]), len(f))
}

// ofCloud tells the addresses at which clouds listen to their machines.
func ofCloud(a netip.Addr) bool { return a == emulation.MetadataAddr || a == cloudbed.WireServer }

func transport(proto byte, p []byte, src, dst netip.Addr) (kind, string) {
	if len(p) >= 4 {
		sport, dport := binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])
		what := fmt.Sprintf("protocol %d, %v to %v", proto, netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport))
		switch {
		case proto == unix.IPPROTO_UDP && dport == TunnelPort:
			return kindTunnel, what
		case proto == unix.IPPROTO_TCP && (sport == ForwarderPort || dport == ForwarderPort):
			return kindAgent, what
		case proto == unix.IPPROTO_TCP && (sport == 80 && ofCloud(src) || dport == 80 && ofCloud(dst)),
			proto == unix.IPPROTO_UDP && (sport == dhcpServer && dport == dhcpClient || sport == dhcpClient && dport == dhcpServer):
			return kindCloud, what
		}
		return kindOther, what
	}
	return kindOther, fmt.Sprintf("protocol %d, %v to %v", proto, src, dst)
}

// Counted is what passed a device, in packets.
type Counted struct {
	Tunnel, Agent int
	Local         int // address resolution
	Cloud         int // metadata service and DHCP
	Others        int
	Strange       []string // some of the others
}

// Counts are what passed so far.
func (c *Capture) Counts() Counted {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Counted{c.tunnel, c.agent, c.local, c.cloud, c.others, append([]string(nil), c.strange...)}
}
