// SPDX-License-Identifier: Apache-2.0

package image

import "github.com/kata-remote/kata-remote/podvm/kmod"

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
