// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// DrainWindow is how long the end of the output is waited for after the process is
// gone. Usually it comes at once; a grandchild that inherited the pipe would keep it
// open for ever. kata-agent uses the same (kata-containers 4.1, src/agent/src/rpc.rs).
const DrainWindow = 500 * time.Millisecond

// Output is one output stream of a process: a pipe or the master of a terminal, and
// the Buffer it is drained into.
type Output struct {
	*Buffer
	src    *os.File
	ctx    context.Context // the drain's own run context, ended by Close
	cancel context.CancelCauseFunc
	done   chan struct{}

	mu     sync.Mutex
	reader *Claim // guarded by mu; nil: nobody reads
}

// NewOutput starts to drain src into a buffer of at most limit bytes. It owns src,
// which must be in non-blocking mode; one that is a terminal's master is shared with
// an Input and closed by Close.
func NewOutput(src *os.File, limit int) *Output {
	o := &Output{Buffer: NewBuffer(limit), src: src, done: make(chan struct{})}
	o.ctx, o.cancel = context.WithCancelCause(context.Background())
	go o.drain()
	return o
}

// drain is the producer. It ends at the end of the file, after the drain window, or
// when Close was called.
func (o *Output) drain() {
	defer close(o.done)
	defer o.src.Close()
	defer o.end()
	for {
		piece, err := o.room(o.ctx)
		if err != nil {
			return
		}
		n, err := o.src.Read(piece)
		o.filled(n, len(piece))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if o.ctx.Err() == nil {
				o.tail()
			}
			return
		case err != nil: // EOF; EIO from a terminal that nobody has open
			return
		}
	}
}

// tail reads what stands in the pipe now, and no more: whoever still writes to it is
// not the process whose output this is.
func (o *Output) tail() {
	conn, err := o.src.SyscallConn()
	if err != nil || o.src.SetReadDeadline(time.Time{}) != nil {
		return
	}
	left := 0
	if err := conn.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); err != nil {
		return
	}
	for left > 0 {
		piece, err := o.room(o.ctx)
		if err != nil {
			return
		}
		piece = piece[:min(left, len(piece))]
		n := 0
		var readErr error
		err = conn.Read(func(fd uintptr) bool {
			n, readErr = unix.Read(int(fd), piece)
			return true
		})
		if err != nil || readErr != nil || n <= 0 {
			return
		}
		o.filled(n, len(piece))
		left -= n
	}
}

// Exited says that the process is gone: from now on the end of the output is waited
// for no longer than DrainWindow.
func (o *Output) Exited() {
	// An error means that the source is closed, so drained.
	_ = o.src.SetReadDeadline(time.Now().Add(DrainWindow))
}

// Close stops draining, ends the stream where it is and sends its reader away. It
// returns when the source is closed. What was drained can still be read.
func (o *Output) Close() {
	o.cancel(fmt.Errorf("the container was removed: %w", errdefs.ErrAborted))
	_ = o.src.SetReadDeadline(time.Unix(1, 0))
	<-o.done
}

// Done is closed when the stream was drained to its end.
func (o *Output) Done() <-chan struct{} { return o.done }

// Claim is the right to read a stream. There is one at a time.
type Claim struct {
	// Context ends when the caller's does or when somebody else claims the stream;
	// its cause is then an error of class Aborted.
	Context context.Context
	cancel  context.CancelCauseFunc
	gone    chan struct{}
}

// Claim makes the caller the stream's reader. The reader before it, most likely one
// whose connection is dead without the agent having noticed, is sent away and
// waited for. Release must be called.
func (o *Output) Claim(ctx context.Context) (*Claim, error) {
	mine := &Claim{gone: make(chan struct{})}
	mine.Context, mine.cancel = context.WithCancelCause(ctx)
	o.mu.Lock()
	before := o.reader
	o.reader = mine
	o.mu.Unlock()
	if before == nil {
		return mine, nil
	}
	before.cancel(fmt.Errorf("another reader took the stream over: %w", errdefs.ErrAborted))
	select {
	case <-before.gone:
		return mine, nil
	case <-mine.Context.Done():
		// The one before is still there; whoever comes next waits for it through us.
		go func() {
			<-before.gone
			o.Release(mine)
		}()
		return nil, context.Cause(mine.Context)
	}
}

// Release gives a claim back.
func (o *Output) Release(c *Claim) {
	o.mu.Lock()
	if o.reader == c {
		o.reader = nil
	}
	o.mu.Unlock()
	c.cancel(context.Canceled)
	close(c.gone)
}
