// SPDX-License-Identifier: Apache-2.0

// Package agentproxy carries the traffic between a sandbox's agent socket on the
// node and the forwarder in its pod VM: for each connection to the socket one
// connection to the VM, over TLS with both sides authenticated, bytes unread. What
// the two ends say to each other is theirs.
package agentproxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
)

const (
	// clientWait is how long a client of the socket is kept while the VM does not
	// answer. Runtimes give up a first call after 30 s (kata's dial_timeout) and
	// do better with an end they can see than with silence.
	clientWait = 10 * time.Second
	// firstKeep is how long the connection that the start has left behind waits
	// for the first client, which follows at once or not at all.
	firstKeep = 30 * time.Second
	// silentAfter is how long the VM may leave a new connection unanswered before
	// somebody asks whether it is still there: some twenty attempts.
	silentAfter = time.Second
	// probeTimeout bounds the question whether somebody answers on a socket that
	// is already there.
	probeTimeout = time.Second
)

// Config of a Proxy.
type Config struct {
	// Path of the socket, made with mode 0600 in a directory of mode 0700.
	Path   string
	Target Target
	// First is a connection to Target that the first client gets; the proxy owns it.
	// Nil: none.
	First *relay.TLSConn
	// Silent is called, once for each client that has to wait, when the VM does not
	// answer. Its context ends when the VM has answered or the client is sent away.
	// Nil: nobody is told.
	Silent func(ctx context.Context)
	Log    *slog.Logger
}

// Proxy serves one sandbox's agent socket. It is safe for concurrent use.
type Proxy struct {
	target   Target
	silent   func(context.Context)
	log      *slog.Logger
	listener *net.UnixListener

	run  context.Context // ends with Close; the proxy's own
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu     sync.Mutex
	first  *relay.TLSConn // dialled and verified already; guarded by mu
	active int            // connections being carried; guarded by mu
	served bool           // some client was carried; guarded by mu
}

// Listen makes the socket and serves it until Close. AlreadyExists: another process
// answers at its path.
func Listen(ctx context.Context, cfg Config) (*Proxy, error) {
	l, err := ListenUnix(ctx, cfg.Path)
	if err != nil {
		if cfg.First != nil {
			cfg.First.Close()
		}
		return nil, err
	}
	p := &Proxy{target: cfg.Target, silent: cfg.Silent, log: cfg.Log, listener: l, first: cfg.First}
	if p.silent == nil {
		p.silent = func(context.Context) {}
	}
	p.run, p.stop = context.WithCancel(context.WithoutCancel(ctx))
	p.wg.Go(p.accept)
	if cfg.First != nil {
		p.wg.Go(func() {
			if sleep(p.run, firstKeep) == nil {
				p.dropFirst()
			}
		})
	}
	return p, nil
}

// ListenUnix listens on a unix socket of mode 0600 and makes its directory, mode
// 0700, where there is none. A socket left by a process that is gone is replaced;
// one that is answered is not: AlreadyExists.
func ListenUnix(ctx context.Context, path string) (*net.UnixListener, error) {
	if len(path) > relay.MaxUnixPath {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(
			"unix socket %s: the path has %d bytes and the kernel takes %d", path, len(path), relay.MaxUnixPath))
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of unix socket %s: %w", path, err)
	}
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("listen on unix socket: %w", err)
	case fi.Mode().Type() != fs.ModeSocket:
		return nil, errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("%s exists and is not a socket: move it away", path))
	default:
		if err := removeStale(ctx, path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // a socket that stays is found again after a restart
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("close unix socket to others: %w", err), l.Close())
	}
	return l, nil
}

func removeStale(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	c, err := relay.Dial(ctx, path)
	if err == nil {
		c.Close()
		return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("another process answers on unix socket %s: end it, or use another path", path))
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("find out who has the socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a socket nobody listens on: %w", err)
	}
	return nil
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			if p.run.Err() != nil {
				return
			}
			// Out of file descriptors, most likely: not for ever.
			p.log.Warn("accept on agent socket", logkey.Error, err)
			if sleep(p.run, 100*time.Millisecond) != nil {
				return
			}
			continue
		}
		p.wg.Go(func() { p.serve(c) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	p.count(1)
	defer p.count(-1)
	vm := p.takeFirst()
	if vm == nil {
		ctx, cancel := context.WithTimeout(p.run, clientWait)
		p.wg.Go(func() {
			if sleep(ctx, silentAfter) == nil {
				p.silent(ctx)
			}
		})
		var err error
		vm, err = Wait(ctx, p.target)
		cancel()
		if err != nil {
			client.Close()
			if p.run.Err() == nil {
				p.log.Warn("agent connection refused: the pod VM does not answer", logkey.Error, err)
			}
			return
		}
	}
	p.log.Debug("agent connection opened", logkey.Address, p.target.Addr)
	err := relay.Relay(p.run, client, vm)
	p.log.Debug("agent connection ended", logkey.Address, p.target.Addr, logkey.Error, err)
}

func (p *Proxy) count(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active += n
	p.served = true
}

// takeFirst hands out the connection the start left, once, if it still stands.
func (p *Proxy) takeFirst() *relay.TLSConn {
	p.mu.Lock()
	c := p.first
	p.first = nil
	p.mu.Unlock()
	if c != nil && !alive(c) {
		c.Close()
		return nil
	}
	return c
}

func (p *Proxy) dropFirst() {
	if c := p.takeFirst(); c != nil {
		c.Close()
	}
}

// Served tells whether any client has ever connected.
func (p *Proxy) Served() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.served
}

// Connections is how many clients are connected now.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.active
}

// Close stops serving, ends all connections and waits for them. The socket file
// stays: a later Listen takes it over, Remove removes it.
func (p *Proxy) Close() error {
	p.stop()
	err := p.listener.Close()
	p.dropFirst()
	p.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Remove removes an agent socket and the directory made for it. Absence is no
// error; a directory with other things in it stays.
func Remove(path string) error {
	err := os.Remove(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove agent socket: %w", err)
	}
	err = os.Remove(filepath.Dir(path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return fmt.Errorf("remove the agent socket's directory: %w", err)
	}
	return nil
}
