// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"time"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure"
)

// newAzure makes the provider of Azure.
func newAzure(cfg *config.Config) (cloud.Provider, error) {
	a := cfg.Azure
	p, err := azure.New(azure.Config{
		SubscriptionID: a.SubscriptionID, Region: a.Region, ResourceGroup: a.ResourceGroup,
		SubnetID: a.SubnetID, NSGID: a.NSGID, ImageID: a.ImageID,
		InstanceSize: a.InstanceSize, InstanceSizes: a.InstanceSizes, Zones: a.Zones,
		SecurityType: a.SecurityType, SecureBoot: a.SecureBoot,
		Spot: azure.Market(a.Spot), EphemeralOSDisk: a.EphemeralOSDisk,
		PublicIP: cfg.Cloud.PublicIP, RootVolumeGiB: cfg.Cloud.RootVolumeGiB,
		OverheadMiB: cfg.Cloud.OverheadMiB, Prices: cfg.Cloud.Prices,
		SSHUser: a.SSHUsername, SSHPublicKeyFile: a.SSHPublicKeyFile,
		Credentials: azureCredentials(cfg),
		Reload: func() (azure.Credentials, error) {
			now, err := cfg.Reload()
			if err != nil {
				return azure.Credentials{}, err
			}
			return azureCredentials(now), nil
		},
		Endpoint: a.Endpoint, AuthorityHost: a.AuthorityHost,
	})
	if err != nil {
		return nil, err
	}
	return azureProvider{p}, nil
}

func azureCredentials(cfg *config.Config) azure.Credentials {
	a := cfg.Azure
	return azure.Credentials{
		TenantID: a.TenantID, ClientID: a.ClientID,
		ClientSecret: string(a.ClientSecret), FederatedTokenFile: a.FederatedTokenFile,
	}
}

// azureProvider tells how far Azure's lists may be behind.
type azureProvider struct{ *azure.Provider }

// ListSettle implements settler.
func (azureProvider) ListSettle() time.Duration { return azure.ListSettle }
