// SPDX-License-Identifier: Apache-2.0

package aws

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/prices"
)

// Config of the provider. The zero value of each field takes the default named. The
// name in front is the key of the adaptor's configuration, which errors name.
type Config struct {
	// AWS_REGION. Default: the node's own, from its metadata service.
	Region string
	// AWS_ENDPOINT_URL: base URL of all services, for emulations. Default: the
	// region's own endpoints.
	Endpoint string

	// Keys are AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN.
	// Default: RoleARN and WebIdentityTokenFile, then Profile, then the SDK's chain
	// (environment, shared files, container and instance roles).
	Keys Keys
	// LookUpKeys, if not nil, is asked for the keys instead, whenever they are needed
	// and not asked for in the last few seconds: they may change while the adaptor runs.
	LookUpKeys func() (Keys, error)
	// AWS_PROFILE: a profile of the shared files.
	Profile string
	// AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE: a role, and the file with the
	// token that lets us have it. The file is read again when it changes.
	RoleARN, WebIdentityTokenFile string

	// PODVM_AMI_ID. Required.
	ImageID string
	// PODVM_INSTANCE_TYPE: of a pod that asks for nothing. Default: m6a.large.
	InstanceType string
	// PODVM_INSTANCE_TYPES: those that may be used. Default: InstanceType alone.
	InstanceTypes []string
	// AWS_SUBNET_ID: where instances go. Several, of different zones, are tried in
	// turn when one has no capacity. Default: the node's, from its metadata service.
	SubnetIDs []string
	// AWS_SG_IDS. Default: the node's.
	SecurityGroupIDs []string
	// AWS_VPC_ID: where subnets and groups must be. Only checked. May be empty.
	VPCID string
	// SSH_KP_NAME: key pair. Default: none.
	KeyName string
	// PODVM_LAUNCHTEMPLATE_NAME, where USE_PODVM_LAUNCHTEMPLATE is true. Default: none.
	LaunchTemplate string
	// ROOT_VOLUME_SIZE, GiB; what the image needs is the least. Default: that.
	RootVolumeGiB int
	// AWS_ROOT_VOLUME_KMS_KEY: id or ARN. Default: the account's key for EBS.
	RootVolumeKMSKey string
	// USE_PUBLIC_IP: reach instances at public addresses.
	PublicIP bool
	// DISABLECVM: ordinary instances; otherwise AMD SEV-SNP is on.
	DisableCVM bool
	// AWS_SPOT. Default: SpotNever.
	Spot Spot
	// AWS_PLACEMENT_GROUP: name. Default: none.
	PlacementGroup string
	// AWS_TENANCY: "default" or "dedicated". Default: "default".
	Tenancy string
	// TAGS, which come with each request; here they are only checked.
	Tags map[string]string

	// GUEST_OVERHEAD_MEMORY: see cloud.Catalog.
	OverheadMiB int
	// INSTANCE_PRICES_FILE: what types cost. Default: nobody knows.
	Prices *prices.Table

	// HTTPClient makes the requests. Default: one with the SDK's timeouts. Tests
	// bring emulations without sockets.
	HTTPClient *http.Client
	// Observe, if not nil, is told of every API call when it has ended.
	Observe func(Call)
}

// Call is one API call as it went.
type Call struct {
	Action string        // "RunInstances"
	Code   string        // the service's error code; "" where there is none
	Err    error         // nil: it succeeded
	Took   time.Duration // the wait for our own token bucket left out
}

// Keys are an access key and what goes with it.
type Keys struct {
	AccessKeyID     string
	SecretAccessKey Secret
	SessionToken    Secret
}

// Secret is a string that is not shown.
type Secret string

const redacted = "[redacted]"

// String hides the secret.
func (Secret) String() string { return redacted }

// GoString hides the secret.
func (Secret) GoString() string { return redacted }

// LogValue hides the secret.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText hides the secret.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Spot tells whether instances are bought on the spot market.
type Spot string

