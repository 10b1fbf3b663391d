// SPDX-License-Identifier: Apache-2.0

// Package stdio carries a process's standard streams between the guest and the
// places containerd names for them: FIFOs, files, or a logging binary.
//
// Output goes through two goroutines per stream. One receives from the agent and
// never waits for anything else: all streams of a connection share one reader, so a
// receiver that waited would hold up every other call of the pod. The other writes
// to the sink and acknowledges what the sink has taken; the agent sends no more
// than a window past that, which bounds the memory between the two. Positions are
// counted in bytes from the start of the stream, so that after a broken connection
// the stream goes on at the byte where it stopped.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Config names a process's streams as containerd's request does. An empty string
// means that nobody is interested in that stream.
type Config struct {
	Stdin, Stdout, Stderr string
	// Terminal: there is one output stream, and Stderr is ignored.
	Terminal bool
	// Namespace and Container are told to logging binaries.
	Namespace, Container string
}

// Validate refuses stream addresses that Open could not serve.
func (c Config) Validate() error {
	for _, s := range []string{c.Stdin, c.Stdout, c.Stderr} {
		if s == "" {
			continue
		}
		if scheme, _, ok := strings.Cut(s, "://"); ok && scheme != "fifo" && scheme != "file" && scheme != "binary" {
			return fmt.Errorf("stdio address %q: scheme %q is not known; use a path, fifo://, file:// or binary://: %w", s, scheme, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Files are the node's ends of a process's streams.
type Files struct {
	// Stdin is nil when there is none.
	Stdin *Stdin
	// Stdout and Stderr are nil when nobody is interested.
	Stdout, Stderr io.WriteCloser
}

// Open opens the node's ends. What it opened is closed when it fails.
func Open(c Config) (*Files, error) {
	f := &Files{}
	if err := f.open(c); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *Files) open(c Config) (err error) {
	if u, ok := strings.CutPrefix(c.Stdout, "binary://"); ok {
		if f.Stdout, f.Stderr, err = startLogger(u, c); err != nil {
			return err
		}
	} else {
		if f.Stdout, err = openSink(c.Stdout); err != nil {
			return fmt.Errorf("open stdout: %w", err)
		}
		if !c.Terminal {
			if f.Stderr, err = openSink(c.Stderr); err != nil {
				return fmt.Errorf("open stderr: %w", err)
			}
		}
	}
	if c.Stdin != "" {
		if f.Stdin, err = openStdin(strings.TrimPrefix(c.Stdin, "fifo://")); err != nil {
			return fmt.Errorf("open stdin: %w", err)
		}
	}
	return nil
}

// Close closes everything. It may be called more than once.
func (f *Files) Close() {
	if f.Stdin != nil {
		f.Stdin.Close()
	}
	for _, w := range []io.WriteCloser{f.Stdout, f.Stderr} {
		if w != nil {
			w.Close()
		}
	}
}

// openSink opens where output goes.
func openSink(addr string) (io.WriteCloser, error) {
	if addr == "" {
		return nil, nil
	}
	if path, ok := strings.CutPrefix(addr, "file://"); ok {
		u, err := url.Parse("file://" + path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", addr, err, errdefs.ErrInvalidArgument)
		}
		if err := os.MkdirAll(filepath.Dir(u.Path), 0o755); err != nil {
			return nil, err
		}
		return os.OpenFile(u.Path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	}
	f, err := os.OpenFile(strings.TrimPrefix(addr, "fifo://"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return outFIFO{f}, nil
}

// Stdin is the reading end of a process's standard input. containerd may come and
// go while the FIFO stays open: the end of the input is what CloseIO says it is,
// not the moment when the FIFO has no writer. So Stdin holds a writing end too,
// until CloseWrite.
type Stdin struct {
	r *os.File

	mu sync.Mutex // guards w
	w  *os.File
}

func openStdin(path string) (*Stdin, error) {
	r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	w, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		r.Close()
		return nil, err
	}
	return &Stdin{r: r, w: w}, nil
}

// Read reads what the client wrote. It returns io.EOF once CloseWrite was called
// and every writer of the FIFO has gone.
func (s *Stdin) Read(b []byte) (int, error) { return s.r.Read(b) }

// CloseWrite marks the end of the input: what is in the FIFO is still read.
func (s *Stdin) CloseWrite() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.w != nil {
		s.w.Close()
		s.w = nil
	}
}

// Close ends a Read that waits, with an error: the input has not come to its end.
func (s *Stdin) Close() {
	s.r.Close() // first: without the other end, a Read would see an end
	s.CloseWrite()
}

// idle tells how long nothing has moved.
type progress struct {
	mu      sync.Mutex // guards the fields below
	last    time.Time
	writing int // sinks that have not taken what was written to them
}

func (p *progress) touch() {
	p.mu.Lock()
	p.last = time.Now()
	p.mu.Unlock()
}

// begin and end go around a write to a sink.
func (p *progress) begin() { p.write(1) }
func (p *progress) end()   { p.write(-1) }

func (p *progress) write(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = time.Now()
	p.writing += n
}

// stuck tells whether a sink has not taken anything for d.
func (p *progress) stuck(d time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.writing > 0 && time.Since(p.last) >= d
}

func (p *progress) idle() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Since(p.last)
}

// ended tells the errors that mean that a sink or source was closed by us.
func ended(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, context.Canceled)
}
