// SPDX-License-Identifier: Apache-2.0

package cloudbed

import (
	"time"

	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// azure is one subscription with one resource group and subnet.
type azure struct{ *fakearm.Server }

func newAzure(cfg Config, host emulation.Host) provider {
	c := fakearm.Config{
		Subnets: []fakearm.Subnet{{CIDR: subnet.Masked(), Gateway: subnet.Addr()}},
		Timing: fakearm.Timing{
			Start: cfg.InstanceTime, Create: cfg.InstanceTime + 2*time.Second, Delete: 2 * time.Second, Other: time.Second,
			ListLag: time.Second, IndexLag: 2 * time.Second, RetryAfter: time.Second,
		},
		Host: host, Dir: cfg.Dir,
	}
	if host != nil { // real guests report that they are ready
		c.ReportTimeout = reportTimeout
	}
	c.Images = []fakearm.Image{{ID: c.ImageID("", "", azureVersion), Path: cfg.Image}}
	return azure{fakearm.New(c)}
}

// reportTimeout is how long the cloud waits for a machine to say that it is ready.
const reportTimeout = 10 * time.Minute

// azureVersion is that of the pod VM image in the gallery.
const azureVersion = "1.0.0"

func (a azure) env(url string) []string {
	c := a.Config()
	return []string{
		"AZURE_ENDPOINT=" + url,
		"AZURE_AUTHORITY_HOST=" + url,
		"AZURE_SUBSCRIPTION_ID=" + c.Subscription,
		"AZURE_TENANT_ID=" + c.Tenant,
		"AZURE_CLIENT_ID=" + fakearm.DefaultClient,
		"AZURE_CLIENT_SECRET=" + fakearm.DefaultSecret,
		"AZURE_REGION=" + c.Region,
		"AZURE_RESOURCE_GROUP=" + fakearm.DefaultGroup,
		"AZURE_SUBNET_ID=" + c.SubnetID(fakearm.Subnet{}),
		"AZURE_NSG_ID=" + c.SecurityGroupID(""),
		"AZURE_IMAGE_ID=" + c.ImageID("", "", azureVersion),
		"AZURE_INSTANCE_SIZE=Standard_D2as_v5",
		"AZURE_INSTANCE_SIZES=Standard_D2as_v5,Standard_D4as_v5",
		"SSH_USERNAME=peerpod",
		"DISABLECVM=true",
	}
}

func (a azure) leaks() error { return leftIn(a.Leaks(nil)) }

func (a azure) close() { a.Close() }
