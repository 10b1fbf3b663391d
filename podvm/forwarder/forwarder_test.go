// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// patience bounds what must happen; no test waits for it to pass.
const patience = 30 * time.Second

// identity is a certificate and its key.
type identity struct {
	pem, keyPEM []byte
	cert        *x509.Certificate
	key         *ecdsa.PrivateKey
}

func (i identity) pair(t *testing.T) tls.Certificate {
	t.Helper()
	p, err := tls.X509KeyPair(i.pem, i.keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// newIdentity makes a certificate signed by parent, or by itself.
func newIdentity(t *testing.T, name string, parent *identity, usage x509.ExtKeyUsage, notAfter time.Duration) identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(notAfter),
		ExtKeyUsage: []x509.ExtKeyUsage{usage}, BasicConstraintsValid: true, IsCA: strings.HasSuffix(name, "ca"),
	}
	signer, signerKey := tmpl, key
	if parent != nil {
		signer, signerKey = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer, &key.PublicKey, signerKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return identity{
		pem:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		keyPEM: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k}),
		cert:   cert, key: key,
	}
}

// sandbox is the key material of one pod.
type sandbox struct{ server, clientCA, client identity }

func newSandbox(t *testing.T) sandbox {
	t.Helper()
	ca := newIdentity(t, "client-ca", nil, x509.ExtKeyUsageClientAuth, time.Hour)
	return sandbox{
		server:   newIdentity(t, "podvm", nil, x509.ExtKeyUsageServerAuth, time.Hour),
		clientCA: ca,
		client:   newIdentity(t, "adaptor", &ca, x509.ExtKeyUsageClientAuth, time.Hour),
	}
}

func (s sandbox) credentials() Credentials {
	return Credentials{Key: s.server.keyPEM, Cert: s.server.pem, ClientCA: s.clientCA.pem}
}

func (s sandbox) serverConfig(t *testing.T) *tls.Config {
	t.Helper()
	cfg, err := s.credentials().TLSConfig()
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func (s sandbox) clientConfig(t *testing.T, certs ...identity) *tls.Config {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(s.server.cert)
	c := &tls.Config{ServerName: "podvm", RootCAs: roots}
	for _, i := range certs {
		c.Certificates = append(c.Certificates, i.pair(t))
	}
	return c
}

// echo is an agent that sends everything back and counts who reached it.
type echo struct {
	mu      sync.Mutex
	reached int          // guarded by mu
	seen    bytes.Buffer // guarded by mu
}

func (e *echo) serve(l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		e.mu.Lock()
		e.reached++
		e.mu.Unlock()
		wg.Go(func() {
			defer conn.Close()
			b := make([]byte, 1024)
			for {
				n, err := conn.Read(b)
				e.mu.Lock()
				e.seen.Write(b[:n])
				e.mu.Unlock()
				if err != nil {
					return
				}
				if _, err := conn.Write(b[:n]); err != nil {
					return
				}
			}
		})
	}
}

func (e *echo) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.reached
}

// start runs a forwarder before an echo agent and returns its address.
func start(t *testing.T, s sandbox, timeout time.Duration, pending int) (addr string, agent *echo) {
	t.Helper()
	inner, err := Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := newListener(inner, s.serverConfig(t), timeout, pending)
	if err != nil {
		t.Fatal(err)
	}
	agent = new(echo)
	done := make(chan struct{})
	go func() {
		defer close(done)
		agent.serve(l)
	}()
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
	return inner.Addr().String(), agent
}

// talk sends a line and wants it back. TLS 1.3 clients learn at their first read
// that they were refused.
func talk(t *testing.T, addr string, cfg *tls.Config) error {
	t.Helper()
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, cfg)
	if err := conn.Handshake(); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		return err
	}
	b := make([]byte, 6)
	if _, err := io.ReadFull(conn, b); err != nil {
		return err
	}
	if string(b) != "hello\n" {
		t.Errorf("got %q back", b)
	}
	return nil
}

func TestAdmits(t *testing.T) {
	s := newSandbox(t)
	addr, agent := start(t, s, patience, 4)
	if err := talk(t, addr, s.clientConfig(t, s.client)); err != nil {
		t.Error(err)
	}
	if err := talk(t, addr, s.clientConfig(t, s.client)); err != nil {
		t.Error("second connection:", err)
	}
	if agent.count() != 2 {
		t.Errorf("%d connections reached the agent, want 2", agent.count())
	}
}

// cloud-api-adaptor puts its own self-signed client certificate where the CA stands
// (cloud-api-adaptor 0.22, pkg/util/tlsutil).
func TestAdmitsPinnedCertificate(t *testing.T) {
	s := newSandbox(t)
	s.client = newIdentity(t, "adaptor", nil, x509.ExtKeyUsageClientAuth, time.Hour)
	s.clientCA = s.client
	addr, _ := start(t, s, patience, 4)
	if err := talk(t, addr, s.clientConfig(t, s.client)); err != nil {
		t.Error(err)
	}
}

