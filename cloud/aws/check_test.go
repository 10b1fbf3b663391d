// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// Every mistake is named with its key, all of one configuration at once.
func TestConfig(t *testing.T) {
	for _, c := range []struct {
		change func(*aws.Config)
		words  []string
	}{
		{func(c *aws.Config) { *c = aws.Config{} }, []string{"PODVM_AMI_ID"}},
		{func(c *aws.Config) { c.ImageID = "<ami>" }, []string{"PODVM_AMI_ID", "<ami>"}},
		{func(c *aws.Config) { c.Region, c.Endpoint = "Frankfurt", "http://ec2.example.com" }, []string{"AWS_REGION", "Frankfurt", "AWS_ENDPOINT_URL", "https"}},
		{func(c *aws.Config) { c.Endpoint = "ec2" }, []string{"AWS_ENDPOINT_URL"}},
		{func(c *aws.Config) { c.Keys.SecretAccessKey = "" }, []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}},
		{func(c *aws.Config) { c.Keys = aws.Keys{SessionToken: "x"} }, []string{"AWS_SESSION_TOKEN"}},
		{func(c *aws.Config) { c.RoleARN = "peer-pods" }, []string{"AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "arn:aws:iam::"}},
		{func(c *aws.Config) { c.InstanceTypes = []string{"m6a large"} }, []string{"PODVM_INSTANCE_TYPES", "m6a large"}},
		{func(c *aws.Config) { c.InstanceTypes = slices.Repeat([]string{"m6a.large"}, 1); c.InstanceType = "" }, nil},
		{func(c *aws.Config) {
			c.SubnetIDs, c.SecurityGroupIDs, c.VPCID = []string{"subnet-1"}, []string{"default"}, "10.0.0.0/16"
		},
			[]string{"AWS_SUBNET_ID", "subnet-1", "AWS_SG_IDS", "default", "AWS_VPC_ID"}},
		{func(c *aws.Config) { c.RootVolumeGiB = -1 }, []string{"ROOT_VOLUME_SIZE"}},
		{func(c *aws.Config) { c.Spot, c.Tenancy = "yes", "host" }, []string{"AWS_SPOT", "AWS_TENANCY"}},
		{func(c *aws.Config) {
			c.Tags = map[string]string{"aws:x": "y", "Name": "z", "k": strings.Repeat("v", 300)}
		}, []string{"TAGS", "aws:x", "Name", "256"}},
		{func(c *aws.Config) {
			c.Tags = map[string]string{}
			for n := range 50 {
				c.Tags[fmt.Sprint(n)] = ""
			}
		}, []string{"TAGS", "44"}},
	} {
		cfg := baseConfig(fakeec2.New(fakeec2.Config{}))
		c.change(&cfg)
		_, err := aws.New(cfg)
		if c.words == nil {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v, want InvalidArgument", err)
		}
		says(t, err, c.words...)
	}
}

func TestCheck(t *testing.T) {
	type place struct {
		server fakeec2.Config
		change func(*aws.Config)
		deny   []string
		class  error
		words  []string
	}
	far := fakeec2.Config{
		VPCs: []fakeec2.VPC{{ID: fakeec2.DefaultVPC, CIDR: netip.MustParsePrefix("10.0.0.0/16"), Default: true},
			{ID: "vpc-00000000000000009", CIDR: netip.MustParsePrefix("10.9.0.0/16")}},
		Subnets: []fakeec2.Subnet{{ID: fakeec2.DefaultSubnet, Zone: zoneA, CIDR: netip.MustParsePrefix("10.0.0.0/24")},
			{ID: fakeec2.DefaultSubnetB, VPC: "vpc-00000000000000009", Zone: zoneB, CIDR: netip.MustParsePrefix("10.9.0.0/24")}},
	}
	bios := fakeec2.Config{Images: []fakeec2.Image{{ID: fakeec2.DefaultImage, Name: "old", BootMode: "legacy-bios"}}}
	none := func(*aws.Config) {}
	for name, c := range map[string]place{
		"fine": {change: func(c *aws.Config) {
			c.KeyName, c.PlacementGroup, c.Spot, c.VPCID = fakeec2.DefaultKeyPair, fakeec2.DefaultPlacementGroup, aws.SpotFirst, fakeec2.DefaultVPC
		}},
		"many at once": {change: func(c *aws.Config) {
			c.ImageID, c.SubnetIDs, c.SecurityGroupIDs = "ami-00000000000000000", []string{"subnet-00000000000000000"}, []string{"sg-00000000000000000"}
			c.InstanceTypes, c.KeyName, c.PlacementGroup, c.LaunchTemplate = []string{"m9z.large"}, "nokey", "nogroup", "notemplate"
		}, class: errdefs.ErrInvalidArgument, words: []string{"PODVM_AMI_ID", "AWS_SUBNET_ID", "AWS_SG_IDS", "PODVM_INSTANCE_TYPES", "m9z.large",
			"SSH_KP_NAME", "AWS_PLACEMENT_GROUP", "PODVM_LAUNCHTEMPLATE_NAME"}},
		"two VPCs": {server: far, change: func(c *aws.Config) { c.SubnetIDs = []string{fakeec2.DefaultSubnet, fakeec2.DefaultSubnetB} },
			class: errdefs.ErrInvalidArgument, words: []string{"AWS_SUBNET_ID", fakeec2.DefaultSubnetB, "one VPC"}},
		"another VPC": {server: far, change: func(c *aws.Config) { c.SubnetIDs, c.VPCID = []string{fakeec2.DefaultSubnetB}, fakeec2.DefaultVPC },
			class: errdefs.ErrInvalidArgument, words: []string{"AWS_VPC_ID", "AWS_SUBNET_ID", "vpc-00000000000000009"}},
		"groups elsewhere": {server: far, change: func(c *aws.Config) { c.SubnetIDs = []string{fakeec2.DefaultSubnetB} },
			class: errdefs.ErrInvalidArgument, words: []string{"AWS_SG_IDS"}},
		"no SEV-SNP": {change: func(c *aws.Config) { c.InstanceType, c.InstanceTypes = "t3.large", []string{"m7g.large"} },
			class: errdefs.ErrInvalidArgument, words: []string{"PODVM_INSTANCE_TYPE: t3.large", "PODVM_INSTANCE_TYPES: m7g.large", "DISABLECVM", "arm64"}},
		"no UEFI":        {server: bios, change: none, class: errdefs.ErrInvalidArgument, words: []string{"PODVM_AMI_ID", "uefi", "DISABLECVM"}},
		"wrong secret":   {change: func(c *aws.Config) { c.Keys.SecretAccessKey = "wrong" }, class: errdefs.ErrPermissionDenied, words: []string{"AuthFailure", "AWS_SECRET_ACCESS_KEY"}},
		"may not launch": {change: none, deny: []string{"ec2:RunInstances"}, class: errdefs.ErrPermissionDenied, words: []string{"ec2:RunInstances", "policy"}},
		"may do little": {change: func(c *aws.Config) { c.Spot = aws.SpotFirst },
			deny: []string{"ec2:TerminateInstances", "ec2:DescribeInstances", "ec2:DescribeVolumes", "ec2:DescribeNetworkInterfaces",
				"ec2:DeleteVolume", "ec2:DeleteNetworkInterface", "ec2:DescribeSubnets", "ec2:DescribeImages", "ec2:DescribeInstanceTypes", "ec2:DescribeSpotInstanceRequests"},
			class: errdefs.ErrPermissionDenied,
			words: []string{"ec2:TerminateInstances", "ec2:DescribeInstances;", "ec2:DescribeVolumes", "ec2:DescribeNetworkInterfaces",
				"ec2:DeleteVolume", "ec2:DeleteNetworkInterface", "ec2:DescribeSubnets", "ec2:DescribeImages", "ec2:DescribeInstanceTypes", "ec2:DescribeSpotInstanceRequests"}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, c.server, func(t *testing.T, s *fakeec2.Server) {
				key := fakeec2.DefaultKey
				key.Deny = c.deny
				s.SetKey(key)
				defer s.SetKey(fakeec2.DefaultKey)
				p := provider(t, s, c.change)
				err := p.Check(t.Context())
				if c.class == nil && err != nil || c.class != nil && errdefs.Resolve(err) != c.class {
					t.Errorf("Check: %v, want %v", err, c.class)
				}
				if err != nil {
					says(t, err, c.words...)
				}
				if len(s.Instances()) != 0 {
					t.Error("Check made an instance")
				}
			})
		})
	}
}

// A service that does not answer is one problem, within the deadline of a call.
func TestOutage(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		s.Inject(fakeec2.Fault{Hang: true})
		begin := time.Now()
		p := provider(t, s)
		if err := p.Check(t.Context()); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Check: %v", err)
		}
		if took := time.Since(begin); took > time.Minute {
			t.Errorf("it took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.List(ctx, cloud.Owner{Cluster: cluster}); err == nil || errdefs.IsUnavailable(err) {
			t.Errorf("List whose caller has left: %v", err)
		}
	})
}
