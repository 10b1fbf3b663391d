// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/podvm/agent/stream"
)

// podvm is peerpod.podvm.v1.PodVM, the extension service.
type podvm struct{ a *Agent }

var _ podvmpb.PodVMService = (*podvm)(nil)

// ImportRootfs receives into a queue that holds no more than the window, so that the
// one reader of the connection is never kept waiting by the unpacking.
func (s *podvm) ImportRootfs(ctx context.Context, srv podvmpb.PodVM_ImportRootfsServer) error {
	first, err := srv.Recv()
	if err != nil {
		return toGRPC(fmt.Errorf("receive the first request: %w", err))
	}
	if err := checkImport(first); err != nil {
		return toGRPC(err)
	}
	if _, err := s.a.container(first.ContainerId, errdefs.ErrNotFound); err == nil {
		return toGRPC(fmt.Errorf("container %s has its root file system already: %w", first.ContainerId, errdefs.ErrAlreadyExists))
	}
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	q := newArchiveQueue(func(consumed uint64) error {
		return srv.Send(&podvmpb.ImportRootfsResponse{Consumed: consumed, Window: extension.Window})
	})
	if err := srv.Send(&podvmpb.ImportRootfsResponse{Window: extension.Window}); err != nil {
		return err
	}
	received := make(chan struct{})
	go func() {
		defer close(received)
		q.receive(srv)
	}()
	// RecvMsg ends when the handler's context does, which is when this call returns or
	// the connection breaks. The goroutine uses only its arguments; it is not waited
	// for, because that would be waiting for ourselves.
	path, err := s.a.root.Import(ctx, first.ContainerId, q.reader, first.Compression == podvmpb.Compression_COMPRESSION_ZSTD, first.SizeLimit)
	if err != nil {
		return toGRPC(err)
	}
	<-received // it saw eof: Import read to the end
	s.a.log.Info("root file system imported", logkey.Container, first.ContainerId, "bytes", q.total(), logkey.Duration, time.Since(began).Milliseconds())
	return srv.Send(&podvmpb.ImportRootfsResponse{Consumed: q.total(), Window: extension.Window, Done: true, Path: path})
}

