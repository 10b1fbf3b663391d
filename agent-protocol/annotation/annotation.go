// SPDX-License-Identifier: Apache-2.0

// Package annotation holds the keys under which Kubernetes, containerd, CRI-O and
// kata hand a pod's facts to a runtime, and a runtime to the adaptor.
package annotation

// Keys that containerd's CRI plugin sets on every container's OCI spec
// (containerd, pkg/cri/annotations).
const (
	// ContainerType is ContainerTypeSandbox or ContainerTypeContainer. A spec
	// without it belongs to a client that knows no pods (ctr, nerdctl): it makes a
	// sandbox of one container.
	ContainerType          = "io.kubernetes.cri.container-type"
	ContainerTypeSandbox   = "sandbox"
	ContainerTypeContainer = "container"

	SandboxID           = "io.kubernetes.cri.sandbox-id"
	SandboxName         = "io.kubernetes.cri.sandbox-name"
	SandboxNamespace    = "io.kubernetes.cri.sandbox-namespace"
	SandboxUID          = "io.kubernetes.cri.sandbox-uid"
	SandboxLogDirectory = "io.kubernetes.cri.sandbox-log-directory"
	ContainerName       = "io.kubernetes.cri.container-name"
	ImageName           = "io.kubernetes.cri.image-name"

	// The sum of the pod's limits, as decimal numbers (containerd 1.6 and later).
	SandboxCPUPeriod = "io.kubernetes.cri.sandbox-cpu-period" // µs
	SandboxCPUQuota  = "io.kubernetes.cri.sandbox-cpu-quota"  // µs per period; < 0: none
	SandboxCPUShares = "io.kubernetes.cri.sandbox-cpu-shares"
	SandboxMemory    = "io.kubernetes.cri.sandbox-memory" // bytes
)

// Keys that CRI-O sets instead.
const (
	CRIOContainerType    = "io.kubernetes.cri-o.ContainerType"
	CRIOSandboxID        = "io.kubernetes.cri-o.SandboxID"
	CRIOSandboxName      = "io.kubernetes.cri-o.SandboxName"
	CRIOSandboxNamespace = "io.kubernetes.cri-o.Namespace"
	CRIOImageName        = "io.kubernetes.cri-o.ImageName"
)

// Keys of kata, set by users and webhooks on pods and passed on in CreateVM.
const (
	// HypervisorPrefix begins every key that shapes the virtual machine.
	HypervisorPrefix = "io.katacontainers.config.hypervisor."

	MachineType     = HypervisorPrefix + "machine_type"      // instance type
	Image           = HypervisorPrefix + "image"             // image id or name in the cloud
	DefaultVCPUs    = HypervisorPrefix + "default_vcpus"     // decimal; "0" or "": not asked for
	DefaultMemory   = HypervisorPrefix + "default_memory"    // MiB, decimal; "0" or "": not asked for
	DefaultGPUs     = HypervisorPrefix + "default_gpus"      // decimal
	DefaultGPUModel = HypervisorPrefix + "default_gpu_model" // free text
	InitData        = HypervisorPrefix + "cc_init_data"      // decoded TOML in CreateVM

	// Policy is what the agent is to enforce on its calls, base64 of Rego.
	Policy = "io.katacontainers.config.agent.policy"

	// ForceGuestPull, "true" or "false", has the guest pull the images of the pod's
	// containers whatever the node offers as their root file systems.
	ForceGuestPull = "io.katacontainers.config.runtime.experimental_force_guest_pull"
)

// EmptyDirSizeLimit, followed by the name of a volume, is the size limit of an
// emptyDir on disk ("100Mi"): the kubelet tells no runtime of it. The prefix is
// kata's, because runtimes are configured to pass those annotations on.
const EmptyDirSizeLimit = "io.katacontainers.volume.emptydir_size_limit."
