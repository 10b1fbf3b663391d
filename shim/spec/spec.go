// SPDX-License-Identifier: Apache-2.0

// Package spec turns the OCI specification that containerd wrote for this node into
// the one that the agent is to carry out in the guest.
//
// What names things of the node goes: host paths of namespaces, cgroups, the node's
// CPU set, block devices, labels of its security modules. What can be kept is kept:
// process, mounts inside the container, limits of memory, CPU and processes, device
// rules, sysctls, masked paths. What the user asked for and cannot be had in a pod
// VM is an error that says so.
package spec

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
)

// TerminationMessagePath is the kubelet's annotation of where in the container its
// termination message is; the agent needs it for GetDiagnosticData.
const TerminationMessagePath = "io.kubernetes.container.terminationMessagePath"

// Read reads a bundle's config.json.
func Read(bundle string) (*specs.Spec, error) {
	b, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read the OCI spec: %w", err)
	}
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("%s/config.json: %w: %w", bundle, err, errdefs.ErrInvalidArgument)
	}
	if s.Process == nil || s.Linux == nil {
		return nil, fmt.Errorf("%s/config.json has no process or no linux section: %w", bundle, errdefs.ErrInvalidArgument)
	}
	return &s, nil
}

// Role is what a container is to its pod.
type Role int

const (
	// RoleSingle is a container of a client that knows no pods: a pod of its own.
	RoleSingle Role = iota
	// RoleSandbox is the container that stands for the pod.
	RoleSandbox
	// RoleMember is a container in the pod of another one.
	RoleMember
)

// Identity tells from a spec's annotations, containerd's or CRI-O's, what the
// container is and to which sandbox it belongs; id is the container's own id. A
// member that does not name its sandbox is InvalidArgument.
func Identity(s *specs.Spec, id string) (Role, string, error) {
	kind, sandbox := s.Annotations[annotation.ContainerType], s.Annotations[annotation.SandboxID]
	if kind == "" {
		kind, sandbox = s.Annotations[annotation.CRIOContainerType], s.Annotations[annotation.CRIOSandboxID]
	}
	switch kind {
	case "":
		return RoleSingle, id, nil
	case annotation.ContainerTypeSandbox:
		return RoleSandbox, id, nil
	case annotation.ContainerTypeContainer:
		if sandbox == "" {
			return 0, "", fmt.Errorf("annotation %s is missing on container %s: %w", annotation.SandboxID, id, errdefs.ErrInvalidArgument)
		}
		return RoleMember, sandbox, nil
	}
	return 0, "", fmt.Errorf("annotation %s of container %s is %q, not sandbox or container: %w", annotation.ContainerType, id, kind, errdefs.ErrInvalidArgument)
}

// NetNS is the path of the network namespace the spec wants its container in. It
// must be one of the pod's own, so the node's is InvalidArgument, however it is named.
func NetNS(s *specs.Spec) (string, error) {
	for _, ns := range s.Linux.Namespaces {
		if ns.Type != specs.NetworkNamespace {
			continue
		}
		if ns.Path == "" {
			return "", fmt.Errorf("the OCI spec has a network namespace without a path, and a pod VM needs one that is set up: with ctr, make one (ip netns add NAME) and pass --with-ns network:/run/netns/NAME: %w", errdefs.ErrInvalidArgument)
		}
		if ofNode(ns.Path) {
			return "", refuseHost("network", "hostNetwork", "to be reached at the node's address use a Service of type NodePort or a hostPort (ctr: without --net-host)")
		}
		return ns.Path, nil
	}
	return "", refuseHost("network", "hostNetwork", "to be reached at the node's address use a Service of type NodePort or a hostPort (ctr: without --net-host)")
}

// ofNode tells whether a path leads to a namespace of this process, which lives in
// the node's.
func ofNode(path string) bool {
	have, err := os.Stat(path)
	if err != nil {
		return false
	}
	own, err := os.Stat("/proc/self/ns/net")
	return err == nil && os.SameFile(have, own)
}

// refuseHost is the error for a pod that wants one of the node's namespaces. containerd
// says so by leaving the namespace out of the spec (1.6 pkg/cri/server/sandbox_run_linux.go,
// 2.4 internal/cri/server/podsandbox/sandbox_run_linux.go).
func refuseHost(kind, field, instead string) error {
	return fmt.Errorf("%s is not possible with this runtime class, because the pod runs on another machine than the node and cannot share the node's %s namespace: remove %s: true from the pod, or use a runtime class that runs on the node; %s: %w",
		field, kind, field, instead, errdefs.ErrInvalidArgument)
}

