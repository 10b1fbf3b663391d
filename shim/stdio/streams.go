// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// drainPoll is how often WaitDrained looks for progress; it does not delay the end.
const drainPoll = 100 * time.Millisecond

// Process names a process in the guest.
type Process struct {
	Conn      *guest.Conn
	Features  extension.Set
	Container string
	// Exec is empty for the container's first process.
	Exec     string
	Terminal bool
	// Quiet: the process never writes; output without a sink is not even discarded.
	Quiet bool
}

// agentID is how the AgentService names the process.
func (p Process) agentID() string {
	if p.Exec == "" {
		return p.Container
	}
	return p.Exec
}

// Streams copies the streams of one process. It is safe for concurrent use.
type Streams struct {
	p       Process
	files   *Files
	cancel  context.CancelFunc
	moved   progress
	read    chan struct{} // closed when the agent has nothing more to be read
	drained chan struct{} // closed when every output stream ended and its FIFO is empty
	wg      sync.WaitGroup
}

// Start begins to copy; the process must exist in the guest. Close ends it. Files
// belongs to the Streams from here on.
func Start(p Process, files *Files) *Streams {
	ctx, cancel := context.WithCancel(context.Background())
	s := &Streams{p: p, files: files, cancel: cancel, read: make(chan struct{}), drained: make(chan struct{})}
	s.moved.touch()
	streams := p.Features.Has(extension.Streams)
	var in, out sync.WaitGroup
	outputs := []*output{{}}
	if !p.Terminal {
		outputs = append(outputs, &output{stderr: true})
	}
	for i, sink := range []io.WriteCloser{files.Stdout, files.Stderr}[:len(outputs)] {
		o := outputs[i]
		if sink != nil {
			o.sink = sink
		} else if p.Quiet {
			continue
		}
		o.p, o.moved = p, &s.moved
		in.Add(1)
		out.Go(func() {
			err := o.copy(ctx, streams)
			in.Done()
			if err != nil && !ended(err) && !errors.Is(err, guest.ErrDead) {
				log.G(ctx).WithError(err).WithField("container", p.Container).WithField("exec", p.Exec).Warn("output may be incomplete")
			}
			if f, ok := sink.(outFIFO); ok {
				f.settle(ctx, &s.moved)
			}
		})
	}
	s.wg.Go(func() {
		in.Wait()
		close(s.read)
		out.Wait()
		close(s.drained)
	})
	if files.Stdin != nil {
		s.wg.Go(func() {
			if err := s.copyInput(ctx, streams); err != nil && !ended(err) && !errdefs.IsNotFound(err) {
				log.G(ctx).WithError(err).WithField("container", p.Container).WithField("exec", p.Exec).Debug("input ended early")
			}
		})
	}
	return s
}

// CloseInput marks the end of the standard input; what the client wrote before is
// still delivered.
func (s *Streams) CloseInput() {
	if s.files.Stdin != nil {
		s.files.Stdin.CloseWrite()
	}
}

// WaitRead returns when the agent has ended all output, when a sink has taken nothing
// for stuck, or when ctx ends. A kata-agent forgets a process with its output as soon as
// it has told how the process ended (kata-containers 4.1, src/agent/src/rpc.rs
// do_wait_process), so it is not to be asked before. It ends the output itself when the
// process has ended, whoever else holds the pipe.
func (s *Streams) WaitRead(ctx context.Context, stuck time.Duration) {
	t := time.NewTicker(drainPoll)
	defer t.Stop()
	for !s.moved.stuck(stuck) {
		select {
		case <-s.read:
			return
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// WaitDrained returns when the last byte of output is with its sink, and taken out of
// it where that is a FIFO, when nothing moved for idle, or when ctx ends. It reports whether everything was drained.
func (s *Streams) WaitDrained(ctx context.Context, idle time.Duration) bool {
	s.moved.touch()
	t := time.NewTicker(drainPoll)
	defer t.Stop()
	for {
		select {
		case <-s.drained:
			return true
		case <-ctx.Done():
			return false
		case <-t.C:
			if s.moved.idle() >= idle {
				return false
			}
		}
	}
}

// Close stops copying and closes the node's ends, which is how a reader of the
// FIFOs learns that there is no more. It may be called more than once.
func (s *Streams) Close() {
	s.cancel()
	s.files.Close()
	s.wg.Wait()
}

// copyInput copies standard input until its end.
func (s *Streams) copyInput(ctx context.Context, streams bool) error {
	buf := make([]byte, readLen)
	var offset uint64
	for {
		n, err := s.files.Stdin.Read(buf)
		if n > 0 {
			if werr := s.writeInput(ctx, streams, offset, buf[:n]); werr != nil {
				return werr
			}
			offset += uint64(n)
		}
		if errors.Is(err, io.EOF) {
			return s.closeInput(ctx, streams, offset)
		}
		if err != nil {
			return err
		}
	}
}

func (s *Streams) writeInput(ctx context.Context, streams bool, offset uint64, b []byte) error {
	if streams {
		return s.p.Conn.PodVM(ctx, func(ctx context.Context, vm podvmpb.PodVMClient) error {
			_, err := vm.WriteInput(ctx, &podvmpb.WriteInputRequest{ContainerId: s.p.Container, ExecId: s.p.Exec, Offset: offset, Data: b})
			return err
		})
	}
	for len(b) > 0 {
		r, err := guest.Agent(ctx, s.p.Conn, agentpb.AgentServiceService.WriteStdin, &agentpb.WriteStreamRequest{ContainerId: s.p.Container, ExecId: s.p.agentID(), Data: b})
		if err != nil {
			return err
		}
		if r.Len == 0 || int(r.Len) > len(b) {
			return io.ErrShortWrite
		}
		b = b[r.Len:]
	}
	return nil
}

func (s *Streams) closeInput(ctx context.Context, streams bool, offset uint64) error {
	if streams {
		return s.p.Conn.PodVM(ctx, func(ctx context.Context, vm podvmpb.PodVMClient) error {
			_, err := vm.WriteInput(ctx, &podvmpb.WriteInputRequest{ContainerId: s.p.Container, ExecId: s.p.Exec, Offset: offset, Eof: true})
			return err
		})
	}
	_, err := guest.Agent(ctx, s.p.Conn, agentpb.AgentServiceService.CloseStdin, &agentpb.CloseStdinRequest{ContainerId: s.p.Container, ExecId: s.p.agentID()})
	return err
}
