// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"encoding/base64"
	"fmt"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v8"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// maxUserData is what Azure takes before base64 (OSProfile.customData).
const maxUserData = 65535

// body is the VM of a request at one candidate, with all that belongs to it, so that
// one PUT makes it and one DELETE removes it.
func (p *Provider) body(req cloud.CreateRequest, t things, c candidate, z size, key string) armcompute.VirtualMachine {
	tags := tagsOf(req)
	vm := armcompute.VirtualMachine{
		Location: to.Ptr(p.cfg.Region), Tags: tags,
		Properties: &armcompute.VirtualMachineProperties{
			HardwareProfile: &armcompute.HardwareProfile{VMSize: to.Ptr(armcompute.VirtualMachineSizeTypes(c.Size))},
			StorageProfile: &armcompute.StorageProfile{
				ImageReference: imageReference(req.Plan.Image),
				OSDisk:         p.osDisk(t, z),
			},
			NetworkProfile: p.network(t, tags),
			OSProfile:      p.osProfile(req, key),
			// On storage of Azure's own: the console of a VM that does not answer.
			DiagnosticsProfile: &armcompute.DiagnosticsProfile{BootDiagnostics: &armcompute.BootDiagnostics{Enabled: to.Ptr(true)}},
			SecurityProfile:    p.security(),
		},
	}
	if c.Zone != "" {
		vm.Zones = []*string{to.Ptr(c.Zone)}
	}
	if c.Spot {
		vm.Properties.Priority = to.Ptr(armcompute.VirtualMachinePriorityTypesSpot)
		// Deallocated it would cost its disk and never run again.
		vm.Properties.EvictionPolicy = to.Ptr(armcompute.VirtualMachineEvictionPolicyTypesDelete)
		vm.Properties.BillingProfile = &armcompute.BillingProfile{MaxPrice: to.Ptr(-1.0)} // up to the regular price
	}
	return vm
}

func imageReference(id string) *armcompute.ImageReference {
	switch kindOfImage(id) {
	case imageShared:
		return &armcompute.ImageReference{SharedGalleryImageID: to.Ptr(id)}
	case imageCommunity:
		return &armcompute.ImageReference{CommunityGalleryImageID: to.Ptr(id)}
	}
	return &armcompute.ImageReference{ID: to.Ptr(id)}
}

func (p *Provider) osDisk(t things, z size) *armcompute.OSDisk {
	d := &armcompute.OSDisk{
		Name:         to.Ptr(t.name + diskSuffix),
		CreateOption: to.Ptr(armcompute.DiskCreateOptionTypesFromImage),
		DeleteOption: to.Ptr(armcompute.DiskDeleteOptionTypesDelete),
		Caching:      to.Ptr(armcompute.CachingTypesReadWrite),
		ManagedDisk:  &armcompute.ManagedDiskParameters{StorageAccountType: to.Ptr(armcompute.StorageAccountTypesPremiumLRS)},
	}
	if z.noPremium {
		d.ManagedDisk.StorageAccountType = to.Ptr(armcompute.StorageAccountTypesStandardSSDLRS)
	}
	encryption := armcompute.SecurityEncryptionTypesVMGuestStateOnly
	if place := z.placement(p.cfg.RootVolumeGiB); p.cfg.EphemeralOSDisk && place != "" {
		d.DiffDiskSettings = &armcompute.DiffDiskSettings{Option: to.Ptr(armcompute.DiffDiskOptionsLocal), Placement: to.Ptr(place)}
		d.Caching = to.Ptr(armcompute.CachingTypesReadOnly) // the only one an ephemeral disk has
		d.ManagedDisk.StorageAccountType = to.Ptr(armcompute.StorageAccountTypesStandardLRS)
		if z.tech == "TDX" {
			encryption = armcompute.SecurityEncryptionTypesNonPersistedTPM // SNP has no such vTPM
		}
	}
	if p.cfg.SecurityType == SecurityConfidential {
		d.ManagedDisk.SecurityProfile = &armcompute.VMDiskSecurityProfile{SecurityEncryptionType: to.Ptr(encryption)}
	}
	if p.cfg.RootVolumeGiB > 0 {
		d.DiskSizeGB = to.Ptr(int32(p.cfg.RootVolumeGiB))
	}
	return d
}

