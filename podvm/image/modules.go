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

// hardware are the modules for the machines of clouds, which are in the disk images only:
// the initramfs is for QEMU, which has virtio. They are loaded where their device is.
// AWS's machines before Nitro, on Xen, are not among them.
var hardware = []Want{
	// AWS Nitro. (nvme is in the kernel.)
	{Name: "nvme", When: kmod.Hardware},
	{Name: "ena", When: kmod.Hardware},
	// Azure: Hyper-V's bus, disks, network and clock, and the network cards that it hands
	// through for accelerated networking.
	{Name: "hv_vmbus", When: kmod.Hardware},
	{Name: "hv_storvsc", When: kmod.Hardware},
	{Name: "hv_netvsc", When: kmod.Hardware},
	{Name: "hv_utils", When: kmod.Hardware},
	{Name: "pci_hyperv", When: kmod.Hardware},
	{Name: "mlx4_core", When: kmod.Hardware},
	{Name: "mlx5_core", When: kmod.Hardware},
	{Name: "mana", When: kmod.Hardware, Optional: true},
	// Disks and CDs on SCSI: Azure's, and virtio's of others. Google's network.
	{Name: "virtio_scsi", When: kmod.Hardware},
	{Name: "sd_mod", When: kmod.Hardware},
	{Name: "sr_mod", When: kmod.Hardware},
	{Name: "gve", When: kmod.Hardware, Optional: true},
	// mlx4_core asks for it when its card is an Ethernet one.
	{Name: "mlx4_en", When: kmod.Demand},
	// The file systems of CDs, and what encrypts the scratch space (podvm/boot).
	{Name: "isofs", When: kmod.Demand},
	{Name: "udf", When: kmod.Demand},
	{Name: "dm_crypt", When: kmod.Demand},
	{Name: "xts", When: kmod.Demand},
	{Name: "aesni_intel", When: kmod.Demand, Optional: true},
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
