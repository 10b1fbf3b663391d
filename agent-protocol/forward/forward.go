// SPDX-License-Identifier: Apache-2.0

// Package forward carries TCP connections from the node to a pod's loopback
// interface, which is in another machine: what `kubectl port-forward` opens in the
// pod's network namespace on the node.
//
//	containerd ──127.0.0.1:8080──▶ redirect (adaptor) ──▶ Port (shim) ══ Forward ══▶ agent ──▶ 127.0.0.1:8080 (VM)
//
// Both ends of the stream PodVM.Forward do the same, and this is it. Each end grants
// the other a window and takes what arrives into memory at once: ttrpc has one reader
// for all streams of a connection, and a connection that nobody reads must not stop
// the pod's other calls.
package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// Port is where the shim listens, on the loopback interface of the pod's network
// namespace on the node. The adaptor redirects every TCP connection to that interface
// to it. Nothing else of the pod runs there.
const Port = 15151

// Window is what an end grants the other, bytes: port-forward is for people and
// debuggers, and this is the memory that one connection may take.
const Window = extension.Window / 4

// Stream is either end of PodVM.Forward.
type Stream interface {
	Send(*podvmpb.ForwardFrame) error
	Recv() (*podvmpb.ForwardFrame, error)
}

// Conn is a connection whose halves can be closed one by one.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Relay carries conn over s until both halves are closed, one of them fails, or ctx
// is done. granted is the other end's window; that of this end was sent before. It
// closes conn. The goroutine that receives from s ends with the stream, which is the
// caller's to end.
func Relay(ctx context.Context, conn Conn, s Stream, granted uint64) error {
	if granted == 0 {
		return errors.Join(fmt.Errorf("the window is 0: nothing could ever be sent: %w", errdefs.ErrInvalidArgument), conn.Close())
	}
	r := &relay{conn: conn, stream: s, granted: granted, changed: make(chan struct{})}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { conn.Close() }) // ends Read and Write
	go func() {
		if err := r.receive(); err != nil {
			cancel(err)
		}
	}()
	var wg sync.WaitGroup
	for _, half := range []func(context.Context) error{r.outgoing, r.incoming} {
		wg.Go(func() {
			if err := half(ctx); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	if !stop() {
		return context.Cause(ctx)
	}
	return conn.Close()
}

type relay struct {
	conn    Conn
	stream  Stream
	granted uint64

	sending sync.Mutex // held over Send

	mu       sync.Mutex
	acked    uint64        // guarded by mu; of what we sent
	pieces   [][]byte      // guarded by mu; received, not yet written
	received uint64        // guarded by mu; bytes ever put into pieces
	reported uint64        // guarded by mu; of these, acknowledged by us
	eof      bool          // guarded by mu; the other end will send nothing more
	changed  chan struct{} // guarded by mu; closed and replaced when any of these changes
}

func (r *relay) send(f *podvmpb.ForwardFrame) error {
	r.sending.Lock()
	defer r.sending.Unlock()
	return r.stream.Send(f)
}

// update changes the state under mu and wakes who waits for it.
func (r *relay) update(f func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := f()
	close(r.changed)
	r.changed = make(chan struct{})
	return err
}

// await waits until f, called under mu, is true.
func (r *relay) await(ctx context.Context, f func() bool) error {
	for {
		r.mu.Lock()
		ok, changed := f(), r.changed
		r.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// receive takes frames until the stream ends.
func (r *relay) receive() error {
	for {
		f, err := r.stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			r.mu.Lock()
			defer r.mu.Unlock()
			if !r.eof {
				return fmt.Errorf("the other end left in the middle: %w", errdefs.ErrAborted)
			}
			return nil
		case err != nil:
			return err
		}
		if err := r.update(func() error { return r.take(f) }); err != nil {
			return err
		}
	}
}

// take applies a frame; mu is held.
func (r *relay) take(f *podvmpb.ForwardFrame) error {
	r.acked = max(r.acked, f.Acked)
	if len(f.Data) > 0 {
		if r.eof {
			return fmt.Errorf("data after the end: %w", errdefs.ErrInvalidArgument)
		}
		r.pieces = append(r.pieces, f.Data)
		r.received += uint64(len(f.Data))
		if r.received-r.reported > Window {
			return fmt.Errorf("more than the window of %d bytes is in flight: %w", Window, errdefs.ErrResourceExhausted)
		}
	}
	r.eof = r.eof || f.Eof
	return nil
}

// outgoing reads the connection and sends.
func (r *relay) outgoing(ctx context.Context) error {
	buf := make([]byte, min(r.granted, extension.ChunkSize))
	for sent := uint64(0); ; {
		var room uint64
		if err := r.await(ctx, func() bool {
			if r.acked > sent {
				r.acked = sent // it cannot have what was not sent
			}
			room = r.granted - (sent - r.acked)
			return room > 0
		}); err != nil {
			return err
		}
		n, err := r.conn.Read(buf[:min(room, uint64(len(buf)))])
		if n > 0 {
			if err := r.send(&podvmpb.ForwardFrame{Data: buf[:n:n]}); err != nil {
				return err
			}
			// ttrpc has written the frame when Send returns: buf is free again.
			sent += uint64(n)
		}
		switch {
		case errors.Is(err, io.EOF):
			return r.send(&podvmpb.ForwardFrame{Eof: true})
		case err != nil:
			return err
		}
	}
}

// incoming writes what was received to the connection.
func (r *relay) incoming(ctx context.Context) error {
	for written := uint64(0); ; {
		var piece []byte
		if err := r.await(ctx, func() bool {
			if len(r.pieces) > 0 {
				piece, r.pieces = r.pieces[0], r.pieces[1:]
			}
			return piece != nil || r.eof
		}); err != nil {
			return err
		}
		if piece == nil {
			return r.conn.CloseWrite()
		}
		if _, err := r.conn.Write(piece); err != nil {
			return err
		}
		written += uint64(len(piece))
		tell := false
		r.mu.Lock()
		// Often enough that the sender never waits, and never after the end: then the
		// other end may be gone.
		if tell = written-r.reported >= Window/4 && !r.eof; tell {
			r.reported = written
		}
		r.mu.Unlock()
		if tell {
			if err := r.send(&podvmpb.ForwardFrame{Acked: written}); err != nil {
				return err
			}
		}
	}
}