// Values of AWS_SPOT.
const (
	SpotNever Spot = "false" // on demand
	SpotFirst Spot = "true"  // spot, and on demand where there is none
	SpotOnly  Spot = "only"  // spot or nothing
)

const (
	defaultType = "m6a.large" // as cloud-api-adaptor's; it can run SEV-SNP
	// maxTypes is how many types one DescribeInstanceTypes takes.
	maxTypes = 100
	// maxVolumeGiB is the largest gp3 volume (EBS User Guide, 2025: 64 TiB).
	maxVolumeGiB = 64 << 10
	// Limits of tags, EC2 User Guide, "Tag your Amazon EC2 resources".
	maxTags, maxTagKey, maxTagValue = 50, 128, 256
	// ownTags is how many tags the provider adds to those of TAGS.
	ownTags = 6
)

var (
	regionRule   = regexp.MustCompile(`^[a-z]{2,}(-[a-z]+)+-[0-9]+$`)
	imageRule    = idRule("ami")
	subnetRule   = idRule("subnet")
	groupRule    = idRule("sg")
	vpcRule      = idRule("vpc")
	typeRule     = regexp.MustCompile(`^[a-z0-9-]+\.[a-z0-9-]+$`)
	roleRule     = regexp.MustCompile(`^arn:[a-z-]+:iam::[0-9]{12}:role/.+$`)
	instanceRule = idRule("i")
	leftRule     = regexp.MustCompile(`^(vol|eni)-(` + idHex + `)$`)
)

// idHex is the second part of an id: old ones are short.
const idHex = `[0-9a-f]{8}|[0-9a-f]{17}`

func idRule(prefix string) *regexp.Regexp {
	return regexp.MustCompile(`^` + prefix + `-(` + idHex + `)$`)
}

