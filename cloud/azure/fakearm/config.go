// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"cmp"
	"crypto"
	"log/slog"
	"net/netip"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// What a Config without these has.
const (
	DefaultSubscription = "11111111-2222-3333-4444-555555555555"
	DefaultTenant       = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
	DefaultClient       = "99999999-0000-0000-0000-000000000001"
	DefaultSecret       = "fakearm-secret"
	DefaultRegion       = "westeurope"
	DefaultGroup        = "pods"
	DefaultNetwork      = "pods-net"
	DefaultSubnet       = "workers"
	DefaultNSG          = "pods-nsg"
	DefaultGallery      = "pods_gallery"
	DefaultImage        = "podvm"
)

// Config is what an emulation is made of. The zero value is a subscription with one
// resource group, network, security group, one principal that may do everything, and
// the sizes of DefaultSizes, but no image.
type Config struct {
	Subscription, Tenant, Region string

	// Groups are the resource groups that exist. nil: DefaultGroup.
	Groups []string
	// Subnets exist from the start, with their networks. nil: DefaultSubnet of
	// DefaultNetwork in the first group, 10.0.0.0/24.
	Subnets []Subnet
	// SecurityGroups are the names of network security groups in the first group.
	// nil: DefaultNSG.
	SecurityGroups []string
	// Sizes are the virtual machine sizes. nil: DefaultSizes().
	Sizes []Size
	// Images exist from the start.
	Images []Image
	// Principals may log in. nil: DefaultClient with DefaultSecret, who may do everything.
	Principals []Principal

	Timing Timing
	// Limits replaces the real throttles by name (see Limits); a bucket that is not
	// named stays real.
	Limits map[string]Limit
	// Unthrottled takes every throttle away.
	Unthrottled bool

	// Now is the clock. nil: time.Now.
	Now func() time.Time
	// ReportTimeout, above 0, makes a creation with an osProfile wait for the guest's
	// report to the wire server (see Metadata): without one it fails after that time
	// with OSProvisioningTimedOut, while the machine runs. 0: nobody waits. On Azure
	// the time is some 20 minutes (learn.microsoft.com, "Creating generalized images
	// without a provisioning agent").
	ReportTimeout time.Duration
	// Host makes the machines behind instances. nil: they are on paper only.
	Host emulation.Host
	// Dir is a folder for uploaded disks. "": the system's temporary folder. Close
	// removes what was put there.
	Dir string
	// PageSize is how many resources a page of a list has. 0: 50.
	PageSize int
	// MachinePrefix begins the machine ids given to Host. "": "az-".
	MachinePrefix string
	// Log takes a line for each request and each change of state. nil: none.
	Log *slog.Logger
}

// Subnet is one that exists.
type Subnet struct {
	Group, Network, Name string // "": the defaults
	CIDR                 netip.Prefix
	// Gateway is the router that machines are told of. Invalid: the first address,
	// as on Azure.
	Gateway netip.Addr
}

// Image is one that exists: a version in a gallery, a managed image, or one that a
// shared or community gallery has.
type Image struct {
	// ID is what an imageReference names: .../galleries/G/images/I/versions/1.0.0,
	// .../Microsoft.Compute/images/I, /SharedGalleries/... or /CommunityGalleries/...
	ID string
	// Path is what emulation.Machine.Image becomes.
	Path string
	// SecurityType is the feature of the image definition: "", "TrustedLaunch",
	// "TrustedLaunchSupported", "ConfidentialVM", "ConfidentialVmSupported" or
	// "TrustedLaunchAndConfidentialVmSupported".
	SecurityType string
	// Generation is V1 or V2. "": V2.
	Generation string
	// State is Generalized or Specialized. "": Generalized.
	State string
	// Arch is x64 or Arm64. "": x64.
	Arch string
	// SizeGB is the size of the disk. 0: 1.
	SizeGB int
}

// Principal is an application that may log in.
type Principal struct {
	Tenant string // "": the Config's
	Client string
	Secret string // "": there is none
	// Federated is a token issuer whose assertions are taken. nil: there is none.
	Federated *Federated
	// Managed: the identity of a virtual machine or node; IMDS gives its tokens.
	Managed bool
	// Actions that it may do, with "*" for any text, as in a role definition
	// ("Microsoft.Compute/virtualMachines/*"). nil: all.
	Actions []string
	// NotActions are taken from Actions.
	NotActions []string
}

// Federated is a federated identity credential.
type Federated struct {
	Issuer, Subject string
	Audience        string           // "": api://AzureADTokenExchange
	Key             crypto.PublicKey // RSA, to check RS256 signatures with. nil: they are not checked
}

