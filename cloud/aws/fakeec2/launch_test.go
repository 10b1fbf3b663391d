// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/base64"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestClientToken(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now, StartTime: 5 * time.Second, StopTime: 20 * time.Second})
	c := newClient(t, s)
	first := c.run("ClientToken", "t")
	now.add(10 * time.Second)
	again := c.do("RunInstances", launch("ClientToken", "t")...)
	if id := again.at("instancesSet/item/instanceId"); id != first {
		t.Errorf("the same token made %s and %s", first, id)
	}
	if state := again.at("instancesSet/item/instanceState/name"); state != running {
		t.Errorf("a replay says %s of a running instance", state)
	}
	c.fails("IdempotentParameterMismatch", "RunInstances", launch("ClientToken", "t", "InstanceType", "m6a.xlarge")...)
	c.fails("IdempotentParameterMismatch", "RunInstances", launch("ClientToken", "t", "UserData", "YQ==")...)
	// A token is of its zone: in another it launches another instance.
	if id := c.run("ClientToken", "t", "SubnetId", DefaultSubnetB); id == first {
		t.Error("a token reached into another zone")
	}
	if id := c.run("ClientToken", "T"); id == first {
		t.Error("tokens are the same whatever their case")
	}
	if got := c.do("DescribeInstances", "Filter.1.Name", "client-token", "Filter.1.Value.1", "t").all("reservationSet/item"); len(got) != 2 {
		t.Errorf("%d launches with the token, want 2", len(got))
	}
	// Without a zone it is the region's.
	regional := []string{"ImageId", DefaultImage, "InstanceType", "m6a.large", "MinCount", "1", "MaxCount", "1", "ClientToken", "t"}
	r1 := c.do("RunInstances", regional...).at("instancesSet/item/instanceId")
	if r2 := c.do("RunInstances", regional...).at("instancesSet/item/instanceId"); r1 != r2 {
		t.Errorf("a regional token made %s and %s", r1, r2)
	}
	c.fails("InvalidParameterValue", "RunInstances", launch("ClientToken", strings.Repeat("x", 65))...)

	c.do("TerminateInstances", "InstanceId.1", first)
	now.add(23 * time.Hour)
	dead := c.do("RunInstances", launch("ClientToken", "t")...)
	if id, state := dead.at("instancesSet/item/instanceId"), dead.at("instancesSet/item/instanceState/name"); id != first || state != terminated {
		t.Errorf("the token of a terminated instance gave %s, %s; want %s, terminated", id, state, first)
	}
	s.cfg.ForgetTerminated = true
	c.fails("IdempotentInstanceTerminated", "RunInstances", launch("ClientToken", "t")...)
	now.add(2 * time.Hour)
	if id := c.run("ClientToken", "t"); id == first {
		t.Error("a token lives for ever")
	}
}

