// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

const (
	// noticeRetry is the pause after a failed wait for a notice.
	noticeRetry = time.Second
	// noticeGrace is what a machine has that the cloud takes back without saying when:
	// the least that any cloud gives (Azure).
	noticeGrace = 30 * time.Second
)

// Taking is the cloud's announcement that it takes the pod VM back.
type Taking struct {
	At     time.Time
	Reason string // what the cloud calls it: "spot interruption"
}

// Error is the sentence that users see.
func (t *Taking) Error() string {
	return fmt.Sprintf("the cloud takes this pod VM back at %s (%s)", t.At.UTC().Format("15:04:05 MST"), t.Reason)
}

// Unwrap gives the class.
func (t *Taking) Unwrap() error { return errdefs.ErrFailedPrecondition }

// Taken is what the cloud announced, as an error; nil: nothing. A pod VM that is taken
// back gets no new container: one that ended would be started again in it.
func (s *Sandbox) Taken() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taking == nil {
		return nil
	}
	return s.taking
}

// watchNotices waits for what the cloud announces, until the guest is gone.
func (s *Sandbox) watchNotices(conn *guest.Conn, features extension.Set) {
	if !features.Has(extension.Notice) {
		return
	}
	seen := ""
	for {
		var n *podvmpb.Notice
		err := conn.PodVM(s.run, func(ctx context.Context, vm podvmpb.PodVMClient) (err error) {
			n, err = vm.WaitNotice(ctx, &podvmpb.WaitNoticeRequest{SeenId: seen})
			return err
		})
		switch {
		case err == nil:
			seen = n.Id
			if s.noticed(n) {
				return
			}
			continue
		case errors.Is(err, guest.ErrDead), s.run.Err() != nil, errdefs.IsNotFound(err), errdefs.IsNotImplemented(err):
			return
		}
		select {
		case <-time.After(noticeRetry):
		case <-s.run.Done():
			return
		}
	}
}

// noticed acts on a notice; true: it is the last that counts.
func (s *Sandbox) noticed(n *podvmpb.Notice) bool {
	l := log.G(s.run).WithField(logkey.Sandbox, s.cfg.ID)
	if n.Kind != podvmpb.NoticeKind_NOTICE_KIND_TAKEN {
		l.Warnf("the cloud may take this pod VM back soon (%s)", n.Reason)
		return false
	}
	t := &Taking{At: time.Now().Add(noticeGrace), Reason: n.Reason}
	if n.DeadlineUnixMs != 0 {
		t.At = time.UnixMilli(n.DeadlineUnixMs)
	}
	s.mu.Lock()
	s.taking = t
	s.mu.Unlock()
	l.Warn(t.Error() + ": its containers are told to end")
	if s.cfg.Taken != nil {
		s.cfg.Taken(s.run, t)
	}
	s.Stop()
	return true
}
