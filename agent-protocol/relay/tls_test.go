// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// counter counts the calls that reach the connection below TLS.
type counter struct {
	net.Conn
	reads, writes atomic.Int64
}

func (c *counter) Read(p []byte) (int, error) { c.reads.Add(1); return c.Conn.Read(p) }

func (c *counter) Write(p []byte) (int, error) { c.writes.Add(1); return c.Conn.Write(p) }

// tlsPair returns both ends of a TLS connection after the handshake, and what is
// below the client's.
func tlsPair(t testing.TB) (client, server *TLSConn, below *counter) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"vm"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	a, b := pair(t)
	below = &counter{Conn: a}
	client = TLSClient(below, &tls.Config{RootCAs: pool, ServerName: "vm", DynamicRecordSizingDisabled: true})
	server = TLSServer(b, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, DynamicRecordSizingDisabled: true,
	})
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server, below
}

func TestTLSConnPassesEveryByte(t *testing.T) {
	client, server, _ := tlsPair(t)
	for _, way := range [][2]*TLSConn{{client, server}, {server, client}} {
		sent := make([]byte, 5<<20)
		if _, err := rand.Read(sent); err != nil {
			t.Fatal(err)
		}
		wrote := make(chan error, 1)
		go func() {
			for rest := sent; len(rest) > 0; {
				n := min(len(rest), 1+mrand.IntN(300_000))
				if m, err := way[0].Write(rest[:n]); err != nil || m != n {
					wrote <- errors.Join(err, errors.New("short write"))
					return
				}
				rest = rest[n:]
			}
			wrote <- way[0].CloseWrite()
		}()
		got, err := io.ReadAll(way[1])
		if err = errors.Join(err, <-wrote); err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(got) != sha256.Sum256(sent) {
			t.Fatalf("%d bytes arrived that differ from the %d sent", len(got), len(sent))
		}
	}
}

func TestTLSConnWritesAndReadsRecordsTogether(t *testing.T) {
	client, server, below := tlsPair(t)
	message := make([]byte, 48<<10) // three records, which the socket takes at once
	before := below.writes.Load()
	if _, err := client.Write(message); err != nil {
		t.Fatal(err)
	}
	if n := below.writes.Load() - before; n != 1 {
		t.Errorf("%d writes below TLS, want 1", n)
	}
	if _, err := io.ReadFull(server, message); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Write(message); err != nil {
		t.Fatal(err)
	}
	got, err := client.Read(make([]byte, 64<<10))
	if err != nil || got <= recordPayload {
		t.Errorf("one Read gave %d bytes and %v, want more than one record", got, err)
	}
}

// A part of a record that has arrived holds nothing back, and is not lost.
func TestTLSConnDoesNotWaitForTheRestOfARecord(t *testing.T) {
	client, server, below := tlsPair(t)
	var records bytes.Buffer
	// What the client sends goes into a buffer and from there in two parts.
	real := client.raw.Conn
	client.raw.Conn = writeTo{real, &records}
	message := make([]byte, recordPayload+1000)
	if _, err := rand.Read(message); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write(message); err != nil {
		t.Fatal(err)
	}
	cut := records.Len() - 500
	if _, err := below.Write(records.Bytes()[:cut]); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2*recordPayload)
	n, err := server.Read(buf)
	if err != nil || n != recordPayload {
		t.Fatalf("first part: %d bytes, %v; want the whole record of %d", n, err, recordPayload)
	}
	if _, err := below.Write(records.Bytes()[cut:]); err != nil {
		t.Fatal(err)
	}
	m, err := server.Read(buf[n:])
	if err != nil || !bytes.Equal(buf[:n+m], message) {
		t.Fatalf("then %d bytes, %v; the message has %d", m, err, len(message))
	}
}

type writeTo struct {
	net.Conn
	w io.Writer
}

func (w writeTo) Write(p []byte) (int, error) { return w.w.Write(p) }

func TestTLSConnCloseEndsAWriteNobodyTakes(t *testing.T) {
	client, server, _ := tlsPair(t)
	ctx, writing := context.WithCancel(t.Context())
	wrote := make(chan error, 1)
	go func() {
		message := make([]byte, 1<<20)
		for err := error(nil); ; _, err = client.Write(message) {
			if err != nil {
				wrote <- err
				return
			}
			writing()
		}
	}()
	<-ctx.Done()
	client.Close()
	if err := <-wrote; err == nil {
		t.Error("the write succeeded")
	}
	server.Close()
}

func TestTLSConnKeepsDeadlines(t *testing.T) {
	client, server, _ := tlsPair(t)
	client.SetReadDeadline(time.Unix(1, 0))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read past its deadline: %v", err)
	}
	client.SetReadDeadline(time.Time{})
	if _, err := server.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("afterwards: %d, %v", n, err)
	}
}