// TestRefusals are launches that the service refuses, and why.
func TestRefusals(t *testing.T) {
	s := New(Config{
		Images: []Image{{ID: DefaultImage, BootMode: "uefi", RootGiB: 2}, {ID: DefaultImageARM, Architecture: "arm64"},
			{ID: "ami-00000001", Architecture: "arm64", BootMode: "legacy-bios"}, {ID: "ami-00000002"}},
		VPCs:           []VPC{{ID: DefaultVPC, CIDR: netip.MustParsePrefix("10.0.0.0/16")}, {ID: "vpc-00000001", CIDR: netip.MustParsePrefix("10.9.0.0/16")}},
		SecurityGroups: []SecurityGroup{{ID: DefaultSecurityGroup, Name: "peer-pods"}, {ID: "sg-00000001", Name: "other", VPC: "vpc-00000001"}},
	})
	c := newClient(t, s)
	big := base64.StdEncoding.EncodeToString(make([]byte, 16<<10+1))
	for _, tt := range []struct {
		code string
		text string // part of the message
		more []string
	}{
		{"InvalidAMIID.NotFound", "The image id '[ami-0000000f]' does not exist", []string{"ImageId", "ami-0000000f"}},
		{"InvalidAMIID.Malformed", `Invalid id: "ami" (expecting "ami-...")`, []string{"ImageId", "ami"}},
		{"InvalidParameterValue", "Invalid value 'm9.huge' for InstanceType", []string{"InstanceType", "m9.huge"}},
		{"InvalidParameterValue", "does not match the architecture 'arm64'", []string{"ImageId", DefaultImageARM}},
		{"InvalidParameterValue", "boot mode 'legacy-bios'", []string{"ImageId", "ami-00000001", "InstanceType", "m7g.large"}},
		{"InvalidSubnetID.NotFound", "The subnet ID 'subnet-00000000' does not exist", []string{"SubnetId", "subnet-00000000"}},
		{"VPCIdNotSpecified", "No default VPC", []string{"SubnetId", none}},
		{"InvalidGroup.NotFound", "The security group 'sg-00000000' does not exist", []string{"SecurityGroupId.1", "sg-00000000"}},
		{"InvalidParameter", "different networks", []string{"SecurityGroupId.1", "sg-00000001"}},
		{"InvalidKeyPair.NotFound", "'nobody'", []string{"KeyName", "nobody"}},
		{"InvalidPlacementGroup.Unknown", "'none'", []string{"Placement.GroupName", "none"}},
		{"InvalidParameterValue", "User data is limited to 16384 bytes", []string{"UserData", big}},
		{"InvalidUserData.Malformed", "BASE64", []string{"UserData", "%%"}},
		{"InvalidParameterCombination", "instance-level subnet ID", []string{"NetworkInterface.1.DeviceIndex", "0"}},
		{"InvalidParameterCombination", "security groups", []string{"SubnetId", none, "NetworkInterface.1.DeviceIndex", "0", "NetworkInterface.1.SubnetId", DefaultSubnet,
			"SecurityGroupId.1", DefaultSecurityGroup}},
		{"InvalidParameterCombination", "does not support AMD SEV-SNP", []string{"InstanceType", "m6i.large", "CpuOptions.AmdSevSnp", "enabled"}},
		{"InvalidParameterCombination", "does not support AMD SEV-SNP", []string{"InstanceType", "m6a.12xlarge", "CpuOptions.AmdSevSnp", "enabled"}},
		{"InvalidParameterCombination", "boot mode uefi", []string{"ImageId", "ami-00000002", "CpuOptions.AmdSevSnp", "enabled"}},
		{"InvalidParameterValue", "MinCount", []string{"MinCount", "2"}},
		{"InvalidParameterValue", "Invalid availability zone: [us-east-1z]", []string{"Placement.AvailabilityZone", "us-east-1z"}},
		{"InvalidBlockDeviceMapping", "smaller than snapshot", []string{"BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.VolumeSize", "1"}},
		{"InvalidParameterCombination", "KmsKeyId", []string{"BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.KmsKeyId", "k"}},
		{"InvalidParameterValue", "taggable", []string{"TagSpecification.4.ResourceType", "vpc", "TagSpecification.4.Tag.1.Key", "a"}},
		{"InvalidParameterValue", "more than one", []string{"TagSpecification.4.ResourceType", "volume", "TagSpecification.4.Tag.1.Key", "a"}},
		{"InvalidParameterValue", "reserved", []string{"TagSpecification.1.Tag.2.Key", "aws:x"}},
		{"InvalidParameterValue", "256", []string{"TagSpecification.1.Tag.2.Key", "x", "TagSpecification.1.Tag.2.Value", strings.Repeat("x", 257)}},
		{"InvalidParameterCombination", "On-Demand", []string{"TagSpecification.4.ResourceType", "spot-instances-request", "TagSpecification.4.Tag.1.Key", "a"}},
		{"InvalidParameterValue", "1-64", []string{"MetadataOptions.HttpPutResponseHopLimit", "0"}},
		{"InvalidLaunchTemplateName.NotFoundException", "lost", []string{"LaunchTemplate.LaunchTemplateName", "lost"}},
		{"UnsupportedOperation", "Ipv6AddressCount", []string{"Ipv6AddressCount", "1"}},
		{"UnsupportedOperation", "NetworkInterface.InterfaceType", []string{"SubnetId", none, "NetworkInterface.1.DeviceIndex", "0", "NetworkInterface.1.InterfaceType", "efa"}},
		{"InvalidParameterValue", "does not fall within", []string{"PrivateIpAddress", "10.0.1.9"}},
	} {
		_, err := c.try("RunInstances", launch(tt.more...)...)
		e, ok := err.(*Error)
		if !ok || e.Code != tt.code || !strings.Contains(e.Message, tt.text) {
			t.Errorf("%v: %v; want %s with %q", tt.more, err, tt.code, tt.text)
		}
	}
	if l := s.Leaks(map[string]string{"owner": "test"}); len(l) != 0 {
		t.Errorf("refused launches left %v", l)
	}
}

