// SPDX-License-Identifier: Apache-2.0

package aws_test

import (
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/prices"
)

// sdk is a plain client of the Server, for what tests prepare.
func sdk(s *fakeec2.Server) *ec2.Client {
	return ec2.New(ec2.Options{
		Region: fakeec2.DefaultRegion, HTTPClient: baseConfig(s).HTTPClient,
		Credentials: credentials.NewStaticCredentialsProvider(fakeec2.DefaultKey.ID, fakeec2.DefaultKey.Secret, ""),
	})
}

// What every launch must say, and what the configuration adds.
func TestLaunch(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s, func(c *aws.Config) {
			c.KeyName, c.PlacementGroup, c.Tenancy, c.RootVolumeGiB = fakeec2.DefaultKeyPair, fakeec2.DefaultPlacementGroup, "dedicated", 30
			c.SubnetIDs = []string{fakeec2.DefaultSubnetB}
		})
		req := request(t, p, "a")
		inst := running(t, p, mustCreate(t, p, req).ID)
		got := alive(s)[0]
		want := fakeec2.Instance{
			ID: string(inst.ID), Type: small, Zone: zoneB, Subnet: fakeec2.DefaultSubnetB, Market: "on-demand", State: "running",
			MetadataTokens: "required", MetadataHops: 1, TerminateOnShutdown: true, SEVSNP: true,
			KeyName: fakeec2.DefaultKeyPair, PlacementGroup: fakeec2.DefaultPlacementGroup, Tenancy: "dedicated",
			RootGiB: 30, RootEncrypted: true, UserData: req.UserData,
			Token: got.Token, Tags: got.Tags, Addr: got.Addr, MAC: got.MAC, Launched: got.Launched,
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		if len(got.Token) != 64 {
			t.Errorf("client token %q", got.Token)
		}
		if len(inst.Addrs) != 1 || inst.Addrs[0] != netip.MustParseAddr(got.Addr) {
			t.Errorf("addresses %v, it has %s", inst.Addrs, got.Addr)
		}
		tags := map[string]string{"team": "blue", cloud.TagName: req.Name, cloud.TagCluster: cluster, cloud.TagNode: node,
			cloud.TagToken: req.Token, cloud.TagSandbox: req.SandboxID, aws.TagRequest: req.Fingerprint()}
		kinds := map[string]int{}
		for _, r := range s.Leaks(nil) {
			if r.Kind == "snapshot" {
				continue // the images'
			}
			kinds[r.Kind]++
			if d := cmp.Diff(tags, r.Tags); d != "" {
				t.Errorf("tags of %s: %s", r, d)
			}
		}
		if d := cmp.Diff(map[string]int{"instance": 1, "volume": 1, "network-interface": 1}, kinds); d != "" {
			t.Error(d)
		}
	})
}

func TestOrdinaryLaunch(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s, func(c *aws.Config) { c.DisableCVM, c.PublicIP, c.Spot = true, true, aws.SpotOnly })
		inst := running(t, p, mustCreate(t, p, request(t, p, "a")).ID)
		got := alive(s)[0]
		if got.SEVSNP || got.Market != "spot" || got.Tenancy != "default" || got.KeyName != "" || got.RootGiB != 1 {
			t.Errorf("made %+v", got)
		}
		if len(inst.Addrs) != 2 || inst.Addrs[0] != netip.MustParseAddr(got.PublicAddr) || inst.Addrs[1] != netip.MustParseAddr(got.Addr) {
			t.Errorf("addresses %v; it has %s and %s", inst.Addrs, got.PublicAddr, got.Addr)
		}
		for _, r := range s.Leaks(nil) {
			if r.Kind != "snapshot" && r.Kind != "address" && r.Tags[cloud.TagCluster] != cluster {
				t.Errorf("%s has no tags of ours", r)
			}
		}
	})
}

