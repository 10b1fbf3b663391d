// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"strings"
	"testing"
)

func TestFiltersAndPages(t *testing.T) {
	c := newClient(t, New(Config{}))
	var ids []string
	for i := range 12 {
		ids = append(ids, c.run("TagSpecification.1.Tag.2.Key", "n", "TagSpecification.1.Tag.2.Value", itoa(i), "ClientToken", "t"+itoa(i)))
	}
	for _, tt := range []struct {
		want   int
		filter []string
	}{
		{12, nil},
		{12, []string{"tag:owner", "test"}},
		{0, []string{"tag:owner", "tes"}},
		{0, []string{"tag:Owner", "test"}},
		{12, []string{"tag:owner", "t*t"}},
		{2, []string{"tag:n", "1?"}},
		{3, []string{"tag:n", "1*"}},
		{0, []string{"tag:n", `\*`}},
		{12, []string{"tag-key", "own*"}},
		{1, []string{"client-token", "t3"}},
		{12, []string{"instance-state-name", running}},
		{12, []string{"instance-state-code", "16"}},
		{12, []string{"subnet-id", DefaultSubnet}},
		{0, []string{"subnet-id", DefaultSubnetB}},
		{12, []string{"instance-type", "m6a.*"}},
	} {
		var params []string
		if tt.filter != nil {
			params = []string{"Filter.1.Name", tt.filter[0], "Filter.1.Value.1", tt.filter[1]}
		}
		if got := len(c.do("DescribeInstances", params...).all("reservationSet/item/instancesSet/item")); got != tt.want {
			t.Errorf("%v: %d instances, want %d", tt.filter, got, tt.want)
		}
	}
	both := c.do("DescribeInstances", "Filter.1.Name", "tag:n", "Filter.1.Value.1", "1", "Filter.1.Value.2", "2", "Filter.2.Name", "client-token",
		"Filter.2.Value.1", "t2").all("reservationSet/item/instancesSet/item")
	if len(both) != 1 || both[0].at("instanceId") != ids[2] {
		t.Errorf("two filters: %v", both)
	}
	var got []string
	token, pages := "", 0
	for {
		out := c.do("DescribeInstances", "MaxResults", "5", "NextToken", token)
		for _, i := range out.all("reservationSet/item/instancesSet/item") {
			got = append(got, i.at("instanceId"))
		}
		pages++
		if token = out.at("nextToken"); token == "" {
			break
		}
		if pages == 1 { // what is launched meanwhile comes on the last page
			ids = append(ids, c.run())
		}
	}
	if strings.Join(got, " ") != strings.Join(ids, " ") || pages != 3 {
		t.Errorf("%d pages: %v, want %v", pages, got, ids)
	}
	many := c.do("RunInstances", launch("MinCount", "2", "MaxCount", "3")...)
	if n := len(many.all("instancesSet/item")); n != 3 {
		t.Errorf("a launch of two or three made %d", n)
	}
	r := c.do("DescribeInstances", "Filter.1.Name", "reservation-id", "Filter.1.Value.1", many.at("reservationId"))
	if len(r.all("reservationSet/item")) != 1 || len(r.all("reservationSet/item/instancesSet/item")) != 3 {
		t.Error("the instances of one launch are not in one reservation")
	}
	// Only a list of ids gives a status to what does not run.
	c.do("StopInstances", "InstanceId.1", ids[0])
	if n := len(c.do("DescribeInstanceStatus").all("instanceStatusSet/item")); n != 15 {
		t.Errorf("%d statuses, want 15", n)
	}
	if n := len(c.do("DescribeInstanceStatus", "IncludeAllInstances", "true").all("instanceStatusSet/item")); n != 16 {
		t.Errorf("%d statuses of all, want 16", n)
	}
}

func TestCatalog(t *testing.T) {
	s := New(Config{Types: append([]InstanceType{{Name: "z1.large", VCPUs: 2, MemoryMiB: 1024, Zones: []string{"us-east-1b"}}}, Types...)})
	c := newClient(t, s)
	info := c.do("DescribeInstanceTypes", "InstanceType.1", "g5.12xlarge", "InstanceType.2", "m6a.large", "InstanceType.3", "m7g.large").all("instanceTypeSet/item")
	if len(info) != 3 {
		t.Fatalf("%d types", len(info))
	}
	for i, want := range []string{
		"g5.12xlarge 48 196608 x86_64  4 A10G",
		"m6a.large 2 8192 x86_64 amd-sev-snp  ",
		"m7g.large 2 8192 arm64   ",
	} {
		x := info[i]
		got := strings.Join([]string{x.at("instanceType"), x.at("vCpuInfo/defaultVCpus"), x.at("memoryInfo/sizeInMiB"),
			x.at("processorInfo/supportedArchitectures/item"), x.at("processorInfo/supportedFeatures/item"),
			x.at("gpuInfo/gpus/item/count"), x.at("gpuInfo/gpus/item/name")}, " ")
		if got != want {
			t.Errorf("type %q, want %q", got, want)
		}
	}
	all, token := 0, ""
	for {
		out := c.do("DescribeInstanceTypes", "NextToken", token)
		all += len(out.all("instanceTypeSet/item"))
		if token = out.at("nextToken"); token == "" {
			break
		}
	}
	if all != len(s.types) {
		t.Errorf("%d types on all pages, want %d", all, len(s.types))
	}
	o := c.do("DescribeInstanceTypeOfferings", "LocationType", "availability-zone", "Filter.1.Name", "instance-type", "Filter.1.Value.1", "z1.large",
		"Filter.1.Value.2", "m6a.large").all("instanceTypeOfferingSet/item")
	if len(o) != 4 {
		t.Errorf("%d offerings, want 4", len(o))
	}
	if z := c.do("DescribeAvailabilityZones").all("availabilityZoneInfo/item"); len(z) != 3 || z[0].at("zoneName") != "us-east-1a" {
		t.Errorf("zones %v", z)
	}
	if k := c.do("DescribeKeyPairs", "KeyName.1", DefaultKeyPair).all("keySet/item"); len(k) != 1 {
		t.Errorf("key pairs %v", k)
	}
	if k := c.do("DescribePlacementGroups", "GroupName.1", DefaultPlacementGroup).all("placementGroupSet/item"); len(k) != 1 {
		t.Errorf("placement groups %v", k)
	}
	if v := c.do("DescribeVpcs", "Filter.1.Name", "is-default", "Filter.1.Value.1", "true").all("vpcSet/item"); len(v) != 1 || v[0].at("vpcId") != DefaultVPC {
		t.Errorf("VPCs %v", v)
	}
	if v := c.do("DescribeSubnets", "Filter.1.Name", "vpc-id", "Filter.1.Value.1", DefaultVPC, "Filter.2.Name", "availability-zone", "Filter.2.Value.1", "us-east-1b").all("subnetSet/item"); len(v) != 1 || v[0].at("subnetId") != DefaultSubnetB {
		t.Errorf("subnets %v", v)
	}
}

