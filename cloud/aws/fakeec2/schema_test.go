// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestModel checks that the table is whole: every name in it leads somewhere, and
// every operation in it is served.
func TestModel(t *testing.T) {
	served := 0
	for version, s := range schemas {
		for name, op := range s.ops {
			if handlers[name] == nil {
				t.Errorf("%s is in the model and not served", name)
			}
			if _, ok := s.in[op.in]; !ok {
				t.Errorf("%s takes %s, which is not there", name, op.in)
			}
			if _, ok := s.out[op.out]; op.out != "" && !ok {
				t.Errorf("%s answers %s, which is not there", name, op.out)
			}
			served++
		}
		for way, shapes := range map[string]map[string]shape{"in": s.in, "out": s.out} {
			for name, sh := range shapes {
				for n, m := range sh {
					if _, ok := shapes[m.typ]; !ok && !m.scalar(s) {
						t.Errorf("%s %s %s.%s is a %s, which is not there", version, way, name, n, m.typ)
					}
				}
			}
		}
	}
	if served != len(handlers) {
		t.Errorf("%d operations in the model, %d served", served, len(handlers))
	}
}

// TestStrict gives requests that the model does not have.
func TestStrict(t *testing.T) {
	c := newClient(t, New(Config{}))
	for _, tt := range []struct {
		code, action string
		params       []string
	}{
		{"InvalidAction", "LaunchInstances", nil},
		{"UnknownParameter", "RunInstances", launch("Subnet", "x")},
		{"UnknownParameter", "RunInstances", launch("subnetid", "x")},
		{"UnknownParameter", "RunInstances", launch("SubnetId.1", "x")},
		{"UnknownParameter", "RunInstances", launch("Placement.Zone", "x")},
		{"UnknownParameter", "RunInstances", launch("NetworkInterface.1.SubnetID", "x")},
		{"UnknownParameter", "RunInstances", launch("BlockDeviceMapping.1.Ebs.Size", "3")},
		{"UnknownParameter", "DescribeInstances", []string{"ClientToken", "x"}},
		{"UnknownParameter", "TerminateInstances", []string{"InstanceIds.1", "i-1"}},
		{"MissingParameter", "RunInstances", []string{"ImageId", DefaultImage, "MinCount", "1"}},
		{"MissingParameter", "TerminateInstances", nil},
		{"MissingParameter", "DeleteVolume", nil},
		{"MissingParameter", "AuthorizeSecurityGroupIngress", nil},
		{"MissingParameter", "AssumeRoleWithWebIdentity", []string{"RoleArn", "x"}},
		{"InvalidParameterValue", "RunInstances", launch("MinCount", "one")},
		{"InvalidParameterValue", "RunInstances", launch("DryRun", "yes")},
		{"InvalidParameterValue", "RunInstances", launch("InstanceInitiatedShutdownBehavior", "explode")},
		{"InvalidParameterValue", "RunInstances", launch("Placement", "x")},
		{"InvalidParameterValue", "RunInstances", launch("SecurityGroupId", "x")},
		{"InvalidParameterValue", "RunInstances", launch("SecurityGroupId.a", "x")},
		{"InvalidParameterValue", "RunInstances", launch("CpuOptions.AmdSevSnp", "maybe")},
		{"InvalidParameterValue", "DescribeInstances", []string{"Filter.1.Name", "colour", "Filter.1.Value.1", "red"}},
		{"InvalidParameterValue", "DescribeInstances", []string{"Filter.1.Name", "tag:a"}},
		{"InvalidParameterValue", "DescribeInstances", []string{"MaxResults", "2"}},
		{"InvalidParameterCombination", "DescribeInstances", []string{"MaxResults", "5", "InstanceId.1", "i-00000000"}},
		{"InvalidNextToken", "DescribeVolumes", []string{"NextToken", "x"}},
		{"InvalidInstanceID.Malformed", "DescribeInstances", []string{"InstanceId.1", ""}},
		{"InvalidInstanceID.Malformed", "TerminateInstances", []string{"InstanceId.1", "i-12"}},
		{"InvalidInstanceID.NotFound", "TerminateInstances", []string{"InstanceId.1", "i-00000000"}},
		{"InvalidVolume.NotFound", "DeleteVolume", []string{"VolumeId", "vol-00000000"}},
		{"InvalidNetworkInterfaceID.NotFound", "DeleteNetworkInterface", []string{"NetworkInterfaceId", "eni-00000000"}},
		{"InvalidInstanceType", "DescribeInstanceTypes", []string{"InstanceType.1", "m99.large"}},
		{"InvalidKeyPair.NotFound", "DescribeKeyPairs", []string{"KeyName.1", "nobody"}},
		{"InvalidPlacementGroup.Unknown", "DescribePlacementGroups", []string{"GroupName.1", "none"}},
		{"InvalidLaunchTemplateName.NotFoundException", "DescribeLaunchTemplates", []string{"LaunchTemplateName.1", "none"}},
		{"InvalidID", "CreateTags", []string{"ResourceId.1", "x", "Tag.1.Key", "a"}},
		{"InvalidParameterValue", "CreateTags", []string{"ResourceId.1", DefaultSubnet, "Tag.1.Key", "aws:a"}},
	} {
		c.fails(tt.code, tt.action, tt.params...)
	}
	if n := len(c.s.Instances()); n != 0 {
		t.Errorf("%d instances were launched by requests that were refused", n)
	}
}

