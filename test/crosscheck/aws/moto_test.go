// SPDX-License-Identifier: Apache-2.0

//go:build crosscheck

package aws

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// cloudServer is one of the two emulations under comparison, with the ids that calls
// need.
type cloudServer struct {
	name, url string
	ids       map[string]string
}

type node struct {
	XMLName xml.Name
	Text    string `xml:",chardata"`
	Nodes   []node `xml:",any"`
}

// at is the text of the first element at a path, "" if there is none.
func (n node) at(path string) string {
	name, rest, more := strings.Cut(path, "/")
	for _, c := range n.Nodes {
		if c.XMLName.Local == name {
			if !more {
				return c.Text
			}
			if v := c.at(rest); v != "" {
				return v
			}
		}
	}
	return ""
}

// paths adds all paths below n that hold text; elements of lists are one.
func (n node) paths(prefix string, into map[string]bool) {
	for _, c := range n.Nodes {
		p := prefix + "/" + c.XMLName.Local
		if len(c.Nodes) == 0 && strings.TrimSpace(c.Text) != "" {
			into[p] = true
		}
		c.paths(p, into)
	}
}

// call signs and sends a form, in which {name} stands for one of the server's ids.
func (c *cloudServer) call(t *testing.T, action string, params ...string) (int, node) {
	t.Helper()
	form := url.Values{"Action": {action}, "Version": {"2016-11-15"}}
	for i := 0; i < len(params); i += 2 {
		v := regexp.MustCompile(`\{[a-z]+\}`).ReplaceAllStringFunc(params[i+1], func(s string) string {
			id, ok := c.ids[strings.Trim(s, "{}")]
			if !ok {
				t.Fatalf("%s has no %s", c.name, s)
			}
			return id
		})
		form.Set(params[i], v)
	}
	body := form.Encode()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	sum := sha256.Sum256([]byte(body))
	key := fakeec2.DefaultKey
	if err := v4.NewSigner().SignHTTP(t.Context(), aws.Credentials{AccessKeyID: key.ID, SecretAccessKey: key.Secret}, r, hex.EncodeToString(sum[:]),
		"ec2", fakeec2.DefaultRegion, time.Now()); err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", c.name, action, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var n node
	if err := xml.Unmarshal(text, &n); err != nil {
		t.Fatalf("%s %s: %v in %s", c.name, action, err, text)
	}
	return resp.StatusCode, n
}

// startMoto starts moto's server and returns where it listens.
func startMoto(t *testing.T) string {
	cmd := exec.CommandContext(t.Context(), filepath.Join(tools(t), "moto", "bin", "moto_server"), "-H", "127.0.0.1", "-p", "0")
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	listening := regexp.MustCompile(`Running on (http://127\.0\.0\.1:\d+)`)
	var said bytes.Buffer
	for lines.Scan() {
		said.WriteString(lines.Text() + "\n")
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			go io.Copy(io.Discard, out) // until it is killed
			return m[1]
		}
	}
	t.Fatalf("moto did not start: %s", said.String())
	return ""
}

// step is a call to both servers. Of its reply, keep are the ids to remember.
type step struct {
	action string
	params []string
	keep   map[string]string // name of an id -> path in the reply
	again  string            // a path that must have text before the reply counts: things take time
}

// owner tags a type of resource.
func owner(n, kind string) []string {
	p := "TagSpecification." + n + "."
	return []string{p + "ResourceType", kind, p + "Tag.1.Key", "owner", p + "Tag.1.Value", "test"}
}

