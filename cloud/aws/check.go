// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"context"
	"errors"
	"fmt"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Check implements cloud.Provider: does what the configuration names exist, does it go
// together, and may the credential do what is needed? A launch is tried as a dry run.
// A credential that is refused, or a service that does not answer, is one problem and
// hides the others.
func (p *Provider) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s, err := p.connect(ctx)
	if err != nil {
		return err
	}
	image, err := p.describeImage(ctx, p.cfg.ImageID)
	if errdefs.IsUnavailable(err) || errdefs.IsPermissionDenied(err) && code(err) != codeUnauthorized {
		return err
	}
	errs := []error{err}
	if err == nil && !p.cfg.DisableCVM && !image.uefi {
		errs = append(errs, fmt.Errorf("PODVM_AMI_ID %s does not boot by UEFI, which SEV-SNP needs; register the image with boot mode uefi, or set DISABLECVM: %w",
			image.id, errdefs.ErrInvalidArgument))
	}
	errs = append(errs, p.checkTypes(ctx, image), p.checkPlace(ctx, s), p.checkNamed(ctx))
	errs = append(errs, p.checkRights(ctx)...)
	if errors.Join(errs...) == nil {
		errs = append(errs, p.tryLaunch(ctx, image))
	}
	return errors.Join(errs...)
}

