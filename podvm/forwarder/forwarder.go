// SPDX-License-Identifier: Apache-2.0

// Package forwarder is the pod VM's one open port. It admits the adaptor of this
// sandbox, and nobody else, to the agent.
//
//	adaptor ── TCP 15150, TLS 1.3 ──▶ Listener ──▶ the agent's ttrpc server
//	           both ends authenticated        └──▶ ServeAgent: a stock agent's unix socket
//
// Listener is a net.Listener whose connections have shown a certificate that the
// sandbox's client CA signed, or is. Not one byte of anybody else gets past it. TLS
// handshakes run side by side, each with a deadline, and only so many at a time:
// who is slow or silent delays nobody.
//
// ServeAgent puts a stock kata-agent behind it, in the place of cloud-api-adaptor's
// agent-protocol-forwarder.
package forwarder

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
)

const (
	// HandshakeTimeout is how long a client may take to authenticate: three
	// retransmissions of a lost TCP segment (1, 2 and 4 s, RFC 6298) and some work
	// in an emulated VM.
	HandshakeTimeout = 10 * time.Second
	// MaxPending is the most handshakes at a time. Further connections wait in the
	// kernel's queue. One adaptor needs one or two.
	MaxPending = 64

	keepAliveIdle     = 15 * time.Second
	keepAliveInterval = 5 * time.Second
	keepAliveCount    = 3
)

// Credentials are PEM texts out of the pod VM's configuration.
type Credentials struct {
	Key, Cert []byte // the forwarder's own
	ClientCA  []byte // signs the adaptor's certificate, or is that certificate
}

// TLSConfig checks the credentials and returns the forwarder's side of TLS. It does
// without no part of them: a forwarder that lacks one would let anybody in, or
// nobody. InvalidArgument names the part.
func (c Credentials) TLSConfig() (*tls.Config, error) {
	for _, p := range []struct {
		name string
		pem  []byte
	}{{"tls-server-key", c.Key}, {"tls-server-cert", c.Cert}, {"tls-client-ca", c.ClientCA}} {
		if len(p.pem) == 0 {
			return nil, fmt.Errorf("forwarder: %s is missing, and without it no client can be authenticated: %w", p.name, errdefs.ErrInvalidArgument)
		}
	}
	pair, err := tls.X509KeyPair(c.Cert, c.Key)
	if err != nil {
		return nil, fmt.Errorf("forwarder: tls-server-cert with tls-server-key: %s: %w", err, errdefs.ErrInvalidArgument)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(c.ClientCA) {
		return nil, fmt.Errorf("forwarder: tls-client-ca holds no certificate: %w", errdefs.ErrInvalidArgument)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		// The adaptor resumes no session, and a ticket is work in every handshake.
		SessionTicketsDisabled: true,
		// Several records are sent together: see relay.TLSConn.
		DynamicRecordSizingDisabled: true,
	}, nil
}

// Listen opens the TCP port with keep-alive, so that a vanished adaptor's
// connections end within half a minute.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount,
	}}
	return lc.Listen(ctx, "tcp", address)
}

// Listener hands out authenticated connections. Accept and Close may be called
// concurrently.
type Listener struct {
	inner net.Listener
	tls   *tls.Config

	// ctx is the listener's run context: handshakes end with it.
	ctx    context.Context
	cancel context.CancelFunc
	ready  chan net.Conn
	slots  chan struct{} // one token per handshake under way
	once   sync.Once
	wg     sync.WaitGroup

	handshakeTimeout time.Duration
	err              error // why accepting ended; set before failed is closed
	failed           chan struct{}
}

// NewListener starts to accept connections from l, which it then owns. cfg is what
// Credentials.TLSConfig returned, which takes too long to be done twice in a start.
// InvalidArgument: cfg would let in a client that has not authenticated.
func NewListener(l net.Listener, cfg *tls.Config) (*Listener, error) {
	return newListener(l, cfg, HandshakeTimeout, MaxPending)
}

func newListener(inner net.Listener, cfg *tls.Config, timeout time.Duration, pending int) (*Listener, error) {
	if cfg == nil || cfg.MinVersion < tls.VersionTLS13 || cfg.ClientAuth != tls.RequireAndVerifyClientCert || cfg.ClientCAs == nil {
		return nil, fmt.Errorf("forwarder: TLS is not set up to authenticate clients: %w", errdefs.ErrInvalidArgument)
	}
	l := &Listener{
		inner:            inner,
		tls:              cfg,
		ready:            make(chan net.Conn),
		slots:            make(chan struct{}, pending),
		failed:           make(chan struct{}),
		handshakeTimeout: timeout,
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Go(l.accept)
	return l, nil
}

// retryAccept is the pause after an error of accept(2) that passes, such as too many
// open files.
const retryAccept = 20 * time.Millisecond

func (l *Listener) accept() {
	for {
		select {
		case l.slots <- struct{}{}:
		case <-l.ctx.Done():
			return
		}
		conn, err := l.inner.Accept()
		if err != nil {
			<-l.slots
			if errors.Is(err, net.ErrClosed) {
				l.err = err
				close(l.failed)
				return
			}
			select {
			case <-time.After(retryAccept):
			case <-l.ctx.Done():
			}
			continue
		}
		l.wg.Go(func() { l.admit(conn) })
	}
}

// admit lets a client authenticate and queues the connection, or drops it. The slot
// is free again when the handshake is over; the queue holds none up.
func (l *Listener) admit(raw net.Conn) {
	conn := relay.TLSServer(raw, l.tls)
	ctx, cancel := context.WithTimeout(l.ctx, l.handshakeTimeout)
	err := conn.HandshakeContext(ctx)
	cancel()
	<-l.slots
	if err != nil {
		// The client was told by a TLS alert; nothing here is for it to know.
		raw.Close()
		return
	}
	select {
	case l.ready <- conn:
	case <-l.ctx.Done():
		raw.Close()
	}
}

// Accept returns the next authenticated connection.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	case <-l.failed:
		return nil, l.err
	}
}

// Close stops accepting, ends handshakes under way and waits for them. Connections
// handed out are their receivers'.
func (l *Listener) Close() error {
	var err error
	l.once.Do(func() {
		l.cancel()
		err = l.inner.Close()
	})
	l.wg.Wait()
	return err
}

// Addr is the address listened on.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }
