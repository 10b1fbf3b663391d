// SPDX-License-Identifier: Apache-2.0

package azure

// Actions are what a role must allow for the provider to work, and no more: the first
// three at the subscription, the others where they name something (resource group,
// network, image). A test holds the provider to it.
var Actions = []string{
	"Microsoft.Resources/subscriptions/read",
	"Microsoft.Compute/skus/read",
	"Microsoft.Compute/locations/*/read", // operations, shared and community images
	"Microsoft.Resources/subscriptions/resourceGroups/read",
	"Microsoft.Compute/virtualMachines/read",
	"Microsoft.Compute/virtualMachines/write",
	"Microsoft.Compute/virtualMachines/delete",
	"Microsoft.Compute/disks/read",
	"Microsoft.Compute/disks/write",
	"Microsoft.Compute/disks/delete",
	"Microsoft.Compute/images/read",
	"Microsoft.Compute/galleries/images/read",
	"Microsoft.Compute/galleries/images/versions/read",
	"Microsoft.Network/networkInterfaces/read",
	"Microsoft.Network/networkInterfaces/write",
	"Microsoft.Network/networkInterfaces/delete",
	"Microsoft.Network/networkInterfaces/join/action",
	"Microsoft.Network/publicIPAddresses/read",
	"Microsoft.Network/publicIPAddresses/write",
	"Microsoft.Network/publicIPAddresses/delete",
	"Microsoft.Network/publicIPAddresses/join/action",
	"Microsoft.Network/virtualNetworks/read",
	"Microsoft.Network/virtualNetworks/subnets/read",
	"Microsoft.Network/virtualNetworks/subnets/join/action",
	"Microsoft.Network/networkSecurityGroups/read",
	"Microsoft.Network/networkSecurityGroups/join/action",
}
