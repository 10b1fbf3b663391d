// SPDX-License-Identifier: Apache-2.0

package forwarder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
)

// agentWait bounds the wait for a stock agent's socket: the agent is a service of
// the guest that may start after us. Upstream's forwarder gives it 150 s.
const (
	agentWait = 150 * time.Second
	agentPoll = 20 * time.Millisecond
)

// Relay connects every connection of l to the agent's unix socket and carries bytes
// both ways until ctx is done. It closes l and all connections, waits for them and
// returns nil; before that it returns only when l fails.
func Relay(ctx context.Context, l net.Listener, socket string, log *slog.Logger) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() {
		<-ctx.Done()
		l.Close()
	})
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		wg.Go(func() {
			if err := relayOne(ctx, conn, socket); err != nil && ctx.Err() == nil {
				log.Error("connection to the agent ended", logkey.Address, conn.RemoteAddr().String(), logkey.Error, err.Error())
			}
		})
	}
}

func relayOne(ctx context.Context, conn net.Conn, socket string) error {
	agent, err := dialAgent(ctx, socket)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	return relay.Relay(ctx, conn, agent)
}

// dialAgent dials until the agent listens.
func dialAgent(ctx context.Context, socket string) (net.Conn, error) {
	wait, cancel := context.WithTimeout(ctx, agentWait)
	defer cancel()
	tick := time.NewTicker(agentPoll)
	defer tick.Stop()
	for {
		conn, err := relay.Dial(wait, socket)
		if err == nil {
			return conn, nil
		}
		select {
		case <-tick.C:
		case <-wait.Done():
			return nil, fmt.Errorf("agent_socket %s: %w", socket, err)
		}
	}
}