func checkImport(req *podvmpb.ImportRootfsRequest) error {
	if err := checkContainerID(req.ContainerId); err != nil {
		return err
	}
	switch req.Compression {
	case podvmpb.Compression_COMPRESSION_NONE, podvmpb.Compression_COMPRESSION_ZSTD:
	default:
		return fmt.Errorf("compression %d: %w", req.Compression, errdefs.ErrNotImplemented)
	}
	if len(req.Data) > 0 || req.Eof {
		return fmt.Errorf("the first request carries data: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// archiveQueue holds what was received of an archive and not yet unpacked.
type archiveQueue struct {
	report func(consumed uint64) error // tells the caller, who may then send more

	mu       sync.Mutex
	pieces   [][]byte      // guarded by mu
	held     uint64        // guarded by mu; bytes in pieces
	consumed uint64        // guarded by mu
	reported uint64        // guarded by mu
	err      error         // guarded by mu; set when nothing follows; io.EOF: complete
	wake     chan struct{} // holds one token: something changed
}

func newArchiveQueue(report func(uint64) error) *archiveQueue {
	return &archiveQueue{report: report, wake: make(chan struct{}, 1)}
}

func (q *archiveQueue) total() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.consumed
}

// receive fills the queue until the archive is complete or its sender is gone.
func (q *archiveQueue) receive(srv podvmpb.PodVM_ImportRootfsServer) {
	for {
		req, err := srv.Recv()
		if err == nil {
			err = q.add(req)
		} else if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the sender ended the stream before the archive: %w", errdefs.ErrAborted)
		}
		if err != nil {
			q.mu.Lock()
			q.err = err
			q.mu.Unlock()
			q.signal()
			return
		}
	}
}

// add takes a piece. io.EOF: it was the last.
func (q *archiveQueue) add(req *podvmpb.ImportRootfsRequest) error {
	if len(req.Data) > extension.MaxData {
		return fmt.Errorf("a piece of %d bytes; at most %d are allowed: %w", len(req.Data), extension.MaxData, errdefs.ErrInvalidArgument)
	}
	q.mu.Lock()
	q.held += uint64(len(req.Data))
	// What is consumed and not reported yet is still in the sender's window.
	over := q.held+q.consumed-q.reported > extension.Window
	if len(req.Data) > 0 {
		q.pieces = append(q.pieces, req.Data)
	}
	q.mu.Unlock()
	q.signal()
	switch {
	case over:
		return fmt.Errorf("more than the window of %d bytes is in flight: %w", extension.Window, errdefs.ErrResourceExhausted)
	case req.Eof:
		return io.EOF
	}
	return nil
}

func (q *archiveQueue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// reader reads the queue. There is one.
func (q *archiveQueue) reader(ctx context.Context) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		for {
			q.mu.Lock()
			if len(q.pieces) > 0 {
				n := copy(p, q.pieces[0])
				if q.pieces[0] = q.pieces[0][n:]; len(q.pieces[0]) == 0 {
					q.pieces = q.pieces[1:]
				}
				q.held -= uint64(n)
				q.consumed += uint64(n)
				tell := uint64(0)
				// Often enough that the sender never waits, seldom enough to cost nothing.
				if q.consumed-q.reported >= extension.Window/4 {
					tell, q.reported = q.consumed, q.consumed
				}
				q.mu.Unlock()
				if tell > 0 {
					if err := q.report(tell); err != nil {
						return n, err
					}
				}
				return n, nil
			}
			err := q.err
			q.mu.Unlock()
			if err != nil {
				return 0, err
			}
			select {
			case <-q.wake:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// ReadOutput pushes output within the window the caller granted.
func (s *podvm) ReadOutput(ctx context.Context, srv podvmpb.PodVM_ReadOutputServer) error {
	req, err := srv.Recv()
	if err != nil {
		return toGRPC(fmt.Errorf("receive the first request: %w", err))
	}
	out, err := s.output(req)
	if err != nil {
		return toGRPC(err)
	}
	claim, err := out.Claim(ctx)
	if err != nil {
		return toGRPC(err)
	}
	defer out.Release(claim)
	if err := out.Ack(req.Acked); err != nil {
		return toGRPC(err)
	}
	if kept, produced := out.Bounds(); req.Offset < kept || req.Offset > produced {
		return toGRPC(fmt.Errorf("offset %d is outside of the kept output, %d to %d: %w", req.Offset, kept, produced, errdefs.ErrOutOfRange))
	}
	acks := make(chan uint64, 1)
	failed := make(chan error, 1)
	go receiveAcks(srv, out, acks, failed) // ends with the stream, which ends with this call
	return toGRPC(push(claim.Context, srv, out, req, acks, failed))
}

// output finds the stream a request names and checks the request.
func (s *podvm) output(req *podvmpb.ReadOutputRequest) (*stream.Output, error) {
	p, err := s.a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	out := p.stdout
	switch req.Stream {
	case podvmpb.OutputStream_OUTPUT_STREAM_STDOUT:
	case podvmpb.OutputStream_OUTPUT_STREAM_STDERR:
		if out = p.stderr; out == nil {
			return nil, fmt.Errorf("a process with a terminal has no standard error of its own: %w", errdefs.ErrFailedPrecondition)
		}
	default:
		return nil, fmt.Errorf("stream %d: %w", req.Stream, errdefs.ErrInvalidArgument)
	}
	if req.Window == 0 {
		return nil, fmt.Errorf("the window is 0: nothing could ever be sent: %w", errdefs.ErrInvalidArgument)
	}
	if req.Acked > req.Offset {
		return nil, fmt.Errorf("%d bytes are acknowledged, of which only %d arrived: %w", req.Acked, req.Offset, errdefs.ErrInvalidArgument)
	}
	return out, nil
}

// receiveAcks applies the caller's acknowledgements and passes the newest on.
func receiveAcks(srv podvmpb.PodVM_ReadOutputServer, out *stream.Output, acks chan uint64, failed chan<- error) {
	for {
		req, err := srv.Recv()
		if errors.Is(err, io.EOF) {
			return // the caller has nothing more to say; it may still listen
		}
		if err == nil {
			err = out.Ack(req.Acked)
		}
		if err != nil {
			failed <- err
			return
		}
		select {
		case <-acks: // older, and not looked at
		default:
		}
		acks <- req.Acked
	}
}

// push sends output until its end.
func push(ctx context.Context, srv podvmpb.PodVM_ReadOutputServer, out *stream.Output, req *podvmpb.ReadOutputRequest, acks <-chan uint64, failed <-chan error) error {
	// What the caller has already is not in flight, acknowledged or not.
	sent, acked := req.Offset, req.Offset
	var buf []byte // of the chunk before
	for {
		// Without room, wait for an acknowledgement; with room, take one that is there.
		open := make(chan struct{})
		if sent-acked < req.Window {
			close(open)
		}
		var err error
		select {
		case newest := <-acks:
			if newest > sent {
				return fmt.Errorf("%d bytes acknowledged, only %d were sent: %w", newest, sent, errdefs.ErrInvalidArgument)
			}
			acked = max(acked, newest)
			continue
		case err = <-failed:
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-open:
		}
		if err != nil {
			return err
		}
		room := req.Window - (sent - acked)
		data, last, err := out.Next(ctx, sent, int(min(room, extension.ChunkSize)), buf)
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
		if err := srv.Send(&podvmpb.ReadOutputResponse{Offset: sent, Data: data, Eof: last}); err != nil {
			return err
		}
		buf = data
		sent += uint64(len(data))
		if last {
			return nil
		}
	}
}

// WriteInput writes to a process's input at an offset.
func (s *podvm) WriteInput(ctx context.Context, req *podvmpb.WriteInputRequest) (*podvmpb.WriteInputResponse, error) {
	if len(req.Data) > extension.MaxData {
		return nil, toGRPC(fmt.Errorf("%d bytes of data; at most %d are allowed: %w", len(req.Data), extension.MaxData, errdefs.ErrInvalidArgument))
	}
	p, err := s.a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, toGRPC(err)
	}
	at, err := p.stdin.Write(ctx, req.Offset, req.Data, req.Eof)
	return reply(&podvmpb.WriteInputResponse{Offset: at}, err)
}
