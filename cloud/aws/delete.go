// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"errors"
	"fmt"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Delete implements cloud.Provider. Many Deletes at once are few calls. EC2 shows an
// instance for an hour after its end: it is gone when it is terminated and no volume
// or network interface with its tags is left.
func (p *Provider) Delete(ctx context.Context, id cloud.InstanceID) error {
	if err := p.delete(ctx, id); err != nil {
		return fmt.Errorf("delete instance %q: %w", id, err)
	}
	return nil
}

func (p *Provider) delete(ctx context.Context, id cloud.InstanceID) error {
	if leftRule.MatchString(string(id)) {
		return p.deleteLeftover(ctx, string(id))
	}
	if !instanceRule.MatchString(string(id)) || p.isDeleted(id) {
		return errdefs.ErrNotFound
	}
	m, err := p.ids.ask(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case m != nil && m.ended:
		return p.finish(ctx, id, m.Token)
	case m != nil && m.State == cloud.StateDeleting:
		return nil
	}
	// Running, or not to be seen: a new instance may be missing from answers.
	refused, err := p.terminates.ask(ctx, id)
	if err == nil {
		err = refused
	}
	switch {
	case err == nil:
		return nil
	case !errdefs.IsNotFound(err):
		return err
	}
	if _, young := p.recall(id); young || m != nil {
		return nil // it exists, and not all of EC2 knows: ask again
	}
	return errdefs.ErrNotFound
}

// terminate answers Deletes: the error of each instance. One unknown id makes EC2
// refuse a whole call, and then the others are asked for one by one.
func (p *Provider) terminate(ctx context.Context, ids []cloud.InstanceID) (map[cloud.InstanceID]error, error) {
	in := &ec2.TerminateInstancesInput{}
	for _, id := range ids {
		in.InstanceIds = append(in.InstanceIds, string(id))
	}
	_, err := call(ctx, p, p.limits.terminate, true, "TerminateInstances", (*ec2.Client).TerminateInstances, in)
	out := map[cloud.InstanceID]error{}
	switch {
	case err == nil:
	case len(ids) == 1:
		out[ids[0]] = err
	case errdefs.IsUnavailable(err):
		return nil, err
	default:
		for _, id := range ids {
			one, err := p.terminate(ctx, []cloud.InstanceID{id})
			if err != nil {
				return nil, err
			}
			out[id] = one[id]
		}
	}
	return out, nil
}

// finish looks for what a terminated instance has left and deletes it. NotFound:
// there is nothing.
func (p *Provider) finish(ctx context.Context, id cloud.InstanceID, token string) error {
	if token != "" {
		left, err := p.leftovers.ask(ctx, token)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return p.removeAll(ctx, left)
		}
	}
	p.setDeleted(id, token)
	return errdefs.ErrNotFound
}

// leftover is a volume or network interface of ours, in an instance's clothes.
type leftover struct {
	cloud.Instance
	free bool // no instance has it
}

// describeLeftovers answers Deletes.
func (p *Provider) describeLeftovers(ctx context.Context, tokens []string) (map[string][]leftover, error) {
	list, err := p.leftBehind(ctx, true, filter("tag:"+cloud.TagToken, tokens...))
	if err != nil {
		return nil, err
	}
	out := map[string][]leftover{}
	for _, l := range list {
		out[l.Token] = append(out[l.Token], l)
	}
	return out, nil
}

// leftBehind lists volumes and interfaces that pass all filters. Whoever may not list
// them has none: EC2 deletes them with the instance, as the launch asked for, and
// this is only for when it does not. Check tells of the missing right.
func (p *Provider) leftBehind(ctx context.Context, urgent bool, filters ...types.Filter) ([]leftover, error) {
	volumes, err := p.volumes(ctx, urgent, filters)
	if err != nil && code(err) != codeUnauthorized {
		return nil, err
	}
	nics, err := p.interfaces(ctx, urgent, filters)
	if err != nil && code(err) != codeUnauthorized {
		return nil, err
	}
	return append(volumes, nics...), nil
}

