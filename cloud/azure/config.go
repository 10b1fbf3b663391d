// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud/prices"
)

// Config of the provider. The name in front of each field is the key of the
// adaptor's configuration, which errors name.
type Config struct {
	SubscriptionID string // AZURE_SUBSCRIPTION_ID. Required.
	Region         string // AZURE_REGION: "eastus" or "East US". Required.
	ResourceGroup  string // AZURE_RESOURCE_GROUP: where VMs, interfaces and disks are made. Required.
	SubnetID       string // AZURE_SUBNET_ID: the full resource id. Required.
	NSGID          string // AZURE_NSG_ID: the full resource id; "" leaves the subnet's own rules.
	// AZURE_IMAGE_ID: a version or definition of a gallery, a shared gallery
	// (/SharedGalleries/...), a community gallery (/CommunityGalleries/...), or a
	// managed image. Required.
	ImageID string
	// AZURE_INSTANCE_SIZE: of a pod that asks for nothing. Default:
	// Standard_DC2as_v5, or Standard_D2as_v5 where VMs are not confidential.
	InstanceSize string
	// AZURE_INSTANCE_SIZES: what pods may get. Default: InstanceSize alone.
	InstanceSizes []string
	// AZURE_ZONES: availability zones ("1", "2", "3") to spread over. None: Azure
	// chooses, and gives no zone.
	Zones []string
	// AZURE_SECURITY_TYPE: ConfidentialVM, TrustedLaunch or Standard. Default:
	// ConfidentialVM, which is Standard with DISABLECVM.
	SecurityType string
	SecureBoot   bool   // ENABLE_SECURE_BOOT: not with Standard.
	Spot         Market // AZURE_SPOT
	// AZURE_EPHEMERAL_OS_DISK: the OS disk on the host's own storage, in sizes that
	// have room for it; others get a managed disk.
	EphemeralOSDisk bool
	PublicIP        bool // USE_PUBLIC_IP: an address the node reaches the VM at over the internet.
	RootVolumeGiB   int  // ROOT_VOLUME_SIZE; 0 is the image's.
	// GUEST_OVERHEAD_MEMORY: what a guest keeps for itself, MiB; see
	// cloud.Catalog.OverheadMiB.
	OverheadMiB int
	// INSTANCE_PRICES_FILE: what sizes cost. nil: the table in the binary.
	Prices *prices.Table
	// SSH_USERNAME. Default: peerpod.
	SSHUser string
	// AZURE_SSH_PUBLIC_KEY_FILE: who may log in. "", or no such file: nobody (see
	// sshKey).
	SSHPublicKeyFile string

	// AZURE_TENANT_ID, AZURE_CLIENT_ID, AZURE_CLIENT_SECRET,
	// AZURE_FEDERATED_TOKEN_FILE.
	Credentials Credentials
	// Reload returns the credentials as they are now and is asked before each new
	// token. nil: they do not change.
	Reload func() (Credentials, error)

	// AZURE_ENDPOINT is the resource manager. Default: the public cloud's. Over
	// plain HTTP only on addresses that leave no private network.
	Endpoint string
	// AZURE_AUTHORITY_HOST is where tokens come from. Default: the public cloud's,
	// or the one that goes with Endpoint.
	AuthorityHost string

	// Observe is told of every call once it has ended. nil: nobody is. It must not
	// block.
	Observe func(Call)

	// Transport sends requests; nil is an http.Client of the provider's own.
	Transport policy.Transporter
}

// Call is one request to Resource Manager, with what the SDK has repeated of it.
type Call struct {
	Method string
	Path   string // without query: of what
	Status int    // 0: there was no answer
	Code   string // of the error, if the service sent one
	Took   time.Duration
	Err    error // nil: it was a success
}

// Credentials are shown to the authority for a token. Which fields are set decides
// how, in this order: ClientSecret; FederatedTokenFile (workload identity);
// otherwise the managed identity of the machine, with ClientID if there are several.
type Credentials struct {
	TenantID, ClientID string
	ClientSecret       string
	FederatedTokenFile string
}

// LogValue keeps the secret out of logs.
func (c Credentials) LogValue() slog.Value {
	return slog.GroupValue(slog.String("tenant", c.TenantID), slog.String("client", c.ClientID), slog.String("kind", c.kind()))
}

// String does the same for fmt.
func (c Credentials) String() string { return c.LogValue().String() }

// GoString does the same for fmt's %#v.
func (c Credentials) GoString() string { return c.String() }

