// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// cloudKeys are the settings that the providers aws and azure share.
var cloudKeys = []key{
	{"DISABLECVM", func(c *Config, v string) error { return boolean(&c.Cloud.DisableCVM, v) }},
	{"USE_PUBLIC_IP", func(c *Config, v string) error { return boolean(&c.Cloud.PublicIP, v) }},
	{"ROOT_VOLUME_SIZE", func(c *Config, v string) error { return number(&c.Cloud.RootVolumeGiB, v, 0, maxVolumeGiB[c.Provider]) }},
	{"GUEST_OVERHEAD_MEMORY", func(c *Config, v string) error { return number(&c.Cloud.OverheadMiB, v, 0, 1<<20) }},
	{"INSTANCE_PRICES_FILE", func(c *Config, v string) error { return absPath(new(string), v) }}, // read in validateCloud
}

// maxVolumeGiB: gp3 volumes of EBS (EBS User Guide, 2025), OS disks of Azure (limits
// of managed disks).
var maxVolumeGiB = map[string]int64{ProviderAWS: 64 << 10, ProviderAzure: 4095}

var awsKeys = []key{
	{"AWS_REGION", func(c *Config, v string) error { return awsRegion(&c.AWS.Region, v) }},
	{"AWS_ENDPOINT_URL", func(c *Config, v string) error { return endpoint(&c.AWS.Endpoint, v) }},
	{"AWS_ACCESS_KEY_ID", func(c *Config, v string) error { return accessKey(&c.AWS.AccessKeyID, v) }},
	{"AWS_SECRET_ACCESS_KEY", func(c *Config, v string) error { return secret(&c.AWS.SecretAccessKey, v) }},
	{"AWS_SESSION_TOKEN", func(c *Config, v string) error { return secret(&c.AWS.SessionToken, v) }},
	{"AWS_PROFILE", func(c *Config, v string) error { c.AWS.Profile = v; return nil }},
	{"AWS_ROLE_ARN", func(c *Config, v string) error {
		return like(&c.AWS.RoleARN, v, roleRule, "want a role, such as arn:aws:iam::123456789012:role/peer-pods")
	}},
	{"AWS_WEB_IDENTITY_TOKEN_FILE", func(c *Config, v string) error { return absPath(&c.AWS.WebIdentityTokenFile, v) }},
	{"PODVM_AMI_ID", func(c *Config, v string) error { return awsID(&c.AWS.ImageID, v, "ami") }},
	{"PODVM_INSTANCE_TYPE", func(c *Config, v string) error { return like(&c.AWS.InstanceType, v, awsTypeRule, wantAWSType) }},
	{"PODVM_INSTANCE_TYPES", func(c *Config, v string) error {
		return list(&c.AWS.InstanceTypes, v, func(p *string, v string) error { return like(p, v, awsTypeRule, wantAWSType) })
	}},
	{"AWS_SUBNET_ID", func(c *Config, v string) error { return awsIDs(&c.AWS.SubnetIDs, v, "subnet") }},
	{"AWS_SG_IDS", func(c *Config, v string) error { return awsIDs(&c.AWS.SecurityGroupIDs, v, "sg") }},
	{"AWS_VPC_ID", func(c *Config, v string) error { return awsID(&c.AWS.VPCID, v, "vpc") }},
	{"SSH_KP_NAME", func(c *Config, v string) error { c.AWS.KeyName = v; return nil }},
	{"USE_PODVM_LAUNCHTEMPLATE", func(c *Config, v string) error { return boolean(new(bool), v) }}, // see finishAWS
	{"PODVM_LAUNCHTEMPLATE_NAME", func(c *Config, v string) error { c.AWS.LaunchTemplate = v; return nil }},
	{"AWS_ROOT_VOLUME_KMS_KEY", func(c *Config, v string) error { c.AWS.RootVolumeKMSKey = v; return nil }},
	{"AWS_SPOT", func(c *Config, v string) error {
		return oneOf(&c.AWS.Spot, strings.ToLower(v), "false", "true", "only")
	}},
	{"AWS_PLACEMENT_GROUP", func(c *Config, v string) error { c.AWS.PlacementGroup = v; return nil }},
	{"AWS_TENANCY", func(c *Config, v string) error { return oneOf(&c.AWS.Tenancy, v, "default", "dedicated") }},
}

