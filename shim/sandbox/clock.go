// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

const (
	// clockInterval is how often the guest is told the time. A machine without a
	// reference drifts by 200 ppm at worst: 12 ms in this time, about what our agent
	// takes for noise, and less than half of what its kernel catches up by slewing
	// (0.5 ms in a second). For a thousand pods it is 17 small calls per second.
	clockInterval = time.Minute
	// clockLate is when the time that a call told was old when it arrived, because
	// something stood still on the way: it is told again at once. Our agent believes a
	// difference of twice that.
	clockLate = time.Second
	// clockFirst bounds the first call: a pod does not wait for its clock.
	clockFirst = 5 * time.Second
)

// tellTime tells the guest the node's time. A call that is repeated on a new connection
// tells the time of the repetition.
func tellTime(ctx context.Context, conn *guest.Conn) error {
	for {
		var sent time.Time
		err := conn.Call(ctx, func(ctx context.Context, client *ttrpc.Client, _ bool) error {
			sent = time.Now()
			_, err := agentpb.NewAgentServiceClient(client).SetGuestDateTime(ctx,
				&agentpb.SetGuestDateTimeRequest{Sec: sent.Unix(), Usec: int64(sent.Nanosecond()) / 1000})
			return err
		})
		if err != nil || time.Since(sent) < clockLate {
			return err
		}
	}
}

// keepTime tells the guest the time until the sandbox ends, or the guest says that it
// has no use for it. first is what came of telling it before the first container.
func (s *Sandbox) keepTime(conn *guest.Conn, first error) {
	t := time.NewTicker(s.cfg.ClockInterval)
	defer t.Stop()
	for err := first; ; {
		switch {
		case errors.Is(err, guest.ErrDead), s.run.Err() != nil:
			return
		case errdefs.IsNotImplemented(err):
			log.G(s.run).Info("the agent does not take the time: the guest's clock is its image's affair")
			return
		case err != nil:
			log.G(s.run).WithError(err).Warn("the guest's clock could not be set")
		}
		select {
		case <-t.C:
			err = tellTime(s.run, conn)
		case <-s.run.Done():
			return
		}
	}
}