// checkTypes names every type of the configuration that could never be chosen.
func (p *Provider) checkTypes(ctx context.Context, image imageInfo) error {
	list, err := p.describeTypes(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range list.types {
		key := typesKey
		if t.Name == p.cfg.InstanceType {
			key = "PODVM_INSTANCE_TYPE"
		}
		if !p.cfg.DisableCVM && !t.Confidential {
			errs = append(errs, fmt.Errorf("%s: %s cannot run a confidential VM (AMD SEV-SNP: m6a, c6a and r6a can); name another, or set DISABLECVM: %w",
				key, t.Name, errdefs.ErrInvalidArgument))
		}
		if image.arch != "" && t.Arch != "" && t.Arch != image.arch {
			errs = append(errs, fmt.Errorf("%s: %s has %s processors and the image of PODVM_AMI_ID is for %s; name others: %w",
				key, t.Name, t.Arch, image.arch, errdefs.ErrInvalidArgument))
		}
	}
	return errors.Join(errs...)
}

// checkPlace looks at subnets and security groups.
func (p *Provider) checkPlace(ctx context.Context, s *session) error {
	var errs []error
	vpc := p.cfg.VPCID
	if s.subnets[0] != "" {
		list, err := p.describeSubnets(ctx, s.subnets)
		if err != nil {
			errs = append(errs, err)
		}
		for _, n := range list {
			switch {
			case vpc == "":
				vpc = n.vpc
			case n.vpc != vpc && p.cfg.VPCID != "":
				errs = append(errs, fmt.Errorf("AWS_SUBNET_ID: %s is in %s and AWS_VPC_ID is %s; correct one: %w", n.id, n.vpc, vpc, errdefs.ErrInvalidArgument))
			case n.vpc != vpc:
				errs = append(errs, fmt.Errorf("AWS_SUBNET_ID: %s is in %s and others are in %s; name subnets of one VPC: %w", n.id, n.vpc, vpc, errdefs.ErrInvalidArgument))
			}
			if n.free == 0 {
				errs = append(errs, fmt.Errorf("AWS_SUBNET_ID: %s has no free address; name another: %w", n.id, errdefs.ErrResourceExhausted))
			}
		}
	}
	if len(s.groups) > 0 {
		out, err := call(ctx, p, p.limits.describe, false, "DescribeSecurityGroups", (*ec2.Client).DescribeSecurityGroups,
			&ec2.DescribeSecurityGroupsInput{GroupIds: s.groups})
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		for _, g := range out.SecurityGroups {
			if in := awssdk.ToString(g.VpcId); vpc != "" && in != vpc {
				errs = append(errs, fmt.Errorf("AWS_SG_IDS: %s is in %s and the subnets are in %s; name groups of that VPC: %w",
					awssdk.ToString(g.GroupId), in, vpc, errdefs.ErrInvalidArgument))
			}
		}
	}
	return errors.Join(errs...)
}

// checkNamed looks for what the configuration calls by name.
func (p *Provider) checkNamed(ctx context.Context) error {
	var errs []error
	if name := p.cfg.KeyName; name != "" {
		_, err := call(ctx, p, p.limits.describe, false, "DescribeKeyPairs", (*ec2.Client).DescribeKeyPairs,
			&ec2.DescribeKeyPairsInput{KeyNames: []string{name}})
		errs = append(errs, unlessForbidden(err))
	}
	if name := p.cfg.PlacementGroup; name != "" {
		_, err := call(ctx, p, p.limits.describe, false, "DescribePlacementGroups", (*ec2.Client).DescribePlacementGroups,
			&ec2.DescribePlacementGroupsInput{GroupNames: []string{name}})
		errs = append(errs, unlessForbidden(err))
	}
	if name := p.cfg.LaunchTemplate; name != "" {
		_, err := call(ctx, p, p.limits.describe, false, "DescribeLaunchTemplates", (*ec2.Client).DescribeLaunchTemplates,
			&ec2.DescribeLaunchTemplatesInput{LaunchTemplateNames: []string{name}})
		errs = append(errs, unlessForbidden(err))
	}
	return errors.Join(errs...)
}

// unlessForbidden drops the lack of a right that only Check would use: the dry run
// tells of a wrong name as well.
func unlessForbidden(err error) error {
	if code(err) == codeUnauthorized {
		return nil
	}
	return err
}

// checkRights asks with dry runs for the rights that nothing else in Check uses. An
// answer other than "not allowed" does not count: the ids are nobody's.
func (p *Provider) checkRights(ctx context.Context) []error {
	dry := awssdk.Bool(true)
	var errs []error
	add := func(err error) {
		switch {
		case code(err) == codeUnauthorized, errdefs.IsUnavailable(err), ctx.Err() != nil:
			errs = append(errs, err)
		}
	}
	_, err := call(ctx, p, p.limits.describe, false, "DescribeInstances", (*ec2.Client).DescribeInstances,
		&ec2.DescribeInstancesInput{DryRun: dry})
	add(err)
	_, err = call(ctx, p, p.limits.describe, false, "DescribeVolumes", (*ec2.Client).DescribeVolumes, &ec2.DescribeVolumesInput{DryRun: dry})
	add(err)
	_, err = call(ctx, p, p.limits.describe, false, "DescribeNetworkInterfaces", (*ec2.Client).DescribeNetworkInterfaces,
		&ec2.DescribeNetworkInterfacesInput{DryRun: dry})
	add(err)
	_, err = call(ctx, p, p.limits.terminate, false, "TerminateInstances", (*ec2.Client).TerminateInstances,
		&ec2.TerminateInstancesInput{DryRun: dry, InstanceIds: []string{"i-00000000000000000"}})
	add(err)
	_, err = call(ctx, p, p.limits.change, false, "DeleteVolume", (*ec2.Client).DeleteVolume,
		&ec2.DeleteVolumeInput{DryRun: dry, VolumeId: awssdk.String("vol-00000000000000000")})
	add(err)
	_, err = call(ctx, p, p.limits.change, false, "DeleteNetworkInterface", (*ec2.Client).DeleteNetworkInterface,
		&ec2.DeleteNetworkInterfaceInput{DryRun: dry, NetworkInterfaceId: awssdk.String("eni-00000000000000000")})
	add(err)
	if p.cfg.Spot != SpotNever {
		_, err = call(ctx, p, p.limits.describe, false, "DescribeSpotInstanceRequests", (*ec2.Client).DescribeSpotInstanceRequests,
			&ec2.DescribeSpotInstanceRequestsInput{DryRun: dry})
		add(err)
	}
	return errs
}

// tryLaunch is a launch that makes nothing, of the kind that pods will ask for.
func (p *Provider) tryLaunch(ctx context.Context, image imageInfo) error {
	places, err := p.places(ctx)
	if err != nil {
		return err
	}
	s, err := p.connect(ctx)
	if err != nil {
		return err
	}
	req := cloud.CreateRequest{
		Token: "check", Name: "check", SandboxID: "check", Owner: cloud.Owner{Cluster: "check", Node: "check"}, Tags: p.cfg.Tags,
		Plan: cloud.Plan{Type: p.cfg.InstanceType},
	}
	l := launch{req: req, request: req.Fingerprint(), image: image, groups: s.groups}
	if l.userData, err = encodeUserData([]byte("#cloud-config\n")); err != nil {
		return err
	}
	in := p.input(l, p.candidates(req, places, 0)[0])
	in.DryRun, in.ClientToken = awssdk.Bool(true), nil
	_, err = call(ctx, p, p.limits.run, false, "RunInstances", (*ec2.Client).RunInstances, in)
	if err == nil || code(err) == codeDryRun || capacity(err) != scopeNone {
		return nil
	}
	return fmt.Errorf("a launch was tried: %w", err)
}
