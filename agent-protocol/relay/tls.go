// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"net"
	"os"
	"sync"
)

// A TLSConn is a TLS connection for bulk data. crypto/tls makes a system call for each
// record it writes and about one for each it reads, and a record carries 16 KiB at
// most (RFC 8446 §5.1): a stream of large messages spends more time in them than on
// encryption. A TLSConn hands all records of one Write to the kernel at once, and a
// Read returns what all records hold that have arrived, as far as there is room.
//
// tls.Config.DynamicRecordSizingDisabled belongs with it, else the first records are
// small ones.
//
// Handshake, deadlines and closing are crypto/tls's. It may be used by several
// goroutines at once, of which one reads.
type TLSConn struct {
	*tls.Conn
	raw *batch
	wmu sync.Mutex // held by Write
}

// TLSClient returns the client side of TLS over conn, whose handshake is to be done.
func TLSClient(conn net.Conn, cfg *tls.Config) *TLSConn {
	raw := newBatch(conn)
	return &TLSConn{Conn: tls.Client(raw, cfg), raw: raw}
}

// TLSServer returns the server side.
func TLSServer(conn net.Conn, cfg *tls.Config) *TLSConn {
	raw := newBatch(conn)
	return &TLSConn{Conn: tls.Server(raw, cfg), raw: raw}
}

// NetConn returns the connection below TLS, whose bytes are not to be touched.
func (c *TLSConn) NetConn() net.Conn { return c.raw.Conn }

const (
	// recordPayload is what one record carries.
	recordPayload = 16 << 10
	// readAhead is what one read takes from the kernel.
	readAhead = 64 << 10
)

// Write writes p as one or more records.
func (c *TLSConn) Write(p []byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if len(p) <= recordPayload {
		return c.Conn.Write(p)
	}
	c.raw.hold()
	n, err := c.Conn.Write(p)
	if flushErr := c.raw.release(); flushErr != nil {
		// How much of it the peer will see is not known; the connection is broken.
		return 0, flushErr
	}
	return n, err
}

// Read reads what has arrived, and waits while that is nothing. One goroutine at a time
// may read.
func (c *TLSConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n == 0 || err != nil {
		return n, err
	}
	c.raw.noWait = true
	for err == nil && n < len(p) && c.raw.in.Buffered() > 0 {
		// An error that counts is crypto/tls's to repeat at the next Read.
		var more int
		more, err = c.Conn.Read(p[n:])
		n += more
	}
	c.raw.noWait = false
	return n, nil
}

// Close says goodbye to the peer and closes the connection. While a Write is under
// way, it does not wait for a peer that takes nothing.
func (c *TLSConn) Close() error {
	if !c.wmu.TryLock() {
		return c.raw.Conn.Close()
	}
	defer c.wmu.Unlock()
	return c.Conn.Close()
}

// batch is the connection below TLS.
type batch struct {
	net.Conn
	// The fields of the goroutine that reads.
	in     *bufio.Reader
	noWait bool // Read returns what is there and does not wait for more

	mu   sync.Mutex
	held *bytes.Buffer // guarded by mu; nil: writes go through
}

func newBatch(conn net.Conn) *batch {
	return &batch{Conn: conn, in: bufio.NewReaderSize(conn, readAhead)}
}

// Read implements net.Conn.
func (b *batch) Read(p []byte) (int, error) {
	if b.noWait && b.in.Buffered() == 0 {
		// An error that passes: crypto/tls keeps the part of a record that it has.
		return 0, os.ErrDeadlineExceeded
	}
	return b.in.Read(p)
}

var records = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// hold keeps what is written until release.
func (b *batch) hold() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held = records.Get().(*bytes.Buffer)
}

// release writes what was held.
func (b *batch) release() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	held := b.held
	b.held = nil
	_, err := b.Conn.Write(held.Bytes())
	held.Reset()
	records.Put(held)
	return err
}

// Write implements net.Conn.
func (b *batch) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.held != nil {
		return b.held.Write(p)
	}
	return b.Conn.Write(p)
}
