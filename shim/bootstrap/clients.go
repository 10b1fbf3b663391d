// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"net"
	"sync"

	"github.com/containerd/ttrpc"
)

// clients counts a server's connections, so that it can end after the last of those
// who were served has left. ttrpc's own Shutdown closes a connection whose answer is
// still being written (1.2.10: a call counts from the moment its connection's loop
// looks again).
type clients struct {
	admit ttrpc.Handshaker

	mu   sync.Mutex // guards the fields below
	n    int
	left chan struct{} // closed and replaced when one leaves
}

func newClients() *clients {
	return &clients{admit: ttrpc.UnixSocketRequireSameUser(), left: make(chan struct{})}
}

// Handshake implements ttrpc.Handshaker.
func (c *clients) Handshake(ctx context.Context, conn net.Conn) (net.Conn, any, error) {
	admitted, who, err := c.admit.Handshake(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	c.mu.Lock()
	c.n++
	c.mu.Unlock()
	return &client{Conn: admitted, leave: sync.OnceFunc(c.leave)}, who, nil
}

func (c *clients) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n--
	close(c.left)
	c.left = make(chan struct{})
}

// wait returns when no connection is open, or ctx ends.
func (c *clients) wait(ctx context.Context) {
	for {
		c.mu.Lock()
		n, left := c.n, c.left
		c.mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-left:
		case <-ctx.Done():
			return
		}
	}
}

type client struct {
	net.Conn
	leave func()
}

func (c *client) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
