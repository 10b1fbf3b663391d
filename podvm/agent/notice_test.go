// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/podvm/notice"
)

// announced is a list of notices; after the last there are none.
type announced []notice.Notice

func (a announced) Next(_ context.Context, seen string) (notice.Notice, error) {
	i := slices.IndexFunc(a, func(n notice.Notice) bool { return n.ID == seen }) + 1
	if i == len(a) {
		return notice.Notice{}, fmt.Errorf("no more: %w", errdefs.ErrNotFound)
	}
	return a[i], nil
}

// TestWaitNotice: what the cloud announced comes in order; where no cloud gives notice,
// the agent does not say that it could.
func TestWaitNotice(t *testing.T) {
	advertised := func(g *guest) bool {
		d, err := g.GetGuestDetails(g.ctx(), &agentpb.GuestDetailsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return extension.Set(d.AgentDetails.ExtraFeatures).Has(extension.Notice)
	}
	g := newGuest(t)
	_, err := g.client.podvm.WaitNotice(g.ctx(), &podvmpb.WaitNoticeRequest{})
	wantClass(t, "no cloud", err, errdefs.ErrNotFound)
	if advertised(g) {
		t.Error("advertised without a cloud")
	}
	g = newGuest(t, func(c *Config) {
		c.Notices = announced{
			{ID: "a", Kind: podvmpb.NoticeKind_NOTICE_KIND_AT_RISK, Reason: "advice"},
			{ID: "b", Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, Reason: "spot interruption", Deadline: time.UnixMilli(1234)},
		}
	})
	if !advertised(g) {
		t.Error("not advertised")
	}
	seen := ""
	for _, want := range []*podvmpb.Notice{
		{Id: "a", Kind: podvmpb.NoticeKind_NOTICE_KIND_AT_RISK, Reason: "advice"},
		{Id: "b", Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, Reason: "spot interruption", DeadlineUnixMs: 1234},
	} {
		got, err := g.client.podvm.WaitNotice(g.ctx(), &podvmpb.WaitNoticeRequest{SeenId: seen})
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
			t.Error(d)
		}
		seen = got.Id
	}
	_, err = g.client.podvm.WaitNotice(g.ctx(), &podvmpb.WaitNoticeRequest{SeenId: seen})
	wantClass(t, "after the last", err, errdefs.ErrNotFound)
}