func TestTags(t *testing.T) {
	c := newClient(t, New(Config{}))
	id := c.run()
	c.do("CreateTags", "ResourceId.1", id, "ResourceId.2", DefaultSecurityGroup, "Tag.1.Key", "a", "Tag.1.Value", "1", "Tag.2.Key", "b", "Tag.2.Value", "2")
	c.do("DeleteTags", "ResourceId.1", id, "Tag.1.Key", "a", "Tag.1.Value", "other", "Tag.2.Key", "b")
	tags := c.do("DescribeTags", "Filter.1.Name", "resource-id", "Filter.1.Value.1", id).all("tagSet/item")
	var got []string
	for _, x := range tags {
		got = append(got, x.at("resourceType")+" "+x.at("key")+"="+x.at("value"))
	}
	if strings.Join(got, ", ") != "instance a=1, instance owner=test" {
		t.Errorf("tags %v", got)
	}
	c.do("DeleteTags", "ResourceId.1", id)
	if n := len(c.do("DescribeTags", "Filter.1.Name", "key", "Filter.1.Value.1", "a").all("tagSet/item")); n != 1 {
		t.Errorf("%d things with the tag, want the security group", n)
	}
	var fifty []string
	for i := range 51 {
		fifty = append(fifty, "Tag."+itoa(i+1)+".Key", "k"+itoa(i))
	}
	c.fails("TagLimitExceeded", "CreateTags", append([]string{"ResourceId.1", id}, fifty...)...)
	c.fails("InvalidParameterValue", "CreateTags", "ResourceId.1", id, "Tag.1.Key", strings.Repeat("x", 129))
	c.fails("InvalidInstanceID.NotFound", "CreateTags", "ResourceId.1", "i-00000000", "Tag.1.Key", "a")
}

func TestIngress(t *testing.T) {
	c := newClient(t, New(Config{}))
	open := []string{"GroupId", DefaultSecurityGroup, "IpPermissions.1.IpProtocol", "tcp", "IpPermissions.1.FromPort", "15150", "IpPermissions.1.ToPort", "15150",
		"IpPermissions.1.IpRanges.1.CidrIp", "10.0.0.0/16", "IpPermissions.2.IpProtocol", "17", "IpPermissions.2.FromPort", "9000", "IpPermissions.2.ToPort", "9000",
		"IpPermissions.2.Groups.1.GroupId", DefaultSecurityGroup}
	rules := c.do("AuthorizeSecurityGroupIngress", open...).all("securityGroupRuleSet/item")
	if len(rules) != 2 || rules[1].at("ipProtocol") != "udp" || rules[1].at("referencedGroupInfo/groupId") != DefaultSecurityGroup {
		t.Errorf("rules %v", rules)
	}
	c.fails("InvalidPermission.Duplicate", "AuthorizeSecurityGroupIngress", open...)
	c.fails("InvalidParameterValue", "AuthorizeSecurityGroupIngress", "GroupId", DefaultSecurityGroup, "IpProtocol", "tcp", "CidrIp", "10.0.0.0/8")
	c.fails("InvalidParameterValue", "AuthorizeSecurityGroupIngress", "GroupId", DefaultSecurityGroup, "IpProtocol", "tcp", "FromPort", "1", "ToPort", "2", "CidrIp", "10.0.0.0")
	c.fails("InvalidGroup.NotFound", "AuthorizeSecurityGroupIngress", "GroupId", "sg-00000000", "IpProtocol", "-1", "CidrIp", "10.0.0.0/8")
	g := c.do("DescribeSecurityGroups", "GroupId.1", DefaultSecurityGroup).all("securityGroupInfo/item")[0]
	if p := g.all("ipPermissions/item"); len(p) != 2 || p[0].at("fromPort") != "15150" || p[0].at("ipRanges/item/cidrIp") != "10.0.0.0/16" {
		t.Errorf("permissions %v", p)
	}
	c.do("RevokeSecurityGroupIngress", open[:10]...)
	c.fails("InvalidPermission.NotFound", "RevokeSecurityGroupIngress", open[:10]...)
}
