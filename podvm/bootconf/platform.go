// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"os"
	"path/filepath"
	"strings"
)

// Platform is what the firmware says the machine runs on. It only says which sources are
// worth asking: anyone who makes a machine can have its firmware say anything.
type Platform int

const (
	PlatformUnknown Platform = iota // QEMU and all others
	PlatformEC2
	PlatformAzure
)

func (p Platform) String() string {
	switch p {
	case PlatformEC2:
		return "EC2"
	case PlatformAzure:
		return "Azure"
	}
	return "unknown"
}

const (
	// ec2Vendor is the system vendor of Nitro instances.
	// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/identify_ec2_instances.html
	ec2Vendor = "Amazon EC2"
	// azureAssetTag is the chassis' on Azure and nowhere else; Hyper-V elsewhere has the
	// same vendor. cloud-init's sources/helpers/azure.py and tools/ds-identify.
	azureAssetTag = "7783-7084-3265-9085-8269-3286-77"
)

// Detect reads what the firmware says (SMBIOS) below sys; empty: /sys.
func Detect(sys string) Platform {
	if sys == "" {
		sys = "/sys"
	}
	field := func(name string) string {
		b, err := os.ReadFile(filepath.Join(sys, "class", "dmi", "id", name))
		if err != nil {
			return "" // no such table, or no such field: nothing is known
		}
		return strings.TrimSpace(string(b))
	}
	switch {
	case field("sys_vendor") == ec2Vendor:
		return PlatformEC2
	case field("chassis_asset_tag") == azureAssetTag:
		return PlatformAzure
	}
	return PlatformUnknown
}
