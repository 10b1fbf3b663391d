// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// A guest can hang: it is there, its connection too, and nothing is answered. It costs
// its own pod, until the pod is removed or the guest is declared dead; nobody else is
// to wait for it. containerd collects figures, and handles exits, one after the other
// for all pods of a node.

// ErrSilent is what AgentWithin returns when the guest did not answer in time. Its
// class is Unavailable.
var ErrSilent = fmt.Errorf("the pod VM does not answer: %w", errdefs.ErrUnavailable)

func (c *Conn) hear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = time.Now()
}

// Hung tells whether the guest has said nothing for longer than it should.
func (c *Conn) Hung() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(c.heard) > hungAfter
}

// AgentWithin is Agent for a caller that does not wait for a hung guest: it returns
// ErrSilent after limit, and earlier where the guest is known to hang.
func AgentWithin[Req, Resp any](ctx context.Context, c *Conn, limit time.Duration, call func(agentpb.AgentServiceService, context.Context, *Req) (*Resp, error), req *Req) (*Resp, error) {
	if c.Hung() {
		limit = min(limit, hungPatience)
	}
	wctx, cancel := context.WithTimeoutCause(ctx, limit, ErrSilent)
	defer cancel()
	resp, err := Agent(wctx, c, call, req)
	if err == nil || errors.Is(err, ErrDead) || ctx.Err() != nil {
		return resp, err
	}
	// The guest knows the limit too, and may be the first to say that it is over.
	if errdefs.IsDeadlineExceeded(err) || errors.Is(context.Cause(wctx), ErrSilent) {
		return nil, ErrSilent
	}
	return nil, err
}
