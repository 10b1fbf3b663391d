// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// invalidID is the sentence a kata-agent says about a container it does not know.
// Runtimes in the field know it.
const invalidID = "Invalid container id"

// classes are those toGRPC passes on. What has none of them is INTERNAL, as with a
// kata-agent (kata-containers 4.1, src/agent/src/rpc.rs), and not UNKNOWN, as errgrpc would have it.
var classes = []error{
	errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrPermissionDenied,
	errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrAborted, errdefs.ErrOutOfRange,
	errdefs.ErrNotImplemented, errdefs.ErrInternal, errdefs.ErrUnavailable, errdefs.ErrDataLoss,
	errdefs.ErrUnauthenticated, errdefs.ErrConflict, errdefs.ErrNotModified,
	context.Canceled, context.DeadlineExceeded,
}

// toGRPC gives an error the code it has on the wire.
func toGRPC(err error) error {
	if err == nil {
		return nil
	}
	for _, c := range classes {
		if errors.Is(err, c) {
			return errgrpc.ToGRPC(err)
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// reply is the last step of every call.
func reply[T any](v *T, err error) (*T, error) {
	if err != nil {
		return nil, toGRPC(err)
	}
	return v, nil
}
