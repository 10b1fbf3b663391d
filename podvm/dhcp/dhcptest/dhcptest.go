// SPDX-License-Identifier: Apache-2.0

// Package dhcptest is a DHCP server for tests: one lease, and what a test wants to see
// of a server's bad days.
package dhcptest

import (
	"net"
	"net/netip"
	"sync"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
)

// Config is what the server gives.
type Config struct {
	Addr   netip.Addr // leased to whoever asks
	Server netip.Addr
	// Options of OFFER and ACK: the mask, the lease's time and all else.
	Options []dhcpv4.Option
	// Reply may change a reply before it is sent, or drop it by returning nil. n counts
	// the requests from 0. May be nil.
	Reply func(n int, request, reply *dhcpv4.DHCPv4) *dhcpv4.DHCPv4
}

// Server is one that runs.
type Server struct {
	srv   *server4.Server
	ended chan error

	mu       sync.Mutex
	requests []*dhcpv4.DHCPv4 // guarded by mu
}

// Start serves on an interface in the caller's network namespace.
func Start(dev string, cfg Config) (*Server, error) {
	s := &Server{ended: make(chan error, 1)}
	srv, err := server4.NewServer(dev, &net.UDPAddr{Port: dhcpv4.ServerPort}, func(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
		s.mu.Lock()
		n := len(s.requests)
		s.requests = append(s.requests, m)
		s.mu.Unlock()
		reply, err := answer(cfg, m)
		if err != nil {
			return // not a request that a server answers
		}
		if cfg.Reply != nil {
			reply = cfg.Reply(n, m, reply)
		}
		if reply == nil {
			return
		}
		// To all while the client has no address, else to it (RFC 2131 4.1). It fails
		// only when the server is being closed.
		to := &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort}
		if !m.ClientIPAddr.IsUnspecified() {
			to.IP = m.ClientIPAddr
		}
		_, _ = conn.WriteTo(reply.ToBytes(), to)
	})
	if err != nil {
		return nil, err
	}
	s.srv = srv
	go func() { s.ended <- srv.Serve() }()
	return s, nil
}

func answer(cfg Config, m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
	}
	mods := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(cfg.Addr.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(cfg.Server.AsSlice())),
	}
	for _, o := range cfg.Options {
		mods = append(mods, dhcpv4.WithOption(o))
	}
	return dhcpv4.NewReplyFromRequest(m, mods...)
}

// Requests are the messages that came so far.
func (s *Server) Requests() []*dhcpv4.DHCPv4 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*dhcpv4.DHCPv4(nil), s.requests...)
}

// Close ends the server.
func (s *Server) Close() {
	_ = s.srv.Close() // what it had is gone either way
	<-s.ended
}