// MarshalJSON does the same for encoding/json.
func (c Credentials) MarshalJSON() ([]byte, error) { return json.Marshal(c.String()) }

func (c Credentials) kind() string {
	switch {
	case c.ClientSecret != "":
		return "client secret"
	case c.FederatedTokenFile != "":
		return "workload identity"
	}
	return "managed identity"
}

// check returns what is missing.
func (c Credentials) check() error {
	var errs []error
	need := func(key, value, why string) {
		if value == "" {
			errs = append(errs, badKey(key, "is not set, and %s", why))
		}
	}
	switch c.kind() {
	case "client secret":
		need("AZURE_TENANT_ID", c.TenantID, "AZURE_CLIENT_SECRET needs it")
		need("AZURE_CLIENT_ID", c.ClientID, "AZURE_CLIENT_SECRET needs it")
	case "workload identity":
		need("AZURE_TENANT_ID", c.TenantID, "AZURE_FEDERATED_TOKEN_FILE needs it")
		need("AZURE_CLIENT_ID", c.ClientID, "AZURE_FEDERATED_TOKEN_FILE needs it")
	}
	return errors.Join(errs...)
}

// Market says at which price VMs are bought.
type Market string

// Markets.
const (
	MarketRegular Market = "false" // also the zero value
	MarketSpot    Market = "true"  // spot, and regular when there is no spot capacity
	MarketOnly    Market = "only"  // spot or nothing
)

// Security types, as the compute API writes them.
const (
	SecurityConfidential = "ConfidentialVM"
	SecurityTrusted      = "TrustedLaunch"
	SecurityStandard     = "Standard"
)

func badKey(key, format string, args ...any) error {
	return fmt.Errorf("%s "+format+": %w", append(append([]any{key}, args...), errdefs.ErrInvalidArgument)...)
}

var (
	guidRule   = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	groupRule  = regexp.MustCompile(`^[-\p{L}\p{N}_().]{0,89}[-\p{L}\p{N}_()]$`)
	subnetRule = regexp.MustCompile(`(?i)^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Network/virtualNetworks/[^/]+/subnets/[^/]+$`)
	nsgRule    = regexp.MustCompile(`(?i)^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Network/networkSecurityGroups/[^/]+$`)
	userRule   = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	// reservedUsers are refused by the compute API (VirtualMachine
	// osProfile.adminUsername); those that userRule admits.
	reservedUsers = []string{"administrator", "admin", "user", "user1", "test", "user2", "test1", "user3", "admin1", "a",
		"actuser", "adm", "admin2", "aspnet", "backup", "console", "david", "guest", "john", "owner", "root", "server", "sql",
		"support", "support_388945a0", "sys", "test2", "test3", "user4", "user5"}
)

