// SPDX-License-Identifier: Apache-2.0

package local

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// Config of the provider. The zero value of each field takes the default named. The
// name in front is the key of the adaptor's configuration, which errors name.
type Config struct {
	// LOCAL_QEMU: the emulator, a path or a name to be looked up in PATH.
	// Default: qemu-system-x86_64.
	QEMU string
	// LOCAL_MACHINE: QEMU's machine type, MachineQ35 or MachineMicroVM. Default:
	// MachineQ35 (see its comment for the reason).
	Machine string
	// LOCAL_ACCEL: AccelKVM or AccelTCG. Default: KVM if a real boot under it works.
	Accel Accel
	// LOCAL_KERNEL and LOCAL_INITRD: Kernel is a bzImage or, for a faster start, an uncompressed vmlinux with
	// a PVH entry. Initrd goes with it. Required.
	Kernel, Initrd string
	// LOCAL_CMDLINE: KernelArgs are added to the kernel's command line.
	KernelArgs string
	// LOCAL_DIR: StateDir holds records, seeds, sockets and logs. Default: /var/lib/peerpod/local.
	StateDir string
	// LOCAL_BRIDGE: between node and VMs. Default: ppbr0.
	Bridge string
	// LOCAL_SUBNET: of the bridge; its first address is the node's. Default: 192.168.213.0/24.
	Subnet netip.Prefix
	// LOCAL_MTU: MTU of the bridge, in bytes. No wire limits it; the default of 9000 leaves
	// room for the tunnel, so that a pod keeps its CNI's MTU.
	MTU int
	// LOCAL_VCPUS and LOCAL_MEMORY: DefaultVCPUs and DefaultMemoryMiB are the size of a pod that asks for none.
	// Defaults: 1, because under emulation a second one adds half a second to
	// each start, and 2048; memory that a VM never touches is not taken.
	DefaultVCPUs, DefaultMemoryMiB int
	// CPUOvercommit is how many vCPUs all VMs together may have for each CPU of
	// the node. Default: 4.
	CPUOvercommit int
}

// Machine types.
const (
	// MachineQ35 has a clock that an emulated kernel can always calibrate against.
	MachineQ35 = "q35"
	// MachineMicroVM has fewer devices, on virtio-mmio. It is refused without KVM:
	// under emulation on a busy node kernels hang in it, for without HPET and ACPI
	// timer they calibrate the TSC against the PIT alone, give up ("Unable to calibrate
	// against PIT") and are left without a clock. Seen in 4 of 4 boots on a loaded
	// node with Debian's 6.1.0-56-cloud-amd64 under QEMU 7.2, 2026-11-21.
	MachineMicroVM = "microvm"
)

// Accel is a way to run a VM.
type Accel string

// Ways to run a VM.
const (
	AccelKVM Accel = "kvm" // by the CPU
	AccelTCG Accel = "tcg" // by software emulation, some 5 to 20 times slower
)

const (
	minMTU        = 1280 // IPv6's, RFC 8200 §5
	maxMTU        = 65535
	maxLinkName   = 15 // IFNAMSIZ-1
	maxHostBits   = 16 // more addresses than VMs that fit a node
	minHostBits   = 2
	minMemoryMiB  = 128 // less does not boot Debian's kernel with an initramfs
	maxMemoryMiB  = 1 << 22
	defaultMemory = 2048
)

// complete returns the configuration with its defaults, or InvalidArgument with
// all that is wrong.
func (c Config) complete(cpus int) (Config, error) {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("local provider: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}
	def := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	defInt := func(n *int, d int) {
		if *n == 0 {
			*n = d
		}
	}
	def(&c.QEMU, "qemu-system-x86_64")
	def(&c.Machine, MachineQ35)
	def(&c.StateDir, "/var/lib/peerpod/local")
	def(&c.Bridge, "ppbr0")
	defInt(&c.MTU, 9000)
	defInt(&c.DefaultVCPUs, 1)
	defInt(&c.DefaultMemoryMiB, defaultMemory)
	defInt(&c.CPUOvercommit, 4)
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("192.168.213.0/24")
	}
	c.Subnet = c.Subnet.Masked()
	if c.Machine != MachineQ35 && c.Machine != MachineMicroVM {
		bad("LOCAL_MACHINE %q is neither %s nor %s", c.Machine, MachineQ35, MachineMicroVM)
	}
	if c.Accel != "" && c.Accel != AccelKVM && c.Accel != AccelTCG {
		bad("LOCAL_ACCEL %q is neither %s nor %s, nor empty to let a test boot decide", c.Accel, AccelKVM, AccelTCG)
	}
	if c.Kernel == "" {
		bad("LOCAL_KERNEL is not set; name the pod VM image's kernel")
	}
	if c.Initrd == "" {
		bad("LOCAL_INITRD is not set; name the pod VM image's initramfs")
	}
	for key, path := range map[string]*string{"LOCAL_KERNEL": &c.Kernel, "LOCAL_INITRD": &c.Initrd, "LOCAL_DIR": &c.StateDir} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			bad("%s %q is not a usable path: %v", key, *path, err)
		}
		*path = abs
	}
	if len(c.Bridge) > maxLinkName || strings.ContainsAny(c.Bridge, "/ :\t\n") || c.Bridge == "." || c.Bridge == ".." {
		bad("LOCAL_BRIDGE %q is not a link name of at most %d bytes", c.Bridge, maxLinkName)
	}
	if bits := c.Subnet.Addr().BitLen() - c.Subnet.Bits(); bits < minHostBits {
		bad("LOCAL_SUBNET %s has no room for an instance; use a /%d or wider", c.Subnet, c.Subnet.Addr().BitLen()-minHostBits)
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		bad("LOCAL_MTU %d is not within %d to %d", c.MTU, minMTU, maxMTU)
	}
	if c.DefaultVCPUs < 1 || c.CPUOvercommit < 1 {
		bad("LOCAL_VCPUS %d and CPUOvercommit %d must be 1 or more", c.DefaultVCPUs, c.CPUOvercommit)
	}
	if c.DefaultMemoryMiB < minMemoryMiB || c.DefaultMemoryMiB > maxMemoryMiB {
		bad("LOCAL_MEMORY %d is not within %d to %d", c.DefaultMemoryMiB, minMemoryMiB, maxMemoryMiB)
	}
	return c, errors.Join(errs...)
}

// gateway is the bridge's own address: the first of the subnet.
func (c Config) gateway() netip.Prefix {
	return netip.PrefixFrom(c.Subnet.Addr().Next(), c.Subnet.Bits())
}

// address returns the n-th address for a VM, n from 0; false past the last.
func (c Config) address(n int) (netip.Addr, bool) {
	if n < 0 || n >= c.addresses() {
		return netip.Addr{}, false
	}
	b := c.Subnet.Addr().AsSlice()
	off := n + 2 // after network and gateway
	for i := len(b) - 1; off > 0 && i >= 0; i-- {
		off += int(b[i])
		b[i] = byte(off)
		off >>= 8
	}
	a, ok := netip.AddrFromSlice(b)
	return a, ok && c.Subnet.Contains(a)
}

// addresses is how many VMs the subnet has room for.
func (c Config) addresses() int {
	bits := min(c.Subnet.Addr().BitLen()-c.Subnet.Bits(), maxHostBits)
	return 1<<bits - 3 // network, gateway, broadcast
}
