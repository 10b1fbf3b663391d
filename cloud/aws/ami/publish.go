// SPDX-License-Identifier: Apache-2.0

// Package ami makes machine images (AMIs) of disk images, and removes old ones.
//
// A publication writes the disk's blocks straight into a snapshot, with the EBS direct
// API, and registers that: no S3 bucket and no role vmimport. Blocks of zeros are left
// out. What there is in the cloud says how far it is, so that a publication that was
// interrupted is resumed by whoever has the same image:
//
//	image with our tags                     done
//	snapshot with our tags, completed       register it
//	snapshot with our tags, pending         go on after the blocks that its tag
//	                                        peerpod-uploaded counts
//	nothing, or a snapshot in error         from the beginning
//
// Tags: cloud.TagImage has the disk's digest, cloud.TagCluster the cluster, so that one
// cluster's prune leaves the other's images.
package ami

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ebs"
	ebstypes "github.com/aws/aws-sdk-go-v2/service/ebs/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

// PublishActions are what a policy must allow for Publish.
var PublishActions = []string{
	"ec2:DescribeImages",
	"ec2:DescribeSnapshots",
	"ec2:CreateTags",
	"ec2:DeleteSnapshot", // of an upload that has ended in error
	"ec2:RegisterImage",
	"ebs:StartSnapshot",
	"ebs:PutSnapshotBlock",
	"ebs:CompleteSnapshot",
}

// tagUploaded counts, on a snapshot that is being written, the blocks from the first on
// that are in it.
const tagUploaded = cloud.TagPrefix + "uploaded"

const (
	rootDevice = "/dev/xvda"
	// snapshotTimeout, minutes: EBS ends a snapshot in error that nobody writes to for
	// so long. (1 h; at most 3 days.)
	snapshotTimeout = 24 * 60
	// starts is how often an upload is begun anew when its snapshot has ended in error.
	starts = 3
	// lag is how long a new thing may not be listed yet.
	lag = time.Minute
	// settleTimeout is for what EC2 does with a snapshot after its completion: a minute
	// for each of many GiB (mem); this is one of some MiB.
	settleTimeout = 30 * time.Minute
)

// Request says what to publish.
type Request struct {
	Image    *diskimage.Image // of format Raw
	Cluster  string           // CLUSTER_NAME; "": no cluster's
	Tags     map[string]string
	Progress func(diskimage.Progress) // nil: nobody wants to know
}

// publication is one Publish under way.
type publication struct {
	*aws.Account
	Request
	out diskimage.Published
}

// Publish makes an image available. Published twice, it is one image. When ctx ends,
// what is there so far stays, for the next Publish. InvalidArgument: the image is
// damaged. Further errors have the classes of package aws.
func Publish(ctx context.Context, a *aws.Account, r Request) (diskimage.Published, error) {
	p := &publication{Account: a, Request: r}
	if p.Progress == nil {
		p.Progress = func(diskimage.Progress) {}
	}
	p.out = diskimage.Published{Name: p.name(), Digest: r.Image.Tag(), Version: r.Image.Version}
	p.Progress(diskimage.Progress{Step: "find"})
	done, err := p.find(ctx)
	if err != nil || done {
		p.out.Existed = done
		return p.out, err
	}
	snapshot, err := p.upload(ctx)
	if err != nil {
		return p.out, err
	}
	p.Progress(diskimage.Progress{Step: "register"})
	return p.out, p.register(ctx, snapshot)
}

var notInNames = regexp.MustCompile(`[^A-Za-z0-9()\[\] ./'@_-]+`)

// name is the image's: another one with it cannot be, in the account and region.
func (p *publication) name() string {
	cluster := notInNames.ReplaceAllString(p.Cluster, "-")
	return "peerpod-" + p.Image.Architecture + "-" + p.Image.Short() + strings.TrimRight("-"+cluster[:min(len(cluster), 80)], "-")
}

func (p *publication) tags(more ...string) []types.Tag {
	all := maps.Clone(p.Tags)
	if all == nil {
		all = map[string]string{}
	}
	all[cloud.TagName], all[cloud.TagImage] = p.name(), p.Image.Tag()
	if p.Image.Version != "" {
		all[cloud.TagImage+"-version"] = p.Image.Version
	}
	if p.Cluster != "" {
		all[cloud.TagCluster] = p.Cluster
	}
	for i := 0; i+1 < len(more); i += 2 {
		all[more[i]] = more[i+1]
	}
	var out []types.Tag
	for _, k := range slices.Sorted(maps.Keys(all)) {
		out = append(out, types.Tag{Key: awssdk.String(k), Value: awssdk.String(all[k])})
	}
	return out
}

func tagsOf(list []types.Tag) map[string]string {
	out := map[string]string{}
	for _, t := range list {
		out[awssdk.ToString(t.Key)] = awssdk.ToString(t.Value)
	}
	return out
}

func filter(name string, values ...string) types.Filter {
	return types.Filter{Name: awssdk.String(name), Values: values}
}

