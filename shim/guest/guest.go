// SPDX-License-Identifier: Apache-2.0

// Package guest is the shim's end of the connection to the agent in the pod VM.
//
// There is one ttrpc connection per pod. It breaks when the adaptor restarts or the
// network does, and neither says anything about the guest; so a broken connection
// is dialled again, and only a guest that could not be reached for a whole Budget,
// or whose adaptor says that it is gone, is declared dead.
//
//	             dialled, agent answered Check
//	(connecting) ------------------------------> (connected)
//	      ^  |                                        |
//	      |  | Budget over, or Gone said so           | closed, or Check failed
//	      |  v                                        |
//	      | (dead)                                    |
//	      +-------------------------------------------+
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

const (
	// DefaultBudget is how long a guest may be out of reach before it counts as
	// dead: longer than an adaptor takes to be upgraded, shorter than the patience
	// of a person looking at a stuck pod.
	DefaultBudget = 5 * time.Minute
	// goneGrace is how long the agent socket must be missing under an adaptor that
	// answers. A restarting adaptor makes its sockets before it serves, so a
	// missing one means that the instance was given up. The grace covers the moment
	// between the end of an adaptor and its socket's.
	goneGrace = 3 * time.Second

	backoffMin = 20 * time.Millisecond
	backoffMax = time.Second

	checkInterval = 5 * time.Second
	checkTimeout  = 10 * time.Second

	// hungAfter is how long a guest that is asked at least every checkInterval may say
	// nothing before it counts as hung, and hungPatience what it is then still given
	// where somebody waits for it.
	hungAfter    = checkInterval + 2*time.Second
	hungPatience = time.Second
)

// ErrDead is what every call returns once the guest is declared dead. Its class is
// Unavailable.
var ErrDead = fmt.Errorf("the pod VM is gone: %w", errdefs.ErrUnavailable)

// Config configures a Conn.
type Config struct {
	// Socket is the path of the agent socket that CreateVM returned.
	Socket string
	// Budget replaces DefaultBudget when it is not 0.
	Budget time.Duration
	// Gone tells whether the adaptor is there and does not know the guest any
	// more. It is asked only while Socket is missing. Nil: never.
	Gone func(ctx context.Context) bool
}

// Conn is the connection to one pod VM. It is safe for concurrent use.
type Conn struct {
	cfg    Config
	cancel context.CancelFunc
	done   chan struct{} // closed when run returned
	dead   chan struct{} // closed when the guest was declared dead

	mu      sync.Mutex    // guards the fields below
	link    *link         // nil while not connected
	changed chan struct{} // closed and replaced when link changes
	heard   time.Time     // when the guest last answered anything
}

type link struct {
	client *ttrpc.Client
	closed chan struct{} // closed when the connection is
}

// New begins to connect and returns at once. Close ends what it started.
func New(cfg Config) *Conn {
	if cfg.Budget == 0 {
		cfg.Budget = DefaultBudget
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Conn{
		cfg: cfg, cancel: cancel,
		done: make(chan struct{}), dead: make(chan struct{}),
		changed: make(chan struct{}), heard: time.Now(),
	}
	go c.run(ctx)
	return c
}

// Dead is closed when the guest is declared dead.
func (c *Conn) Dead() <-chan struct{} { return c.dead }

// Close drops the connection; calls under way fail with ErrDead. It may be called
// more than once.
func (c *Conn) Close() {
	c.cancel()
	<-c.done
}

// run owns the connection.
func (c *Conn) run(ctx context.Context) {
	defer close(c.done)
	defer close(c.dead)
	for {
		l, err := c.connect(ctx)
		if err != nil {
			if ctx.Err() == nil {
				log.G(ctx).WithError(err).Error("guest declared dead")
			}
			return
		}
		c.set(l)
		c.watch(ctx, l)
		c.set(nil)
		l.client.Close()
		<-l.closed
	}
}

func (c *Conn) set(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.link = l
	close(c.changed)
	c.changed = make(chan struct{})
}

// connect dials until the agent answers, the budget is over or ctx ends.
func (c *Conn) connect(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Budget)
	defer cancel()
	var missing time.Time
	for wait := backoffMin; ; wait = min(2*wait, backoffMax) {
		l, err := c.dial(ctx)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			missing = time.Time{}
		} else if missing.IsZero() {
			missing = time.Now()
		} else if time.Since(missing) >= min(goneGrace, c.cfg.Budget/2) && c.cfg.Gone != nil && c.cfg.Gone(ctx) {
			return nil, fmt.Errorf("agent socket %s was removed by the adaptor", c.cfg.Socket)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, fmt.Errorf("agent at %s did not answer for %s: %w", c.cfg.Socket, c.cfg.Budget, err)
		}
	}
}