var steps = []step{
	{action: "DescribeVpcs", keep: map[string]string{"vpc": "vpcSet/item/vpcId"}},
	{action: "DescribeSubnets", params: []string{"Filter.1.Name", "availability-zone", "Filter.1.Value.1", "us-east-1a"}, keep: map[string]string{"subnet": "subnetSet/item/subnetId"}},
	{action: "DescribeAvailabilityZones", params: []string{"ZoneName.1", "us-east-1a"}},
	{action: "DescribeSecurityGroups", params: []string{"Filter.1.Name", "vpc-id", "Filter.1.Value.1", "{vpc}"}, keep: map[string]string{"group": "securityGroupInfo/item/groupId"}},
	{action: "AuthorizeSecurityGroupIngress", params: []string{"GroupId", "{group}", "IpPermissions.1.IpProtocol", "tcp", "IpPermissions.1.FromPort", "15150",
		"IpPermissions.1.ToPort", "15150", "IpPermissions.1.IpRanges.1.CidrIp", "10.1.0.0/16", "IpPermissions.1.IpRanges.1.Description", "agents"}},
	{action: "DescribeSecurityGroups", params: []string{"GroupId.1", "{group}"}},
	{action: "DescribeInstanceTypes", params: []string{"InstanceType.1", "m6a.large", "InstanceType.2", "g4dn.xlarge"}},
	{action: "DescribeInstanceTypeOfferings", params: []string{"LocationType", "availability-zone", "Filter.1.Name", "instance-type", "Filter.1.Value.1", "m6a.large"}},
	{action: "DescribeImages", params: []string{"ImageId.1", "{image}"}, keep: map[string]string{"snapshot": "imagesSet/item/blockDeviceMapping/item/ebs/snapshotId"}},
	{action: "RunInstances", params: slices.Concat([]string{"ImageId", "{image}", "InstanceType", "m6a.large", "MinCount", "1", "MaxCount", "1",
		"SubnetId", "{subnet}", "SecurityGroupId.1", "{group}", "ClientToken", "one", "InstanceInitiatedShutdownBehavior", "terminate",
		"MetadataOptions.HttpTokens", "required", "MetadataOptions.HttpPutResponseHopLimit", "1", "UserData", "aGVsbG8=",
		"BlockDeviceMapping.1.DeviceName", "/dev/sdf", "BlockDeviceMapping.1.Ebs.VolumeSize", "9", "BlockDeviceMapping.1.Ebs.VolumeType", "gp3",
		"BlockDeviceMapping.1.Ebs.Encrypted", "true"}, owner("1", "instance"), owner("2", "volume")),
		keep: map[string]string{"instance": "instancesSet/item/instanceId"}},
	{action: "DescribeInstances", params: []string{"InstanceId.1", "{instance}"}, again: "reservationSet/item/instancesSet/item/blockDeviceMapping/item/ebs/volumeId"},
	{action: "DescribeInstanceStatus", params: []string{"InstanceId.1", "{instance}"}, again: "instanceStatusSet/item/instanceId"},
	{action: "DescribeInstanceAttribute", params: []string{"InstanceId", "{instance}", "Attribute", "userData"}},
	{action: "DescribeInstanceAttribute", params: []string{"InstanceId", "{instance}", "Attribute", "instanceInitiatedShutdownBehavior"}},
	{action: "DescribeVolumes", params: []string{"Filter.1.Name", "attachment.instance-id", "Filter.1.Value.1", "{instance}"}},
	{action: "DescribeNetworkInterfaces", params: []string{"Filter.1.Name", "attachment.instance-id", "Filter.1.Value.1", "{instance}"}},
	{action: "CreateTags", params: []string{"ResourceId.1", "{instance}", "Tag.1.Key", "more", "Tag.1.Value", "x"}},
	{action: "DescribeTags", params: []string{"Filter.1.Name", "resource-id", "Filter.1.Value.1", "{instance}"}},
	{action: "DeleteTags", params: []string{"ResourceId.1", "{instance}", "Tag.1.Key", "more"}},
	{action: "StopInstances", params: []string{"InstanceId.1", "{instance}"}},
	{action: "StartInstances", params: []string{"InstanceId.1", "{instance}"}},
	{action: "CreateLaunchTemplate", params: []string{"LaunchTemplateName", "kata", "LaunchTemplateData.InstanceType", "m6a.large", "LaunchTemplateData.ImageId", "{image}"},
		keep: map[string]string{"template": "launchTemplate/launchTemplateId"}},
	{action: "DescribeLaunchTemplates", params: []string{"LaunchTemplateId.1", "{template}"}},
	{action: "DescribeLaunchTemplateVersions", params: []string{"LaunchTemplateId", "{template}"}},
	{action: "DeleteLaunchTemplate", params: []string{"LaunchTemplateId", "{template}"}},
	{action: "RegisterImage", params: []string{"Name", "own", "Architecture", "x86_64", "VirtualizationType", "hvm", "RootDeviceName", "/dev/xvda", "EnaSupport", "true",
		"BootMode", "uefi", "BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.SnapshotId", "{snapshot}"}, keep: map[string]string{"own": "imageId"}},
	{action: "DescribeImages", params: []string{"ImageId.1", "{own}"}},
	{action: "DescribeSnapshots", params: []string{"SnapshotId.1", "{snapshot}"}},
	{action: "DeregisterImage", params: []string{"ImageId", "{own}"}},
	{action: "RevokeSecurityGroupIngress", params: []string{"GroupId", "{group}", "IpPermissions.1.IpProtocol", "tcp", "IpPermissions.1.FromPort", "15150",
		"IpPermissions.1.ToPort", "15150", "IpPermissions.1.IpRanges.1.CidrIp", "10.1.0.0/16"}},
	{action: "TerminateInstances", params: []string{"InstanceId.1", "{instance}"}},
}