func TestRefuses(t *testing.T) {
	s, other := newSandbox(t), newSandbox(t)
	wrongUse := newIdentity(t, "adaptor", &s.clientCA, x509.ExtKeyUsageServerAuth, time.Hour)
	expired := newIdentity(t, "adaptor", &s.clientCA, x509.ExtKeyUsageClientAuth, -time.Minute)
	selfSigned := newIdentity(t, "adaptor", nil, x509.ExtKeyUsageClientAuth, time.Hour)
	tls12 := s.clientConfig(t, s.client)
	tls12.MaxVersion = tls.VersionTLS12
	for name, cfg := range map[string]*tls.Config{
		"no certificate":          s.clientConfig(t),
		"self-signed certificate": s.clientConfig(t, selfSigned),
		"other sandbox's":         s.clientConfig(t, other.client),
		"the server's own":        s.clientConfig(t, s.server),
		"not for clients":         s.clientConfig(t, wrongUse),
		"expired":                 s.clientConfig(t, expired),
		"TLS 1.2":                 tls12,
	} {
		t.Run(name, func(t *testing.T) {
			addr, agent := start(t, s, patience, 4)
			if err := talk(t, addr, cfg); err == nil {
				t.Error("admitted")
			}
			if n := agent.count(); n != 0 {
				t.Errorf("%d connections reached the agent", n)
			}
			if err := talk(t, addr, s.clientConfig(t, s.client)); err != nil {
				t.Errorf("the right client afterwards: %v", err)
			}
		})
	}
}

func TestGarbage(t *testing.T) {
	s := newSandbox(t)
	addr, agent := start(t, s, patience, 4)
	for name, send := range map[string]string{
		"nothing":     "",
		"http":        "GET / HTTP/1.1\r\n\r\n",
		"ttrpc":       "\x00\x00\x00\x10\x00\x00\x00\x01\x01\x00" + strings.Repeat("x", 16),
		"half record": "\x16\x03\x01\xff\xff\x01",
		"zeros":       strings.Repeat("\x00", 70_000),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			_, _ = io.WriteString(conn, send) // the other end may have closed
			_ = conn.(*net.TCPConn).CloseWrite()
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
				t.Error("the connection was left open")
			}
		})
	}
	if agent.count() != 0 || agent.seen.Len() != 0 {
		t.Error("something reached the agent")
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// Silent clients take all the slots but not for longer than the deadline, and with
// slots left they delay nobody.
func TestSilentClients(t *testing.T) {
	s := newSandbox(t)
	t.Run("beside others", func(t *testing.T) {
		addr, _ := start(t, s, patience, 8)
		for range 4 {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
		began := time.Now()
		if err := talk(t, addr, s.clientConfig(t, s.client)); err != nil {
			t.Error(err)
		}
		if time.Since(began) >= patience {
			t.Error("waited for the silent ones")
		}
	})
	t.Run("all slots", func(t *testing.T) {
		addr, _ := start(t, s, 50*time.Millisecond, 2)
		for range 6 {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write([]byte{0x16}); err != nil { // the first byte of a hello
				t.Fatal(err)
			}
		}
		// The right client's own handshake has the short deadline too, so it
		// may need more than one try on a busy machine.
		var err error
		for range 100 {
			if err = talk(t, addr, s.clientConfig(t, s.client)); err == nil {
				return
			}
		}
		t.Error(err)
	})
}

func TestCloseEndsHandshakes(t *testing.T) {
	s := newSandbox(t)
	inner, err := Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(inner, s.serverConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	silent, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	// Authenticated but never accepted.
	conn, err := tls.Dial("tcp", inner.Addr().String(), s.clientConfig(t, s.client))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

func TestInnerListenerFails(t *testing.T) {
	s := newSandbox(t)
	inner, err := Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(inner, s.serverConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	inner.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	l.Close()
}

func TestCredentials(t *testing.T) {
	s, other := newSandbox(t), newSandbox(t)
	for name, c := range map[string]struct {
		change func(*Credentials)
		want   string
	}{
		"no key":       {func(c *Credentials) { c.Key = nil }, "tls-server-key is missing"},
		"no cert":      {func(c *Credentials) { c.Cert = nil }, "tls-server-cert is missing"},
		"no ca":        {func(c *Credentials) { c.ClientCA = nil }, "tls-client-ca is missing"},
		"bad key":      {func(c *Credentials) { c.Key = []byte("x") }, "tls-server-key"},
		"other's key":  {func(c *Credentials) { c.Key = other.server.keyPEM }, "tls-server-key"},
		"bad cert":     {func(c *Credentials) { c.Cert = []byte("x") }, "tls-server-cert"},
		"bad ca":       {func(c *Credentials) { c.ClientCA = []byte("x") }, "tls-client-ca"},
		"key for a ca": {func(c *Credentials) { c.ClientCA = s.server.keyPEM }, "tls-client-ca"},
	} {
		t.Run(name, func(t *testing.T) {
			cred := s.credentials()
			c.change(&cred)
			_, err := cred.TLSConfig()
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want InvalidArgument with %q", err, c.want)
			}
			if strings.Contains(err.Error(), "PRIVATE") {
				t.Errorf("%q shows key material", err)
			}
		})
	}
}

// A configuration that is not Credentials' own is refused where it admits more.
func TestListenerRefuses(t *testing.T) {
	s := newSandbox(t)
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":         func(c *tls.Config) { c.MinVersion = tls.VersionTLS12 },
		"any client":      func(c *tls.Config) { c.ClientAuth = tls.RequestClientCert },
		"any CA's":        func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert },
		"the system's CA": func(c *tls.Config) { c.ClientCAs = nil },
	} {
		cfg := s.serverConfig(t)
		change(cfg)
		if _, err := NewListener(nil, cfg); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v, want InvalidArgument", name, err)
		}
	}
	if _, err := NewListener(nil, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("none: got %v, want InvalidArgument", err)
	}
}
