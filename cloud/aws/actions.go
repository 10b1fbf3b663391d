// SPDX-License-Identifier: Apache-2.0

package aws

// Actions are what a policy must allow for the provider to work, and no more. A test
// holds the provider to it, and the documentation's policy to this list.
var Actions = []string{
	"ec2:RunInstances",
	"ec2:CreateTags", // of what RunInstances makes, in the same call
	"ec2:TerminateInstances",
	"ec2:DeleteVolume", // what an instance has left
	"ec2:DeleteNetworkInterface",
	"ec2:DescribeInstances",
	"ec2:DescribeVolumes",
	"ec2:DescribeNetworkInterfaces",
	"ec2:DescribeInstanceTypes",
	"ec2:DescribeImages",
	"ec2:DescribeSubnets",
	"ec2:DescribeSecurityGroups",
}

// ActionsFor are what some settings need besides, by their key. Without those of a key
// pair, placement group or launch template a wrong name is found by the first launch
// instead of by --check-config.
var ActionsFor = map[string][]string{
	"AWS_SPOT": {"ec2:DescribeSpotInstanceRequests", "iam:CreateServiceLinkedRole"}, // the latter once in an account

	"SSH_KP_NAME":               {"ec2:DescribeKeyPairs"},
	"AWS_PLACEMENT_GROUP":       {"ec2:DescribePlacementGroups"},
	"PODVM_LAUNCHTEMPLATE_NAME": {"ec2:DescribeLaunchTemplates"},
	"AWS_ROOT_VOLUME_KMS_KEY":   {"kms:CreateGrant", "kms:Decrypt", "kms:GenerateDataKeyWithoutPlaintext"},
}
