// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// window is what the agent may send past what the sink has taken. Half of the
// protocol's default: it still allows 500 MB/s at a round trip of 1 ms, and it is
// what a stalled reader costs in the node's memory.
const window = extension.Window / 2

// readLen is what one ReadStdout asks for, as kata does.
const readLen = 32 << 10

// output copies one stream of a process to its sink.
type output struct {
	p      Process
	stderr bool
	sink   io.Writer // nil: discard
	moved  *progress
}

// copy runs until the end of the stream. An error means that bytes may be missing.
func (o *output) copy(ctx context.Context, streams bool) error {
	if streams {
		return o.copyStream(ctx)
	}
	return o.copyCalls(ctx)
}

// copyCalls uses the calls every kata-agent has. A reply that is lost with its
// connection takes its bytes along; only the extension does better.
func (o *output) copyCalls(ctx context.Context) error {
	read := agentpb.AgentServiceService.ReadStdout
	if o.stderr {
		read = agentpb.AgentServiceService.ReadStderr
	}
	for {
		r, err := guest.Agent(ctx, o.p.Conn, read, &agentpb.ReadStreamRequest{ContainerId: o.p.Container, ExecId: o.p.agentID(), Len: readLen})
		if err != nil {
			return err
		}
		if len(r.Data) == 0 {
			return nil
		}
		o.moved.begin()
		o.write(r.Data)
		o.moved.end()
	}
}

// write hands data to the sink. A sink that fails is not tried again, and the
// process goes on as if it had been read: it must not hang on a broken log.
func (o *output) write(b []byte) {
	if o.sink == nil {
		return
	}
	if _, err := o.sink.Write(b); err != nil {
		o.sink = nil
	}
}

// copyStream uses PodVM.ReadOutput.
func (o *output) copyStream(ctx context.Context) error {
	q := &queue{ready: make(chan struct{}, 1), empty: make(chan struct{}, 1)}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { o.drain(wctx, q) })
	err := o.p.Conn.PodVM(ctx, func(ctx context.Context, vm podvmpb.PodVMClient) error {
		if err := q.waitEmpty(ctx); err != nil {
			return err
		}
		return o.receive(ctx, vm, q)
	})
	if err == nil {
		err = q.waitEmpty(ctx)
	}
	cancel()
	wg.Wait()
	return err
}

// receive opens the stream where it stopped and queues what comes until its end.
func (o *output) receive(ctx context.Context, vm podvmpb.PodVMClient, q *queue) error {
	// The stream's context is not ctx: a stream whose receiver went away while the
	// agent still sends would fill and hold up the connection's one reader.
	st, err := vm.ReadOutput(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	which := podvmpb.OutputStream_OUTPUT_STREAM_STDOUT
	if o.stderr {
		which = podvmpb.OutputStream_OUTPUT_STREAM_STDERR
	}
	offset := q.attach(nil)
	defer q.attach(nil)
	req := &podvmpb.ReadOutputRequest{ContainerId: o.p.Container, ExecId: o.p.Exec, Stream: which, Offset: offset, Window: window}
	if err := st.Send(req); err != nil {
		return guest.Broken(err)
	}
	q.attach(st)
	if offset > 0 {
		// The last acknowledgements may have been lost with the old connection; an
		// agent whose buffer is full sends nothing that we could acknowledge anew.
		q.acknowledge()
	}
	result := make(chan error, 1)
	go func() { result <- o.receiveAll(st, q, offset) }()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		// The goroutine goes on to drain what the agent may still send: at most a
		// window, since nothing is acknowledged any more.
		q.close()
		q.detach()
		return context.Cause(ctx)
	}
}

func (o *output) receiveAll(st podvmpb.PodVM_ReadOutputClient, q *queue, offset uint64) error {
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return guest.Broken(fmt.Errorf("output stream ended without eof: %w", io.ErrUnexpectedEOF))
		}
		if err != nil {
			return err
		}
		if len(r.Data) == 0 && !r.Eof {
			continue // ttrpc's closing message; io.EOF follows
		}
		if r.Offset != offset && len(r.Data) > 0 {
			return fmt.Errorf("agent sent output at %d instead of %d: %w", r.Offset, offset, errdefs.ErrDataLoss)
		}
		if len(r.Data) > 0 {
			o.moved.touch()
			if !q.put(r.Data) {
				return fmt.Errorf("agent sent more output than the window of %d bytes: %w", window, errdefs.ErrOutOfRange)
			}
			offset += uint64(len(r.Data))
		}
		if r.Eof {
			q.attach(nil) // an acknowledgement would meet a stream that is no more
			go func() {
				for err := error(nil); err == nil; _, err = st.Recv() {
				}
			}()
			return nil
		}
	}
}

// drain writes what is queued and acknowledges it.
func (o *output) drain(ctx context.Context, q *queue) {
	var bulk bulk
	defer bulk.end()
	for {
		b := q.take()
		if b == nil {
			select {
			case <-q.ready:
			case <-bulk.pause():
				bulk.end()
			case <-ctx.Done():
				return
			}
			continue
		}
		bulk.moved(len(b))
		o.write(b)
		o.moved.touch()
		q.written(len(b))
	}
}

// queue holds what was received and not yet written: at most a window.
type queue struct {
	ready chan struct{} // capacity 1: something was put
	empty chan struct{} // capacity 1: everything was written

	mu     sync.Mutex // guards the fields below
	chunks [][]byte   // received, not yet taken
	held   int        // bytes of chunks, and those being written
	offset uint64     // bytes written since the start of the stream
	closed bool       // put discards

	send sync.Mutex // guards st and its sending side
	st   podvmpb.PodVM_ReadOutputClient
}

// detach ends the sending side of the stream.
func (q *queue) detach() {
	q.send.Lock()
	defer q.send.Unlock()
	if q.st != nil {
		q.st.CloseSend()
		q.st = nil
	}
}

// attach makes st the stream that acknowledgements go to and returns the offset at
// which it is to begin.
func (q *queue) attach(st podvmpb.PodVM_ReadOutputClient) uint64 {
	q.send.Lock()
	q.st = st
	q.send.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.offset
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
}

// put takes b over. It reports false when b does not fit in the window.
func (q *queue) put(b []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return true
	}
	if q.held+len(b) > window {
		return false
	}
	q.chunks, q.held = append(q.chunks, b), q.held+len(b)
	signal(q.ready)
	return true
}

// take returns the oldest chunk, or nil.
func (q *queue) take() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.chunks) == 0 {
		return nil
	}
	b := q.chunks[0]
	if q.chunks = q.chunks[1:]; len(q.chunks) == 0 {
		q.chunks = nil
	}
	return b
}

// written counts n bytes as done and tells the agent.
func (q *queue) written(n int) {
	q.mu.Lock()
	q.offset += uint64(n)
	if q.held -= n; q.held == 0 {
		signal(q.empty)
	}
	q.mu.Unlock()
	q.acknowledge()
}

// acknowledge tells the agent how far everything was written.
func (q *queue) acknowledge() {
	q.mu.Lock()
	acked := q.offset
	q.mu.Unlock()
	q.send.Lock()
	defer q.send.Unlock()
	if q.st != nil {
		// A failure shows in Recv, and the next stream begins at the right offset.
		q.st.Send(&podvmpb.ReadOutputRequest{Acked: acked})
	}
}

// waitEmpty returns when everything received was written.
func (q *queue) waitEmpty(ctx context.Context) error {
	for {
		q.mu.Lock()
		done := q.held == 0
		q.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-q.empty:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
