// SPDX-License-Identifier: Apache-2.0

// Package ports opens the ports between worker nodes and pod VMs in security groups.
//
// Which groups, with N those of the node and P those that pod VMs get (AWS_SG_IDS;
// by default the node's own):
//
//	in both N and P   the group lets itself in        15150/tcp, 9000/udp, 9000/tcp
//	none is in both   each of P lets each of N in     15150/tcp, 9000/udp, 9000/tcp
//	                  each of N lets each of P in     9000/udp, 9000/tcp
//
// A rule of a group that lets in more than needed counts. Security groups are
// stateful: answers need no rule.
package ports

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
)

// Actions are what a policy must allow for Open.
var Actions = []string{
	"ec2:DescribeInstances",
	"ec2:DescribeSecurityGroups",
	"ec2:AuthorizeSecurityGroupIngress",
}

// Request says what to open.
type Request struct {
	Instance string // id of the node's instance; "": Groups stand for the node's
	// Groups are those that pod VMs get. None: the node's.
	Groups []string
	Ports  []cloud.Port
	DryRun bool // look only
}

// Open lets nodes and pod VMs reach each other, and returns the rules that this takes,
// each with whether it was there or was made (DryRun: would be). InvalidArgument: there
// is no such instance, or group.
func Open(ctx context.Context, a *aws.Account, r Request) ([]cloud.PortRule, error) {
	node := r.Groups
	if r.Instance != "" {
		var err error
		if node, err = groupsOf(ctx, a, r.Instance); err != nil {
			return nil, err
		}
	}
	pods := r.Groups
	if len(pods) == 0 {
		pods = node
	}
	if len(node) == 0 {
		return nil, fmt.Errorf("no security group is known: give the node's --provider-id, or set AWS_SG_IDS: %w", errdefs.ErrInvalidArgument)
	}
	out, err := aws.CallEC2(ctx, a, "DescribeSecurityGroups", (*ec2.Client).DescribeSecurityGroups,
		&ec2.DescribeSecurityGroupsInput{GroupIds: union(node, pods)})
	if err != nil {
		return nil, err
	}
	groups := map[string]types.SecurityGroup{}
	for _, g := range out.SecurityGroups {
		groups[awssdk.ToString(g.GroupId)] = g
	}
	rules := want(node, pods, r.Ports)
	for i := range rules {
		rules[i].State = cloud.RuleWanted
		if covered(groups[rules[i].Where], rules[i]) {
			rules[i].State = cloud.RuleThere
		}
		rules[i].Name = awssdk.ToString(groups[rules[i].Where].GroupName)
	}
	if r.DryRun {
		return rules, nil
	}
	for i := range rules {
		if rules[i].State == cloud.RuleThere {
			continue
		}
		if err := authorize(ctx, a, &rules[i]); err != nil {
			return rules, fmt.Errorf("security group %s: %w", rules[i].Where, err)
		}
	}
	return rules, nil
}

// groupsOf are the security groups of an instance's interfaces.
func groupsOf(ctx context.Context, a *aws.Account, instance string) ([]string, error) {
	out, err := aws.CallEC2(ctx, a, "DescribeInstances", (*ec2.Client).DescribeInstances, &ec2.DescribeInstancesInput{InstanceIds: []string{instance}})
	if errdefs.IsNotFound(err) || err == nil && len(out.Reservations) == 0 {
		return nil, fmt.Errorf("there is no instance %s in this account and region; correct --provider-id, or AWS_REGION and the credentials: %w", instance, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, res := range out.Reservations {
		for _, i := range res.Instances {
			for _, g := range i.SecurityGroups {
				ids = union(ids, []string{awssdk.ToString(g.GroupId)})
			}
		}
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("instance %s has no security group; is it terminated?: %w", instance, errdefs.ErrInvalidArgument)
	}
	return ids, nil
}

// want is the table of the package comment.
func want(node, pods []string, ports []cloud.Port) []cloud.PortRule {
	var out []cloud.PortRule
	add := func(where, from string, p cloud.Port) {
		out = append(out, cloud.PortRule{Port: p, Where: where, From: from})
	}
	for _, g := range node {
		for _, p := range ports {
			if slices.Contains(pods, g) {
				add(g, g, p)
			}
		}
	}
	if len(out) > 0 {
		return out
	}
	for _, n := range node {
		for _, g := range pods {
			for _, p := range ports {
				add(g, n, p)
				if p.BothWays {
					add(n, g, p)
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b cloud.PortRule) int {
		return cmp.Compare(slices.Index(pods, b.Where), slices.Index(pods, a.Where))
	})
	return out
}

func union(a, b []string) []string {
	out := slices.Clone(a)
	for _, s := range b {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// covered tells whether a group lets the rule's traffic in already.
func covered(g types.SecurityGroup, r cloud.PortRule) bool {
	return slices.ContainsFunc(g.IpPermissions, func(p types.IpPermission) bool {
		switch awssdk.ToString(p.IpProtocol) {
		case "-1":
		case r.Protocol:
			if int(awssdk.ToInt32(p.FromPort)) > r.Number || int(awssdk.ToInt32(p.ToPort)) < r.Number {
				return false
			}
		default:
			return false
		}
		return slices.ContainsFunc(p.UserIdGroupPairs, func(u types.UserIdGroupPair) bool { return awssdk.ToString(u.GroupId) == r.From }) ||
			slices.ContainsFunc(p.IpRanges, func(i types.IpRange) bool { return awssdk.ToString(i.CidrIp) == "0.0.0.0/0" })
	})
}

func authorize(ctx context.Context, a *aws.Account, r *cloud.PortRule) error {
	port := awssdk.Int32(int32(r.Number))
	_, err := aws.CallEC2(ctx, a, "AuthorizeSecurityGroupIngress", (*ec2.Client).AuthorizeSecurityGroupIngress, &ec2.AuthorizeSecurityGroupIngressInput{
		GroupId: &r.Where,
		IpPermissions: []types.IpPermission{{IpProtocol: &r.Protocol, FromPort: port, ToPort: port, UserIdGroupPairs: []types.UserIdGroupPair{
			{GroupId: &r.From, Description: awssdk.String("peer pods: " + r.For)}}}},
	})
	switch {
	case aws.ErrorCode(err) == "InvalidPermission.Duplicate": // of a lost reply, or somebody else's
		r.State = cloud.RuleThere
	case err != nil:
		return err
	default:
		r.State = cloud.RuleMade
	}
	return nil
}
