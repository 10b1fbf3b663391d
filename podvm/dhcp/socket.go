// SPDX-License-Identifier: Apache-2.0

package dhcp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"golang.org/x/sys/unix"
)

// maxMessage is the largest message that is read: one Ethernet frame.
const maxMessage = 1500

// device is an interface of the machine, by name.
type device string

func (d device) raw() (conn, error) {
	p, err := nclient4.NewRawUDPConn(string(d), dhcpv4.ClientPort)
	if err != nil {
		return nil, err
	}
	return socket{p, &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ServerPort}}, nil
}

func (d device) udp(from, to netip.Addr) (conn, error) {
	listen := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var set error
		err := raw.Control(func(fd uintptr) {
			set = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				unix.BindToDevice(int(fd), string(d)))
		})
		return errors.Join(err, set)
	}}
	p, err := listen.ListenPacket(context.Background(), "udp4", netip.AddrPortFrom(from, dhcpv4.ClientPort).String())
	if err != nil {
		return nil, err
	}
	return socket{p, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, dhcpv4.ServerPort))}, nil
}

type socket struct {
	net.PacketConn
	to *net.UDPAddr
}

func (s socket) send(m *dhcpv4.DHCPv4) error {
	_, err := s.WriteTo(m.ToBytes(), s.to)
	return err
}

func (s socket) receive(ctx context.Context) (*dhcpv4.DHCPv4, error) {
	if err := s.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = s.SetReadDeadline(time.Unix(1, 0)) }) // it can only fail once closed
	defer stop()
	b := make([]byte, maxMessage)
	for {
		n, _, err := s.ReadFrom(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			// The end of an earlier call's context, late.
			if err := s.SetReadDeadline(time.Time{}); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if m, err := dhcpv4.FromBytes(b[:n]); err == nil {
			return m, nil
		}
	}
}

func (s socket) close() error { return s.Close() }
