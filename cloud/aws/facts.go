// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// What the cloud says about the things that the configuration names. None of it
// changes while a region, an image or a subnet exists, so it is asked for once.

// typesKey is how errors name the list of types.
const typesKey = "PODVM_INSTANCE_TYPES"

// catalog is the list of types that may be used, with their sizes from the cloud.
func (p *Provider) catalog(ctx context.Context) (cloud.Catalog, error) {
	image, err := p.image(ctx, p.cfg.ImageID)
	if err != nil {
		return cloud.Catalog{}, err
	}
	list, err := p.types.get(ctx, func() (typeList, error) { return p.describeTypes(ctx) })
	if err != nil {
		return cloud.Catalog{}, err
	}
	return cloud.Catalog{
		Types: list.types, Remark: list.remark, Default: p.cfg.InstanceType, Key: typesKey,
		Arch: image.arch, Confidential: !p.cfg.DisableCVM, OverheadMiB: p.cfg.OverheadMiB,
	}, nil
}

// typeList is the configured types with their sizes and prices.
type typeList struct {
	types  []cloud.InstanceType
	remark string // where the prices are from
}

// describeTypes asks for all types of the configuration in one call.
func (p *Provider) describeTypes(ctx context.Context) (typeList, error) {
	s, err := p.connect(ctx)
	if err != nil {
		return typeList{}, err
	}
	in := &ec2.DescribeInstanceTypesInput{}
	for _, t := range p.cfg.InstanceTypes {
		in.InstanceTypes = append(in.InstanceTypes, types.InstanceType(t))
	}
	found := map[string]cloud.InstanceType{}
	for {
		out, err := call(ctx, p, p.limits.describe, false, "DescribeInstanceTypes", (*ec2.Client).DescribeInstanceTypes, in)
		if err != nil {
			return typeList{}, err
		}
		for _, t := range out.InstanceTypes {
			it := instanceType(t)
			if p.cfg.Spot == SpotOnly && !slices.Contains(t.SupportedUsageClasses, types.UsageClassTypeSpot) && len(t.SupportedUsageClasses) > 0 {
				it.Unusable = "it is not sold on the spot market, and AWS_SPOT is only"
			}
			found[it.Name] = it
		}
		if awssdk.ToString(out.NextToken) == "" {
			break
		}
		in.NextToken = out.NextToken
	}
	var list typeList
	for _, name := range p.cfg.InstanceTypes { // their order decides between equals
		if t, ok := found[name]; ok {
			list.types = append(list.types, t)
		}
	}
	if p.cfg.Prices != nil {
		list.remark = p.cfg.Prices.Apply("aws", s.region, list.types)
	}
	return list, nil
}

func instanceType(t types.InstanceTypeInfo) cloud.InstanceType {
	it := cloud.InstanceType{Name: string(t.InstanceType)}
	if t.VCpuInfo != nil {
		it.VCPUs = int(awssdk.ToInt32(t.VCpuInfo.DefaultVCpus))
	}
	if t.MemoryInfo != nil {
		it.MemoryMiB = int(awssdk.ToInt64(t.MemoryInfo.SizeInMiB))
	}
	if t.GpuInfo != nil {
		for _, g := range t.GpuInfo.Gpus {
			it.GPUs += int(awssdk.ToInt32(g.Count))
			it.GPUModel = strings.TrimSpace(awssdk.ToString(g.Manufacturer) + " " + awssdk.ToString(g.Name))
		}
	}
	if t.ProcessorInfo != nil {
		for _, a := range t.ProcessorInfo.SupportedArchitectures {
			if g := goArch(string(a)); g != "" {
				it.Arch = g
			}
		}
		it.Confidential = slices.Contains(t.ProcessorInfo.SupportedFeatures, types.SupportedAdditionalProcessorFeatureAmdSevSnp)
	}
	return it
}

// goArch is EC2's name of an architecture as Go has it; "" for others.
func goArch(a string) string {
	switch a {
	case "x86_64":
		return "amd64"
	case "arm64":
		return "arm64"
	}
	return ""
}

// imageInfo is what a launch must know of an image.
type imageInfo struct {
	id      string
	root    string   // device name of the root volume
	rootGiB int32    // its size in the image
	disks   []string // device names of the image's other EBS volumes
	arch    string
	state   types.ImageState
	uefi    bool // it can boot by UEFI
}

