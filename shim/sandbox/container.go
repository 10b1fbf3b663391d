// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/rootfs"
	"github.com/kata-remote/kata-remote/shim/spec"
	"github.com/kata-remote/kata-remote/shim/volume"
)

// Made is a container that exists in the guest.
type Made struct {
	Guest Guest
	// TerminationLog is the node's file for the termination message, or empty.
	TerminationLog string
	// Release gives back the container's volumes, once it is removed from the guest.
	Release func()
}

// CreateContainer makes a container in the guest: root file system, volumes, then
// the container itself. The volumes are looked at first, because what is wrong with
// them is the user's mistake and the root file system may take long. A failure
// leaves nothing in the guest that is not named after the container.
func (s *Sandbox) CreateContainer(ctx context.Context, r *taskapi.CreateTaskRequest, spc *specs.Spec) (_ *Made, err error) {
	g, err := s.Guest()
	if err == nil {
		err = s.Taken()
	}
	if err != nil {
		return nil, err
	}
	release := func() { s.volumes.Release(r.ID) }
	defer func() {
		if err != nil {
			release()
		}
	}()
	plan, err := s.volumes.Plan(volume.Request{Container: r.ID, Mounts: spc.Mounts, Annotations: spc.Annotations, Features: g.Features})
	if err != nil {
		return nil, err
	}
	storages := plan.Storages()
	opts := spec.Options{ContainerID: r.ID, Mounts: plan.Mounts(), Seccomp: g.Seccomp, TerminationPath: plan.TerminationPath}
	converted, err := spec.Convert(spc, opts)
	if err != nil {
		return nil, err
	}
	role, _, err := spec.Identity(spc, r.ID)
	if err != nil {
		return nil, err
	}
	forced, err := rootfs.ForcesPull(spc.Annotations)
	if err != nil {
		return nil, err
	}
	rr := rootfs.Request{
		Container: r.ID, Bundle: r.Bundle, Mounts: r.Rootfs, Sandbox: role == spec.RoleSandbox,
		Annotations: spc.Annotations, ForcePull: forced || g.Pull, Handlers: g.Handlers,
	}
	if spc.Root != nil {
		rr.Root = spc.Root.Path
	}
	source, err := rootfs.Choose(g.Conn, g.Features, rr)
	if err != nil {
		return nil, err
	}
	root, err := source.Prepare(ctx, rr)
	if err != nil {
		return nil, err
	}
	if root.Own {
		// All that the agent's own program has a use for. The rest would only have
		// to be decoded, on the way to every pod's start.
		converted.OCI = &agentpb.Spec{
			Annotations: converted.OCI.Annotations, Root: &agentpb.Root{}, Process: &agentpb.Process{},
			Linux: &agentpb.Linux{Sysctl: converted.OCI.GetLinux().GetSysctl()},
		}
		storages = nil
	} else if err := plan.Bring(ctx, g.Conn); err != nil {
		return nil, err
	}
	converted.OCI.Root.Path = root.Path
	converted.OCI.Process.Terminal = r.Terminal
	err = guest.AgentOnce(ctx, g.Conn, errdefs.IsAlreadyExists, agentpb.AgentServiceService.CreateContainer, &agentpb.CreateContainerRequest{
		ContainerId: r.ID, ExecId: r.ID, OCI: converted.OCI, SandboxPidns: converted.SandboxPIDNS,
		Storages: append(root.Storages, storages...),
	})
	if err != nil {
		return nil, err
	}
	return &Made{Guest: g, TerminationLog: plan.TerminationSource, Release: release}, nil
}
