// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// maxUserData is what an instance takes, before base64 (EC2 User Guide, "Run commands
// when you launch an EC2 instance with user data input").
const maxUserData = 16 << 10

// encodeUserData compresses a document that would be too long; guests understand
// both. The result is the same each time, as the idempotency token needs it.
func encodeUserData(doc []byte) (string, error) {
	data := doc
	if len(doc) > maxUserData {
		var b bytes.Buffer
		w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
		if err != nil {
			return "", err
		}
		if _, err := w.Write(doc); err != nil {
			return "", err
		}
		if err := w.Close(); err != nil {
			return "", err
		}
		data = b.Bytes()
	}
	if len(data) > maxUserData {
		return "", fmt.Errorf("the user data has %d bytes, %d compressed, and EC2 takes %d; shorten what PULL_AUTH_FILE and PULL_CA_FILE name: %w",
			len(doc), len(data), maxUserData, errdefs.ErrInvalidArgument)
	}
	return base64.StdEncoding.EncodeToString(data), nil
}

// launch is all that a Create's attempts have in common.
type launch struct {
	req      cloud.CreateRequest
	request  string // the fingerprint of req
	image    imageInfo
	groups   []string
	userData string // as RunInstances takes it
}

// input is the call of one attempt. With a launch template it says what must be ours:
// what the pod asked for, what the configuration says, and what keeps the instance
// closed to its containers and deletable by us. The rest is the template's.
func (p *Provider) input(l launch, a attempt) *ec2.RunInstancesInput {
	in := &ec2.RunInstancesInput{
		MinCount: awssdk.Int32(1), MaxCount: awssdk.Int32(1),
		ClientToken:  awssdk.String(a.Token),
		ImageId:      awssdk.String(l.image.id),
		InstanceType: types.InstanceType(a.Type),
		UserData:     awssdk.String(l.userData),
		// A request to the metadata service from inside a container has one hop
		// more than the guest's own, and user data holds the guest's key.
		MetadataOptions: &types.InstanceMetadataOptionsRequest{
			HttpEndpoint: types.InstanceMetadataEndpointStateEnabled, HttpTokens: types.HttpTokensStateRequired,
			HttpPutResponseHopLimit: awssdk.Int32(1),
		},
		InstanceInitiatedShutdownBehavior: types.ShutdownBehaviorTerminate,
		DisableApiTermination:             awssdk.Bool(false),
		BlockDeviceMappings:               p.disks(l.image),
		TagSpecifications:                 tagSpecifications(l, a),
	}
	if p.cfg.KeyName != "" {
		in.KeyName = awssdk.String(p.cfg.KeyName)
	}
	if p.cfg.LaunchTemplate != "" {
		in.LaunchTemplate = &types.LaunchTemplateSpecification{LaunchTemplateName: awssdk.String(p.cfg.LaunchTemplate)}
	}
	if !p.cfg.DisableCVM {
		in.CpuOptions = &types.CpuOptionsRequest{AmdSevSnp: types.AmdSevSnpSpecificationEnabled}
	}
	if p.cfg.PlacementGroup != "" || p.cfg.Tenancy != "default" {
		in.Placement = &types.Placement{Tenancy: types.Tenancy(p.cfg.Tenancy)}
		if p.cfg.PlacementGroup != "" {
			in.Placement.GroupName = awssdk.String(p.cfg.PlacementGroup)
		}
	}
	if a.Market == marketSpot {
		in.InstanceMarketOptions = &types.InstanceMarketOptionsRequest{MarketType: types.MarketTypeSpot,
			SpotOptions: &types.SpotMarketOptions{
				SpotInstanceType: types.SpotInstanceTypeOneTime, InstanceInterruptionBehavior: types.InstanceInterruptionBehaviorTerminate,
			}}
	}
	p.network(in, l, a)
	return in
}

// network says where the instance goes. Without a template that is one interface,
// spelt out, so that it goes with the instance. Templates that have security groups
// do not go together with interfaces in the call, so that with a template the short
// form is used unless a public address is asked for.
func (p *Provider) network(in *ec2.RunInstancesInput, l launch, a attempt) {
	if p.cfg.LaunchTemplate != "" && !p.cfg.PublicIP {
		if a.Subnet != "" {
			in.SubnetId = awssdk.String(a.Subnet)
		}
		in.SecurityGroupIds = l.groups
		return
	}
	nic := types.InstanceNetworkInterfaceSpecification{
		DeviceIndex: awssdk.Int32(0), DeleteOnTermination: awssdk.Bool(true), Groups: l.groups,
	}
	if a.Subnet != "" {
		nic.SubnetId = awssdk.String(a.Subnet)
	}
	if p.cfg.PublicIP {
		nic.AssociatePublicIpAddress = awssdk.Bool(true)
	}
	in.NetworkInterfaces = []types.InstanceNetworkInterfaceSpecification{nic}
}

// disks are the volumes: the root, which is encrypted and at least as large as the
// image's, and whatever else the image has, to be deleted with the instance.
func (p *Provider) disks(img imageInfo) []types.BlockDeviceMapping {
	root := &types.EbsBlockDevice{
		VolumeType: types.VolumeTypeGp3, Encrypted: awssdk.Bool(true), DeleteOnTermination: awssdk.Bool(true),
	}
	if size := max(img.rootGiB, int32(p.cfg.RootVolumeGiB)); size > 0 {
		root.VolumeSize = awssdk.Int32(size)
	}
	if p.cfg.RootVolumeKMSKey != "" {
		root.KmsKeyId = awssdk.String(p.cfg.RootVolumeKMSKey)
	}
	out := []types.BlockDeviceMapping{{DeviceName: awssdk.String(img.root), Ebs: root}}
	for _, name := range img.disks {
		out = append(out, types.BlockDeviceMapping{DeviceName: awssdk.String(name), Ebs: &types.EbsBlockDevice{DeleteOnTermination: awssdk.Bool(true)}})
	}
	return out
}

// tagSpecifications puts the same tags on everything that the call makes, so that
// there is never anything without them.
func tagSpecifications(l launch, a attempt) []types.TagSpecification {
	own := map[string]string{
		cloud.TagName: l.req.Name, cloud.TagCluster: l.req.Owner.Cluster, cloud.TagNode: l.req.Owner.Node,
		cloud.TagToken: l.req.Token, cloud.TagSandbox: l.req.SandboxID, TagRequest: l.request,
	}
	for k, v := range l.req.Tags {
		own[k] = v
	}
	var tags []types.Tag
	for _, k := range sortedKeys(own) {
		tags = append(tags, types.Tag{Key: awssdk.String(k), Value: awssdk.String(own[k])})
	}
	kinds := []types.ResourceType{types.ResourceTypeInstance, types.ResourceTypeVolume, types.ResourceTypeNetworkInterface}
	if a.Market == marketSpot {
		kinds = append(kinds, types.ResourceTypeSpotInstancesRequest)
	}
	var out []types.TagSpecification
	for _, kind := range kinds {
		out = append(out, types.TagSpecification{ResourceType: kind, Tags: tags})
	}
	return out
}