// Timing says how long things take. Zero fields have the defaults given; Instant is
// none at all.
type Timing struct {
	Start     time.Duration // PUT until the machine is switched on: 3 s
	Create    time.Duration // PUT until the operation has succeeded: 12 s; never before the machine is on
	Fail      time.Duration // PUT until an operation that fails ends: 10 s
	Delete    time.Duration // DELETE of a virtual machine: 15 s
	Power     time.Duration // deallocate, powerOff, start: 8 s
	Update    time.Duration // a PATCH, or a PUT on what is there: 2 s
	Other     time.Duration // any operation on another resource: 2 s
	Replicate time.Duration // an image version: 20 s

	ListLag  time.Duration // until lists show what was made, or no longer what is gone: 3 s
	IndexLag time.Duration // the same for the list of a group's resources: 8 s
	Reserve  time.Duration // how long a failed machine's interface is reserved: 180 s
	Notice   time.Duration // a spot machine's, before eviction: 30 s
	Token    time.Duration // life of an access token: 1 h
	// RetryAfter is what replies about an operation ask a client to wait: 10 s.
	// Negative: they say nothing.
	RetryAfter time.Duration
}

// Instant is the timing of a cloud that does everything at once.
var Instant = Timing{Start: -1, Create: -1, Fail: -1, Delete: -1, Power: -1, Update: -1, Other: -1, Replicate: -1,
	ListLag: -1, IndexLag: -1, Reserve: -1, Notice: -1, RetryAfter: -1}

func (t Timing) withDefaults() Timing {
	for _, f := range []struct {
		d   *time.Duration
		def time.Duration
	}{
		{&t.Start, 3 * time.Second}, {&t.Create, 12 * time.Second}, {&t.Fail, 10 * time.Second},
		{&t.Delete, 15 * time.Second}, {&t.Power, 8 * time.Second}, {&t.Update, 2 * time.Second},
		{&t.Other, 2 * time.Second}, {&t.Replicate, 20 * time.Second}, {&t.ListLag, 3 * time.Second},
		{&t.IndexLag, 8 * time.Second}, {&t.Reserve, 180 * time.Second}, {&t.Notice, 30 * time.Second},
		{&t.Token, time.Hour}, {&t.RetryAfter, 10 * time.Second},
	} {
		if *f.d == 0 {
			*f.d = f.def
		}
		*f.d = max(*f.d, 0)
	}
	return t
}

func (c Config) withDefaults() Config {
	c.Subscription = cmp.Or(c.Subscription, DefaultSubscription)
	c.Tenant = cmp.Or(c.Tenant, DefaultTenant)
	c.Region = cmp.Or(c.Region, DefaultRegion)
	c.MachinePrefix = cmp.Or(c.MachinePrefix, "az-")
	c.PageSize = cmp.Or(c.PageSize, 50)
	if c.Groups == nil {
		c.Groups = []string{DefaultGroup}
	}
	if c.Subnets == nil {
		c.Subnets = []Subnet{{CIDR: netip.MustParsePrefix("10.0.0.0/24")}}
	}
	if c.SecurityGroups == nil {
		c.SecurityGroups = []string{DefaultNSG}
	}
	if c.Sizes == nil {
		c.Sizes = DefaultSizes()
	}
	if c.Principals == nil {
		c.Principals = []Principal{{Client: DefaultClient, Secret: DefaultSecret}}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Timing = c.Timing.withDefaults()
	return c
}

// SubnetID is the resource id of a subnet; names that are "" are the defaults.
func (c Config) SubnetID(sn Subnet) string {
	c = c.withDefaults()
	return c.id(cmp.Or(sn.Group, c.Groups[0]), "Microsoft.Network/virtualNetworks", cmp.Or(sn.Network, DefaultNetwork)) +
		"/subnets/" + cmp.Or(sn.Name, DefaultSubnet)
}

// SecurityGroupID is the resource id of a network security group in the first group.
func (c Config) SecurityGroupID(name string) string {
	c = c.withDefaults()
	return c.id(c.Groups[0], "Microsoft.Network/networkSecurityGroups", cmp.Or(name, DefaultNSG))
}

// ImageID is the resource id of a gallery image version in the first group; gallery
// and image that are "" are the defaults.
func (c Config) ImageID(gallery, image, version string) string {
	c = c.withDefaults()
	return c.id(c.Groups[0], "Microsoft.Compute/galleries", cmp.Or(gallery, DefaultGallery)) +
		"/images/" + cmp.Or(image, DefaultImage) + "/versions/" + version
}

func (c Config) id(group, kind, name string) string {
	return "/subscriptions/" + c.Subscription + "/resourceGroups/" + group + "/providers/" + kind + "/" + name
}