// images are those of this account that carry the tag of ours; digest "": any.
func images(ctx context.Context, a *aws.Account, cluster, digest string) ([]types.Image, error) {
	in := &ec2.DescribeImagesInput{Owners: []string{"self"}, Filters: []types.Filter{filter("tag-key", cloud.TagImage)}}
	if digest != "" {
		in.Filters[0] = filter("tag:"+cloud.TagImage, digest)
	}
	var all []types.Image
	for {
		out, err := aws.CallEC2(ctx, a, "DescribeImages", (*ec2.Client).DescribeImages, in)
		if err != nil {
			return nil, err
		}
		for _, i := range out.Images {
			if tagsOf(i.Tags)[cloud.TagCluster] == cluster {
				all = append(all, i)
			}
		}
		if in.NextToken = out.NextToken; awssdk.ToString(in.NextToken) == "" {
			return all, nil
		}
	}
}

// snapshots is images for snapshots.
func snapshots(ctx context.Context, a *aws.Account, cluster, digest string) ([]types.Snapshot, error) {
	in := &ec2.DescribeSnapshotsInput{OwnerIds: []string{"self"}, Filters: []types.Filter{filter("tag-key", cloud.TagImage)}}
	if digest != "" {
		in.Filters[0] = filter("tag:"+cloud.TagImage, digest)
	}
	var all []types.Snapshot
	for {
		out, err := aws.CallEC2(ctx, a, "DescribeSnapshots", (*ec2.Client).DescribeSnapshots, in)
		if err != nil {
			return nil, err
		}
		for _, s := range out.Snapshots {
			if tagsOf(s.Tags)[cloud.TagCluster] == cluster {
				all = append(all, s)
			}
		}
		if in.NextToken = out.NextToken; awssdk.ToString(in.NextToken) == "" {
			return all, nil
		}
	}
}

// find looks for the image, and waits until it can be used.
func (p *publication) find(ctx context.Context) (bool, error) {
	for pause := time.Second; ; pause = min(2*pause, 15*time.Second) {
		list, err := images(ctx, p.Account, p.Cluster, p.Image.Tag())
		if err != nil || len(list) == 0 {
			return false, err
		}
		i := list[0]
		switch i.State {
		case types.ImageStateAvailable:
			p.out.ID, p.out.Name = awssdk.ToString(i.ImageId), awssdk.ToString(i.Name)
			return true, nil
		case types.ImageStatePending, types.ImageStateTransient:
		default:
			why := ""
			if i.StateReason != nil {
				why = ": " + awssdk.ToString(i.StateReason.Message)
			}
			return false, fmt.Errorf("image %s is in the state %s%s; deregister it, and publish again: %w", awssdk.ToString(i.ImageId), i.State, why, errdefs.ErrFailedPrecondition)
		}
		if err := cloud.Pause(ctx, pause); err != nil {
			return false, err
		}
	}
}

// upload makes the snapshot, or what is missing of it, and returns its id when it is
// completed.
func (p *publication) upload(ctx context.Context) (string, error) {
	for try := 0; try < starts; try++ {
		list, err := snapshots(ctx, p.Account, p.Cluster, p.Image.Tag())
		if err != nil {
			return "", err
		}
		id, uploaded := "", 0
		for _, s := range list {
			switch s.State {
			case types.SnapshotStateCompleted:
				return awssdk.ToString(s.SnapshotId), nil
			case types.SnapshotStatePending:
				id = awssdk.ToString(s.SnapshotId)
				uploaded, _ = strconv.Atoi(tagsOf(s.Tags)[tagUploaded])
			default: // error: nothing can be done with it
				if err := remove(ctx, p.Account, awssdk.ToString(s.SnapshotId)); err != nil {
					return "", err
				}
			}
		}
		if id == "" {
			if id, err = p.start(ctx, try); err != nil {
				return "", err
			}
		}
		ok, err := p.fill(ctx, id, uploaded)
		if err != nil || ok {
			return id, err
		}
		if err := cloud.Pause(ctx, 5*time.Second); err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("the snapshot ended in error %d times: %w", starts, errdefs.ErrUnavailable)
}

// start begins a snapshot. Its token is the image's: a reply that was lost is given
// again, also to the next process.
func (p *publication) start(ctx context.Context, try int) (string, error) {
	var tags []ebstypes.Tag
	for _, t := range p.tags() {
		tags = append(tags, ebstypes.Tag{Key: t.Key, Value: t.Value})
	}
	for ; ; try++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %s %v %d", p.Image.Tag(), p.Cluster, tagsOf(p.tags()), try))
		out, err := aws.CallEBS(ctx, p.Account, "StartSnapshot", (*ebs.Client).StartSnapshot, func() *ebs.StartSnapshotInput {
			return &ebs.StartSnapshotInput{
				VolumeSize: awssdk.Int64((p.Image.Size + 1<<30 - 1) >> 30), Tags: tags, Timeout: awssdk.Int32(snapshotTimeout),
				Description: awssdk.String("disk of " + p.name()), ClientToken: awssdk.String(hex.EncodeToString(sum[:])),
			}
		})
		switch {
		case errdefs.IsAlreadyExists(err) && try < 2*starts: // the token of one that is gone, or has ended
		case err != nil:
			return "", err
		case out.Status == ebstypes.StatusError && try < 2*starts:
		default:
			return awssdk.ToString(out.SnapshotId), nil
		}
	}
}

