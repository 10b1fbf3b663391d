// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/forward"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/netns"
)

// dialTimeout bounds a connection to the pod's own loopback: whoever listens there
// answers at once, unless its queue is full.
const dialTimeout = 10 * time.Second

// Forward connects to a port of the pod's loopback interface.
func (s *podvm) Forward(ctx context.Context, srv podvmpb.PodVM_ForwardServer) error {
	first, err := srv.Recv()
	if err != nil {
		return toGRPC(fmt.Errorf("receive the first frame: %w", err))
	}
	if first.Port == 0 || first.Port > 1<<16-1 || len(first.Data) > 0 || first.Eof {
		return toGRPC(fmt.Errorf("the first frame names a port, %d is none, and carries no data: %w", first.Port, errdefs.ErrInvalidArgument))
	}
	conn, err := s.a.dialPod(ctx, uint16(first.Port))
	if err != nil {
		return toGRPC(err)
	}
	if err := srv.Send(&podvmpb.ForwardFrame{Window: forward.Window}); err != nil {
		return errors.Join(err, conn.Close())
	}
	return toGRPC(forward.Relay(ctx, conn, srv, first.Window))
}

// dialPod connects inside of the pod's network namespace: to 127.0.0.1, and where
// nobody listens to ::1, as containerd does for pods on the node (2.4,
// sandbox_portforward_linux.go). Unavailable: nobody listens.
func (a *Agent) dialPod(ctx context.Context, port uint16) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var conn net.Conn
	dial := func() error {
		var d net.Dialer
		var err4, err6 error
		p := strconv.Itoa(int(port))
		if conn, err4 = d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", p)); err4 == nil {
			return nil
		}
		if conn, err6 = d.DialContext(ctx, "tcp6", net.JoinHostPort("::1", p)); err6 == nil {
			return nil
		}
		if errors.Is(err4, unix.ECONNREFUSED) {
			return fmt.Errorf("nothing listens on port %d of the pod: %w", port, errdefs.ErrUnavailable)
		}
		return fmt.Errorf("connect to port %d of the pod: %w", port, err4)
	}
	var err error
	if a.cfg.PodNetNS == "" {
		err = dial()
	} else {
		err = netns.Do(ctx, a.cfg.PodNetNS, dial)
	}
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}
