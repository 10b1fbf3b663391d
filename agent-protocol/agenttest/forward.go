// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"fmt"
	"net"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/forward"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// Announce has one WaitNotice return the notice. Call it after Register.
func (a *Agent) Announce(n *podvmpb.Notice) {
	a.mu.Lock()
	a.init()
	c := a.notices
	a.mu.Unlock()
	c <- n
}

// WaitNotice returns what Announce was given, each once.
func (s extensionService) WaitNotice(ctx context.Context, req *podvmpb.WaitNoticeRequest) (*podvmpb.Notice, error) {
	select {
	case n := <-s.notices:
		return n, nil
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
}

// Forward connects to a port of the loopback interface that the test is on.
func (s extensionService) Forward(ctx context.Context, st podvmpb.PodVM_ForwardServer) error {
	if err := s.enter(ctx, "Forward"); err != nil {
		return errgrpc.ToGRPC(err)
	}
	first, err := st.Recv()
	if err != nil {
		return err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(first.Port))))
	if err != nil {
		return errgrpc.ToGRPC(fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable))
	}
	if err := st.Send(&podvmpb.ForwardFrame{Window: forward.Window}); err != nil {
		conn.Close()
		return err
	}
	return errgrpc.ToGRPC(forward.Relay(ctx, conn.(*net.TCPConn), st, first.Window))
}
