// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
)

// newAWS makes the provider of Amazon EC2.
func newAWS(cfg *config.Config) (cloud.Provider, error) {
	a := cfg.AWS
	out := &awsProvider{}
	c := aws.Config{
		Region: a.Region, Endpoint: a.Endpoint,
		Keys: awsKeys(cfg), Profile: a.Profile, RoleARN: a.RoleARN, WebIdentityTokenFile: a.WebIdentityTokenFile,
		ImageID: a.ImageID, InstanceType: a.InstanceType, InstanceTypes: a.InstanceTypes,
		SubnetIDs: a.SubnetIDs, SecurityGroupIDs: a.SecurityGroupIDs, VPCID: a.VPCID,
		KeyName: a.KeyName, LaunchTemplate: a.LaunchTemplate,
		RootVolumeGiB: cfg.Cloud.RootVolumeGiB, RootVolumeKMSKey: a.RootVolumeKMSKey,
		PublicIP: cfg.Cloud.PublicIP, DisableCVM: cfg.Cloud.DisableCVM,
		Spot: aws.Spot(a.Spot), PlacementGroup: a.PlacementGroup, Tenancy: a.Tenancy,
		Tags: cfg.Tags, OverheadMiB: cfg.Cloud.OverheadMiB, Prices: cfg.Cloud.Prices,
		Observe: out.observe,
	}
	if a.AccessKeyID != "" {
		c.LookUpKeys = reloadedKeys(cfg)
	}
	p, err := aws.New(c)
	if err != nil {
		return nil, err
	}
	out.Provider = p
	return out, nil
}

func awsKeys(cfg *config.Config) aws.Keys {
	a := cfg.AWS
	return aws.Keys{AccessKeyID: a.AccessKeyID, SecretAccessKey: aws.Secret(a.SecretAccessKey), SessionToken: aws.Secret(a.SessionToken)}
}

// reloadedKeys reads the keys from where the configuration came from, again each
// time. While the configuration is wrong, or has no keys, the last ones stand: what
// else is wrong with it is the matter of the next start.
func reloadedKeys(cfg *config.Config) func() (aws.Keys, error) {
	var mu sync.Mutex
	last := awsKeys(cfg)
	return func() (aws.Keys, error) {
		now, err := cfg.Reload()
		mu.Lock()
		defer mu.Unlock()
		if err == nil && now.AWS.AccessKeyID != "" {
			last = awsKeys(now)
		}
		return last, nil
	}
}

// awsProvider tells the log of what it does.
type awsProvider struct {
	*aws.Provider
	calls cloudLog
}

// Announce implements announcer.
func (p *awsProvider) Announce(ctx context.Context, log *slog.Logger) {
	p.calls.announce(ctx, log, p, config.ProviderAWS, "EC2", "EC2 instances")
}

func (p *awsProvider) observe(c aws.Call) {
	p.calls.call(c.Took, c.Err, c.Code, "action", c.Action)
}

// ListSettle is above the lags of EC2's lists that users have seen, which are some
// seconds. EC2 itself gives no bound.
func (*awsProvider) ListSettle() time.Duration { return 20 * time.Second }
