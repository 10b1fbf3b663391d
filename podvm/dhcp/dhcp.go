// SPDX-License-Identifier: Apache-2.0

// Package dhcp asks for an IPv4 address and keeps it: the client's part of RFC 2131,
// with the options that clouds use (classless static routes, RFC 3442; the MTU).
//
//	Acquire:  DISCOVER ─▶ OFFER ─▶ REQUEST ─▶ ACK ─▶ Lease
//	Keep:     T1: REQUEST to the server ── T2: REQUEST to all ── end: Acquire again
//
// Messages are those of github.com/insomniacslk/dhcp, and so is the socket that works
// before there is an address; linked into podvmd that is 0.3 MB and 0.03 ms of the
// process's start (2026-11-22). When to say what is ours: that module has no renewal,
// and waits 5 s before it repeats itself, which is longer than a pod VM's start.
//
// It sets nothing: guestnet does, with what is in the Lease.
package dhcp

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

const (
	// firstWait is how long the first message waits for its answer, and maxWait the
	// last; each waits twice as long as the one before. RFC 2131 4.1 says 4 to 64 s,
	// for networks with many clients and a slow server. A cloud answers within
	// milliseconds, beside the machine, so a message without an answer was lost: a link
	// that is not quite up loses the first.
	firstWait = 200 * time.Millisecond
	maxWait   = 8 * time.Second
	// requests is how often an offer is asked for before another is looked for.
	requests = 4
	// minRenewal is the least time between two attempts to renew (RFC 2131 4.4.5 has
	// 60 s, for leases of days; a shorter lease has less).
	minRenewal = time.Second
	maxRenewal = time.Minute
	// forever is how lease times say that they do not end (RFC 2131 3.3).
	forever = 0xffffffff * time.Second
	// minMTU is the least an IPv4 link may have that every host must take
	// (RFC 791); what is below is a mistake of the server's.
	minMTU = 576
)

// Route is one route of a lease.
type Route struct {
	Dst netip.Prefix
	Via netip.Addr // invalid: on link
}

// Lease is what the server gave.
type Lease struct {
	Addr   netip.Prefix
	Routes []Route // the default route among them, if there is one
	MTU    int     // bytes; 0: not told
	Server netip.Addr
	Time   time.Duration // from Since; 0: for ever
	T1, T2 time.Duration // when to renew, and when to ask any server; 0 if Time is
	Since  time.Time     // when the request was sent that it answers
}

// options are what is asked for.
var options = []dhcpv4.OptionCode{
	dhcpv4.OptionSubnetMask, dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionRouter, dhcpv4.OptionInterfaceMTU,
	dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue,
}

// conn sends and receives messages.
type conn interface {
	send(*dhcpv4.DHCPv4) error
	// receive returns the next message that is a DHCP message at all.
	receive(context.Context) (*dhcpv4.DHCPv4, error)
	close() error
}

// network opens connections on one interface.
type network interface {
	// raw works without an address, and sends to all.
	raw() (conn, error)
	// udp sends from an address to another, which may be that of all.
	udp(from, to netip.Addr) (conn, error)
}

// Client is one interface's. Its methods are not safe for concurrent use.
type Client struct {
	name string
	mac  net.HardwareAddr
	net  network
}

// New returns the client of an interface, which must be up and in the caller's network
// namespace: a goroutine that is not locked to a thread is in the process's.
func New(name string, mac net.HardwareAddr) *Client {
	return &Client{name: name, mac: mac, net: device(name)}
}

// Acquire asks for an address until it has one or ctx ends. Unavailable: nobody gave
// one, and the message says what was the matter with what came.
func (c *Client) Acquire(ctx context.Context) (*Lease, error) {
	conn, err := c.net.raw()
	if err != nil {
		return nil, fmt.Errorf("DHCP on %s: %w", c.name, err)
	}
	defer conn.close()
	sent, reason := 0, "no answer"
	for wait := firstWait; ; wait = min(2*wait, maxWait) {
		sent++
		l, err := c.attempt(ctx, conn, wait)
		if err == nil {
			return l, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("DHCP on %s: no address after asking %d times: %s: %w", c.name, sent, reason, errdefs.ErrUnavailable)
		}
		if !errors.Is(err, errSilence) {
			reason = err.Error()
		}
		if errors.Is(err, errRefused) {
			_ = pause(ctx, wait) // ended early by ctx, which the next turn notices
		}
	}
}