// TestReplies refuses to write what the model does not have.
func TestReplies(t *testing.T) {
	s := schemas[ec2Version]
	op := s.ops["DescribeInstances"]
	for _, o := range []obj{
		{"reservations": []obj{}},
		{"reservationSet": obj{}},
		{"nextToken": 3},
		{"reservationSet": []obj{{"instancesSet": []obj{{"instanceId": true}}}}},
		{"reservationSet": []obj{{"instancesSet": []obj{{"launchTime": "now"}}}}},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("rendered %v", o)
				}
			}()
			s.render(op, o, "x")
		}()
	}
	got := string(s.render(op, obj{"nextToken": "a<b", "reservationSet": []obj{{"instancesSet": []obj{{"instanceId": "i-1", "amiLaunchIndex": 0,
		"launchTime": time.Unix(1, 5e8), "ebsOptimized": false, "keyName": "", "tagSet": []obj{{"key": "k", "value": present("")}}}}}}}, "id"))
	for _, want := range []string{"<DescribeInstancesResponse xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>id</requestId>",
		"<nextToken>a&lt;b</nextToken><reservationSet><item><instancesSet><item><amiLaunchIndex>0</amiLaunchIndex><ebsOptimized>false</ebsOptimized>",
		"<launchTime>1970-01-01T00:00:01.500Z</launchTime><tagSet><item><key>k</key><value></value></item></tagSet>"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s\nlacks %s", got, want)
		}
	}
	if strings.Contains(got, "keyName") {
		t.Error("an empty string was written")
	}
}

