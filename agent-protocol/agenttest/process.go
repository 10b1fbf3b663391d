// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"fmt"
	"io"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// process is one program: created, running after start, ended when done is closed.
type process struct {
	spec           *agentpb.Process
	program        Program
	stdin          *io.PipeReader
	stdinW         *io.PipeWriter
	stdout, stderr *output
	signals        chan syscall.Signal
	cancel         context.CancelFunc
	ctx            context.Context // ends at SIGKILL
	done           chan struct{}

	stdinMu  sync.Mutex // serialises writers; guards stdinOff
	stdinOff uint64

	mu      sync.Mutex // guards the fields below
	started bool
	status  int
	row     uint32
	column  uint32
}

func newProcess(spec *agentpb.Process, program Program) *process {
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	return &process{
		spec: spec, program: program, stdin: r, stdinW: w,
		stdout: newOutput(ctx), stderr: newOutput(ctx),
		signals: make(chan syscall.Signal, 16), ctx: ctx, cancel: cancel, done: make(chan struct{}),
	}
}

func (p *process) start(work *group) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.started {
		return fmt.Errorf("process is started already: %w", errdefs.ErrFailedPrecondition)
	}
	err := work.run(func() {
		status := p.program(p.ctx, &Proc{
			Args: p.spec.Args, Env: p.spec.Env, Terminal: p.spec.Terminal,
			Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr, Signals: p.signals,
		})
		if p.ctx.Err() != nil {
			status = 128 + int(syscall.SIGKILL)
		}
		p.mu.Lock()
		p.status = status
		p.mu.Unlock()
		p.stdin.Close()
		p.stdout.end()
		p.stderr.end()
		close(p.done)
	})
	p.started = err == nil
	return err
}

func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.started {
		p.started = true
		p.status = 128 + int(syscall.SIGKILL)
		p.stdout.end()
		p.stderr.end()
		close(p.done)
	}
	p.cancel()
}

func (p *process) signal(sig syscall.Signal) error {
	p.mu.Lock()
	started := p.started
	p.mu.Unlock()
	if !started {
		return fmt.Errorf("process is not started: %w", errdefs.ErrFailedPrecondition)
	}
	if sig == syscall.SIGKILL {
		p.kill()
		return nil
	}
	select {
	case p.signals <- sig:
	case <-p.done:
	}
	return nil
}

// outputLimit is what a process may write before it blocks until a reader
// acknowledges: small, so that tests meet it.
const outputLimit = 256 << 10

// output keeps what was written and not acknowledged.
type output struct {
	ctx context.Context // of the process: a killed one never blocks in Write

	mu      sync.Mutex // guards the fields below
	base    uint64     // offset of data[0]: everything before is acknowledged
	data    []byte
	ended   bool
	changed chan struct{} // closed and replaced at every change
}

func newOutput(ctx context.Context) *output {
	return &output{ctx: ctx, changed: make(chan struct{})}
}

// wake tells every waiter that something changed. Caller holds mu.
func (o *output) wake() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *output) Write(b []byte) (n int, err error) {
	for len(b) > 0 {
		o.mu.Lock()
		if room := outputLimit - len(o.data); room > 0 {
			m := min(room, len(b))
			o.data = append(o.data, b[:m]...)
			o.wake()
			o.mu.Unlock()
			b, n = b[m:], n+m
			continue
		}
		changed := o.changed
		o.mu.Unlock()
		select {
		case <-changed:
		case <-o.ctx.Done():
			return n, io.ErrClosedPipe
		}
	}
	return n, nil
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	o.wake()
}

func (o *output) ack(offset uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if offset > o.base {
		n := min(offset-o.base, uint64(len(o.data)))
		o.data = append([]byte(nil), o.data[n:]...)
		o.base += n
		o.wake()
	}
}

// check refuses an offset whose bytes are gone or do not exist yet.
func (o *output) check(offset uint64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if end := o.base + uint64(len(o.data)); offset < o.base || offset > end {
		return fmt.Errorf("offset %d is outside of the %d to %d that are kept: %w", offset, o.base, end, errdefs.ErrOutOfRange)
	}
	return nil
}

// next waits for bytes at offset and returns at most limit of them. No bytes and no
// error mean the end of the stream. notify, when it is not nil, ends the wait early
// with again set.
func (o *output) next(ctx context.Context, offset, limit uint64, notify <-chan struct{}) (b []byte, again bool, err error) {
	for {
		o.mu.Lock()
		end := o.base + uint64(len(o.data))
		switch {
		case offset < end && limit > 0:
			i := offset - o.base
			b = append([]byte(nil), o.data[i:min(i+limit, uint64(len(o.data)))]...)
			o.mu.Unlock()
			return b, false, nil
		case o.ended && offset == end:
			o.mu.Unlock()
			return nil, false, nil
		}
		changed := o.changed
		o.mu.Unlock()
		select {
		case <-changed:
		case <-notify:
			return nil, true, nil
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}

// writeInput feeds a process. A process that ended takes nothing and says so.
func (p *process) writeInput(offset uint64, b []byte, eof bool) (uint64, error) {
	p.stdinMu.Lock()
	defer p.stdinMu.Unlock()
	if offset > p.stdinOff {
		return p.stdinOff, fmt.Errorf("offset %d skips bytes: %d are there: %w", offset, p.stdinOff, errdefs.ErrOutOfRange)
	}
	if skip := p.stdinOff - offset; skip < uint64(len(b)) {
		n, err := p.stdinW.Write(b[skip:])
		p.stdinOff += uint64(n)
		if err != nil {
			return p.stdinOff, fmt.Errorf("process takes no more input: %w", errdefs.ErrFailedPrecondition)
		}
	}
	if eof {
		p.stdinW.Close()
	}
	return p.stdinOff, nil
}
