// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
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
	log atomic.Pointer[slog.Logger] // nil until Announce
}

// prepareTimeout bounds what is asked before the first pod comes; a service that is
// down holds up the start of the adaptor no longer.
const prepareTimeout = 20 * time.Second

// Announce asks EC2 for what all pods need to know, so that the first one does not
// wait for it, and logs API calls from then on.
func (p *awsProvider) Announce(ctx context.Context, log *slog.Logger) {
	p.log.Store(log)
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	begin := time.Now()
	if err := p.Prepare(ctx); err != nil {
		log.Error("EC2 cannot be asked; pods cannot be started until it can", logkey.Provider, config.ProviderAWS, logkey.Error, err)
		return
	}
	choice, err := p.Explain(ctx, cloud.Size{})
	if err != nil {
		log.Error("pods that ask for nothing cannot be started", logkey.Provider, config.ProviderAWS, logkey.Error, err)
		return
	}
	log.Info("pod VMs are EC2 instances", logkey.Provider, config.ProviderAWS, "choice", choice,
		logkey.Duration, float64(time.Since(begin).Microseconds())/1000)
}

// observe logs an API call.
func (p *awsProvider) observe(c aws.Call) {
	log := p.log.Load()
	if log == nil {
		return
	}
	attrs := []any{"action", c.Action, logkey.Duration, float64(c.Took.Microseconds()) / 1000}
	if c.Err != nil {
		attrs = append(attrs, "code", c.Code, logkey.Error, c.Err)
	}
	log.Debug("cloud call", attrs...)
}

// ListSettle is above the lags of EC2's lists that users have seen, which are some
// seconds. EC2 itself gives no bound.
func (*awsProvider) ListSettle() time.Duration { return 20 * time.Second }
