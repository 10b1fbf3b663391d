// SPDX-License-Identifier: Apache-2.0

package cloudbed

import (
	"time"

	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// aws is one region of EC2 with one subnet.
type aws struct {
	*fakeec2.Server
	before map[string]bool // ids of what was there from the start: the image's snapshot
}

// awsLag is how long EC2's answers are behind at most. The real one's seconds would
// only be waited for.
const awsLag = time.Second

func newAWS(cfg Config, host emulation.Host) provider {
	a := aws{before: map[string]bool{}, Server: fakeec2.New(fakeec2.Config{
		MaxLag: awsLag, StartTime: cfg.InstanceTime, StopTime: cfg.InstanceTime, Throttle: true,
		Subnets:  []fakeec2.Subnet{{ID: fakeec2.DefaultSubnet, Zone: fakeec2.DefaultRegion + "a", CIDR: subnet.Masked(), Gateway: subnet.Addr()}},
		Images:   []fakeec2.Image{{ID: fakeec2.DefaultImage, Name: "podvm", BootMode: "uefi", File: cfg.Image}},
		Host:     host,
		ImageDir: cfg.Dir,
	})}
	for _, r := range a.Leaks(nil) {
		a.before[r.ID] = true
	}
	return a
}

func (a aws) env(url string) []string {
	key := fakeec2.DefaultKey
	return []string{
		"AWS_ENDPOINT_URL=" + url,
		"AWS_ACCESS_KEY_ID=" + key.ID,
		"AWS_SECRET_ACCESS_KEY=" + key.Secret,
		"AWS_REGION=" + fakeec2.DefaultRegion,
		"AWS_VPC_ID=" + fakeec2.DefaultVPC,
		"AWS_SUBNET_ID=" + fakeec2.DefaultSubnet,
		"AWS_SG_IDS=" + fakeec2.DefaultSecurityGroup,
		"PODVM_AMI_ID=" + fakeec2.DefaultImage,
		"PODVM_INSTANCE_TYPE=t3.medium",
		"PODVM_INSTANCE_TYPES=t3.small,t3.medium,t3.large",
		"SSH_KP_NAME=" + fakeec2.DefaultKeyPair,
		"DISABLECVM=true",
	}
}

func (a aws) leaks() error {
	var left []string
	for _, r := range a.Leaks(nil) {
		if !a.before[r.ID] {
			left = append(left, r.String())
		}
	}
	return leftIn(left)
}

func (a aws) close() { a.Close() }