var azureKeys = []key{
	{"AZURE_SUBSCRIPTION_ID", func(c *Config, v string) error { return guid(&c.Azure.SubscriptionID, v) }},
	{"AZURE_REGION", func(c *Config, v string) error { return azureRegion(&c.Azure.Region, v) }},
	{"AZURE_RESOURCE_GROUP", func(c *Config, v string) error {
		return like(&c.Azure.ResourceGroup, v, resourceGroupRule, "want the name of a resource group, not its id: at most 90 letters, digits and -_.()")
	}},
	{"AZURE_ENDPOINT", func(c *Config, v string) error { return endpoint(&c.Azure.Endpoint, v) }},
	{"AZURE_AUTHORITY_HOST", func(c *Config, v string) error { return endpoint(&c.Azure.AuthorityHost, v) }},
	{"AZURE_TENANT_ID", func(c *Config, v string) error { return guid(&c.Azure.TenantID, v) }},
	{"AZURE_CLIENT_ID", func(c *Config, v string) error { return guid(&c.Azure.ClientID, v) }},
	{"AZURE_CLIENT_SECRET", func(c *Config, v string) error { return secret(&c.Azure.ClientSecret, v) }},
	{"AZURE_FEDERATED_TOKEN_FILE", func(c *Config, v string) error { return absPath(&c.Azure.FederatedTokenFile, v) }},
	{"AZURE_IMAGE_ID", func(c *Config, v string) error { return like(&c.Azure.ImageID, v, azureImageRule, wantAzureImage) }},
	{"AZURE_INSTANCE_SIZE", func(c *Config, v string) error { return like(&c.Azure.InstanceSize, v, azureSizeRule, wantAzureSize) }},
	{"AZURE_INSTANCE_SIZES", func(c *Config, v string) error {
		return list(&c.Azure.InstanceSizes, v, func(p *string, v string) error { return like(p, v, azureSizeRule, wantAzureSize) })
	}},
	{"AZURE_SUBNET_ID", func(c *Config, v string) error {
		return like(&c.Azure.SubnetID, v, azureSubnetRule, "want the whole id, /subscriptions/<id>/resourceGroups/<group>/providers/Microsoft.Network/virtualNetworks/<network>/subnets/<name>, as `az network vnet subnet show --query id` prints it")
	}},
	{"AZURE_NSG_ID", func(c *Config, v string) error {
		return like(&c.Azure.NSGID, v, azureNSGRule, "want the whole id, /subscriptions/<id>/resourceGroups/<group>/providers/Microsoft.Network/networkSecurityGroups/<name>, as `az network nsg show --query id` prints it")
	}},
	{"AZURE_ZONES", func(c *Config, v string) error {
		return list(&c.Azure.Zones, v, func(p *string, v string) error {
			return like(p, v, azureZoneRule, `want numbers of zones with commas between them, such as "1,2,3"`)
		})
	}},
	{"AZURE_SECURITY_TYPE", func(c *Config, v string) error {
		return oneOf(&c.Azure.SecurityType, v, azureConfidential, "TrustedLaunch", azureStandard)
	}},
	{"ENABLE_SECURE_BOOT", func(c *Config, v string) error { return boolean(&c.Azure.SecureBoot, v) }},
	{"AZURE_SPOT", func(c *Config, v string) error {
		return oneOf(&c.Azure.Spot, strings.ToLower(v), "false", "true", "only")
	}},
	{"AZURE_EPHEMERAL_OS_DISK", func(c *Config, v string) error { return boolean(&c.Azure.EphemeralOSDisk, v) }},
	{"SSH_USERNAME", func(c *Config, v string) error { return azureUser(&c.Azure.SSHUsername, v) }},
	{"AZURE_SSH_PUBLIC_KEY_FILE", func(c *Config, v string) error { return absPath(&c.Azure.SSHPublicKeyFile, v) }},
}

// secretKeys are those whose values are not shown, the access key's id included:
// people put the one in the place of the other.
var secretKeys = []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET"}

const (
	azureConfidential = "ConfidentialVM"
	azureStandard     = "Standard"

	wantAWSType    = "want an instance type, such as m6a.large"
	wantAzureSize  = "want a VM size, such as Standard_D2as_v5"
	wantAzureImage = "want the id of an image: /subscriptions/<id>/resourceGroups/<group>/providers/Microsoft.Compute/galleries/<gallery>/images/<image>/versions/<version>, one under /SharedGalleries/ or /CommunityGalleries/, or a managed image's"
)