// Options is what Convert needs besides the spec.
type Options struct {
	ContainerID string
	// RootPath is the root file system's path in the guest.
	RootPath string
	// Mounts replace the spec's.
	Mounts []specs.Mount
	// Seccomp: the agent enforces seccomp profiles. Without it they are left out.
	Seccomp bool
	// TerminationPath is the destination of the termination log; empty: none.
	TerminationPath string
}

// Converted is a spec for the guest.
type Converted struct {
	OCI *agentpb.Spec
	// SandboxPIDNS: the container shares the pod's pid namespace.
	SandboxPIDNS bool
}

// Convert makes the spec for the guest. It does not change s.
func Convert(s *specs.Spec, o Options) (*Converted, error) {
	if err := Check(s); err != nil {
		return nil, err
	}
	add := map[string]string{}
	if o.TerminationPath != "" && s.Annotations[TerminationMessagePath] == "" {
		add[TerminationMessagePath] = o.TerminationPath
	}
	l := s.Linux
	out := &Converted{OCI: &agentpb.Spec{
		Version:     s.Version,
		Process:     Process(s.Process),
		Root:        &agentpb.Root{Path: o.RootPath, Readonly: s.Root != nil && s.Root.Readonly},
		Hostname:    s.Hostname,
		Mounts:      mounts(o.Mounts),
		Annotations: annotations(s.Annotations, []string{annotation.InitData, annotation.Policy}, add),
		Linux: &agentpb.Linux{
			UIDMappings: idMappings(l.UIDMappings), GIDMappings: idMappings(l.GIDMappings),
			Sysctl: l.Sysctl, Resources: Resources(l.Resources), CgroupsPath: "/" + o.ContainerID,
			Devices: devices(l.Devices), RootfsPropagation: l.RootfsPropagation,
			MaskedPaths: l.MaskedPaths, ReadonlyPaths: l.ReadonlyPaths,
		},
	}}
	if o.Seccomp {
		out.OCI.Linux.Seccomp = seccomp(l.Seccomp)
	}
	for _, ns := range l.Namespaces {
		switch ns.Type {
		case specs.NetworkNamespace, specs.CgroupNamespace, specs.TimeNamespace:
			// The network is the pod's; the agent makes the others as it needs them.
		case specs.PIDNamespace:
			out.SandboxPIDNS = ns.Path != ""
		default:
			out.OCI.Linux.Namespaces = append(out.OCI.Linux.Namespaces, &agentpb.LinuxNamespace{Type: string(ns.Type)})
		}
	}
	return out, nil
}

// Check refuses what a pod VM cannot do: namespaces, programs and devices of the
// node. It needs nothing but the spec, so a pod is refused before it has a machine.
func Check(s *specs.Spec) error {
	for _, want := range []struct {
		ns             specs.LinuxNamespaceType
		field, instead string
	}{
		{specs.PIDNamespace, "hostPID", "the containers of the pod see each other's processes with shareProcessNamespace: true"},
		{specs.IPCNamespace, "hostIPC", "the containers of the pod share an IPC namespace without it"},
	} {
		if !slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == want.ns }) {
			return refuseHost(string(want.ns), want.field, want.instead)
		}
	}
	if err := checkProcess(s.Process); err != nil {
		return err
	}
	if h := s.Hooks; h != nil {
		for _, list := range [][]specs.Hook{h.Prestart, h.CreateRuntime, h.CreateContainer, h.StartContainer, h.Poststart, h.Poststop} { //nolint:staticcheck // Prestart is deprecated, not gone
			if len(list) > 0 {
				return fmt.Errorf("OCI hook %s cannot run, since the container is not on this node: remove the hook (NRI or CDI plugin, --gpus): %w", list[0].Path, errdefs.ErrInvalidArgument)
			}
		}
	}
	for _, d := range s.Linux.Devices {
		if !virtual(d) {
			return fmt.Errorf("device %s (%s %d:%d) is the node's and cannot be given to a pod, which runs on another machine: remove it from the container; for privileged pods set privileged_without_host_devices = true for this runtime in containerd's configuration: %w",
				d.Path, d.Type, d.Major, d.Minor, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// virtual tells the devices that every Linux has under the same number and that hold
// nothing of the node: memory devices, terminals, fuse and tun (Linux,
// Documentation/admin-guide/devices.txt).
func virtual(d specs.LinuxDevice) bool {
	if d.Type != "c" && d.Type != "u" {
		return d.Type == "p"
	}
	switch d.Major {
	case 1:
		return slices.Contains([]int64{3, 5, 7, 8, 9}, d.Minor) // null zero full random urandom
	case 5:
		return d.Minor == 0 || d.Minor == 2 // tty ptmx
	case 10:
		return d.Minor == 200 || d.Minor == 229 // tun fuse
	}
	return false
}