// TestRoom fills zones, quotas and subnets.
func TestRoom(t *testing.T) {
	types := append([]InstanceType{{Name: "z1.large", VCPUs: 2, MemoryMiB: 1024, Zones: []string{"us-east-1b"}}}, Types...)
	now := newClock()
	s := New(Config{Types: types, Now: now.now})
	c := newClient(t, s)
	s.SetCapacity(Capacity{Type: "m6a.large", Zone: "us-east-1a", Free: 1})
	s.SetCapacity(Capacity{Type: "m6a.xlarge", Free: 0})
	s.SetCapacity(Capacity{Market: "spot", Zone: "us-east-1b", Free: 0})
	first := c.run()
	_, err := c.try("RunInstances", launch()...)
	if e, ok := err.(*Error); !ok || e.Code != "InsufficientInstanceCapacity" || e.Status != 500 || !strings.Contains(e.Message, "choosing us-east-1b, us-east-1c.") {
		t.Errorf("a full zone: %v", err)
	}
	c.run("SubnetId", DefaultSubnetB)
	if z := c.do("RunInstances", "ImageId", DefaultImage, "InstanceType", "m6a.large", "MinCount", "1", "MaxCount", "1").at("instancesSet/item/placement/availabilityZone"); z != "us-east-1b" {
		t.Errorf("without a subnet the launch went to %s, want the first zone with room", z)
	}
	c.fails("InsufficientInstanceCapacity", "RunInstances", launch("InstanceType", "m6a.xlarge", "SubnetId", DefaultSubnetC)...)
	c.fails("InsufficientInstanceCapacity", "RunInstances", launch("SubnetId", DefaultSubnetB, "InstanceMarketOptions.MarketType", "spot")...)
	c.fails("Unsupported", "RunInstances", launch("InstanceType", "z1.large")...)
	c.do("TerminateInstances", "InstanceId.1", first)
	c.run() // its place is free again
	s.SetCapacity(Capacity{Type: "m6a.large", Zone: "us-east-1a", Free: -1})

	s.SetQuota("standard", 8)
	c.fails("VcpuLimitExceeded", "RunInstances", launch("InstanceType", "m6a.2xlarge")...)
	c.run("InstanceType", "g4dn.xlarge") // of another quota
	s.SetQuota("spot", 1)
	c.fails("MaxSpotInstanceCountExceeded", "RunInstances", launch("InstanceMarketOptions.MarketType", "spot")...)
	s.SetQuota("standard", -1)

	small := New(Config{Subnets: []Subnet{{ID: DefaultSubnet, Zone: "us-east-1a", CIDR: netip.MustParsePrefix("10.0.0.0/24"), Free: 2}}})
	c = newClient(t, small)
	a := c.do("RunInstances", launch()...)
	c.run()
	c.fails("InsufficientFreeAddressesInSubnet", "RunInstances", launch()...)
	c.do("TerminateInstances", "InstanceId.1", a.at("instancesSet/item/instanceId"))
	b := c.do("RunInstances", launch()...)
	if x, y := a.at("instancesSet/item/privateIpAddress"), b.at("instancesSet/item/privateIpAddress"); x != "10.0.0.4" || x != y {
		t.Errorf("addresses %s and %s, want 10.0.0.4 for both", x, y)
	}
	if n := c.do("DescribeSubnets").at("subnetSet/item/availableIpAddressCount"); n != "0" {
		t.Errorf("the full subnet says %s addresses are free", n)
	}
}

