// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// outFIFO is the writing end of an output FIFO. It is opened for reading too: its reader
// is containerd, and a write must wait for a restarted containerd instead of failing
// with EPIPE.
type outFIFO struct{ *os.File }

// unread is how many bytes stand in the FIFO.
func (f outFIFO) unread() (n int, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := conn.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); cerr != nil {
		return 0, cerr
	}
	return n, err
}

// Pauses between two looks at a FIFO that is being emptied: the first is about what
// a reader needs for one read, the last is short against what a person notices.
const (
	firstLook = time.Millisecond
	lastLook  = 20 * time.Millisecond
)

// settle waits until the reader has taken what stands in the FIFO, or ctx ends.
//
// Closing the FIFO with bytes in it would be enough for a reader that reads to the
// end, but containerd does not: at the exit of a container its CRI plugin closes
// its end while its copier still reads. With 1.6.20 a runc container that wrote
// 8 MB at full speed lost up to 64 KiB of its log, a pipe's worth, in 7 of 8 runs
// (2026-11-21). A process's exit is published after its last byte was taken.
func (f outFIFO) settle(ctx context.Context, moved *progress) {
	before := -1
	for pause := firstLook; ; pause = min(2*pause, lastLook) {
		n, err := f.unread()
		if err != nil || n == 0 {
			return
		}
		if n != before {
			before = n
			moved.touch()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}
