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
)

// Input is a process's standard input. Its methods may be called concurrently;
// writes take turns.
type Input struct {
	dst   *os.File
	owned bool // Close closes dst; false for a terminal, whose master is the Output's

	turn chan struct{} // holds one token

	mu      sync.Mutex
	offset  uint64 // guarded by mu; bytes the process's pipe has taken
	closing bool   // guarded by mu; no write may begin
	closed  bool   // guarded by mu
	writing bool   // guarded by mu; a write will see closing when it ends
}

// NewInput returns the input that writes to dst, which must be in non-blocking mode.
// owned tells whether closing the input closes dst.
func NewInput(dst *os.File, owned bool) *Input {
	return &Input{dst: dst, owned: owned, turn: make(chan struct{}, 1)}
}

// Write writes data, whose first byte has position offset in the stream, and, with
// last, closes the input after it. Bytes that were written before are skipped, so
// that a call may be repeated. It returns how many bytes of the stream the pipe has
// taken, also with an error. OutOfRange: bytes before offset are missing.
// FailedPrecondition: the input is closed or the process reads no more.
func (i *Input) Write(ctx context.Context, offset uint64, data []byte, last bool) (uint64, error) {
	return i.write(ctx, &offset, data, last)
}

// Append writes data at the end of what was written.
func (i *Input) Append(ctx context.Context, data []byte) (uint64, error) {
	return i.write(ctx, nil, data, false)
}

func (i *Input) write(ctx context.Context, offset *uint64, data []byte, last bool) (uint64, error) {
	select {
	case i.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-i.turn }()

	i.mu.Lock()
	at := i.offset
	if offset != nil {
		if *offset > at {
			i.mu.Unlock()
			return at, fmt.Errorf("input continues at %d, not at %d: %w", at, *offset, errdefs.ErrOutOfRange)
		}
		data = data[min(uint64(len(data)), at-*offset):]
	}
	if i.closing && len(data) > 0 {
		i.mu.Unlock()
		return at, fmt.Errorf("standard input is closed: %w", errdefs.ErrFailedPrecondition)
	}
	i.writing = true
	i.mu.Unlock()

	n, err := i.put(ctx, data)

	i.mu.Lock()
	defer i.mu.Unlock()
	i.writing = false
	i.offset += uint64(n)
	if last && err == nil {
		i.closing = true
	}
	if i.closing {
		i.shut()
	}
	return i.offset, err
}

// put writes to the pipe until it has taken all or ctx is done.
func (i *Input) put(ctx context.Context, data []byte) (int, error) {
	if len(data) == 0 {
		return 0, nil
	}
	stop := context.AfterFunc(ctx, func() { _ = i.dst.SetWriteDeadline(time.Unix(1, 0)) })
	n, err := i.dst.Write(data)
	if !stop() {
		_ = i.dst.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n, ctx.Err()
	default:
		return n, fmt.Errorf("the process reads no more: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
}

// Close ends the input after the writes that are under way; it does not wait for
// them. Closing twice is no error.
func (i *Input) Close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closing = true
	if !i.writing {
		i.shut()
	}
}

// Abort ends the input and every write under way: the process is gone.
func (i *Input) Abort() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closing = true
	i.shut()
}

// shut closes the pipe. mu is held. A terminal's input has no end of its own: it
// ends with the terminal.
func (i *Input) shut() {
	if i.closed {
		return
	}
	i.closed = true
	if i.owned {
		_ = i.dst.Close()
	}
}

// Writing tells whether a write is under way.
func (i *Input) Writing() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.writing
}
