// SPDX-License-Identifier: Apache-2.0

// Package logkey holds the keys of structured log records. Shim, adaptor and pod
// VM use the same ones, so that one search by sandbox id crosses all three.
package logkey

const (
	Sandbox   = "sandbox"   // pod sandbox id
	Container = "container" // container id
	Exec      = "exec"      // exec id within a container; absent for its first process
	Pod       = "pod"       // namespace/name
	Instance  = "instance"  // the provider's id of a virtual machine
	Provider  = "provider"  // name of the provider
	Step      = "step"      // named step of a sandbox's start or stop
	Duration  = "ms"        // duration in milliseconds, a number
	Error     = "err"       // text of an error
	RPC       = "rpc"       // service/method
	NetNS     = "netns"     // path of a network namespace
	Device    = "device"    // name of a network device
	VNI       = "vni"       // VXLAN network identifier
	Address   = "addr"      // network address
	Volume    = "volume"    // name of a volume
)
