// SPDX-License-Identifier: Apache-2.0

package config

import (
	"log/slog"

	"github.com/kata-remote/kata-remote/cloud/prices"
)

// Cloud is what the providers aws and azure have in common.
type Cloud struct {
	DisableCVM    bool // DISABLECVM: ordinary VMs instead of confidential ones
	PublicIP      bool // USE_PUBLIC_IP: reach pod VMs at public addresses
	RootVolumeGiB int  // ROOT_VOLUME_SIZE; 0: the image's own size
	OverheadMiB   int  // GUEST_OVERHEAD_MEMORY: see cloud.Catalog; 0: none
	// Prices are those of INSTANCE_PRICES_FILE, or the ones in the binary; never nil
	// after Load.
	Prices *prices.Table
}

// AWS is the provider aws. The name in front of a comment is the key.
type AWS struct {
	Region   string // AWS_REGION; "": the node's, from its metadata service
	Endpoint string // AWS_ENDPOINT_URL, of emulations; "": the region's own

	// Who the adaptor is. Nothing set: the SDK's own chain finds out.
	AccessKeyID          string // AWS_ACCESS_KEY_ID
	SecretAccessKey      Secret // AWS_SECRET_ACCESS_KEY
	SessionToken         Secret // AWS_SESSION_TOKEN
	Profile              string // AWS_PROFILE
	RoleARN              string // AWS_ROLE_ARN
	WebIdentityTokenFile string // AWS_WEB_IDENTITY_TOKEN_FILE

	ImageID       string   // PODVM_AMI_ID; required
	InstanceType  string   // PODVM_INSTANCE_TYPE, of a pod that asks for nothing; never ""
	InstanceTypes []string // PODVM_INSTANCE_TYPES; holds InstanceType

	SubnetIDs        []string // AWS_SUBNET_ID, one or several; none: the node's
	SecurityGroupIDs []string // AWS_SG_IDS; none: the node's
	VPCID            string   // AWS_VPC_ID; only checked against subnets and groups

	KeyName          string // SSH_KP_NAME
	LaunchTemplate   string // PODVM_LAUNCHTEMPLATE_NAME; "" unless one is to be used
	RootVolumeKMSKey string // AWS_ROOT_VOLUME_KMS_KEY; "": the account's key for EBS
	Spot             string // AWS_SPOT: false, true or only
	PlacementGroup   string // AWS_PLACEMENT_GROUP
	Tenancy          string // AWS_TENANCY: default or dedicated
}

// Azure is the provider azure. The name in front of a comment is the key.
type Azure struct {
	SubscriptionID string // AZURE_SUBSCRIPTION_ID; required
	Region         string // AZURE_REGION; required
	ResourceGroup  string // AZURE_RESOURCE_GROUP; required
	Endpoint       string // AZURE_ENDPOINT, of emulations and sovereign clouds; "": the public cloud's
	AuthorityHost  string // AZURE_AUTHORITY_HOST, likewise

	// Who the adaptor is: with a secret, a service principal; with a token file, a
	// workload identity; else the node's managed identity.
	TenantID           string // AZURE_TENANT_ID
	ClientID           string // AZURE_CLIENT_ID
	ClientSecret       Secret // AZURE_CLIENT_SECRET
	FederatedTokenFile string // AZURE_FEDERATED_TOKEN_FILE

	ImageID       string   // AZURE_IMAGE_ID; required
	InstanceSize  string   // AZURE_INSTANCE_SIZE, of a pod that asks for nothing; never ""
	InstanceSizes []string // AZURE_INSTANCE_SIZES; holds InstanceSize

	SubnetID string   // AZURE_SUBNET_ID; required
	NSGID    string   // AZURE_NSG_ID; "": the subnet's
	Zones    []string // AZURE_ZONES; none: Azure chooses

	SecurityType     string // AZURE_SECURITY_TYPE: ConfidentialVM, TrustedLaunch or Standard; never ""
	SecureBoot       bool   // ENABLE_SECURE_BOOT
	Spot             string // AZURE_SPOT: false, true or only
	EphemeralOSDisk  bool   // AZURE_EPHEMERAL_OS_DISK
	SSHUsername      string // SSH_USERNAME
	SSHPublicKeyFile string // AZURE_SSH_PUBLIC_KEY_FILE; the file need not exist
}

// Defaults of cloud-api-adaptor (its aws and azure managers), but for the file of the
// key, which is where operators mount the Secret ssh-key-secret.
const (
	DefaultAWSInstanceType   = "m6a.large"
	DefaultAWSLaunchTemplate = "kata"
	DefaultAWSRootVolumeGiB  = 30
	DefaultAzureInstanceSize = "Standard_DC2as_v5"
	DefaultAzureOrdinarySize = "Standard_D2as_v5" // where VMs are not confidential
	DefaultAzureSSHUsername  = "peerpod"
	DefaultAzureSSHKeyFile   = "/root/.ssh/id_rsa.pub"
)

// Secret is a value that is never shown: not in a log, nor in an error.
type Secret string

const redacted = "[redacted]"

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// String tells only whether there is a secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return redacted
}

// GoString is String for %#v.
func (s Secret) GoString() string { return s.String() }

// MarshalText is String for encodings.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