func (p *Provider) network(t things, tags map[string]*string) *armcompute.NetworkProfile {
	ip := &armcompute.VirtualMachineNetworkInterfaceIPConfigurationProperties{
		Primary:                 to.Ptr(true),
		Subnet:                  &armcompute.SubResource{ID: to.Ptr(p.cfg.SubnetID)},
		PrivateIPAddressVersion: to.Ptr(armcompute.IPVersionsIPv4),
	}
	if p.cfg.PublicIP {
		ip.PublicIPAddressConfiguration = &armcompute.VirtualMachinePublicIPAddressConfiguration{
			Name: to.Ptr(t.name + ipSuffix), Tags: tags,
			SKU: &armcompute.PublicIPAddressSKU{
				Name: to.Ptr(armcompute.PublicIPAddressSKUNameStandard), Tier: to.Ptr(armcompute.PublicIPAddressSKUTierRegional),
			},
			Properties: &armcompute.VirtualMachinePublicIPAddressConfigurationProperties{
				DeleteOption:             to.Ptr(armcompute.DeleteOptionsDelete),
				PublicIPAllocationMethod: to.Ptr(armcompute.PublicIPAllocationMethodStatic), // the only one Standard has
			},
		}
	}
	nic := &armcompute.VirtualMachineNetworkInterfaceConfigurationProperties{
		Primary:      to.Ptr(true),
		DeleteOption: to.Ptr(armcompute.DeleteOptionsDelete),
		IPConfigurations: []*armcompute.VirtualMachineNetworkInterfaceIPConfiguration{
			{Name: to.Ptr("pod"), Properties: ip},
		},
	}
	if p.cfg.NSGID != "" {
		nic.NetworkSecurityGroup = &armcompute.SubResource{ID: to.Ptr(p.cfg.NSGID)}
	}
	return &armcompute.NetworkProfile{
		NetworkAPIVersion: to.Ptr(armcompute.NetworkAPIVersionTwoThousandTwentyTwo1101),
		NetworkInterfaceConfigurations: []*armcompute.VirtualMachineNetworkInterfaceConfiguration{
			{Name: to.Ptr(t.name + nicSuffix), Properties: nic, Tags: tags},
		},
	}
}

// osProfile holds the user data, as customData: see the package comment.
func (p *Provider) osProfile(req cloud.CreateRequest, key string) *armcompute.OSProfile {
	return &armcompute.OSProfile{
		CustomData:   to.Ptr(base64.StdEncoding.EncodeToString(req.UserData)),
		ComputerName: to.Ptr(req.Name), AdminUsername: to.Ptr(p.cfg.SSHUser),
		AllowExtensionOperations: to.Ptr(false), // there is no agent for them
		LinuxConfiguration: &armcompute.LinuxConfiguration{
			DisablePasswordAuthentication: to.Ptr(true), ProvisionVMAgent: to.Ptr(false),
			SSH: &armcompute.SSHConfiguration{PublicKeys: []*armcompute.SSHPublicKey{
				{Path: to.Ptr("/home/" + p.cfg.SSHUser + "/.ssh/authorized_keys"), KeyData: to.Ptr(key)},
			}},
		},
	}
}

// security is nil for standard VMs: to name that type a subscription must have a
// feature registered, and it is what no type means.
func (p *Provider) security() *armcompute.SecurityProfile {
	if p.cfg.SecurityType == SecurityStandard {
		return nil
	}
	return &armcompute.SecurityProfile{
		SecurityType: to.Ptr(armcompute.SecurityTypes(p.cfg.SecurityType)),
		UefiSettings: &armcompute.UefiSettings{VTpmEnabled: to.Ptr(true), SecureBootEnabled: to.Ptr(p.cfg.SecureBoot)},
	}
}

// checkRequest finds what no attempt could succeed with.
func checkRequest(req cloud.CreateRequest) error {
	if err := req.Validate(); err != nil {
		return err
	}
	if req.Plan.Type == "" || kindOfImage(req.Plan.Image) == imageUnknown {
		return fmt.Errorf("plan %+v was not made by Plan: %w", req.Plan, errdefs.ErrInvalidArgument)
	}
	if n := len(req.UserData); n > maxUserData {
		return fmt.Errorf("the user data is %d bytes, Azure takes %d; is a file of it too large: AUTHFILE, INITDATA? %w", n, maxUserData, errdefs.ErrInvalidArgument)
	}
	return checkTags(tagsOf(req))
}
