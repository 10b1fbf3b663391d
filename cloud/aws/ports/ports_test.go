// SPDX-License-Identifier: Apache-2.0

package ports_test

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/aws/ports"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	nodeGroup  = fakeec2.DefaultSecurityGroup
	otherGroup = "sg-0aaaaaaaaaaaaaaa1"
)

// region is an emulation with a node in it.
type region struct {
	*fakeec2.Server
	api  *ec2.Client
	acct *aws.Account
	node string
}

func inRegion(t *testing.T, f func(t *testing.T, r *region)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := fakeec2.New(fakeec2.Config{SecurityGroups: []fakeec2.SecurityGroup{{ID: nodeGroup, Name: "nodes"}, {ID: otherGroup, Name: "pods"}}})
		hc := &http.Client{Transport: s.Transport()}
		acct, err := aws.NewAccount(aws.Config{Region: fakeec2.DefaultRegion, HTTPClient: hc,
			Keys: aws.Keys{AccessKeyID: fakeec2.DefaultKey.ID, SecretAccessKey: aws.Secret(fakeec2.DefaultKey.Secret)}})
		if err != nil {
			t.Fatal(err)
		}
		r := &region{Server: s, acct: acct, api: ec2.New(ec2.Options{Region: fakeec2.DefaultRegion, HTTPClient: hc,
			Credentials: credentials.NewStaticCredentialsProvider(fakeec2.DefaultKey.ID, fakeec2.DefaultKey.Secret, "")})}
		out, err := r.api.RunInstances(t.Context(), &ec2.RunInstancesInput{ImageId: awssdk.String(fakeec2.DefaultImage), InstanceType: "m6a.large",
			MinCount: awssdk.Int32(1), MaxCount: awssdk.Int32(1), SubnetId: awssdk.String(fakeec2.DefaultSubnet), SecurityGroupIds: []string{nodeGroup}})
		if err != nil {
			t.Fatal(err)
		}
		r.node = *out.Instances[0].InstanceId
		f(t, r)
	})
}

// open returns what was done as "where<-from proto/port state".
func (r *region) open(t *testing.T, req ports.Request) []string {
	t.Helper()
	req.Ports = cloud.Ports(15150, 9000)
	rules, err := ports.Open(t.Context(), r.acct, req)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range rules {
		out = append(out, strings.Join([]string{p.Where[3:6], "<-", p.From[3:6], " ", p.Protocol, " ", map[int]string{9000: "9000", 15150: "15150"}[p.Number], " ", string(p.State)}, ""))
	}
	return out
}

func (r *region) permissions(t *testing.T, group string) int {
	t.Helper()
	out, err := r.api.DescribeSecurityGroups(t.Context(), &ec2.DescribeSecurityGroupsInput{GroupIds: []string{group}})
	if err != nil {
		t.Fatal(err)
	}
	return len(out.SecurityGroups[0].IpPermissions)
}

// TestNodesGroup: rules in the node's own group, once, and not in a dry run.
func TestNodesGroup(t *testing.T) {
	inRegion(t, func(t *testing.T, r *region) {
		want := []string{"012<-012 tcp 15150 ", "012<-012 udp 9000 ", "012<-012 tcp 9000 "}
		for _, step := range []struct {
			dry   bool
			state cloud.RuleState
			count int
		}{{true, cloud.RuleWanted, 0}, {false, cloud.RuleMade, 3}, {false, cloud.RuleThere, 3}, {true, cloud.RuleThere, 3}} {
			got := r.open(t, ports.Request{Instance: r.node, DryRun: step.dry})
			for i, w := range want {
				if len(got) != len(want) || got[i] != w+string(step.state) {
					t.Fatalf("%+v: %q", step, got)
				}
			}
			if n := r.permissions(t, nodeGroup); n != step.count {
				t.Errorf("%+v: the group has %d permissions", step, n)
			}
		}
	})
}

// TestPodsGroup: pod VMs have a group that the node has not.
func TestPodsGroup(t *testing.T) {
	inRegion(t, func(t *testing.T, r *region) {
		got := r.open(t, ports.Request{Instance: r.node, Groups: []string{otherGroup}})
		want := []string{"0aa<-012 tcp 15150 made", "0aa<-012 udp 9000 made", "0aa<-012 tcp 9000 made", "012<-0aa udp 9000 made", "012<-0aa tcp 9000 made"}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
		if got := r.open(t, ports.Request{Groups: []string{otherGroup}}); len(got) != 3 || got[0] != "0aa<-0aa tcp 15150 made" {
			t.Errorf("without a node: %q", got)
		}
	})
}