// refusals are calls that both servers refuse, with the same code and status.
var refusals = []step{
	{action: "DescribeInstances", params: []string{"InstanceId.1", "i-0123456789abcdef0"}},
	{action: "TerminateInstances", params: []string{"InstanceId.1", "i-0123456789abcdef0"}},
	{action: "RunInstances", params: []string{"ImageId", "{image}", "InstanceType", "m6a.large", "MinCount", "1", "MaxCount", "1", "SubnetId", "subnet-0123456789abcdef0"}},
	{action: "RunInstances", params: []string{"ImageId", "{image}", "InstanceType", "m6a.large", "MinCount", "1", "MaxCount", "1", "SubnetId", "{subnet}",
		"NetworkInterface.1.DeviceIndex", "0", "NetworkInterface.1.SubnetId", "{subnet}"}},
	{action: "RunInstances", params: []string{"ImageId", "{image}", "InstanceType", "m6a.large", "MinCount", "1", "MaxCount", "1", "DryRun", "true"}},
	{action: "DescribeVolumes", params: []string{"VolumeId.1", "vol-0123456789abcdef0"}},
	{action: "DeleteVolume", params: []string{"VolumeId", "vol-0123456789abcdef0"}},
	{action: "DescribeImages", params: []string{"ImageId.1", "ami-0123456789abcdef9"}},
	{action: "DescribeSubnets", params: []string{"SubnetId.1", "subnet-0123456789abcdef0"}},
	{action: "DescribeVpcs", params: []string{"VpcId.1", "vpc-0123456789abcdef0"}},
	{action: "DescribeSecurityGroups", params: []string{"GroupId.1", "sg-0123456789abcdef9"}},
	{action: "DescribeNetworkInterfaces", params: []string{"NetworkInterfaceId.1", "eni-0123456789abcdef0"}},
	{action: "DeleteSnapshot", params: []string{"SnapshotId", "snap-0123456789abcdef0"}},
	{action: "DescribeKeyPairs", params: []string{"KeyName.1", "nobody"}},
	{action: "DescribeLaunchTemplateVersions", params: []string{"LaunchTemplateName", "nobody"}},
	{action: "DescribeInstanceTypes", params: []string{"InstanceType.1", "m99.large"}},
}

// mayLack are elements that moto writes and fakeec2 does not, and why not.
// A slash at the end stands for all below.
var mayLack = map[string]string{
	"DescribeInstanceTypes/instanceTypeSet/item/ebsInfo/":                                          facts,
	"DescribeInstanceTypes/instanceTypeSet/item/gpuInfo/gpus/item/":                                facts,
	"DescribeInstanceTypes/instanceTypeSet/item/instanceStorageInfo/":                              "no type here has disks of its own",
	"DescribeInstanceTypes/instanceTypeSet/item/networkInfo/":                                      facts,
	"DescribeInstanceTypes/instanceTypeSet/item/nitroTpmInfo/":                                     facts,
	"DescribeInstanceTypes/instanceTypeSet/item/phcSupport":                                        facts,
	"DescribeInstanceTypes/instanceTypeSet/item/processorInfo/sustainedClockSpeedInGhz":            facts,
	"DescribeInstanceTypes/instanceTypeSet/item/rebootMigrationSupport":                            facts,
	"DescribeInstanceTypes/instanceTypeSet/item/vCpuInfo/":                                         facts,
	"DescribeImages/imagesSet/item/description":                                                    "the Config's images have none",
	"DescribeImages/imagesSet/item/imageOwnerAlias":                                                "the images are the account's own",
	"RunInstances/instancesSet/item/blockDeviceMapping/":                                           "the real one's reply to a launch does not know its volumes yet",
	"RunInstances/instancesSet/item/sriovNetSupport":                                               "of instances older than Nitro",
	"DescribeInstances/reservationSet/item/instancesSet/item/sriovNetSupport":                      "of instances older than Nitro",
	"RunInstances/instancesSet/item/networkInterfaceSet/item/description":                          "moto says \"Primary network interface\", the real one nothing",
	"DescribeInstances/reservationSet/item/instancesSet/item/networkInterfaceSet/item/description": "moto says \"Primary network interface\", the real one nothing",
	"DescribeNetworkInterfaces/networkInterfaceSet/item/description":                               "moto says \"Primary network interface\", the real one nothing",
	"DescribeNetworkInterfaces/networkInterfaceSet/item/requesterId":                               "of interfaces that a service of the vendor's has made",
}

