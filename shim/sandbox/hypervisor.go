// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	"github.com/kata-remote/kata-remote/agent-protocol/hypervisorpb"
)

// dialTimeout bounds a connect to the adaptor's socket, which is on this node.
const dialTimeout = 5 * time.Second

// errNotReached: the call was never made, so nothing came of it.
var errNotReached = errors.New("the adaptor does not answer")

// Hypervisor is the adaptor. Each call dials anew, as kata's does: an adaptor that
// was restarted between two calls is none of our business.
type Hypervisor struct {
	// Socket is the path of the adaptor's socket.
	Socket string
}

func hypervisorCall[Resp any](ctx context.Context, h Hypervisor, name string, f func(context.Context, hypervisorpb.HypervisorService) (Resp, error)) (Resp, error) {
	var none Resp
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "unix", h.Socket)
	if err != nil {
		return none, fmt.Errorf("%s: %w at %s (is cloud-api-adaptor running on this node?): %w: %w", name, errNotReached, h.Socket, err, errdefs.ErrUnavailable)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	r, err := f(ctx, hypervisorpb.NewHypervisorClient(client))
	if err != nil {
		if _, ok := status.FromError(err); ok {
			return none, fmt.Errorf("%s: %w", name, errgrpc.ToNative(err))
		}
		if errors.Is(err, ttrpc.ErrClosed) {
			return none, fmt.Errorf("%s: the adaptor ended during the call: %w: %w", name, err, errdefs.ErrUnavailable)
		}
		return none, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

// createVM registers the sandbox and returns the path of its agent socket.
func (h Hypervisor) createVM(ctx context.Context, id, netns string, annotations map[string]string) (string, error) {
	r, err := hypervisorCall(ctx, h, "CreateVM", func(ctx context.Context, c hypervisorpb.HypervisorService) (*hypervisorpb.CreateVMResponse, error) {
		return c.CreateVM(ctx, &hypervisorpb.CreateVMRequest{Id: id, Annotations: annotations, NetworkNamespacePath: netns})
	})
	if err != nil {
		return "", err
	}
	if r.AgentSocketPath == "" {
		return "", fmt.Errorf("CreateVM: the adaptor returned no agent socket: %w", errdefs.ErrInternal)
	}
	return r.AgentSocketPath, nil
}

func (h Hypervisor) startVM(ctx context.Context, id string) error {
	_, err := hypervisorCall(ctx, h, "StartVM", func(ctx context.Context, c hypervisorpb.HypervisorService) (*hypervisorpb.StartVMResponse, error) {
		return c.StartVM(ctx, &hypervisorpb.StartVMRequest{Id: id})
	})
	return err
}

// StopVM gives a pod VM back. The adaptor answers at once and deletes it on its own
// time. A sandbox that it does not know is not an error.
func (h Hypervisor) StopVM(ctx context.Context, id string) error {
	_, err := hypervisorCall(ctx, h, "StopVM", func(ctx context.Context, c hypervisorpb.HypervisorService) (*hypervisorpb.StopVMResponse, error) {
		return c.StopVM(ctx, &hypervisorpb.StopVMRequest{Id: id})
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// answers tells whether the adaptor is there.
func (h Hypervisor) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	_, err := hypervisorCall(ctx, h, "Version", func(ctx context.Context, c hypervisorpb.HypervisorService) (*hypervisorpb.VersionResponse, error) {
		return c.Version(ctx, &hypervisorpb.VersionRequest{})
	})
	return err == nil || errdefs.IsNotImplemented(err)
}
