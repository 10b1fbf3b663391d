// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/podvm/notice"
)

// noticer knows what the cloud announced; implemented by notice.Watch.
type noticer interface {
	// Next waits for the notice after the one with the id. NotFound: there will be none.
	Next(ctx context.Context, seen string) (notice.Notice, error)
}

// WaitNotice waits for what the cloud announces.
func (s *podvm) WaitNotice(ctx context.Context, req *podvmpb.WaitNoticeRequest) (*podvmpb.Notice, error) {
	if s.a.cfg.Notices == nil {
		return nil, toGRPC(fmt.Errorf("this machine is in no cloud that gives notice: %w", errdefs.ErrNotFound))
	}
	n, err := s.a.cfg.Notices.Next(ctx, req.SeenId)
	if err != nil {
		return nil, toGRPC(err)
	}
	r := &podvmpb.Notice{Id: n.ID, Kind: n.Kind, Reason: n.Reason}
	if !n.Deadline.IsZero() {
		r.DeadlineUnixMs = n.Deadline.UnixMilli()
	}
	return r, nil
}