// facts is why elements are missing that describe a type further.
const facts = "facts of a type that no client here reads"

// excuse finds the entry of mayLack that covers a path, "" if none does.
func excuse(path string) string {
	if mayLack[path] != "" {
		return path
	}
	for p := range mayLack {
		if strings.HasSuffix(p, "/") && strings.HasPrefix(path, p) {
			return p
		}
	}
	return ""
}

// TestMoto asks fakeec2 and moto the same, and compares which elements their replies
// have: a second opinion on the shapes that both implement.
func TestMoto(t *testing.T) {
	// moto's subnets give public addresses.
	ours := httptest.NewServer(fakeec2.New(fakeec2.Config{Subnets: []fakeec2.Subnet{
		{ID: fakeec2.DefaultSubnet, Zone: "us-east-1a", CIDR: netip.MustParsePrefix("10.0.0.0/24"), PublicIPs: true}}}))
	defer ours.Close()
	servers := []*cloudServer{
		{name: "fakeec2", url: ours.URL, ids: map[string]string{"image": fakeec2.DefaultImage}},
		{name: "moto", url: startMoto(t), ids: map[string]string{}},
	}
	// moto has images of its own.
	_, images := servers[1].call(t, "DescribeImages", "Filter.1.Name", "architecture", "Filter.1.Value.1", "x86_64", "Filter.2.Name", "root-device-type",
		"Filter.2.Value.1", "ebs", "Filter.3.Name", "name", "Filter.3.Value.1", "amzn-ami-hvm-*")
	servers[1].ids["image"] = images.at("imagesSet/item/imageId")
	used := map[string]bool{}
	for _, st := range steps {
		t.Run(st.action, func(t *testing.T) {
			var have [2]map[string]bool
			for i, s := range servers {
				status, reply := s.call(t, st.action, st.params...)
				for st.again != "" && reply.at(st.again) == "" {
					if t.Context().Err() != nil {
						t.FailNow()
					}
					status, reply = s.call(t, st.action, st.params...)
				}
				if status != http.StatusOK {
					t.Fatalf("%s refused it: %v", s.name, reply)
				}
				for name, path := range st.keep {
					if s.ids[name] = reply.at(path); s.ids[name] == "" {
						t.Fatalf("%s has no %s", s.name, path)
					}
				}
				have[i] = map[string]bool{}
				reply.paths("", have[i])
			}
			for _, p := range slices.Sorted(maps.Keys(have[1])) {
				if have[0][p] {
					continue
				}
				if e := excuse(st.action + p); e != "" {
					used[e] = true
				} else {
					t.Errorf("moto answers %s%s, fakeec2 does not", st.action, p)
				}
			}
			both := 0
			for p := range have[0] {
				if have[1][p] {
					both++
				}
			}
			t.Logf("%d elements in both, %d in fakeec2 only", both, len(have[0])-both)
		})
	}
	for p := range mayLack {
		if !used[p] {
			t.Errorf("%s is on the list of what fakeec2 lacks, and it does not lack it", p)
		}
	}
	for _, st := range refusals {
		t.Run("refused/"+st.action, func(t *testing.T) {
			var said [2]string
			for i, s := range servers {
				status, reply := s.call(t, st.action, st.params...)
				said[i] = strings.TrimSpace(strings.Join([]string{reply.at("Errors/Error/Code"), http.StatusText(status)}, " "))
			}
			if said[0] != said[1] {
				t.Errorf("%v: fakeec2 says %s, moto %s", st.params, said[0], said[1])
			}
		})
	}
}
