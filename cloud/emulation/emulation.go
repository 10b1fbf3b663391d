// SPDX-License-Identifier: Apache-2.0

// Package emulation is what the emulations of clouds have in common: the machines
// behind their instances, and the buckets of their throttles. The emulations
// themselves (cloud/aws/fakeec2, cloud/azure/fakearm) speak their cloud's protocol
// and keep its state; whoever starts one gives it a Host if its instances are to be
// real machines.
package emulation

import (
	"context"
	"net/http"
	"net/netip"
)

// MetadataAddr is where both clouds serve metadata to an instance.
var MetadataAddr = netip.MustParseAddr("169.254.169.254")

// Host makes real machines for an emulation's instances. It is safe for concurrent
// use.
type Host interface {
	// Start starts a machine and returns when it runs, which is before anything in
	// it does. The machine outlives ctx.
	Start(ctx context.Context, m Machine) error
	// Stop ends a machine and removes all there is of it, and returns when that is
	// done. Stopping a machine that is not there is no error.
	Stop(ctx context.Context, id string) error
	// Console returns what the machine has printed on its serial port so far, the
	// last 64 KiB of it.
	Console(id string) ([]byte, error)
}

// Machine is one to be started.
type Machine struct {
	ID        string // the instance's; unique on the Host, of [A-Za-z0-9-]
	VCPUs     int
	MemoryMiB int
	// Image is a disk (a raw file, started by UEFI firmware), or a folder with the
	// kernel and initramfs that podvm/image makes (started directly). It is not
	// written to.
	Image string
	// MAC is the address of its one interface, "02:...": the DHCP server of the
	// machine's network leases Addr to it.
	MAC  string
	Addr netip.Prefix
	// Gateway is the network's router, which is the node.
	Gateway netip.Addr
	// Vendor and Product are what the firmware says of the machine (SMBIOS type 1),
	// AssetTag what it says of the chassis (type 3). Guests tell clouds apart by them.
	Vendor, Product, AssetTag string
	// Metadata answers the machine's requests to port 80 of MetadataAddr. nil: there
	// is no metadata service.
	Metadata http.Handler
	// CDROM is an ISO 9660 image on the machine's CD-ROM drive. nil: no drive.
	CDROM []byte
	// Exited is called once when the machine has ended without Stop. May be nil.
	Exited func()
}
