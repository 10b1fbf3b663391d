// SPDX-License-Identifier: Apache-2.0

// Package rootfs brings a container's root file system into the guest. Node and
// guest share no file system, so there are several ways, behind Source:
//
//   - FromNode mounts what containerd's snapshotter hands out and streams it.
//   - AgentsOwn brings nothing: the agent has a program of its own for the pod's
//     sandbox container.
//   - GuestPull names the image, and the agent pulls it: where the snapshotter says so
//     in its mounts, or containerd's configuration or the pod itself does.
//
// Choose picks the way by the request and by what the agent can do.
package rootfs

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// Request says what root file system a container is to have.
type Request struct {
	Container string
	// Bundle is the bundle directory; its rootfs is the root file system where
	// Mounts is empty, and the place to mount them where it is not.
	Bundle string
	// Root is the spec's root.path, absolute or relative to Bundle.
	Root   string
	Mounts []*types.Mount
	// Sandbox: it is the pod's sandbox container.
	Sandbox bool
	// Annotations of the container. They name its image.
	Annotations map[string]string
	// ForcePull: the guest pulls the image whatever Mounts say.
	ForcePull bool
	// Handlers are the agent's storage drivers. Empty: it does not tell.
	Handlers []string
}

// Result says where the guest has it.
type Result struct {
	// Path for CreateContainer's Root.Path.
	Path string
	// Storages the agent is to prepare in CreateContainer.
	Storages []*agentpb.Storage
	// Own: the agent runs its own program, which sees no files: neither Path nor the
	// spec's mounts are of use to it.
	Own bool
}

// Source is one way to bring a root file system into the guest. A failed Prepare
// leaves nothing on the node; what it left in the guest goes with the container's id.
type Source interface {
	Prepare(ctx context.Context, r Request) (Result, error)
}

// AgentsOwn is the agent's own pause program. It is what the guest runs in the place
// of the pod's sandbox container, which does nothing but exist: sending an image
// for it would cost every pod's start the time of a container.
type AgentsOwn struct{}

// Prepare implements Source.
func (AgentsOwn) Prepare(context.Context, Request) (Result, error) { return Result{Own: true}, nil }

// Choose returns the way that the request asks for.
func Choose(conn *guest.Conn, features extension.Set, r Request) (Source, error) {
	if r.Sandbox && features.Has(extension.Pause) {
		return AgentsOwn{}, nil
	}
	pull, err := pulled(r)
	if err != nil {
		return nil, err
	}
	if pull != nil {
		return pull, nil
	}
	if !features.Has(extension.Rootfs) {
		return nil, fmt.Errorf("container %s: the agent in the pod VM cannot take a root file system from the node (it lacks %s): use a pod VM image made by this project: %w", r.Container, extension.Rootfs, errdefs.ErrNotImplemented)
	}
	return &FromNode{conn: conn}, nil
}
