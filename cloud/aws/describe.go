// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/kata-remote/kata-remote/cloud"
)

// TagRequest carries the request's fingerprint, by which a used token is told from
// another request's.
const TagRequest = cloud.TagPrefix + "request"

// pageSize is the most that one DescribeInstances, DescribeVolumes or
// DescribeNetworkInterfaces gives (EC2 API Reference, MaxResults).
const pageSize = 1000

// machine is an instance as the cloud last told of it.
type machine struct {
	cloud.Instance
	request string // its fingerprint
	typ     string
	zone    string
	spot    bool
	spotID  string // of its spot request
	ended   bool   // terminated; it bills nothing
	byUser  bool   // it ended because somebody asked for that
	reason  string // code of its state's reason
}

// filter makes a filter. Values are taken literally: * and ? would match anything.
func filter(name string, values ...string) types.Filter {
	literal := make([]string, len(values))
	for i, v := range values {
		literal[i] = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`).Replace(v)
	}
	return types.Filter{Name: awssdk.String(name), Values: literal}
}

// describe returns the instances that pass all filters.
func (p *Provider) describe(ctx context.Context, urgent bool, filters ...types.Filter) ([]machine, error) {
	in := &ec2.DescribeInstancesInput{Filters: filters, MaxResults: awssdk.Int32(pageSize)}
	var list []machine
	for {
		out, err := call(ctx, p, p.limits.describe, urgent, "DescribeInstances", (*ec2.Client).DescribeInstances, in)
		if err != nil {
			return nil, err
		}
		for _, r := range out.Reservations {
			for _, i := range r.Instances {
				list = append(list, p.machine(i))
			}
		}
		if awssdk.ToString(out.NextToken) == "" {
			return list, nil
		}
		in.NextToken = out.NextToken
	}
}

// describeIDs answers Gets and Deletes.
func (p *Provider) describeIDs(ctx context.Context, ids []cloud.InstanceID) (map[cloud.InstanceID]*machine, error) {
	values := make([]string, len(ids))
	for i, id := range ids {
		values[i] = string(id)
	}
	list, err := p.describe(ctx, true, filter("instance-id", values...))
	if err != nil {
		return nil, err
	}
	out := map[cloud.InstanceID]*machine{}
	requests := map[string]*machine{}
	for i := range list {
		m := &list[i]
		out[m.ID] = m
		if m.spotID != "" && m.State == cloud.StateRunning {
			requests[m.spotID] = m
		}
	}
	if len(requests) > 0 {
		p.spotNotices(ctx, requests)
	}
	return out, nil
}

// spotNotices adds to running spot instances what is to happen to them. It is extra
// information: without it, for want of a right say, an instance is still running.
func (p *Provider) spotNotices(ctx context.Context, requests map[string]*machine) {
	var ids []string
	for id := range requests {
		ids = append(ids, id)
	}
	out, err := call(ctx, p, p.limits.describe, false, "DescribeSpotInstanceRequests", (*ec2.Client).DescribeSpotInstanceRequests,
		&ec2.DescribeSpotInstanceRequestsInput{Filters: []types.Filter{filter("spot-instance-request-id", ids...)}})
	if err != nil {
		return
	}
	for _, r := range out.SpotInstanceRequests {
		m := requests[awssdk.ToString(r.SpotInstanceRequestId)]
		if m == nil || r.Status == nil {
			continue
		}
		// EC2 User Guide, "Spot request status": marked-for-termination is the
		// two-minute notice; the others mean that it is over.
		switch c := awssdk.ToString(r.Status.Code); {
		case strings.HasPrefix(c, "marked-for-"):
			m.Detail = fmt.Sprintf("spot interruption: EC2 takes the instance back within two minutes (%s)", c)
		case strings.HasPrefix(c, "instance-terminated-") || strings.HasPrefix(c, "instance-stopped-"):
			m.Detail = fmt.Sprintf("spot interruption: EC2 is taking the instance back (%s)", c)
		}
	}
}

// describeTokens answers Creates that want to know what their token has made.
func (p *Provider) describeTokens(ctx context.Context, tokens []string) (map[string][]machine, error) {
	list, err := p.describe(ctx, false, filter("tag:"+cloud.TagToken, tokens...))
	if err != nil {
		return nil, err
	}
	out := map[string][]machine{}
	for _, m := range list {
		out[m.Token] = append(out[m.Token], m)
	}
	return out, nil
}

// machine is an instance in the common terms.
func (p *Provider) machine(i types.Instance) machine {
	tags := tagMap(i.Tags)
	m := machine{
		Instance: cloud.Instance{
			ID: cloud.InstanceID(awssdk.ToString(i.InstanceId)), Name: tags[cloud.TagName], Token: tags[cloud.TagToken], SandboxID: tags[cloud.TagSandbox],
			Owner: cloud.Owner{Cluster: tags[cloud.TagCluster], Node: tags[cloud.TagNode]},
		},
		request: tags[TagRequest], typ: string(i.InstanceType),
		spot: i.InstanceLifecycle == types.InstanceLifecycleTypeSpot, spotID: awssdk.ToString(i.SpotInstanceRequestId),
	}
	if i.LaunchTime != nil {
		m.CreatedAt = *i.LaunchTime
	}
	if i.Placement != nil {
		m.zone = awssdk.ToString(i.Placement.AvailabilityZone)
	}
	if r := i.StateReason; r != nil {
		m.reason = awssdk.ToString(r.Code)
	}
	var state types.InstanceStateName
	if i.State != nil {
		state = i.State.Name
	}
	switch state {
	case types.InstanceStateNamePending:
		m.State = cloud.StatePending
	case types.InstanceStateNameRunning:
		m.State = cloud.StateRunning
	case types.InstanceStateNameShuttingDown:
		m.State, m.Detail = cloud.StateDeleting, endDetail(i)
	case types.InstanceStateNameStopping, types.InstanceStateNameStopped:
		m.State, m.Detail = cloud.StateFailed, "it is stopped: "+endDetail(i)
	case types.InstanceStateNameTerminated:
		m.State, m.Detail, m.ended = cloud.StateFailed, endDetail(i), true
		m.byUser = m.reason == "" || m.reason == "Client.UserInitiatedShutdown"
	}
	if m.State == cloud.StatePending || m.State == cloud.StateRunning {
		m.Addrs = p.addrs(i)
	}
	return m
}

// addrs are the addresses at which the node reaches an instance. None while the
// first, which carries the traffic, is missing.
func (p *Provider) addrs(i types.Instance) []netip.Addr {
	var out []netip.Addr
	for _, s := range []*string{i.PublicIpAddress, i.PrivateIpAddress} {
		if s == i.PublicIpAddress && !p.cfg.PublicIP {
			continue
		}
		a, err := netip.ParseAddr(awssdk.ToString(s))
		if err != nil {
			return nil
		}
		out = append(out, a)
	}
	return out
}

// endings are reasons of an instance's end, as EC2 codes them (EC2 User Guide,
// "Troubleshoot instance launch issues"), in words. The code is added.
var endings = map[string]string{
	"Server.SpotInstanceTermination":      "spot interruption: EC2 has taken the instance back",
	"Server.SpotInstanceShutdown":         "spot interruption: EC2 has taken the instance back",
	"Server.InsufficientInstanceCapacity": "EC2 had no capacity for it after all",
	"Server.InternalError":                "EC2 failed to run it",
	"Server.ScheduledStop":                "EC2 has stopped it for maintenance of its host",
	"Client.InstanceInitiatedShutdown":    "the pod VM has shut itself down",
	"Client.UserInitiatedShutdown":        "somebody has terminated it",
	"Client.InternalError":                "its volume cannot be used: where AWS_ROOT_VOLUME_KMS_KEY is set, see whether that key's policy allows the adaptor's role kms:CreateGrant, kms:Decrypt and kms:GenerateDataKeyWithoutPlaintext",
	"Client.InvalidSnapshot.NotFound":     "the image's snapshot is gone; publish it anew and set PODVM_AMI_ID",
	"Client.VolumeLimitExceeded":          "the account's quota of EBS volumes is used up",
}

// endDetail says why an instance ends.
func endDetail(i types.Instance) string {
	if i.StateReason == nil {
		return awssdk.ToString(i.StateTransitionReason)
	}
	code, text := awssdk.ToString(i.StateReason.Code), awssdk.ToString(i.StateReason.Message)
	if known := endings[code]; known != "" {
		return fmt.Sprintf("%s (%s)", known, code)
	}
	return text
}

func tagMap(tags []types.Tag) map[string]string {
	m := make(map[string]string, len(tags))
	for _, t := range tags {
		m[awssdk.ToString(t.Key)] = awssdk.ToString(t.Value)
	}
	return m
}

// remembered is an instance of which this process knows that it was made, while the
// cloud may not show it yet.
type remembered struct {
	machine
	until time.Time
}

// settle is how long after its creation an instance may be missing from answers.
// EC2 gives no bound ("Ensuring idempotency and eventual consistency", EC2 Developer
// Guide, advises to ask for up to some minutes with growing pauses); lags seen by
// users are a few seconds.
const settle = 30 * time.Second

// remember keeps an instance that was just made.
func (p *Provider) remember(m machine) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for id, r := range p.recent {
		if now.After(r.until) {
			delete(p.recent, id)
		}
	}
	if _, known := p.recent[m.ID]; !known {
		p.recent[m.ID] = remembered{m, now.Add(settle)}
	}
}

// recall gives an instance made so lately that it may be missing from answers.
func (p *Provider) recall(id cloud.InstanceID) (machine, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok := p.recent[id]
	return r.machine, ok && time.Now().Before(r.until)
}

// ownerFilters are the tags of an owner's things.
func ownerFilters(o cloud.Owner) []types.Filter {
	f := []types.Filter{filter("tag:"+cloud.TagCluster, o.Cluster)}
	if o.Node != "" {
		f = append(f, filter("tag:"+cloud.TagNode, o.Node))
	}
	return f
}

// owns tells whether o is the whole owner, or his cluster.
func owns(o, of cloud.Owner) bool {
	return of.Cluster == o.Cluster && (o.Node == "" || of.Node == o.Node)
}
