// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
)

// agentWait bounds the wait for a stock agent's socket: the agent is a service of
// the guest that may start after us. Upstream's forwarder gives it 150 s.
const (
	agentWait = 150 * time.Second
	agentPoll = 20 * time.Millisecond
	// maxCalls is how many calls one connection may have under way. Each process
	// that runs holds three (its exit and two outputs).
	maxCalls = 4096
	// lastReplies is how long a connection is kept for replies on their way when
	// the agent has ended.
	lastReplies = 5 * time.Second
)

// front stands before a stock kata-agent. The agent removes the directory of its own
// socket when the sandbox is made (kata-containers 4.1, src/agent/src/rpc.rs), so
// that nobody can connect to it afterwards: there is one connection to the agent,
// made before the first call, and the calls of all clients go over it.
//
//	client ──┐  stream ids of each client's own
//	client ──┼─▶ Front ──▶ one connection, stream ids of the front's own ──▶ agent
//	client ──┘
//
// Requests and responses pass unread, whatever the call is, but for what rewrite
// changes. A client that has gone leaves calls behind, because ttrpc cannot take one
// back. What the agent answers to those that wait or read is kept for the client that
// asks next, which is the same runtime on a new connection (see link).
type front struct {
	cfg FrontConfig
	run context.Context // ends with Serve

	mu     sync.Mutex
	link   *link         // guarded by mu; nil: none
	dialed chan struct{} // guarded by mu; closed when the dial under way has ended; nil: none is
}

// FrontConfig configures ServeAgent.
type FrontConfig struct {
	// Socket is the agent's.
	Socket string
	// PodNetNS is the path of the network namespace that containers join.
	PodNetNS string
	Log      *slog.Logger
}

// ServeAgent connects to the stock agent and serves it on l until ctx is done. It
// closes l and all connections, waits for them and returns nil; before that it
// returns only when l fails.
func ServeAgent(ctx context.Context, l net.Listener, cfg FrontConfig) error {
	return (&front{cfg: cfg}).serveAll(ctx, l)
}

func (f *front) serveAll(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	f.run = ctx
	defer func() {
		cancel()
		f.close()
		wg.Wait()
	}()
	wg.Go(func() {
		<-ctx.Done()
		l.Close()
	})
	// Before anybody can make a sandbox.
	wg.Go(func() {
		if _, err := f.agent(ctx); err != nil && ctx.Err() == nil {
			f.cfg.Log.Error("the agent cannot be reached", logkey.Error, err.Error())
		}
	})
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		wg.Go(func() {
			defer conn.Close()
			if err := f.serve(ctx, conn); err != nil && ctx.Err() == nil {
				f.cfg.Log.Error("connection to the agent ended", logkey.Address, conn.RemoteAddr().String(), logkey.Error, err.Error())
			}
		})
	}
}

