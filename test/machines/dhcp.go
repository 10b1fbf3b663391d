// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// leaseTime is EC2's (docs.aws.amazon.com, "DHCP option sets", seen 2026-11).
const leaseTime = time.Hour

func listenDHCP(device string) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: onDevice(device, [2]int{unix.SO_REUSEADDR, 1}, [2]int{unix.SO_BROADCAST, 1})}
	c, err := lc.ListenPacket(context.Background(), "udp4", fmt.Sprintf(":%d", dhcpv4.ServerPort))
	if err != nil {
		return nil, fmt.Errorf("DHCP on %s: %w", device, err)
	}
	return c.(*net.UDPConn), nil
}

// serveDHCP answers until the socket is closed.
func (n *network) serveDHCP() {
	buf := make([]byte, 1<<16)
	for {
		size, _, err := n.dhcp.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		request, err := dhcpv4.FromBytes(buf[:size])
		if err != nil || request.OpCode != dhcpv4.OpcodeBootRequest {
			continue
		}
		answer := n.answer(request)
		if answer == nil {
			continue
		}
		// A packet that is lost is asked for again.
		_, _ = n.dhcp.WriteToUDPAddrPort(answer.ToBytes(), destination(request, answer))
	}
}

// destination is where an answer goes (RFC 2131 §4.1).
func destination(request, answer *dhcpv4.DHCPv4) netip.AddrPort {
	to := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	switch client, ok := netip.AddrFromSlice(request.ClientIPAddr.To4()); {
	case answer.MessageType() == dhcpv4.MessageTypeNak:
	case ok && !client.IsUnspecified():
		to = client
	case !request.IsBroadcast():
		// It has no address yet and takes packets for the one it will have. Its
		// hardware address is known to the kernel.
		to = netip.AddrFrom4([4]byte(answer.YourIPAddr.To4()))
	}
	return netip.AddrPortFrom(to, dhcpv4.ClientPort)
}

// answer is what a client is told, nil for nothing. There is exactly one address for
// each machine, and none for anybody else.
func (n *network) answer(request *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	m := n.withMAC(request.ClientHWAddr)
	if m == nil {
		return nil
	}
	node := net.IP(m.Gateway.AsSlice())
	if id := request.ServerIdentifier(); id != nil && !id.Equal(node) {
		return nil // it takes another server's offer
	}
	kind := dhcpv4.MessageTypeAck
	switch request.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		want := request.RequestedIPAddress()
		if want == nil || want.IsUnspecified() {
			want = request.ClientIPAddr
		}
		if !want.Equal(m.Addr.Addr().AsSlice()) {
			kind = dhcpv4.MessageTypeNak
		}
	case dhcpv4.MessageTypeInform:
	default: // release and decline change nothing: the address stays the machine's
		return nil
	}
	answer, err := dhcpv4.NewReplyFromRequest(request, dhcpv4.WithMessageType(kind), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(node)))
	if err != nil {
		return nil
	}
	if kind != dhcpv4.MessageTypeNak {
		n.describe(answer, m, request.MessageType() != dhcpv4.MessageTypeInform)
	}
	return answer
}

// describe puts the machine's network into an answer, and with lease the address.
func (n *network) describe(answer *dhcpv4.DHCPv4, m *emulation.Machine, lease bool) {
	node := net.IP(m.Gateway.AsSlice())
	answer.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(m.Addr.Bits(), 32)))
	answer.UpdateOption(dhcpv4.OptRouter(node))
	if n.cfg.MTU != 0 {
		answer.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, uint16(n.cfg.MTU))))
	}
	if len(n.cfg.Routes) > 0 {
		// A client that knows this option ignores the router's (RFC 3442).
		routes := []*dhcpv4.Route{{Dest: ipNet(netip.MustParsePrefix("0.0.0.0/0")), Router: node}}
		for _, r := range n.cfg.Routes {
			routes = append(routes, &dhcpv4.Route{Dest: ipNet(r), Router: node})
		}
		answer.UpdateOption(dhcpv4.OptClasslessStaticRoute(routes...))
	}
	if lease {
		answer.YourIPAddr = m.Addr.Addr().AsSlice()
		answer.UpdateOption(dhcpv4.OptIPAddressLeaseTime(leaseTime))
	}
}
