// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"maps"
	"slices"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/shim/sandboxpb"
)

// podSysctls are what containerd's CRI plugin gives to every pod's sandbox container
// since 2.0 (enable_unprivileged_ports, enable_unprivileged_icmp); a pod made through
// the Sandbox API has none, and its sandboxer is to do the same.
var podSysctls = map[string]string{
	"net.ipv4.ip_unprivileged_port_start": "0",
	"net.ipv4.ping_group_range":           "0 2147483647",
}

// FromPod is the spec that the CRI plugin would have written for the sandbox container
// of a pod, had it made one: through the Sandbox API the pod's own configuration comes
// instead. The rest of the shim thus knows one kind of pod. files are those of
// PodFiles, netns the path of the pod's network namespace or empty.
func FromPod(c *sandboxpb.PodSandboxConfig, id, netns string, files map[string]string) *specs.Spec {
	meta, linux := c.GetMetadata(), c.GetLinux()
	modes := linux.GetSecurityContext().GetNamespaceOptions()
	a := maps.Clone(c.GetAnnotations())
	if a == nil {
		a = map[string]string{}
	}
	a[annotation.ContainerType], a[annotation.SandboxID] = annotation.ContainerTypeSandbox, id
	a[annotation.SandboxName], a[annotation.SandboxNamespace], a[annotation.SandboxUID] = id, "default", meta.GetUid()
	if meta.GetName() != "" {
		a[annotation.SandboxName] = meta.GetName()
	}
	if meta.GetNamespace() != "" {
		a[annotation.SandboxNamespace] = meta.GetNamespace()
	}
	if r := linux.GetResources(); r != nil {
		for key, v := range map[string]int64{
			annotation.SandboxCPUPeriod: r.CpuPeriod, annotation.SandboxCPUQuota: r.CpuQuota,
			annotation.SandboxCPUShares: r.CpuShares, annotation.SandboxMemory: r.MemoryLimitInBytes,
		} {
			a[key] = strconv.FormatInt(v, 10)
		}
	}
	s := &specs.Spec{
		Version: specs.Version, Hostname: c.GetHostname(), Annotations: a,
		Process: &specs.Process{Args: []string{"/pause"}, Cwd: "/"},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.UTSNamespace}},
			Sysctl:     maps.Clone(podSysctls),
		},
	}
	maps.Copy(s.Linux.Sysctl, linux.GetSysctls())
	if modes.GetNetwork() != sandboxpb.NamespaceMode_NAMESPACE_MODE_NODE && netns != "" {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: netns})
	}
	for kind, mode := range map[specs.LinuxNamespaceType]sandboxpb.NamespaceMode{specs.PIDNamespace: modes.GetPid(), specs.IPCNamespace: modes.GetIpc()} {
		if mode != sandboxpb.NamespaceMode_NAMESPACE_MODE_NODE {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind})
		}
	}
	AddPodFiles(s, files)
	return s
}

// AddPodFiles binds the pod's files into a container, by destination, where the spec
// has nothing there, and the pod's shared memory in the place of one of its own. The
// CRI plugin leaves them out where another sandboxer than its own makes the pod
// (containerd 2.4, internal/cri/server/container_create.go).
func AddPodFiles(s *specs.Spec, files map[string]string) {
	options := []string{"rbind", "rprivate", "rw"}
	if s.Root != nil && s.Root.Readonly {
		options[2] = "ro"
	}
	at := func(destination string) int {
		return slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == destination })
	}
	for _, destination := range slices.Sorted(maps.Keys(files)) {
		if at(destination) < 0 {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: destination, Source: files[destination], Type: "bind", Options: options})
		}
	}
	shm := specs.Mount{Destination: "/dev/shm", Source: "/dev/shm", Type: "bind", Options: []string{"rbind", "rprivate", "rw"}}
	if i := at(shm.Destination); i < 0 {
		s.Mounts = append(s.Mounts, shm)
	} else if s.Mounts[i].Type == "tmpfs" {
		s.Mounts[i] = shm
	}
}