// complete returns the configuration with its defaults, or InvalidArgument with all
// that is wrong.
func (c Config) complete() (Config, error) {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("aws provider: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}
	c.checkAccount(bad)
	switch {
	case c.ImageID == "":
		bad("PODVM_AMI_ID is not set; name the pod VM image")
	case !imageRule.MatchString(c.ImageID):
		bad("PODVM_AMI_ID %q is not an image id such as ami-0123456789abcdef0", c.ImageID)
	}
	if c.InstanceType == "" {
		c.InstanceType = defaultType
		if len(c.InstanceTypes) > 0 && !slices.Contains(c.InstanceTypes, defaultType) {
			c.InstanceType = c.InstanceTypes[0]
		}
	}
	// As cloud-api-adaptor has it, the default may be used whether listed or not.
	c.InstanceTypes = unique(append([]string{c.InstanceType}, c.InstanceTypes...))
	for _, t := range c.InstanceTypes {
		if !typeRule.MatchString(t) {
			bad("%q in PODVM_INSTANCE_TYPE or PODVM_INSTANCE_TYPES is not an instance type such as m6a.large", t)
		}
	}
	if len(c.InstanceTypes) > maxTypes {
		bad("PODVM_INSTANCE_TYPES has %d types; at most %d are possible", len(c.InstanceTypes), maxTypes)
	}
	c.checkNetwork(bad)
	if c.RootVolumeGiB < 0 || c.RootVolumeGiB > maxVolumeGiB {
		bad("ROOT_VOLUME_SIZE %d is not within 0 to %d GiB", c.RootVolumeGiB, maxVolumeGiB)
	}
	if c.Spot == "" {
		c.Spot = SpotNever
	}
	if c.Spot != SpotNever && c.Spot != SpotFirst && c.Spot != SpotOnly {
		bad("AWS_SPOT %q is none of %s, %s and %s", c.Spot, SpotNever, SpotFirst, SpotOnly)
	}
	if c.Tenancy == "" {
		c.Tenancy = "default"
	}
	if c.Tenancy != "default" && c.Tenancy != "dedicated" {
		bad("AWS_TENANCY %q is neither default nor dedicated", c.Tenancy)
	}
	c.checkTags(bad)
	if c.Observe == nil {
		c.Observe = func(Call) {}
	}
	return c, errors.Join(errs...)
}

// checkAccount is about where the account is and who we are in it.
func (c Config) checkAccount(bad func(string, ...any)) {
	if c.Region != "" && !regionRule.MatchString(c.Region) {
		bad("AWS_REGION %q is not a region such as us-east-2", c.Region)
	}
	if c.Endpoint != "" {
		if err := checkEndpoint(c.Endpoint); err != nil {
			bad("AWS_ENDPOINT_URL: %v", err)
		}
	}
	c.checkCredentials(bad)
}

func (c Config) checkCredentials(bad func(string, ...any)) {
	if (c.Keys.AccessKeyID == "") != (c.Keys.SecretAccessKey == "") {
		bad("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together; set both or neither")
	}
	if c.Keys.SessionToken != "" && c.Keys.AccessKeyID == "" {
		bad("AWS_SESSION_TOKEN is set and AWS_ACCESS_KEY_ID is not")
	}
	if (c.RoleARN == "") != (c.WebIdentityTokenFile == "") {
		bad("AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE go together; set both or neither")
	}
	if c.RoleARN != "" && !roleRule.MatchString(c.RoleARN) {
		bad("AWS_ROLE_ARN %q is not a role such as arn:aws:iam::123456789012:role/peer-pods", c.RoleARN)
	}
}

func (c Config) checkNetwork(bad func(string, ...any)) {
	for _, id := range c.SubnetIDs {
		if !subnetRule.MatchString(id) {
			bad("AWS_SUBNET_ID: %q is not a subnet id such as subnet-0123456789abcdef0", id)
		}
	}
	for _, id := range c.SecurityGroupIDs {
		if !groupRule.MatchString(id) {
			bad("AWS_SG_IDS: %q is not a security group id such as sg-0123456789abcdef0", id)
		}
	}
	if c.VPCID != "" && !vpcRule.MatchString(c.VPCID) {
		bad("AWS_VPC_ID %q is not a VPC id such as vpc-0123456789abcdef0", c.VPCID)
	}
}

// checkTags holds TAGS to EC2's rules, and leaves room for the provider's own.
func (c Config) checkTags(bad func(string, ...any)) {
	if n := len(c.Tags) + ownTags; n > maxTags {
		bad("TAGS has %d tags; at most %d are possible beside the adaptor's own", len(c.Tags), maxTags-ownTags)
	}
	for _, k := range sortedKeys(c.Tags) {
		if err := checkTag(k, c.Tags[k]); err != nil {
			bad("TAGS: %v", err)
		}
	}
}

func checkTag(key, value string) error {
	switch {
	case cloud.ReservedTag(key):
		return fmt.Errorf("%q is the adaptor's own; choose another key", key)
	case key == "":
		return errors.New("a tag has an empty key")
	case strings.HasPrefix(strings.ToLower(key), "aws:"):
		return fmt.Errorf("%q begins with aws:, which is Amazon's", key)
	case utf8.RuneCountInString(key) > maxTagKey:
		return fmt.Errorf("the key %q is longer than %d characters", key, maxTagKey)
	case utf8.RuneCountInString(value) > maxTagValue:
		return fmt.Errorf("the value of %q is longer than %d characters", key, maxTagValue)
	}
	return nil
}

// checkEndpoint refuses plain http to places beyond the node and its own network:
// user data, which goes there, holds a private key.
func checkEndpoint(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("%q is not a URL such as https://ec2.us-east-2.amazonaws.com", s)
	}
	if u.Scheme == "https" || u.Hostname() == "localhost" {
		return nil
	}
	a, err := netip.ParseAddr(u.Hostname())
	if err != nil || !a.IsLoopback() && !a.IsPrivate() && !a.IsLinkLocalUnicast() {
		return fmt.Errorf("%q is plain http to a host that is not known to be near; use https", s)
	}
	return nil
}

func unique(list []string) []string {
	var out []string
	for _, s := range list {
		if s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