// TestBelongings are the volumes and interfaces of an instance, and what becomes of
// them.
func TestBelongings(t *testing.T) {
	s := New(Config{})
	c := newClient(t, s)
	id := c.run("SubnetId", none, "NetworkInterface.1.SubnetId", DefaultSubnetB, "NetworkInterface.1.DeviceIndex", "0",
		"NetworkInterface.1.SecurityGroupId.1", DefaultSecurityGroup, "NetworkInterface.1.AssociatePublicIpAddress", "true",
		"NetworkInterface.1.DeleteOnTermination", "false", "BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.VolumeSize", "7",
		"BlockDeviceMapping.1.Ebs.Encrypted", "true", "BlockDeviceMapping.2.DeviceName", "/dev/sdb", "BlockDeviceMapping.2.Ebs.VolumeSize", "9",
		"BlockDeviceMapping.2.Ebs.DeleteOnTermination", "false")
	i := c.do("DescribeInstances", "InstanceId.1", id).all("reservationSet/item/instancesSet/item")[0]
	if i.at("ipAddress") == "" || i.at("subnetId") != DefaultSubnetB || i.at("groupSet/item/groupId") != DefaultSecurityGroup ||
		i.at("placement/availabilityZone") != "us-east-1b" || len(i.all("blockDeviceMapping/item")) != 2 {
		t.Errorf("instance %+v", s.Instances()[0])
	}
	v := c.do("DescribeVolumes", "Filter.1.Name", "attachment.instance-id", "Filter.1.Value.1", id, "Filter.2.Name", "size", "Filter.2.Value.1", "7").all("volumeSet/item")
	if len(v) != 1 || v[0].at("encrypted") != "true" || v[0].at("volumeType") != "gp3" || v[0].at("iops") != "3000" || v[0].at("tagSet/item/key") != "owner" {
		t.Errorf("root volume %v", v)
	}
	eni := i.at("networkInterfaceSet/item/networkInterfaceId")
	c.fails("InvalidParameterValue", "DeleteNetworkInterface", "NetworkInterfaceId", eni)
	c.fails("VolumeInUse", "DeleteVolume", "VolumeId", v[0].at("volumeId"))
	if l := s.Leaks(map[string]string{"owner": "test"}); len(l) != 5 { // instance, two volumes, interface, address
		t.Errorf("while it runs: %v", l)
	}
	c.do("TerminateInstances", "InstanceId.1", id)
	l := s.Leaks(map[string]string{"owner": "test"})
	if len(l) != 2 || l[0].Kind != "volume" || l[1].Kind != "network-interface" || l[1].ID != eni {
		t.Fatalf("after its end: %v; want the volume and the interface that were to stay", l)
	}
	i = c.do("DescribeInstances", "InstanceId.1", id).all("reservationSet/item/instancesSet/item")[0]
	if i.at("privateIpAddress") != "" || i.at("stateReason/code") != "Client.UserInitiatedShutdown" {
		t.Errorf("a terminated instance still has the address %q; reason %q", i.at("privateIpAddress"), i.at("stateReason/code"))
	}
	c.do("DeleteVolume", "VolumeId", l[0].ID)
	c.do("DeleteNetworkInterface", "NetworkInterfaceId", eni)
	if l := s.Leaks(nil); len(l) != 0 {
		t.Errorf("at the end: %v", l)
	}
}

// TestTemplate launches from a template, with parameters that win over it.
func TestTemplate(t *testing.T) {
	s := New(Config{})
	c := newClient(t, s)
	c.do("CreateLaunchTemplate", "LaunchTemplateName", "kata", "LaunchTemplateData.InstanceType", "m6a.xlarge", "LaunchTemplateData.KeyName", DefaultKeyPair,
		"LaunchTemplateData.ImageId", DefaultImage, "LaunchTemplateData.MetadataOptions.HttpTokens", "required",
		"LaunchTemplateData.SecurityGroupId.1", DefaultSecurityGroup)
	c.fails("InvalidLaunchTemplateName.AlreadyExistsException", "CreateLaunchTemplate", "LaunchTemplateName", "kata", "LaunchTemplateData.InstanceType", "m6a.large")
	c.do("RunInstances", "LaunchTemplate.LaunchTemplateName", "kata", "LaunchTemplate.Version", "$Latest", "InstanceType", "m6a.large",
		"SubnetId", DefaultSubnet, "MinCount", "1", "MaxCount", "1")
	i := s.Instances()[0]
	if i.Type != "m6a.large" || i.KeyName != DefaultKeyPair || i.MetadataTokens != "required" || i.Tags["aws:ec2launchtemplate:version"] != "1" {
		t.Errorf("instance %+v", i)
	}
	v := c.do("DescribeLaunchTemplateVersions", "LaunchTemplateName", "kata").all("launchTemplateVersionSet/item")
	if len(v) != 1 || v[0].at("launchTemplateData/metadataOptions/httpTokens") != "required" {
		t.Errorf("versions %v", v)
	}
	c.fails("InvalidLaunchTemplateId.VersionNotFound", "RunInstances", "LaunchTemplate.LaunchTemplateName", "kata", "LaunchTemplate.Version", "7", "MinCount", "1", "MaxCount", "1")
}