// complete returns the configuration with its defaults, or InvalidArgument with all
// that is wrong.
func (c Config) complete() (Config, error) {
	var errs []error
	bad := func(key, format string, args ...any) { errs = append(errs, badKey(key, format, args...)) }
	def := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	def(&c.SecurityType, SecurityConfidential)
	if c.SecurityType == SecurityConfidential {
		def(&c.InstanceSize, "Standard_DC2as_v5")
	}
	def(&c.InstanceSize, "Standard_D2as_v5")
	def(&c.SSHUser, "peerpod")
	if c.Prices == nil {
		c.Prices = prices.BuiltIn()
	}
	if c.Spot == "" {
		c.Spot = MarketRegular
	}
	c.SubscriptionID = strings.ToLower(c.SubscriptionID)
	c.Region = strings.ToLower(strings.ReplaceAll(c.Region, " ", ""))
	for _, k := range []struct{ key, value, what string }{
		{"AZURE_SUBSCRIPTION_ID", c.SubscriptionID, "`az account show` prints it"},
		{"AZURE_REGION", c.Region, "`az account list-locations` lists them"},
		{"AZURE_RESOURCE_GROUP", c.ResourceGroup, "name the group that pod VMs are made in"},
		{"AZURE_SUBNET_ID", c.SubnetID, "`az network vnet subnet show --query id` prints it"},
		{"AZURE_IMAGE_ID", c.ImageID, "`peerpodctl image publish azure` prints it"},
	} {
		if k.value == "" {
			bad(k.key, "is not set; %s", k.what)
		}
	}
	if c.SubscriptionID != "" && !guidRule.MatchString(c.SubscriptionID) {
		bad("AZURE_SUBSCRIPTION_ID", "%q is not a subscription id (xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx)", c.SubscriptionID)
	}
	if c.ResourceGroup != "" && !groupRule.MatchString(c.ResourceGroup) {
		bad("AZURE_RESOURCE_GROUP", "%q is not the name of a resource group", c.ResourceGroup)
	}
	if c.SubnetID != "" && !subnetRule.MatchString(c.SubnetID) {
		bad("AZURE_SUBNET_ID", "%q is not /subscriptions/.../virtualNetworks/.../subnets/...", c.SubnetID)
	}
	if c.NSGID != "" && !nsgRule.MatchString(c.NSGID) {
		bad("AZURE_NSG_ID", "%q is not /subscriptions/.../networkSecurityGroups/...", c.NSGID)
	}
	if c.ImageID != "" && kindOfImage(c.ImageID) == imageUnknown {
		bad("AZURE_IMAGE_ID", "%q is no image: use the id of a gallery image version, a managed image, /SharedGalleries/... or /CommunityGalleries/...", c.ImageID)
	}
	if !slices.Contains([]string{SecurityConfidential, SecurityTrusted, SecurityStandard}, c.SecurityType) {
		bad("AZURE_SECURITY_TYPE", "%q is none of %s, %s, %s", c.SecurityType, SecurityConfidential, SecurityTrusted, SecurityStandard)
	}
	if c.SecureBoot && c.SecurityType == SecurityStandard {
		bad("ENABLE_SECURE_BOOT", "does not go with VMs without vTPM; set AZURE_SECURITY_TYPE to %s", SecurityTrusted)
	}
	if !slices.Contains([]Market{MarketRegular, MarketSpot, MarketOnly}, c.Spot) {
		bad("AZURE_SPOT", "%q is none of false, true, only", c.Spot)
	}
	for _, z := range c.Zones {
		if z == "" || strings.Trim(z, "0123456789") != "" {
			bad("AZURE_ZONES", "%q is not a zone's number", z)
		}
	}
	if c.RootVolumeGiB < 0 || c.RootVolumeGiB > 4095 {
		bad("ROOT_VOLUME_SIZE", "%d GiB is not within 0 to 4095", c.RootVolumeGiB)
	}
	if !userRule.MatchString(c.SSHUser) || slices.Contains(reservedUsers, c.SSHUser) {
		bad("SSH_USERNAME", "%q is not a name that Azure gives to a user", c.SSHUser)
	}
	if !slices.ContainsFunc(c.InstanceSizes, func(s string) bool { return strings.EqualFold(s, c.InstanceSize) }) {
		c.InstanceSizes = append([]string{c.InstanceSize}, c.InstanceSizes...)
	}
	errs = append(errs, c.Credentials.check(), checkURL("AZURE_ENDPOINT", c.Endpoint), checkURL("AZURE_AUTHORITY_HOST", c.AuthorityHost))
	return c, errors.Join(errs...)
}

// checkURL admits https anywhere, and http where nobody beyond the machine's own
// network hears it: the requests carry a token.
func checkURL(key, s string) error {
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Scheme != "https" && u.Scheme != "http":
		return badKey(key, "%q is not https://<host>", s)
	case u.Scheme == "https":
		return nil
	}
	a, err := netip.ParseAddr(u.Hostname())
	if u.Hostname() == "localhost" || err == nil && (a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast()) {
		return nil
	}
	return badKey(key, "%q is plain HTTP to a host that is not on a private address; use https", s)
}

// imageKind is how the compute API wants to be told of an image.
type imageKind int

const (
	imageUnknown   imageKind = iota
	imageGallery             // a gallery of a subscription, imageReference.id
	imageManaged             // Microsoft.Compute/images, imageReference.id
	imageShared              // imageReference.sharedGalleryImageId
	imageCommunity           // imageReference.communityGalleryImageId
)

var imageRules = []struct {
	kind imageKind
	rule *regexp.Regexp
}{
	{imageGallery, regexp.MustCompile(`(?i)^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Compute/galleries/[^/]+/images/[^/]+(/versions/[^/]+)?$`)},
	{imageManaged, regexp.MustCompile(`(?i)^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Compute/images/[^/]+$`)},
	{imageShared, regexp.MustCompile(`(?i)^/sharedGalleries/([^/]+)/images/([^/]+)(/versions/([^/]+))?$`)},
	{imageCommunity, regexp.MustCompile(`(?i)^/communityGalleries/([^/]+)/images/([^/]+)(/versions/([^/]+))?$`)},
}

func kindOfImage(id string) imageKind {
	for _, r := range imageRules {
		if r.rule.MatchString(id) {
			return r.kind
		}
	}
	return imageUnknown
}