// dial makes one connection. A socket that accepts proves nothing, because the
// adaptor's end accepts while the guest is out of reach: the agent must answer.
func (c *Conn) dial(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.cfg.Socket)
	if err != nil {
		return nil, err
	}
	l := &link{closed: make(chan struct{})}
	l.client = ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(l.closed) }))
	if err := check(ctx, l.client); err != nil {
		l.client.Close()
		<-l.closed
		return nil, err
	}
	c.hear()
	return l, nil
}

func check(ctx context.Context, client *ttrpc.Client) error {
	r, err := agentpb.NewHealthClient(client).Check(ctx, &agentpb.CheckRequest{})
	if err != nil {
		return err
	}
	if r.Status != agentpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("agent says %s", r.Status)
	}
	return nil
}

// watch returns when the connection is closed, or silent.
func (c *Conn) watch(ctx context.Context, l *link) {
	t := time.NewTicker(checkInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.closed:
			return
		case <-t.C:
			cctx, cancel := context.WithTimeout(ctx, checkTimeout)
			err := check(cctx, l.client)
			cancel()
			if err != nil {
				if ctx.Err() == nil {
					log.G(ctx).WithError(err).Warn("agent does not answer, connecting anew")
				}
				return
			}
			c.hear()
		}
	}
}

// acquire waits for a connection. Nothing is begun for a caller that has left.
func (c *Conn) acquire(ctx context.Context) (*link, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		c.mu.Lock()
		l, changed := c.link, c.changed
		c.mu.Unlock()
		if l != nil {
			select {
			case <-l.closed: // run is about to notice
			default:
				return l, nil
			}
		}
		select {
		case <-changed:
		case <-c.dead:
			return nil, ErrDead
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Call runs f, again on each new connection while it fails because the connection
// broke. retried is true from the second time on: whether the first call had an
// effect is then unknown, and f must take AlreadyExists and the like as success. A
// gRPC status is returned as an error of its errdefs class.
func (c *Conn) Call(ctx context.Context, f func(ctx context.Context, client *ttrpc.Client, retried bool) error) error {
	for retried := false; ; retried = true {
		l, err := c.acquire(ctx)
		if err != nil {
			return err
		}
		err = f(ctx, l.client, retried)
		if !broken(ctx, err) {
			if ctx.Err() == nil {
				c.hear()
			}
			return native(err)
		}
		// The link is not usable: what is said about it here holds for everybody.
		l.client.Close()
		select {
		case <-l.closed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// broken tells whether err is the connection's fault.
func broken(ctx context.Context, err error) bool {
	if err == nil || ctx.Err() != nil {
		return false
	}
	var op *net.OpError
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errBroken) || errors.As(err, &op)
}

// errBroken marks an error as the connection's fault.
var errBroken = errors.New("connection broke")

// Broken wraps err so that Call tries again on a new connection.
func Broken(err error) error { return fmt.Errorf("%w: %w", errBroken, err) }

func native(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return errgrpc.ToNative(err)
	}
	return err
}

// Agent runs one call of the AgentService that may be repeated.
func Agent[Req, Resp any](ctx context.Context, c *Conn, call func(agentpb.AgentServiceService, context.Context, *Req) (*Resp, error), req *Req) (*Resp, error) {
	var resp *Resp
	err := c.Call(ctx, func(ctx context.Context, client *ttrpc.Client, _ bool) (err error) {
		resp, err = call(agentpb.NewAgentServiceClient(client), ctx, req)
		return err
	})
	return resp, err
}

// AgentOnce runs one call that has its effect only once. done tells by its class
// whether a failure of the second attempt means that the first one succeeded.
func AgentOnce[Req, Resp any](ctx context.Context, c *Conn, done func(error) bool, call func(agentpb.AgentServiceService, context.Context, *Req) (*Resp, error), req *Req) error {
	return c.Call(ctx, func(ctx context.Context, client *ttrpc.Client, retried bool) error {
		_, err := call(agentpb.NewAgentServiceClient(client), ctx, req)
		if retried && err != nil && !broken(ctx, err) && done(native(err)) {
			return nil
		}
		return err
	})
}

// PodVM runs f with the extension service on a live connection, again when it broke.
func (c *Conn) PodVM(ctx context.Context, f func(ctx context.Context, vm podvmpb.PodVMClient) error) error {
	return c.Call(ctx, func(ctx context.Context, client *ttrpc.Client, _ bool) error {
		return f(ctx, podvmpb.NewPodVMClient(client))
	})
}