// TestWiderRule: a rule that lets in more is enough; one of another protocol is not.
func TestWiderRule(t *testing.T) {
	inRegion(t, func(t *testing.T, r *region) {
		_, err := r.api.AuthorizeSecurityGroupIngress(t.Context(), &ec2.AuthorizeSecurityGroupIngressInput{GroupId: awssdk.String(nodeGroup),
			IpPermissions: []types.IpPermission{{IpProtocol: awssdk.String("tcp"), FromPort: awssdk.Int32(9000), ToPort: awssdk.Int32(16000),
				UserIdGroupPairs: []types.UserIdGroupPair{{GroupId: awssdk.String(nodeGroup)}}}}})
		if err != nil {
			t.Fatal(err)
		}
		got := r.open(t, ports.Request{Instance: r.node})
		if want := []string{"012<-012 tcp 15150 there", "012<-012 udp 9000 made", "012<-012 tcp 9000 there"}; !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
	})
}

// TestThrottleAndLoss: a throttle is waited out, and a lost reply is no second rule.
func TestThrottleAndLoss(t *testing.T) {
	inRegion(t, func(t *testing.T, r *region) {
		hits := r.Inject(fakeec2.Fault{Action: "DescribeSecurityGroups", Times: 4, Err: &fakeec2.Error{Status: 503, Code: "RequestLimitExceeded", Message: "Request limit exceeded."}})
		r.Inject(fakeec2.Fault{Action: "AuthorizeSecurityGroupIngress", Times: 1, Lost: true})
		got := r.open(t, ports.Request{Instance: r.node})
		if want := []string{"012<-012 tcp 15150 there", "012<-012 udp 9000 made", "012<-012 tcp 9000 made"}; !slices.Equal(got, want) || hits() != 4 {
			t.Errorf("%q after %d throttles", got, hits())
		}
	})
}

// TestActions: the table is enough, and nothing in it is too much.
func TestActions(t *testing.T) {
	inRegion(t, func(t *testing.T, r *region) {
		try := func(allow []string) error {
			k := fakeec2.DefaultKey
			k.Allow = allow
			r.SetKey(k)
			_, err := ports.Open(context.Background(), r.acct, ports.Request{Instance: r.node, Ports: cloud.Ports(15150, 9000)})
			return err
		}
		for i, a := range ports.Actions {
			err := try(slices.Delete(slices.Clone(ports.Actions), i, i+1))
			if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "the action is "+a) {
				t.Errorf("without %s: %v", a, err)
			}
		}
		if err := try(ports.Actions); err != nil {
			t.Error(err)
		}
	})
}

func TestMistakes(t *testing.T) {
	inRegion(t, func(t *testing.T, r *region) {
		for want, req := range map[string]ports.Request{
			"there is no instance i-0123456789abcdef0": {Instance: "i-0123456789abcdef0"},
			"set AWS_SG_IDS":     {},
			"correct AWS_SG_IDS": {Groups: []string{"sg-0123456789abcdeff"}},
		} {
			if _, err := ports.Open(t.Context(), r.acct, req); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
				t.Errorf("%+v: %v", req, err)
			}
		}
	})
	for id, want := range map[string][2]string{
		"aws:///us-east-1a/i-0123456789abcdef0":          {"us-east-1", "i-0123456789abcdef0"},
		"aws:///us-west-2-lax-1a/i-0123456789abcdef0":    {"us-west-2", "i-0123456789abcdef0"},
		"aws:///us-gov-west-1b/i-01234567":               {"us-gov-west-1", "i-01234567"},
		"azure:///subscriptions/x":                       {},
		"i-0123456789abcdef0":                            {},
		"aws:///us-east-1a/i-0123456789abcdef0/and-more": {},
	} {
		region, instance, err := aws.ParseProviderID(id)
		if region != want[0] || instance != want[1] || (err == nil) != (want[0] != "") {
			t.Errorf("%s: %q %q %v", id, region, instance, err)
		}
	}
}