// TestDryRun asks of every action whether it would succeed, and finds nothing changed.
func TestDryRun(t *testing.T) {
	s := New(Config{})
	c := newClient(t, s)
	id := c.run()
	d := c.do("DescribeInstances", "InstanceId.1", id)
	volume := d.at("reservationSet/item/instancesSet/item/blockDeviceMapping/item/ebs/volumeId")
	c.do("CreateLaunchTemplate", "LaunchTemplateName", "there", "LaunchTemplateData.InstanceType", "m6a.large")
	spot := c.do("RunInstances", launch("InstanceMarketOptions.MarketType", "spot")...).at("instancesSet/item/spotInstanceRequestId")
	image := c.do("DescribeImages", "ImageId.1", DefaultImage)
	snap := image.at("imagesSet/item/blockDeviceMapping/item/ebs/snapshotId")
	c.do("AuthorizeSecurityGroupIngress", "GroupId", DefaultSecurityGroup, "IpProtocol", "tcp", "FromPort", "1", "ToPort", "1", "CidrIp", "10.0.0.0/8")
	partial := s.Inject(Fault{Action: "RunInstances", Partial: &Error{Code: "InternalError"}, Times: 1})
	c.fails("InternalError", "RunInstances", launch()...)
	if partial() != 1 {
		t.Fatal("no partial launch")
	}
	loose := map[string]string{}
	for _, r := range s.Leaks(map[string]string{"owner": "test"}) {
		if r.State == "available" {
			loose[r.Kind] = r.ID
		}
	}
	free := s.newSnapshot(s.cfg.Now(), 1, nil)
	free.status = "completed"
	valid := map[string][]string{
		"AuthorizeSecurityGroupIngress":  {"GroupId", DefaultSecurityGroup, "IpProtocol", "udp", "FromPort", "9000", "ToPort", "9000", "CidrIp", "10.0.0.0/16"},
		"RevokeSecurityGroupIngress":     {"GroupId", DefaultSecurityGroup, "IpProtocol", "tcp", "FromPort", "1", "ToPort", "1", "CidrIp", "10.0.0.0/8"},
		"CancelSpotInstanceRequests":     {"SpotInstanceRequestId.1", spot},
		"CreateLaunchTemplate":           {"LaunchTemplateName", "new", "LaunchTemplateData.InstanceType", "m6a.large"},
		"CreateTags":                     {"ResourceId.1", id, "Tag.1.Key", "new", "Tag.1.Value", "x"},
		"DeleteTags":                     {"ResourceId.1", id, "Tag.1.Key", "owner"},
		"DeleteLaunchTemplate":           {"LaunchTemplateName", "there"},
		"DescribeLaunchTemplateVersions": {"LaunchTemplateName", "there"},
		"DeleteNetworkInterface":         {"NetworkInterfaceId", loose["network-interface"]},
		"DeleteVolume":                   {"VolumeId", loose["volume"]},
		"DeleteSnapshot":                 {"SnapshotId", free.id},
		"DeregisterImage":                {"ImageId", DefaultImageARM},
		"DescribeInstanceAttribute":      {"InstanceId", id, "Attribute", "userData"},
		"GetConsoleOutput":               {"InstanceId", id},
		"RegisterImage": {"Name", "new", "Architecture", "x86_64", "VirtualizationType", "hvm", "RootDeviceName", "/dev/xvda",
			"BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.SnapshotId", snap},
		"RunInstances":       launch(),
		"StartInstances":     {"InstanceId.1", id},
		"StopInstances":      {"InstanceId.1", id},
		"TerminateInstances": {"InstanceId.1", id},
	}
	before := fmt.Sprint(s.Instances(), s.Leaks(nil), s.groups[DefaultSecurityGroup].rules)
	for action := range schemas[ec2Version].ops {
		params, ok := valid[action]
		if !ok && !strings.HasPrefix(action, "Describe") {
			t.Errorf("%s is not tried", action)
			continue
		}
		c.fails("DryRunOperation", action, append([]string{"DryRun", "true"}, params...)...)
	}
	if after := fmt.Sprint(s.Instances(), s.Leaks(nil), s.groups[DefaultSecurityGroup].rules); after != before {
		t.Errorf("a dry run changed\n%s\nto\n%s", before, after)
	}
	// The same calls without DryRun succeed: what they say is true.
	delete(valid, "TerminateInstances")
	for action, params := range valid {
		if action == "StartInstances" || action == "StopInstances" || action == "DescribeInstanceAttribute" {
			continue // they depend on each other's order
		}
		if action == "DescribeLaunchTemplateVersions" {
			continue
		}
		c.do(action, params...)
	}
	if volume == "" {
		t.Error("no volume is described")
	}
}
