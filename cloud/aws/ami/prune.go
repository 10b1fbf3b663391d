// SPDX-License-Identifier: Apache-2.0

package ami

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

// PruneActions are what a policy must allow for Prune.
var PruneActions = []string{
	"ec2:DescribeImages",
	"ec2:DescribeSnapshots",
	"ec2:DescribeInstances",
	"ec2:DescribeLaunchTemplates",
	"ec2:DescribeLaunchTemplateVersions",
	"ec2:DeregisterImage",
	"ec2:DeleteSnapshot",
}

// abandonedAfter is how old a snapshot must be that no image has, before it is taken for
// what an interrupted prune or publication has left, and not for one under way.
const abandonedAfter = 24 * time.Hour

// PruneRequest says what may go.
type PruneRequest struct {
	Cluster    string // whose images; see Request.Cluster
	Configured string // PODVM_AMI_ID; "": none
	Keep       int    // how many of the newest stay, whether used or not
	DryRun     bool   // look only
}

// Prune removes images of ours, with their snapshots, that are not among the newest,
// not configured, and that no instance and no launch template of the account and region
// uses; and snapshots of ours that an interruption has left. It returns what became of
// each, the newest first; with an error, as far as it came.
func Prune(ctx context.Context, a *aws.Account, r PruneRequest) ([]diskimage.Pruned, error) {
	list, err := images(ctx, a, r.Cluster, "")
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(x, y types.Image) int {
		return cmp.Or(cmp.Compare(awssdk.ToString(y.CreationDate), awssdk.ToString(x.CreationDate)), cmp.Compare(awssdk.ToString(y.ImageId), awssdk.ToString(x.ImageId)))
	})
	used, err := uses(ctx, a, list)
	if err != nil {
		return nil, err
	}
	var out []diskimage.Pruned
	kept := map[string]bool{} // snapshots
	for n, i := range list {
		p := diskimage.Pruned{ID: awssdk.ToString(i.ImageId), Name: awssdk.ToString(i.Name), Digest: tagsOf(i.Tags)[cloud.TagImage], Created: awssdk.ToString(i.CreationDate)}
		switch {
		case p.ID == r.Configured:
			p.Reason = "configured as PODVM_AMI_ID"
		case used[p.ID] != "":
			p.Reason = "used by " + used[p.ID]
		case n < r.Keep:
			p.Reason = fmt.Sprintf("one of the newest %d", r.Keep)
		default:
			p.Removed, p.Reason = true, "old and not used"
		}
		if p.Removed && !r.DryRun {
			if err := deregister(ctx, a, i); err != nil {
				return out, fmt.Errorf("image %s: %w", p.ID, err)
			}
		}
		for _, s := range snapshotsOf(i) {
			kept[s] = true // or gone with the image
		}
		out = append(out, p)
	}
	left, err := snapshots(ctx, a, r.Cluster, "")
	if err != nil {
		return out, err
	}
	for _, s := range left {
		id := awssdk.ToString(s.SnapshotId)
		if kept[id] || time.Since(awssdk.ToTime(s.StartTime)) < abandonedAfter {
			continue
		}
		if !r.DryRun {
			if err := remove(ctx, a, id); err != nil {
				return out, err
			}
		}
		tags := tagsOf(s.Tags)
		out = append(out, diskimage.Pruned{ID: id, Name: tags[cloud.TagName], Digest: tags[cloud.TagImage], Created: awssdk.ToTime(s.StartTime).UTC().Format(time.RFC3339),
			Removed: true, Reason: "left by an interruption: no image has it"})
	}
	return out, nil
}

func snapshotsOf(i types.Image) []string {
	var ids []string
	for _, m := range i.BlockDeviceMappings {
		if m.Ebs != nil && m.Ebs.SnapshotId != nil {
			ids = append(ids, *m.Ebs.SnapshotId)
		}
	}
	return ids
}

func deregister(ctx context.Context, a *aws.Account, i types.Image) error {
	_, err := aws.CallEC2(ctx, a, "DeregisterImage", (*ec2.Client).DeregisterImage, &ec2.DeregisterImageInput{ImageId: i.ImageId})
	if c := aws.ErrorCode(err); err != nil && c != "InvalidAMIID.NotFound" && c != "InvalidAMIID.Unavailable" { // gone, after a reply that was lost
		return err
	}
	for _, id := range snapshotsOf(i) {
		if err := remove(ctx, a, id); err != nil {
			return err
		}
	}
	return nil
}

// uses tells of images who uses them.
func uses(ctx context.Context, a *aws.Account, list []types.Image) (map[string]string, error) {
	used := map[string]string{}
	var ids []string
	for _, i := range list {
		ids = append(ids, awssdk.ToString(i.ImageId))
	}
	for some := range slices.Chunk(ids, 200) { // values that a filter takes
		in := &ec2.DescribeInstancesInput{Filters: []types.Filter{filter("image-id", some...), filter("instance-state-name", "pending", "running", "stopping", "stopped")}}
		for more := true; more; more = awssdk.ToString(in.NextToken) != "" {
			out, err := aws.CallEC2(ctx, a, "DescribeInstances", (*ec2.Client).DescribeInstances, in)
			if err != nil {
				return nil, err
			}
			for _, res := range out.Reservations {
				for _, i := range res.Instances {
					used[awssdk.ToString(i.ImageId)] = "instance " + awssdk.ToString(i.InstanceId)
				}
			}
			in.NextToken = out.NextToken
		}
	}
	if len(ids) == 0 {
		return used, nil
	}
	return used, usesOfTemplates(ctx, a, used)
}

// usesOfTemplates adds images that any version of a launch template names.
func usesOfTemplates(ctx context.Context, a *aws.Account, used map[string]string) error {
	in := &ec2.DescribeLaunchTemplatesInput{}
	for more := true; more; more = awssdk.ToString(in.NextToken) != "" {
		out, err := aws.CallEC2(ctx, a, "DescribeLaunchTemplates", (*ec2.Client).DescribeLaunchTemplates, in)
		if err != nil {
			return err
		}
		for _, t := range out.LaunchTemplates {
			in := &ec2.DescribeLaunchTemplateVersionsInput{LaunchTemplateId: t.LaunchTemplateId}
			for more := true; more; more = awssdk.ToString(in.NextToken) != "" {
				out, err := aws.CallEC2(ctx, a, "DescribeLaunchTemplateVersions", (*ec2.Client).DescribeLaunchTemplateVersions, in)
				if err != nil {
					return err
				}
				for _, v := range out.LaunchTemplateVersions {
					if d := v.LaunchTemplateData; d != nil && awssdk.ToString(d.ImageId) != "" {
						used[*d.ImageId] = fmt.Sprintf("launch template %s, version %d", awssdk.ToString(t.LaunchTemplateName), awssdk.ToInt64(v.VersionNumber))
					}
				}
				in.NextToken = out.NextToken
			}
		}
		in.NextToken = out.NextToken
	}
	return nil
}