// errSilence: nothing came in time.
var errSilence = errors.New("no answer")

// attempt is one DISCOVER, whose answer is waited for that long, and what follows.
func (c *Client) attempt(ctx context.Context, conn conn, wait time.Duration) (*Lease, error) {
	discover, err := c.message(dhcpv4.MessageTypeDiscover)
	if err != nil {
		return nil, err
	}
	offer, err := c.ask(ctx, conn, discover, wait, func(m *dhcpv4.DHCPv4) error {
		if m.MessageType() != dhcpv4.MessageTypeOffer {
			return fmt.Errorf("a %s for an answer to DISCOVER", m.MessageType())
		}
		_, err := parse(m)
		return err
	})
	if err != nil {
		return nil, err
	}
	request, err := c.message(dhcpv4.MessageTypeRequest,
		dhcpv4.WithTransactionID(offer.TransactionID),
		dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(offer.YourIPAddr)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(offer.ServerIdentifier())))
	if err != nil {
		return nil, err
	}
	for range requests {
		var l *Lease
		if l, err = c.request(ctx, conn, request, wait); !errors.Is(err, errSilence) {
			return l, err
		}
	}
	return nil, fmt.Errorf("server %s offered %s and did not confirm it", offer.ServerIdentifier(), offer.YourIPAddr)
}

// errRefused: the server said no.
var errRefused = errors.New("the server refuses")

// request sends a REQUEST once and waits for the lease.
func (c *Client) request(ctx context.Context, conn conn, m *dhcpv4.DHCPv4, wait time.Duration) (*Lease, error) {
	since := time.Now()
	var l *Lease
	_, err := c.ask(ctx, conn, m, wait, func(m *dhcpv4.DHCPv4) (err error) {
		switch m.MessageType() {
		case dhcpv4.MessageTypeNak:
			return fmt.Errorf("%w: %q", errRefused, m.Message())
		case dhcpv4.MessageTypeAck:
			l, err = parse(m)
			return err
		}
		return fmt.Errorf("a %s for an answer to REQUEST", m.MessageType())
	})
	if err != nil {
		return nil, err
	}
	l.Since = since
	return l, nil
}

// ask sends a message once and waits for an answer that check takes. The error is
// errSilence, or what was the matter with the last answer; errRefused ends it at once.
func (c *Client) ask(ctx context.Context, conn conn, m *dhcpv4.DHCPv4, wait time.Duration, check func(*dhcpv4.DHCPv4) error) (*dhcpv4.DHCPv4, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if err := conn.send(m); err != nil {
		// A link that is coming up: as if the message had been lost.
		<-ctx.Done()
		return nil, fmt.Errorf("send: %w", err)
	}
	reason := errSilence
	for {
		reply, err := conn.receive(ctx)
		if ctx.Err() != nil {
			return nil, reason
		}
		if err != nil {
			return nil, fmt.Errorf("receive: %w", err)
		}
		if reply.OpCode != dhcpv4.OpcodeBootReply || reply.TransactionID != m.TransactionID || reply.ClientHWAddr.String() != c.mac.String() {
			continue // somebody else's
		}
		if err = check(reply); err == nil || errors.Is(err, errRefused) {
			return reply, err
		}
		reason = err
	}
}

// message begins one.
func (c *Client) message(kind dhcpv4.MessageType, more ...dhcpv4.Modifier) (*dhcpv4.DHCPv4, error) {
	var xid dhcpv4.TransactionID
	if _, err := rand.Read(xid[:]); err != nil {
		return nil, err
	}
	return dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithTransactionID(xid),
		dhcpv4.WithHwAddr(c.mac),
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithRequestedOptions(options...),
	}, more...)...)
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
