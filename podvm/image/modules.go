// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"slices"

	"github.com/kata-remote/kata-remote/podvm/kmod"
)

// forbidden make devices on top of the VM's own interface. A container with NET_ADMIN
// could make one in the pod's namespace, which knows the VM's by the number that the
// tunnel's device shows (IFLA_LINK_NETNSID, seen on Linux 6.18), and be past the tunnel:
// at the cloud's metadata service, for one.
var forbidden = []string{"macvlan", "macvtap", "ipvlan", "ipvtap", "8021q", "macsec"}

// checkForbidden refuses an image whose kernel has one of forbidden or could load it.
func (k *Kernel) checkForbidden(modules []Module) error {
	for _, name := range forbidden {
		if k.builtin[name] || slices.ContainsFunc(modules, func(m Module) bool { return m.Name == name }) {
			return fmt.Errorf("kernel module %s would let a container with NET_ADMIN past the tunnel: take it out of wanted, or take a kernel that has it as a module", name)
		}
	}
	return nil
}

// wanted are the modules a pod VM needs; what they depend on comes with them.
var wanted = []Want{
	// The machine's devices. Clouds and QEMU's q35 have them on PCI, QEMU's microvm
	// as memory-mapped devices.
	{Name: "virtio_pci", When: "pci"},
	{Name: "virtio_mmio", When: "mmio"},
	{Name: "virtio_net"},
	{Name: "virtio_blk"}, // the disk with the user data
	// The guest end of the tunnel.
	{Name: "vxlan"},
	// Its source filter (netns/vxlan) is IPsec policies, and this is how to set them.
	{Name: "xfrm_user"},
	// libcontainer shows a container podvmd's file through a read-only overlay; without
	// it makes a copy for each process.
	{Name: "overlay", When: kmod.Late},
	// What a privileged container, or one with NET_ADMIN, may ask the kernel for.
	{Name: "bridge", When: kmod.Demand},
	{Name: "veth", When: kmod.Demand},
	{Name: "tun", When: kmod.Demand},
	{Name: "fuse", When: kmod.Demand},
}
