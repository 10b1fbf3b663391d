// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"bufio"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
)

// link is the connection to a stock agent and the calls under way on it.
//
// Some calls wait for something that happens once: the exit of a process, the next
// piece of its output, the next lack of memory. A stock agent tells the first who
// asks, and nobody else (a second WaitProcess gets NOT_FOUND). So that a runtime
// whose connection broke loses none of it:
//
//   - an exit is kept until its container is removed, and all who wait for it get it; the
//     agent has forgotten the process with it, and who reads then is told of the end;
//   - output and lack of memory that came for a client that has gone goes to the next
//     that asks the same, and so does a question still open; the newest client is
//     the one that is there.
type link struct {
	conn net.Conn
	log  *slog.Logger
	done chan struct{} // closed when the connection has ended

	send sync.Mutex // held while a frame is written, and from choosing its stream id

	mu    sync.Mutex
	last  uint32                // stream id; guarded by mu
	calls map[uint32]*call      // by stream id; guarded by mu
	exits map[question][]byte   // replies to WaitProcess; guarded by mu
	order []question            // of exits, oldest first; guarded by mu
	left  map[question][][]byte // replies nobody was there for, oldest first; guarded by mu
	ended bool                  // guarded by mu
}

// keptExits is how many exits are kept: each probe that a kubelet runs leaves one, for
// as long as its container lives. Whoever has not asked after so many has gone.
const keptExits = 1024

// call is one that the agent has not answered.
type call struct {
	question
	waiters []waiter
}

type waiter struct {
	client *client
	stream uint32
}

// target is the process a call is about.
type target struct{ container, exec string }

// question is what a call asks: two that are equal ask the same.
type question struct {
	kind   kind
	method string
	target target
	length uint32 // of a read
}

// kind says how often the answer to a question can be had.
type kind int

const (
	ordinary kind = iota // the agent knows
	shared               // all who ask get the same answer
	single               // each answer goes to one
)

func newLink(conn net.Conn, log *slog.Logger) *link {
	l := &link{
		conn: conn, log: log, done: make(chan struct{}),
		calls: map[uint32]*call{}, exits: map[question][]byte{}, left: map[question][][]byte{},
	}
	go l.receive()
	return l
}

// classify reads a request as far as link has to know it. What cannot be read is an
// ordinary call, for the agent to refuse.
func classify(req *ttrpc.Request) question {
	q := question{method: req.Method}
	if req.Service != agentService {
		q.method = ""
		return q
	}
	var m interface {
		proto.Message
		GetContainerId() string
	}
	switch req.Method {
	case "WaitProcess":
		q.kind, m = shared, new(agentpb.WaitProcessRequest)
	case "ReadStdout", "ReadStderr":
		q.kind, m = single, new(agentpb.ReadStreamRequest)
	case "GetOOMEvent":
		q.kind = single
		return q
	case "ExecProcess":
		m = new(agentpb.ExecProcessRequest)
	case "CreateContainer":
		m = new(agentpb.CreateContainerRequest)
	case "RemoveContainer":
		m = new(agentpb.RemoveContainerRequest)
	default:
		return q
	}
	if proto.Unmarshal(req.Payload, m) != nil {
		q.kind = ordinary
		return q
	}
	q.target.container = m.GetContainerId()
	if e, ok := m.(interface{ GetExecId() string }); ok && e.GetExecId() != q.target.container {
		// Runtimes name the first process by the container's id, or not at all.
		q.target.exec = e.GetExecId()
	}
	if r, ok := m.(*agentpb.ReadStreamRequest); ok {
		q.length = r.Len
	}
	return q
}

// call makes a client's call, or answers it from what is known.
func (l *link) call(c *client, fr frame, req *ttrpc.Request) {
	q := classify(req)
	w := waiter{c, fr.stream}
	l.send.Lock()
	defer l.send.Unlock()
	l.mu.Lock()
	if l.ended || l.known(q, w) {
		l.mu.Unlock()
		return // with a link that has ended, its clients end
	}
	// Ids are odd and rise, as ttrpc wants them of a client. After 2^31 calls they
	// begin anew; those still under way are passed over.
	next := l.last + 1
	for next%2 == 0 || l.calls[next] != nil {
		next++
	}
	l.last = next
	l.calls[next] = &call{question: q, waiters: []waiter{w}}
	l.mu.Unlock()
	fr.stream = next
	if _, err := l.conn.Write(fr.bytes()); err != nil {
		l.conn.Close() // receive ends everything else
	}
}

