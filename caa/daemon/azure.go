// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"path"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure"
)

// newAzure makes the provider of Azure.
func newAzure(cfg *config.Config) (cloud.Provider, error) {
	a := cfg.Azure
	out := &azureProvider{}
	p, err := azure.New(azure.Config{
		SubscriptionID: a.SubscriptionID, Region: a.Region, ResourceGroup: a.ResourceGroup,
		SubnetID: a.SubnetID, NSGID: a.NSGID, ImageID: a.ImageID,
		InstanceSize: a.InstanceSize, InstanceSizes: a.InstanceSizes, Zones: a.Zones,
		SecurityType: a.SecurityType, SecureBoot: a.SecureBoot,
		Spot: azure.Market(a.Spot), EphemeralOSDisk: a.EphemeralOSDisk,
		PublicIP: cfg.Cloud.PublicIP, RootVolumeGiB: cfg.Cloud.RootVolumeGiB,
		OverheadMiB: cfg.Cloud.OverheadMiB, Prices: cfg.Cloud.Prices,
		SSHUser: a.SSHUsername, SSHPublicKeyFile: a.SSHPublicKeyFile,
		Credentials: azureCredentials(cfg), Reload: reloadedCredentials(cfg),
		Endpoint: a.Endpoint, AuthorityHost: a.AuthorityHost,
		Observe: out.observe,
	})
	if err != nil {
		return nil, err
	}
	out.Provider = p
	return out, nil
}

func azureCredentials(cfg *config.Config) azure.Credentials {
	a := cfg.Azure
	return azure.Credentials{
		TenantID: a.TenantID, ClientID: a.ClientID,
		ClientSecret: string(a.ClientSecret), FederatedTokenFile: a.FederatedTokenFile,
	}
}

// reloadedCredentials reads the credentials from where the configuration came from,
// again each time. While the configuration is wrong, the last ones stand, as with
// reloadedKeys.
func reloadedCredentials(cfg *config.Config) func() (azure.Credentials, error) {
	var mu sync.Mutex
	last := azureCredentials(cfg)
	return func() (azure.Credentials, error) {
		now, err := cfg.Reload()
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			last = azureCredentials(now)
		}
		return last, nil
	}
}

// azureProvider tells the log of what it does.
type azureProvider struct {
	*azure.Provider
	calls cloudLog
}

// Announce implements announcer.
func (p *azureProvider) Announce(ctx context.Context, log *slog.Logger) {
	p.calls.announce(ctx, log, p, config.ProviderAzure, "Azure", "Azure VMs")
}

func (p *azureProvider) observe(c azure.Call) {
	p.calls.call(c.Took, c.Err, c.Code,
		"action", c.Method+" "+path.Base(path.Dir(c.Path)), "of", path.Base(c.Path), "status", c.Status)
}

// ListSettle implements settler.
func (*azureProvider) ListSettle() time.Duration { return azure.ListSettle }