// image asks about an image once.
func (p *Provider) image(ctx context.Context, id string) (imageInfo, error) {
	if !imageRule.MatchString(id) {
		return imageInfo{}, fmt.Errorf("image %q is not an image id such as ami-0123456789abcdef0: %w", id, errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	l := p.images[id]
	if l == nil {
		l = new(lazy[imageInfo])
		p.images[id] = l
	}
	p.mu.Unlock()
	return l.get(ctx, func() (imageInfo, error) { return p.describeImage(ctx, id) })
}

func (p *Provider) describeImage(ctx context.Context, id string) (imageInfo, error) {
	out, err := call(ctx, p, p.limits.describe, false, "DescribeImages", (*ec2.Client).DescribeImages,
		&ec2.DescribeImagesInput{ImageIds: []string{id}})
	if err != nil {
		return imageInfo{}, err
	}
	if len(out.Images) != 1 {
		return imageInfo{}, fmt.Errorf("image %s is not to be found; %s: %w", id, fixImage, errdefs.ErrInvalidArgument)
	}
	return newImageInfo(out.Images[0])
}

func newImageInfo(img types.Image) (imageInfo, error) {
	i := imageInfo{id: awssdk.ToString(img.ImageId), root: awssdk.ToString(img.RootDeviceName), arch: goArch(string(img.Architecture)),
		state: img.State, uefi: img.BootMode == types.BootModeValuesUefi || img.BootMode == types.BootModeValuesUefiPreferred}
	for _, m := range img.BlockDeviceMappings {
		switch {
		case m.Ebs == nil:
		case awssdk.ToString(m.DeviceName) == i.root: // not always the first
			i.rootGiB = awssdk.ToInt32(m.Ebs.VolumeSize)
		default:
			i.disks = append(i.disks, awssdk.ToString(m.DeviceName))
		}
	}
	if i.state != "" && i.state != types.ImageStateAvailable {
		return i, fmt.Errorf("image %s is %s; wait, or name another in PODVM_AMI_ID: %w", i.id, i.state, errdefs.ErrInvalidArgument)
	}
	if i.root == "" || img.RootDeviceType != types.DeviceTypeEbs && img.RootDeviceType != "" {
		return i, fmt.Errorf("image %s has no root volume on EBS; name another in PODVM_AMI_ID: %w", i.id, errdefs.ErrInvalidArgument)
	}
	return i, nil
}

// subnet is a place for instances.
type subnet struct {
	id   string // "": the launch template's
	zone string // "": not known
	vpc  string
	free int32 // addresses, when it was asked
}

// places are the configured subnets, in the order of the configuration.
func (p *Provider) places(ctx context.Context) ([]subnet, error) {
	s, err := p.connect(ctx)
	if err != nil {
		return nil, err
	}
	if slices.Equal(s.subnets, []string{""}) {
		return []subnet{{}}, nil
	}
	return p.subnets.get(ctx, func() ([]subnet, error) { return p.describeSubnets(ctx, s.subnets) })
}

func (p *Provider) describeSubnets(ctx context.Context, ids []string) ([]subnet, error) {
	out, err := call(ctx, p, p.limits.describe, false, "DescribeSubnets", (*ec2.Client).DescribeSubnets,
		&ec2.DescribeSubnetsInput{SubnetIds: ids})
	if err != nil {
		return nil, err
	}
	list := make([]subnet, len(ids))
	for i, id := range ids {
		list[i].id = id
		for _, o := range out.Subnets {
			if awssdk.ToString(o.SubnetId) == id {
				list[i] = subnet{id, awssdk.ToString(o.AvailabilityZone), awssdk.ToString(o.VpcId), awssdk.ToInt32(o.AvailableIpAddressCount)}
			}
		}
	}
	return list, nil
}

// Prepare asks for all that a Create needs to know, so that the first one does not
// have to.
func (p *Provider) Prepare(ctx context.Context) error {
	if _, err := p.connect(ctx); err != nil {
		return err
	}
	errs := make([]error, 2)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, errs[1] = p.places(ctx)
	}()
	_, errs[0] = p.catalog(ctx)
	<-done
	return errors.Join(errs...)
}
