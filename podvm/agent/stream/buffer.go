// SPDX-License-Identifier: Apache-2.0

// Package stream keeps a process's input and output between the process and a
// runtime whose connection may break. Every byte has a position in its stream, so
// that a runtime that comes back goes on where it was.
package stream

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
)

// firstSize is what a buffer starts with, bytes. It grows when a read fills it: most
// processes say little, and a probe that says "ok" should not cost a megabyte.
const firstSize = 4 << 10

// Buffer holds the bytes of one output stream from the first that was not
// acknowledged to the last that was produced. It has one producer; everything else
// may be called concurrently.
type Buffer struct {
	limit int

	mu       sync.Mutex
	ring     []byte        // guarded by mu; byte p of the stream is at p % len(ring)
	acked    uint64        // guarded by mu
	produced uint64        // guarded by mu
	ended    bool          // guarded by mu; nothing will be produced any more
	grow     bool          // guarded by mu; the last read filled all the room it had
	wake     chan struct{} // guarded by mu; closed and replaced when something changes
}

// NewBuffer returns an empty buffer that never holds more than limit bytes.
func NewBuffer(limit int) *Buffer {
	return &Buffer{limit: limit, wake: make(chan struct{})}
}

// changed wakes all who wait. mu is held.
func (b *Buffer) changed() {
	close(b.wake)
	b.wake = make(chan struct{})
}

// Bounds tells which bytes can be read: those from acked up to produced.
func (b *Buffer) Bounds() (acked, produced uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.acked, b.produced
}

// Settled tells whether the stream has ended and every byte of it was acknowledged.
func (b *Buffer) Settled() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ended && b.acked == b.produced
}

// Next returns up to limit bytes from offset on, waiting until there is at least
// one. They stand in buf where they fit, which may be nil. last is set when nothing follows them; at the end of the stream data is nil
// and last is set. OutOfRange: offset is below what was acknowledged or beyond what
// was produced.
func (b *Buffer) Next(ctx context.Context, offset uint64, limit int, buf []byte) (data []byte, last bool, err error) {
	for {
		b.mu.Lock()
		if offset < b.acked || offset > b.produced {
			defer b.mu.Unlock()
			return nil, false, fmt.Errorf("offset %d is outside of the kept output, %d to %d: %w", offset, b.acked, b.produced, errdefs.ErrOutOfRange)
		}
		if n := min(uint64(limit), b.produced-offset); n > 0 {
			defer b.mu.Unlock()
			data = slices.Grow(buf[:0], int(n))[:n]
			at := int(offset % uint64(len(b.ring)))
			copy(data[copy(data, b.ring[at:]):], b.ring)
			return data, b.ended && offset+n == b.produced, nil
		}
		if b.ended {
			b.mu.Unlock()
			return nil, true, nil
		}
		wake := b.wake
		b.mu.Unlock()
		select {
		case <-wake:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}

// Ack forgets all bytes before offset and so makes room. An offset that was
// acknowledged before changes nothing. OutOfRange: offset is beyond what was
// produced.
func (b *Buffer) Ack(offset uint64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if offset > b.produced {
		return fmt.Errorf("%d bytes acknowledged, only %d were produced: %w", offset, b.produced, errdefs.ErrOutOfRange)
	}
	if offset <= b.acked {
		return nil
	}
	b.acked = offset
	if b.ended && b.acked == b.produced {
		b.ring = nil
	}
	b.changed()
	return nil
}

// room waits for room and returns a piece of the ring to read into. The piece is
// the producer's until filled is called.
func (b *Buffer) room(ctx context.Context) ([]byte, error) {
	for {
		b.mu.Lock()
		held := int(b.produced - b.acked)
		if len(b.ring) < b.limit && (b.grow || held == len(b.ring)) {
			b.resize(min(b.limit, max(firstSize, 2*len(b.ring))))
		}
		if held < len(b.ring) {
			at := int(b.produced % uint64(len(b.ring)))
			end := min(len(b.ring), at+len(b.ring)-held)
			defer b.mu.Unlock()
			return b.ring[at:end:end], nil
		}
		wake := b.wake
		b.mu.Unlock()
		select {
		case <-wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// filled hands n bytes of the last piece over to the readers.
func (b *Buffer) filled(n, piece int) {
	if n <= 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.produced += uint64(n)
	b.grow = n == piece
	b.changed()
}

// end says that nothing follows. The ring shrinks to what it holds.
func (b *Buffer) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return
	}
	b.ended = true
	b.resize(int(b.produced - b.acked))
	b.changed()
}

// resize moves what the ring holds into one of another size. mu is held.
func (b *Buffer) resize(size int) {
	b.grow = false
	if size == 0 {
		b.ring = nil
		return
	}
	next := make([]byte, size)
	for p := b.acked; p < b.produced; {
		from, to := int(p%uint64(len(b.ring))), int(p%uint64(size))
		n := min(len(b.ring)-from, size-to, int(b.produced-p))
		copy(next[to:to+n], b.ring[from:])
		p += uint64(n)
	}
	b.ring = next
}