// Shapes of names. AWS: EC2 User Guide, "Resource IDs". Azure: "Naming rules and
// restrictions for Azure resources", and the compute API's osProfile.adminUsername.
var (
	awsRegionRule     = regexp.MustCompile(`^[a-z]{2,}(-[a-z]+)+-[0-9]+$`)
	awsTypeRule       = regexp.MustCompile(`^[a-z0-9-]+\.[a-z0-9-]+$`)
	roleRule          = regexp.MustCompile(`^arn:[a-z-]+:iam::[0-9]{12}:role/.+$`)
	accessKeyRule     = regexp.MustCompile(`^[A-Za-z0-9]{16,128}$`)
	guidRule          = regexp.MustCompile(`(?i)^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	resourceGroupRule = regexp.MustCompile(`^[-\p{L}\p{N}_().]{0,89}[-\p{L}\p{N}_()]$`)
	azureRegionRule   = regexp.MustCompile(`^[a-z0-9]+$`)
	azureSizeRule     = regexp.MustCompile(`(?i)^(Standard|Basic)_[A-Z0-9]+(-[0-9]+)?[A-Z0-9]*(_[A-Z0-9]+)*$`)
	// B2als_v2, B2ts_v2, and so on.
	azureBurstableRule = regexp.MustCompile(`(?i)^(Standard|Basic)_B[0-9]`)
	azureZoneRule      = regexp.MustCompile(`^[1-9]$`)
	azureSubnetRule    = regexp.MustCompile(`(?i)^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Network/virtualNetworks/[^/]+/subnets/[^/]+$`)
	azureNSGRule       = regexp.MustCompile(`(?i)^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Network/networkSecurityGroups/[^/]+$`)
	azureImageRule     = regexp.MustCompile(`(?i)^(/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Compute/(galleries/[^/]+/images/[^/]+(/versions/[^/]+)?|images/[^/]+)|/(Shared|Community)Galleries/[^/]+/images/[^/]+(/versions/[^/]+)?)$`)
	azureUserRule      = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	azureUsersRefused  = []string{"administrator", "admin", "user", "user1", "test", "user2", "test1", "user3", "admin1", "a",
		"actuser", "adm", "admin2", "aspnet", "backup", "console", "david", "guest", "john", "owner", "root", "server", "sql",
		"support", "support_388945a0", "sys", "test2", "test3", "user4", "user5"}
)

func boolean(p *bool, v string) error {
	switch strings.ToLower(v) {
	case "true", "1":
		*p = true
	case "false", "0":
		*p = false
	default:
		return errors.New("want true or false")
	}
	return nil
}

func like(p *string, v string, rule *regexp.Regexp, want string) error {
	if !rule.MatchString(v) {
		return errors.New(want)
	}
	*p = v
	return nil
}

// list reads values with commas between them, each once.
func list(p *[]string, v string, one func(*string, string) error) error {
	var all []string
	for s := range strings.SplitSeq(v, ",") {
		s = strings.TrimSpace(s)
		var got string
		if err := one(&got, s); err != nil {
			return fmt.Errorf("%q in it: %w", s, err)
		}
		if slices.Contains(all, got) {
			return fmt.Errorf("%s is in it twice; give it once", got)
		}
		all = append(all, got)
	}
	*p = all
	return nil
}

func awsID(p *string, v, kind string) error {
	rule := regexp.MustCompile(`^` + kind + `-([0-9a-f]{8}|[0-9a-f]{17})$`)
	return like(p, v, rule, "want an id such as "+kind+"-0123456789abcdef0")
}

func awsIDs(p *[]string, v, kind string) error {
	return list(p, v, func(p *string, v string) error { return awsID(p, v, kind) })
}

func awsRegion(p *string, v string) error {
	if n := len(v) - 1; n > 0 && v[n] >= 'a' && v[n] <= 'z' && awsRegionRule.MatchString(v[:n]) {
		return fmt.Errorf("that is an availability zone; want its region, %s, and choose zones by their subnets in AWS_SUBNET_ID", v[:n])
	}
	return like(p, v, awsRegionRule, "want a region, such as us-east-2")
}

func azureRegion(p *string, v string) error {
	bare := strings.ToLower(strings.Map(func(r rune) rune {
		if r == ' ' || r == '-' || r == '_' {
			return -1
		}
		return r
	}, v))
	if bare != v && azureRegionRule.MatchString(bare) {
		return fmt.Errorf("that is not how the name of a region is spelled; try %s (`az account list-locations --query \"[].name\"` lists them)", bare)
	}
	return like(p, v, azureRegionRule, "want the name of a region, such as eastus")
}

func azureUser(p *string, v string) error {
	if slices.Contains(azureUsersRefused, v) {
		return errors.New("Azure refuses users of that name; choose another")
	}
	return like(p, v, azureUserRule, "want the name of a user: at most 32 lower-case letters, digits, '_' or '-', a letter or '_' first")
}

func guid(p *string, v string) error {
	return like(p, v, guidRule, "want an id of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")
}

func accessKey(p *string, v string) error {
	return like(p, v, accessKeyRule, "want the id of an access key: 16 to 128 letters and digits, such as AKIAIOSFODNN7EXAMPLE")
}

// secret takes anything that can be one. What an editor or a shell leaves at its ends
// would only show as a refusal by the cloud.
func secret(p *Secret, v string) error {
	if strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return errors.New("there is a space or a line break in it; set it without")
	}
	*p = Secret(v)
	return nil
}

// endpoint admits plain HTTP only where nobody beyond this machine's own networks
// hears it: requests carry credentials.
func endpoint(p *string, v string) error {
	u, err := url.Parse(v)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || (u.Scheme != "https" && u.Scheme != "http") {
		return errors.New("want a URL, such as https://host:port")
	}
	a, err := netip.ParseAddr(u.Hostname())
	near := u.Hostname() == "localhost" || (err == nil && (a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast()))
	if u.Scheme == "http" && !near {
		return errors.New("that is plain HTTP to a host without a private address, and credentials go there; use https")
	}
	*p = v
	return nil
}