func (p *Provider) volumes(ctx context.Context, urgent bool, filters []types.Filter) ([]leftover, error) {
	in := &ec2.DescribeVolumesInput{Filters: filters, MaxResults: awssdk.Int32(pageSize)}
	var list []leftover
	for {
		out, err := call(ctx, p, p.limits.describe, urgent, "DescribeVolumes", (*ec2.Client).DescribeVolumes, in)
		if err != nil {
			return nil, err
		}
		for _, v := range out.Volumes {
			if v.State == types.VolumeStateDeleted || v.State == types.VolumeStateDeleting {
				continue // it bills nothing
			}
			l := leftoverOf(awssdk.ToString(v.VolumeId), "a volume that no instance has", v.Tags)
			if v.CreateTime != nil {
				l.CreatedAt = *v.CreateTime
			}
			l.free = len(v.Attachments) == 0
			list = append(list, l)
		}
		if awssdk.ToString(out.NextToken) == "" {
			return list, nil
		}
		in.NextToken = out.NextToken
	}
}

func (p *Provider) interfaces(ctx context.Context, urgent bool, filters []types.Filter) ([]leftover, error) {
	in := &ec2.DescribeNetworkInterfacesInput{Filters: filters, MaxResults: awssdk.Int32(pageSize)}
	var list []leftover
	for {
		out, err := call(ctx, p, p.limits.describe, urgent, "DescribeNetworkInterfaces", (*ec2.Client).DescribeNetworkInterfaces, in)
		if err != nil {
			return nil, err
		}
		for _, n := range out.NetworkInterfaces {
			l := leftoverOf(awssdk.ToString(n.NetworkInterfaceId), "a network interface that no instance has", n.TagSet)
			l.free = n.Attachment == nil
			list = append(list, l)
		}
		if awssdk.ToString(out.NextToken) == "" {
			return list, nil
		}
		in.NextToken = out.NextToken
	}
}

func leftoverOf(id, what string, tags []types.Tag) leftover {
	t := tagMap(tags)
	return leftover{Instance: cloud.Instance{
		ID: cloud.InstanceID(id), Name: t[cloud.TagName], Token: t[cloud.TagToken], SandboxID: t[cloud.TagSandbox],
		Owner: cloud.Owner{Cluster: t[cloud.TagCluster], Node: t[cloud.TagNode]}, State: cloud.StateFailed, Detail: what,
	}}
}

// deleteLeftover is Delete for what List showed without an instance: with it goes all
// else of its request.
func (p *Provider) deleteLeftover(ctx context.Context, id string) error {
	name := "volume-id"
	if leftRule.FindStringSubmatch(id)[1] == "eni" {
		name = "network-interface-id"
	}
	var found []leftover
	var err error
	if name == "volume-id" {
		found, err = p.volumes(ctx, true, []types.Filter{filter(name, id)})
	} else {
		found, err = p.interfaces(ctx, true, []types.Filter{filter(name, id)})
	}
	if err != nil {
		return err
	}
	if len(found) == 0 || found[0].Token == "" || found[0].Owner.Cluster == "" {
		return errdefs.ErrNotFound // gone, or nothing of ours
	}
	left, err := p.leftovers.ask(ctx, found[0].Token)
	if err != nil {
		return err
	}
	if len(left) == 0 {
		return errdefs.ErrNotFound
	}
	return p.removeAll(ctx, left)
}

// removeAll deletes what is free; what an instance still has, EC2 is taking away, or
// the next look finds it free. Nil: look again.
func (p *Provider) removeAll(ctx context.Context, left []leftover) error {
	var errs []error
	for _, l := range left {
		if !l.free {
			continue
		}
		id := string(l.ID)
		var err error
		if leftRule.FindStringSubmatch(id)[1] == "vol" {
			_, err = call(ctx, p, p.limits.change, true, "DeleteVolume", (*ec2.Client).DeleteVolume, &ec2.DeleteVolumeInput{VolumeId: &id})
		} else {
			_, err = call(ctx, p, p.limits.change, true, "DeleteNetworkInterface", (*ec2.Client).DeleteNetworkInterface,
				&ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: &id})
		}
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
			errs = append(errs, fmt.Errorf("%s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}
