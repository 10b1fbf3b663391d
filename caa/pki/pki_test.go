// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func issue(t *testing.T, name string) *Bundle {
	t.Helper()
	b, err := Issue(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// shake does a handshake and one exchange of bytes, which is when a client of TLS
// 1.3 learns that it was refused.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		c := tls.Server(raw, server)
		defer c.Close()
		if err := c.Handshake(); err != nil {
			done <- err
			return
		}
		_, err = c.Write([]byte("x"))
		done <- err
	}()
	c, clientErr := tls.Dial("tcp", l.Addr().String(), client)
	if clientErr == nil {
		_, clientErr = io.ReadFull(c, make([]byte, 1))
		c.Close()
	}
	return <-done, clientErr
}

func serverConfig(t *testing.T, b *Bundle) *tls.Config {
	t.Helper()
	cert, err := tls.X509KeyPair([]byte(b.ServerCert), []byte(b.ServerKey))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(b.CA)) {
		t.Fatal("no authority")
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
}

func clientConfig(t *testing.T, name string, b *Bundle) *tls.Config {
	t.Helper()
	c, err := ClientConfig(name, b.CA, b.ClientCert, b.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestBothSidesOfOneSandboxMeet(t *testing.T) {
	for _, name := range []string{"podvm-nginx-12345678", "podvm-" + strings.Repeat("a", 57)} {
		b := issue(t, name)
		if s, c := shake(t, serverConfig(t, b), clientConfig(t, name, b)); s != nil || c != nil {
			t.Errorf("%s: server %v, client %v", name, s, c)
		}
	}
}

func TestOthersAreRefused(t *testing.T) {
	ours, theirs := issue(t, "podvm-a-1"), issue(t, "podvm-b-2")
	sameName := issue(t, "podvm-a-1")
	noCert := clientConfig(t, "podvm-a-1", ours)
	noCert.Certificates = nil
	old := clientConfig(t, "podvm-a-1", ours)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	// A client that trusts our server and shows the certificate of another sandbox.
	foreign := clientConfig(t, "podvm-a-1", ours)
	foreign.Certificates = clientConfig(t, "podvm-b-2", theirs).Certificates
	// A server that shows its client's certificate as its own.
	swapped := *ours
	swapped.ServerCert, swapped.ServerKey = ours.ClientCert, ours.ClientKey
	tls13 := serverConfig(t, ours)
	tls13.MinVersion = tls.VersionTLS13

	for name, c := range map[string]struct {
		server, client *tls.Config
	}{
		"server of another sandbox":              {serverConfig(t, theirs), clientConfig(t, "podvm-a-1", ours)},
		"server of that name, other authority":   {serverConfig(t, sameName), clientConfig(t, "podvm-a-1", ours)},
		"server of our authority, another name":  {serverConfig(t, ours), clientConfig(t, "podvm-c-3", ours)},
		"client certificate used by a server":    {serverConfig(t, &swapped), clientConfig(t, "podvm-a-1", ours)},
		"client without certificate":             {serverConfig(t, ours), noCert},
		"client with another sandbox's":          {serverConfig(t, ours), foreign},
		"client that speaks no TLS 1.3":          {tls13, old},
		"server that speaks no TLS 1.3 (is old)": {&tls.Config{Certificates: serverConfig(t, ours).Certificates, MaxVersion: tls.VersionTLS12}, clientConfig(t, "podvm-a-1", ours)},
	} {
		s, cl := shake(t, c.server, c.client)
		if cl == nil {
			t.Errorf("%s: accepted (server says %v)", name, s)
		}
	}
}

func TestValidity(t *testing.T) {
	now := time.Now()
	b := issue(t, "podvm-a-1")
	cfg := clientConfig(t, "podvm-a-1", b)
	for what, at := range map[string]time.Time{"guest's clock behind": now.Add(-23 * time.Hour), "pod of nine years": now.Add(9 * 365 * 24 * time.Hour)} {
		cfg := cfg.Clone()
		cfg.Time = func() time.Time { return at }
		server := serverConfig(t, b)
		server.Time = cfg.Time
		if s, c := shake(t, server, cfg); s != nil || c != nil {
			t.Errorf("%s: server %v, client %v", what, s, c)
		}
	}
}

func TestClientConfigRefusesHalves(t *testing.T) {
	b := issue(t, "podvm-a-1")
	if _, err := ClientConfig("", b.CA, b.ClientCert, b.ClientKey); err == nil {
		t.Error("no server name: accepted, and nothing would be verified")
	}
	if _, err := ClientConfig("x", "", b.ClientCert, b.ClientKey); err == nil {
		t.Error("no authority: accepted, and the system's would be used")
	}
	if _, err := ClientConfig("x", b.CA, "", ""); err == nil {
		t.Error("no client certificate: accepted")
	}
}

func BenchmarkIssue(b *testing.B) {
	for b.Loop() {
		if _, err := Issue("podvm-a-1", time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
