// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/shim/container"
	"github.com/kata-remote/kata-remote/shim/sandbox"
)

const (
	// takenMargin is how long before the cloud takes the pod VM the sandbox is stopped:
	// the ends of the last processes are published then, and the adaptor is told.
	takenMargin = 3 * time.Second
	// takenKill bounds the sending of a signal to a guest that may hang.
	takenKill = 5 * time.Second
)

// taken ends the pod's containers because the cloud takes the pod VM back: each is sent
// SIGTERM and has until then. It returns when all have ended or there is no time left.
// The sandbox is stopped after it, so that the kubelet makes the pod again, in another
// pod VM: containers that end alone would be started again in this one.
func (s *Service) taken(ctx context.Context, t *sandbox.Taking) {
	ctx, cancel := context.WithDeadline(ctx, t.At.Add(-takenMargin))
	defer cancel()
	s.mu.Lock()
	var members []*container.Container
	for id, c := range s.containers {
		if c != nil && id != s.sandboxCtr {
			members = append(members, c)
		}
	}
	s.mu.Unlock()
	for _, c := range members {
		c.Explain(t.Error())
	}
	var wg sync.WaitGroup
	for _, c := range members {
		if s := c.State(); ctx.Err() != nil || s != container.StateRunning && s != container.StatePaused {
			continue
		}
		wg.Go(func() {
			kctx, cancel := context.WithTimeout(ctx, takenKill)
			err := c.Kill(kctx, "", syscall.SIGTERM)
			cancel()
			if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
				log.G(ctx).WithError(err).WithField(logkey.Container, c.ID()).Warn("a container was not told that its pod VM is taken back")
			}
			if _, err := c.Wait(ctx, ""); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).WithField(logkey.Container, c.ID()).Warn("wait for the end of a container whose pod VM is taken back")
			}
		})
	}
	wg.Wait()
}