// A launch template gives what is not ours to say.
func TestLaunchTemplate(t *testing.T) {
	template := func(t *testing.T, s *fakeec2.Server, data types.RequestLaunchTemplateData) {
		t.Helper()
		_, err := sdk(s).CreateLaunchTemplate(t.Context(), &ec2.CreateLaunchTemplateInput{
			LaunchTemplateName: awssdk.String("kata"), LaunchTemplateData: &data})
		if err != nil {
			t.Fatal(err)
		}
	}
	use := func(c *aws.Config) { c.LaunchTemplate, c.SubnetIDs, c.SecurityGroupIDs = "kata", nil, nil }
	t.Run("network of the template", func(t *testing.T) {
		bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
			template(t, s, types.RequestLaunchTemplateData{
				InstanceType: types.InstanceType(large), KeyName: awssdk.String(fakeec2.DefaultKeyPair), ImageId: awssdk.String(fakeec2.DefaultImageARM),
				DisableApiTermination: awssdk.Bool(true),
				MetadataOptions: &types.LaunchTemplateInstanceMetadataOptionsRequest{
					HttpTokens: types.LaunchTemplateHttpTokensStateOptional, HttpPutResponseHopLimit: awssdk.Int32(3)},
				NetworkInterfaces: []types.LaunchTemplateInstanceNetworkInterfaceSpecificationRequest{{
					DeviceIndex: awssdk.Int32(0), SubnetId: awssdk.String(fakeec2.DefaultSubnetC), Groups: []string{fakeec2.DefaultSecurityGroup}}},
			})
			p := provider(t, s, use)
			req := request(t, p, "a")
			mustCreate(t, p, req)
			got := alive(s)[0]
			if got.Type != small || got.Subnet != fakeec2.DefaultSubnetC || got.KeyName != fakeec2.DefaultKeyPair || !got.SEVSNP ||
				got.MetadataTokens != "required" || got.MetadataHops != 1 || !got.TerminateOnShutdown || !bytes.Equal(got.UserData, req.UserData) {
				t.Errorf("made %+v", got)
			}
			if err := p.Check(t.Context()); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("network of the configuration", func(t *testing.T) {
		bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
			template(t, s, types.RequestLaunchTemplateData{SecurityGroupIds: []string{fakeec2.DefaultSecurityGroup}})
			p := provider(t, s, use, func(c *aws.Config) { c.SubnetIDs = []string{fakeec2.DefaultSubnetB} })
			mustCreate(t, p, request(t, p, "a"))
			if got := alive(s)[0]; got.Subnet != fakeec2.DefaultSubnetB {
				t.Errorf("made %+v", got)
			}
		})
	})
	t.Run("both", func(t *testing.T) {
		bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
			template(t, s, types.RequestLaunchTemplateData{
				NetworkInterfaces: []types.LaunchTemplateInstanceNetworkInterfaceSpecificationRequest{{
					DeviceIndex: awssdk.Int32(0), SubnetId: awssdk.String(fakeec2.DefaultSubnetC)}},
			})
			p := provider(t, s, use, func(c *aws.Config) { c.SubnetIDs = []string{fakeec2.DefaultSubnetB} })
			_, err := p.Create(t.Context(), request(t, p, "a"))
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v, want InvalidArgument", err)
			}
			says(t, err, "launch template", "AWS_SUBNET_ID")
		})
	})
}

// User data beyond EC2's limit goes compressed, and not at all when that is too long.
func TestUserData(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		p := provider(t, s)
		req := request(t, p, "a")
		req.UserData = []byte("#cloud-config\n" + strings.Repeat("# the same again\n", 2000))
		mustCreate(t, p, req)
		sent := alive(s)[0].UserData
		if len(sent) > 16<<10 {
			t.Fatalf("%d bytes of user data", len(sent))
		}
		r, err := gzip.NewReader(bytes.NewReader(sent))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, req.UserData) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		random := rand.New(rand.NewPCG(1, 2))
		noise := make([]byte, 20<<10)
		for i := range noise {
			noise[i] = byte(random.Uint32())
		}
		req = request(t, p, "b")
		req.UserData = noise
		_, err = p.Create(t.Context(), req)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v, want InvalidArgument", err)
		}
		says(t, err, "16384", "PULL_CA_FILE")
	})
}

func TestPlan(t *testing.T) {
	bubble(t, fakeec2.Config{}, func(t *testing.T, s *fakeec2.Server) {
		table, err := prices.Parse("test", "aws\tus-east-1\tm6a.large\t0.09\naws\tus-east-1\tm6a.xlarge\t0.17\naws\tus-east-1\tt3.micro\t0.01\n")
		if err != nil {
			t.Fatal(err)
		}
		p := provider(t, s, func(c *aws.Config) {
			c.InstanceTypes, c.Prices = []string{large, small, "t3.micro"}, table
		})
		plan, err := p.Plan(t.Context(), cloud.Size{VCPUs: 1, MemoryMiB: 100})
		if d := cmp.Diff(cloud.Plan{Type: small, Alternatives: []string{large}, VCPUs: 2, MemoryMiB: 8192, Image: fakeec2.DefaultImage}, plan); err != nil || d != "" {
			t.Errorf("%v %s", err, d)
		}
		choice, err := p.Explain(t.Context(), cloud.Size{VCPUs: 1, MemoryMiB: 100})
		if err != nil || !strings.Contains(choice.Table(), "t3.micro") || !strings.Contains(choice.Table(), "DISABLECVM") {
			t.Errorf("%v\n%s", err, choice.Table())
		}
		if _, err := p.Plan(t.Context(), cloud.Size{Type: "t3.micro"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a type without SEV-SNP: %v", err)
		}
		if _, err := p.Plan(t.Context(), cloud.Size{Image: "ami-00000000000000000"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("an image that does not exist: %v", err)
		}
		if _, err := p.Plan(t.Context(), cloud.Size{Image: "podvm"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("an image's name: %v", err)
		}
		if n := s.Calls("DescribeInstanceTypes"); n != 1 {
			t.Errorf("types were asked for %d times", n)
		}
		gpu := provider(t, s, func(c *aws.Config) {
			c.DisableCVM, c.InstanceTypes = true, []string{small, "g4dn.xlarge"}
		})
		plan, err = gpu.Plan(t.Context(), cloud.Size{GPUs: 1, GPUModel: "T4"})
		if err != nil || plan.Type != "g4dn.xlarge" || plan.GPUs != 1 {
			t.Errorf("%+v, %v", plan, err)
		}
		arm := provider(t, s, func(c *aws.Config) { c.ImageID = fakeec2.DefaultImageARM })
		if _, err := arm.Plan(t.Context(), cloud.Size{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("an image of another architecture: %v", err)
		}
	})
}