// complete ends the snapshot. false: it has ended in error.
func (p *publication) complete(ctx context.Context, id string, count int, sum []byte) (bool, error) {
	_, err := aws.CallEBS(ctx, p.Account, "CompleteSnapshot", (*ebs.Client).CompleteSnapshot, func() *ebs.CompleteSnapshotInput {
		return &ebs.CompleteSnapshotInput{
			SnapshotId: &id, ChangedBlocksCount: awssdk.Int32(int32(count)), Checksum: awssdk.String(base64.StdEncoding.EncodeToString(sum)),
			ChecksumAlgorithm: ebstypes.ChecksumAlgorithmChecksumAlgorithmSha256, ChecksumAggregationMethod: ebstypes.ChecksumAggregationMethodChecksumAggregationLinear,
		}
	})
	if err != nil && !notPending(err) {
		return false, err
	}
	end := time.Now().Add(settleTimeout)
	for pause := time.Second; ; pause = min(2*pause, 15*time.Second) {
		out, err := aws.CallEC2(ctx, p.Account, "DescribeSnapshots", (*ec2.Client).DescribeSnapshots, &ec2.DescribeSnapshotsInput{SnapshotIds: []string{id}})
		switch {
		case err != nil && aws.ErrorCode(err) != codeNoSnapshot:
			return false, err
		case err == nil && len(out.Snapshots) == 1 && out.Snapshots[0].State == types.SnapshotStateCompleted:
			return true, nil
		case err == nil && len(out.Snapshots) == 1 && out.Snapshots[0].State == types.SnapshotStateError:
			return false, nil
		case time.Now().After(end):
			return false, fmt.Errorf("snapshot %s was not completed within %s; publish again to go on: %w", id, settleTimeout, errdefs.ErrUnavailable)
		}
		if err := cloud.Pause(ctx, pause); err != nil {
			return false, err
		}
	}
}

// register makes the image of the snapshot, and waits until it can be used.
func (p *publication) register(ctx context.Context, snapshot string) error {
	arch := types.ArchitectureValuesX8664
	if p.Image.Architecture == diskimage.ARM64 {
		arch = types.ArchitectureValuesArm64
	}
	_, err := aws.CallEC2(ctx, p.Account, "RegisterImage", (*ec2.Client).RegisterImage, &ec2.RegisterImageInput{
		Name: awssdk.String(p.name()), Description: awssdk.String("pod VM, Linux " + p.Image.Version), Architecture: arch,
		BootMode: types.BootModeValuesUefi, EnaSupport: awssdk.Bool(true), ImdsSupport: types.ImdsSupportValuesV20,
		VirtualizationType: awssdk.String("hvm"), RootDeviceName: awssdk.String(rootDevice),
		BlockDeviceMappings: []types.BlockDeviceMapping{{DeviceName: awssdk.String(rootDevice), Ebs: &types.EbsBlockDevice{
			SnapshotId: &snapshot, VolumeType: types.VolumeTypeGp3, DeleteOnTermination: awssdk.Bool(true)}}},
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeImage, Tags: p.tags()}},
	})
	// The name is taken after a reply that was lost, or by somebody who does the same.
	if err != nil && aws.ErrorCode(err) != "InvalidAMIName.Duplicate" {
		return err
	}
	end := time.Now().Add(lag)
	for pause := time.Second; ; pause = min(2*pause, 15*time.Second) {
		done, ferr := p.find(ctx)
		if ferr != nil || done {
			return ferr
		}
		if time.Now().After(end) {
			if err == nil {
				err = fmt.Errorf("image %s was registered and is not listed: %w", p.name(), errdefs.ErrUnavailable)
			}
			return fmt.Errorf("%w; if it is not ours, deregister the image %s", err, p.name())
		}
		if err := cloud.Pause(ctx, pause); err != nil {
			return err
		}
	}
}

// remove deletes a snapshot; that there is none is no error.
func remove(ctx context.Context, a *aws.Account, id string) error {
	end := time.Now().Add(lag)
	for {
		_, err := aws.CallEC2(ctx, a, "DeleteSnapshot", (*ec2.Client).DeleteSnapshot, &ec2.DeleteSnapshotInput{SnapshotId: &id})
		switch {
		case err == nil || aws.ErrorCode(err) == codeNoSnapshot:
			return nil
		case !errdefs.IsFailedPrecondition(err) || time.Now().After(end): // in use: the image is going
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
		if err := cloud.Pause(ctx, 2*time.Second); err != nil {
			return err
		}
	}
}
