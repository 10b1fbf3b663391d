// SPDX-License-Identifier: Apache-2.0

// Package relay carries bytes between two connections without reading them. It is
// what makes the adaptor and the forwarder blind to the protocol they carry: a new
// call between runtime and agent needs no change in between.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
)

// MaxUnixPath is the longest path of a unix socket in bytes: sun_path is 108 with
// its terminating zero (unix(7)).
const MaxUnixPath = 107

// bufferSize is one TLS record (16 KiB of payload, RFC 8446 §5.1) times four:
// larger buffers gained nothing on loopback, smaller ones cost system calls.
const bufferSize = 64 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// Dial connects to the unix socket at path. The error names the path and, where
// nobody listens there, says so.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	if len(path) > MaxUnixPath {
		return nil, fmt.Errorf("dial unix socket %s: path has %d bytes, the kernel takes %d", path, len(path), MaxUnixPath)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("dial unix socket %s: nobody listens on it: %w", path, err)
	case errors.Is(err, syscall.ENOENT):
		return nil, fmt.Errorf("dial unix socket %s: it does not exist: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("dial unix socket %s: %w", path, err)
	}
	return c, nil
}

// Relay copies bytes from a to b and from b to a until both directions have ended,
// one of them fails, or ctx is done. The end of one direction is passed on as a
// half-close where the connection knows one, so that a peer may go on reading. Both
// connections are closed when it returns. The end of a stream is not an error, and
// neither is a connection that was closed by its peer or by the end of ctx.
func Relay(ctx context.Context, a, b net.Conn) error {
	closeBoth := func() { a.Close(); b.Close() }
	defer closeBoth()
	stop := context.AfterFunc(ctx, closeBoth)
	defer stop()

	errs := make(chan error, 2)
	one := func(dst, src net.Conn) {
		err := copyHalf(dst, src)
		if err != nil {
			closeBoth() // a broken direction ends the other: neither end can go on
		}
		errs <- err
	}
	go one(a, b)
	go one(b, a)
	err := errors.Join(<-errs, <-errs)
	if ctx.Err() != nil || isClosed(err) {
		return nil
	}
	return err
}

// copyHalf copies src to dst and then closes dst's sending side.
func copyHalf(dst, src net.Conn) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	// The two wrappers keep io.CopyBuffer from bypassing the buffer: splice(2)
	// between unix and TCP sockets does not apply to TLS, and ReadFrom of
	// net.TCPConn would allocate 32 KiB for each connection.
	if _, err := io.CopyBuffer(writer{dst}, reader{src}, *buf); err != nil {
		return err
	}
	if c, ok := dst.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return dst.Close()
}

type (
	reader struct{ io.Reader }
	writer struct{ io.Writer }
)

// isClosed tells whether err is made only of errors that mean "the connection is
// gone", which is how a relay ends.
func isClosed(err error) bool {
	if err == nil {
		return true
	}
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range j.Unwrap() {
			if !isClosed(e) {
				return false
			}
		}
		return true
	}
	return errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, io.EOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN)
}
