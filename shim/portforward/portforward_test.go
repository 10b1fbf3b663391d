// SPDX-License-Identifier: Apache-2.0

package portforward

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/guest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newGuest is a connection to an agent that the test owns.
func newGuest(t *testing.T) *guest.Conn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	agent := &agenttest.Agent{Features: []extension.Feature{extension.Forward}}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() {
		defer close(served)
		agent.Serve(ctx, l)
	}()
	conn := guest.New(guest.Config{Socket: path})
	t.Cleanup(func() {
		conn.Close()
		cancel()
		<-served
		agent.Close()
	})
	return conn
}

// serve serves connections that were meant for port, and returns where to connect.
func serve(t *testing.T, port uint16) (addr string, end func()) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	conn := newGuest(t)
	go func() {
		defer close(served)
		(&Listener{l.(*net.TCPListener), func(*net.TCPConn) (uint16, error) { return port, nil }}).Serve(ctx, conn)
	}()
	end = func() { cancel(); <-served }
	t.Cleanup(end)
	return l.Addr().String(), end
}

// TestForward: a connection reaches the port it was meant for, and both its halves
// work on their own.
func TestForward(t *testing.T) {
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	echoed := make(chan error, 1)
	go func() {
		c, err := server.Accept()
		if err != nil {
			echoed <- err
			return
		}
		defer c.Close()
		_, err = io.Copy(c, c)
		echoed <- err
	}()
	addr, _ := serve(t, uint16(server.Addr().(*net.TCPAddr).Port))
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := <-echoed; err != nil {
		t.Error(err)
	}
}

// TestNobodyListens: the connection is closed, and the next one is served.
func TestNobodyListens(t *testing.T) {
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	addr, _ := serve(t, uint16(port))
	for range 2 {
		c, err := net.Dial("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("read %d, %v from a port that nobody listens on", n, err)
		}
		c.Close()
	}
}

// TestEnd: the listener goes, and the connections with it.
func TestEnd(t *testing.T) {
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	addr, end := serve(t, uint16(server.Addr().(*net.TCPAddr).Port))
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	inside, err := server.Accept() // now it is carried
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	end()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection is open")
	}
	if c, err := net.Dial("tcp4", addr); err == nil {
		c.Close()
		t.Error("the listener is open")
	}
}

// TestOriginalPort: without a redirect a connection was meant for the port it came to.
func TestOriginalPort(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	port, err := originalPort(in.(*net.TCPConn))
	if want := l.Addr().(*net.TCPAddr).Port; err != nil || int(port) != want {
		t.Errorf("port %d, %v; want %d", port, err, want)
	}
}

func TestListenRefuses(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "none"), t.TempDir()} {
		if l, err := Listen(path); err == nil {
			l.l.Close()
			t.Errorf("%s was taken for a network namespace", path)
		}
	}
}