// known answers from what was kept, or has the caller wait with or instead of others.
// mu is held.
func (l *link) known(q question, w waiter) bool {
	switch q.kind {
	case ordinary:
		return false
	case shared:
		if body, ok := l.exits[q]; ok {
			w.client.reply(w.stream, body)
			return true
		}
	case single:
		if kept := l.left[q]; len(kept) > 0 {
			if l.left[q] = kept[1:]; len(kept) == 1 {
				delete(l.left, q)
			}
			w.client.reply(w.stream, kept[0])
			return true
		}
	}
	for _, c := range l.calls {
		if c.question != q {
			continue
		}
		if q.kind == shared {
			c.waiters = append(c.waiters, w)
			return true
		}
		// A question of the same client is one of its own; anybody else's is that of
		// a connection that is no more, whether we were told so or not.
		if len(c.waiters) > 0 && c.waiters[0].client == w.client {
			continue
		}
		for _, old := range c.waiters {
			old.client.reply(old.stream, refusal(codes.Aborted, "%s: a newer connection has taken over", c.method))
		}
		c.waiters = []waiter{w}
		return true
	}
	return false
}

// forget takes a client that has gone off all calls.
func (l *link) forget(gone *client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.calls {
		c.waiters = slices.DeleteFunc(c.waiters, func(w waiter) bool { return w.client == gone })
	}
}

// receive hands out the agent's answers until the connection ends.
func (l *link) receive() {
	defer close(l.done)
	defer l.conn.Close()
	r := bufio.NewReader(l.conn)
	for {
		fr, err := readFrame(r)
		switch {
		case err == errTooLong:
			fr.body = refusal(codes.ResourceExhausted, "agent: %v", err)
		case err != nil:
			l.log.Info("the agent has ended the connection", logkey.Error, err.Error())
			l.mu.Lock()
			l.ended = true
			l.mu.Unlock()
			return
		case fr.kind != kindResponse:
			l.log.Warn("the agent sent what is not a response", "type", fr.kind, "stream", fr.stream)
			continue
		}
		l.answered(fr)
	}
}

// answered passes an answer on, and keeps what is to be kept.
func (l *link) answered(fr frame) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.calls[fr.stream]
	if c == nil {
		l.log.Warn("the agent answered a call nobody made", "stream", fr.stream)
		return
	}
	delete(l.calls, fr.stream)
	switch class(fr.body) {
	case codes.OK:
		l.keep(c, fr.body)
	case codes.NotFound:
		if c.length > 0 && l.waitedFor(c.target) {
			fr.body = nil // an empty response: a read without data, which is the end
		}
	}
	for _, w := range c.waiters {
		w.client.reply(w.stream, fr.body)
	}
}

// waitedFor tells whether somebody has asked for a process's exit, with whose answer the
// agent forgets the process. mu is held.
func (l *link) waitedFor(t target) bool {
	q := question{kind: shared, method: "WaitProcess", target: t}
	if l.exits[q] != nil {
		return true
	}
	for _, c := range l.calls {
		if c.question == q {
			return true
		}
	}
	return false
}

// keep does with a success what its call asks for. mu is held.
func (l *link) keep(c *call, body []byte) {
	switch {
	case c.kind == shared:
		l.exits[c.question] = body
		if l.order = append(l.order, c.question); len(l.order) > keptExits {
			delete(l.exits, l.order[0])
			l.order = l.order[1:]
		}
	case c.kind == single && len(c.waiters) == 0:
		l.left[c.question] = append(l.left[c.question], body)
	case c.method == "RemoveContainer" || c.method == "CreateContainer":
		l.drop(func(t target) bool { return t.container == c.target.container })
	case c.method == "ExecProcess": // an id may be used again
		l.drop(func(t target) bool { return t == c.target })
	}
}

// drop forgets what was kept of processes. mu is held.
func (l *link) drop(of func(target) bool) {
	gone := func(q question) bool { return of(q.target) }
	l.order = slices.DeleteFunc(l.order, gone)
	maps.DeleteFunc(l.exits, func(q question, _ []byte) bool { return gone(q) })
	maps.DeleteFunc(l.left, func(q question, _ [][]byte) bool { return gone(q) })
}
