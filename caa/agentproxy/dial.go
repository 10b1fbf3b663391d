// SPDX-License-Identifier: Apache-2.0

package agentproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/relay"
)

const (
	// connectTimeout bounds one attempt to connect. It is longer than any round
	// trip to an instance worth having and shorter than the kernel's first SYN
	// retransmission (1 s, RFC 6298 §2.1), which would decide when we notice a VM
	// that has come up.
	connectTimeout = 250 * time.Millisecond
	// attemptEvery is how often a new attempt starts while earlier ones are still
	// unanswered. A booting VM drops SYNs until its stack is up; waiting for each
	// attempt to time out would see it half a connectTimeout late on average.
	attemptEvery = 50 * time.Millisecond
	// pause follows an attempt that was refused, that is: the VM is up and the
	// forwarder is about to listen.
	pause = 10 * time.Millisecond
	// strangerPause follows a handshake with somebody else, such as an earlier VM
	// that still holds the address: no boot is waited for, and no hurry is due.
	strangerPause = 250 * time.Millisecond
	// handshakeTimeout bounds TLS. A guest under software emulation needs tens of
	// milliseconds for its half; one that needs seconds is stuck.
	handshakeTimeout = 5 * time.Second

	// keepAlive finds a dead peer on an idle connection within 60 s
	// (15 + 9 × 5); userTimeout does the same for one with bytes under way. Both
	// are above what a live migration or a network hiccup takes, because a
	// connection cut without need costs every stream on it a reconnect.
	keepAliveIdle     = 15 * time.Second
	keepAliveInterval = 5 * time.Second
	keepAliveCount    = 9
	userTimeout       = 60 * time.Second
)

// Target is the forwarder of one pod VM.
type Target struct {
	Addr netip.AddrPort
	TLS  *tls.Config // verifies the forwarder and proves who we are; see package pki
}

func (t Target) dialer() *net.Dialer {
	return &net.Dialer{
		Timeout: connectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount,
		},
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			cerr := c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond))
			})
			return errors.Join(cerr, err)
		},
	}
}

// Wait dials until the forwarder has answered and proved who it is, or ctx is done.
// The error then says what the last attempt met.
func Wait(ctx context.Context, t Target) (*relay.TLSConn, error) {
	var last error
	for {
		raw, err := connect(ctx, t, &last)
		if err != nil {
			return nil, err
		}
		conn, err := handshake(ctx, raw, t.TLS)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		wait := pause
		var stranger *tls.CertificateVerificationError
		if errors.As(err, &stranger) {
			wait = strangerPause
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, waitError(t, last, err)
		}
	}
}

// connect returns the first TCP connection that comes about. Attempts overlap: one
// starts when the last was refused or attemptEvery has passed.
func connect(ctx context.Context, t Target, last *error) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	// Without ctx's deadline, which would make the last attempt's end look like
	// what the VM did to it.
	dialing, cancel := context.WithCancel(context.WithoutCancel(ctx))
	results := make(chan result)
	pending := 0
	defer func() {
		cancel()
		for ; pending > 0; pending-- { // each attempt ends soon after its context
			if r := <-results; r.conn != nil {
				r.conn.Close()
			}
		}
	}()
	d := t.dialer()
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, waitError(t, *last, ctx.Err())
		case <-next.C:
			pending++
			go func() {
				c, err := d.DialContext(dialing, "tcp", t.Addr.String())
				results <- result{c, err}
			}()
			next.Reset(attemptEvery)
		case r := <-results:
			pending--
			if r.err == nil {
				return r.conn, nil
			}
			if ctx.Err() == nil {
				*last = r.err
			}
			if !isTimeout(r.err) {
				next.Reset(pause)
			}
		}
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func handshake(ctx context.Context, raw net.Conn, cfg *tls.Config) (*relay.TLSConn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	c := relay.TLSClient(raw, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return c, nil
}

func waitError(t Target, last, ctxErr error) error {
	if last == nil {
		last = ctxErr
	}
	return fmt.Errorf("dial the forwarder at %s: %w", t.Addr, last)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// alive tells whether the peer of an idle connection has not hung up.
func alive(c *relay.TLSConn) bool {
	tc, ok := c.NetConn().(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return false
	}
	established := false
	err = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		established = err == nil && info.State == unix.BPF_TCP_ESTABLISHED
	})
	return err == nil && established
}