func (f *front) close() {
	f.mu.Lock()
	dialed := f.dialed
	f.mu.Unlock()
	if dialed != nil {
		<-dialed
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.link != nil {
		f.link.conn.Close()
		<-f.link.done
	}
}

// agent returns the connection to the agent, made anew if there is none. One dial at
// a time serves all who wait.
func (f *front) agent(ctx context.Context) (*link, error) {
	for {
		f.mu.Lock()
		if f.link != nil {
			select {
			case <-f.link.done:
				f.link = nil
			default:
				defer f.mu.Unlock()
				return f.link, nil
			}
		}
		if dialed := f.dialed; dialed != nil {
			f.mu.Unlock()
			select {
			case <-dialed:
				continue
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		dialed := make(chan struct{})
		f.dialed = dialed
		f.mu.Unlock()

		conn, err := dialAgent(f.run, f.cfg.Socket)
		f.mu.Lock()
		if err == nil {
			f.link = newLink(conn, f.cfg.Log)
		}
		f.dialed = nil
		close(dialed)
		f.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
}

// dialAgent dials until the agent listens.
func dialAgent(ctx context.Context, socket string) (net.Conn, error) {
	wait, cancel := context.WithTimeout(ctx, agentWait)
	defer cancel()
	tick := time.NewTicker(agentPoll)
	defer tick.Stop()
	for {
		conn, err := relay.Dial(wait, socket)
		if err == nil {
			return conn, nil
		}
		select {
		case <-tick.C:
		case <-wait.Done():
			return nil, fmt.Errorf("agent_socket %s (a kata-agent removes it when it makes its sandbox): %w", socket, err)
		}
	}
}

// client is one connection of the adaptor's.
type client struct {
	conn net.Conn
	wake chan struct{} // capacity 1

	mu     sync.Mutex
	queue  []frame // replies to be written; guarded by mu
	calls  int     // under way; guarded by mu
	ending bool    // nothing more will be queued; guarded by mu
}

// begin counts a call. False: there are too many.
func (c *client) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls >= maxCalls {
		return false
	}
	c.calls++
	return true
}

// reply queues the answer to a call that begin counted.
func (c *client) reply(stream uint32, body []byte) {
	c.mu.Lock()
	c.calls--
	c.mu.Unlock()
	c.push(frame{stream: stream, kind: kindResponse, body: body})
}

// push queues a frame. It never waits: a client that does not read holds up nobody.
func (c *client) push(f frame) {
	c.mu.Lock()
	c.queue = append(c.queue, f)
	c.mu.Unlock()
	c.poke()
}

// end says that no reply will come any more.
func (c *client) end() {
	c.mu.Lock()
	c.ending = true
	c.mu.Unlock()
	c.poke()
}

func (c *client) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// write sends replies until the connection is closed, or end was called and all of
// them are sent. It closes the connection.
func (c *client) write(ctx context.Context) {
	defer c.conn.Close()
	for {
		c.mu.Lock()
		queue, ending := c.queue, c.ending
		c.queue = nil
		c.mu.Unlock()
		for _, f := range queue {
			if _, err := c.conn.Write(f.bytes()); err != nil {
				return
			}
		}
		if len(queue) > 0 {
			continue
		}
		if ending {
			return
		}
		select {
		case <-c.wake:
		case <-ctx.Done():
			return
		}
	}
}

// serve carries one client's calls until it or the agent goes.
func (f *front) serve(ctx context.Context, conn net.Conn) error {
	agent, err := f.agent(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &client{conn: conn, wake: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { c.write(ctx) })
	wg.Go(func() {
		select {
		case <-agent.done:
			// The last reply, that to DestroySandbox, is still to be sent.
			_ = conn.SetWriteDeadline(time.Now().Add(lastReplies))
			c.end()
		case <-ctx.Done():
			conn.Close()
		}
	})
	defer agent.forget(c)
	r := bufio.NewReader(conn)
	for {
		fr, err := readFrame(r)
		switch {
		case errors.Is(err, errTooLong):
			c.push(frame{stream: fr.stream, kind: kindResponse, body: refusal(codes.ResourceExhausted, "%v", err)})
			continue
		case err != nil:
			return nil // the client has gone, and owes nobody a reason
		case fr.kind != kindRequest:
			return fmt.Errorf("message of type %d on stream %d: a client of a stock agent sends requests alone", fr.kind, fr.stream)
		}
		if err := f.request(agent, c, fr); err != nil {
			return err
		}
	}
}

// request sends one request on to the agent, or refuses it.
func (f *front) request(agent *link, c *client, fr frame) error {
	if !c.begin() {
		c.push(frame{stream: fr.stream, kind: kindResponse, body: refusal(codes.ResourceExhausted, "%d calls are under way on this connection", maxCalls)})
		return nil
	}
	req := new(ttrpc.Request)
	if err := proto.Unmarshal(fr.body, req); err != nil {
		return fmt.Errorf("request on stream %d: %w", fr.stream, err)
	}
	if fr.flags&flagRemoteOpen != 0 {
		c.reply(fr.stream, refusal(codes.Unimplemented, "%s/%s is a stream, and the agent behind this forwarder is a stock one", req.Service, req.Method))
		return nil
	}
	changed, err := rewrite(req, f.cfg.PodNetNS)
	if err == nil && changed {
		fr.body, err = proto.Marshal(req)
	}
	switch {
	case err != nil:
		c.reply(fr.stream, refusal(codes.Internal, "forwarder: %s: %v", req.Method, err))
	case len(fr.body) > maxBody:
		c.reply(fr.stream, refusal(codes.ResourceExhausted, "forwarder: %s: %v", req.Method, errTooLong))
	default:
		agent.call(c, fr, req)
	}
	return nil
}
