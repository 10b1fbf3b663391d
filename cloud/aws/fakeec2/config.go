// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"net/netip"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// Config is what a Server begins with. The zero Config is a fast and consistent
// region without limits, with the Default things in it and no machines behind its
// instances; Realistic is the one to test against.
type Config struct {
	Region  string // "": DefaultRegion
	Account string // twelve digits; "": DefaultAccount
	// Now is the clock of everything that happens with time. nil: time.Now, which in
	// a testing/synctest bubble is the bubble's.
	Now func() time.Time
	// Seed makes ids, lags and the like come out the same again.
	Seed uint64

	// MaxLag is how long at most a change is not seen by Describe calls, and a new
	// id is not known to any call.
	MaxLag time.Duration
	// StartTime is from pending to running, StopTime from shutting-down or stopping
	// to the end. With a Host they are the least.
	StartTime, StopTime time.Duration
	// Throttle turns the token buckets on.
	Throttle bool
	// ForgetTerminated makes RunInstances with the token of a terminated instance
	// answer IdempotentInstanceTerminated, which the service has in its list of
	// errors, and not with that instance, which its guide promises.
	ForgetTerminated bool
	// MaxSkew is how far the time in a signature may be from Now. 0: any.
	MaxSkew time.Duration

	VPCs            []VPC           // nil: DefaultVPC
	Subnets         []Subnet        // nil: three of DefaultVPC, each in a zone of its own
	SecurityGroups  []SecurityGroup // nil: DefaultSecurityGroup
	Types           []InstanceType  // nil: Types
	Images          []Image         // nil: DefaultImage, and DefaultImageARM
	KeyPairs        []string        // names; nil: DefaultKeyPair
	PlacementGroups []string        // names; nil: DefaultPlacementGroup
	Keys            []Key           // nil: DefaultKey

	// Host makes the machines of instances. nil: there are none.
	Host emulation.Host
	// ImageDir is where images made by uploads are kept as files, for Host. "": they
	// are kept in memory, and cannot be started by a Host.
	ImageDir string
}

// What a Config that says nothing else has.
const (
	DefaultRegion         = "us-east-1"
	DefaultAccount        = "123456789012"
	DefaultVPC            = "vpc-0a1b2c3d4e5f60718"
	DefaultSubnet         = "subnet-0aaaaaaaaaaaaaaaa" // zone a
	DefaultSubnetB        = "subnet-0bbbbbbbbbbbbbbbb" // zone b
	DefaultSubnetC        = "subnet-0cccccccccccccccc" // zone c
	DefaultSecurityGroup  = "sg-0123456789abcdef0"
	DefaultImage          = "ami-0123456789abcdef0" // x86_64, boots by UEFI, allows SEV-SNP
	DefaultImageARM       = "ami-0fedcba9876543210" // arm64
	DefaultKeyPair        = "peer-pods"
	DefaultPlacementGroup = "peer-pods"
)

// DefaultKey is the credential of a Config without any.
var DefaultKey = Key{ID: "AKIAIOSFODNN7EXAMPLE", Secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", User: "peer-pods"}

// Realistic is a region that behaves as the real one: its lag, its throttles, and the
// time its instances take (1.5 s of call and 4.9 s of pending for a c5.xlarge:
// daemonology.net, 2021-08-12).
func Realistic() Config {
	return Config{MaxLag: 5 * time.Second, StartTime: 4900 * time.Millisecond, StopTime: 20 * time.Second, Throttle: true}
}

// VPC is a network.
type VPC struct {
	ID      string
	CIDR    netip.Prefix
	Default bool // instances without a subnet go there
}

// Subnet is a part of a VPC in one zone.
type Subnet struct {
	ID   string
	VPC  string // "": DefaultVPC
	Zone string // such as "us-east-1a"
	CIDR netip.Prefix
	// Gateway is the router's address. Zero: the first of CIDR, as in the cloud.
	Gateway netip.Addr
	// PublicIPs gives instances a public address unless they say otherwise.
	PublicIPs bool
	// Free is how many addresses there are to give. 0: as many as CIDR has, which is
	// all but five.
	Free int
}

// SecurityGroup is a firewall.
type SecurityGroup struct {
	ID   string
	Name string
	VPC  string // "": DefaultVPC
}

// Image is a machine image.
type Image struct {
	ID           string
	Name         string
	Architecture string // "": x86_64
	BootMode     string // "legacy-bios", "uefi", "uefi-preferred"; "": none stated, which boots as the type does
	RootDevice   string // "": /dev/xvda
	RootGiB      int    // size of the root's snapshot; 0: 1
	Tags         map[string]string
	// File is what a Host boots: see emulation.Machine.Image.
	File string
}

// Key is a credential. An access key whose User is a role is a temporary one and
// needs its Session token with every request.
type Key struct {
	ID, Secret string
	Session    string // "": it is a user's
	User       string // as in the ARN
	Role       string // the ARN's role of a temporary key
	// Allow are the actions it may call, such as "ec2:RunInstances" or "ec2:Describe*".
	// nil: all.
	Allow []string
	// Deny are actions it may not call, whatever Allow says.
	Deny []string
	// Expires is when the key ends. Zero: never.
	Expires time.Time
}

func (c *Config) setDefaults() {
	if c.Region == "" {
		c.Region = DefaultRegion
	}
	if c.Account == "" {
		c.Account = DefaultAccount
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.VPCs == nil {
		c.VPCs = []VPC{{ID: DefaultVPC, CIDR: netip.MustParsePrefix("10.0.0.0/16"), Default: true}}
	}
	if c.Subnets == nil {
		c.Subnets = []Subnet{
			{ID: DefaultSubnet, Zone: c.Region + "a", CIDR: netip.MustParsePrefix("10.0.0.0/24")},
			{ID: DefaultSubnetB, Zone: c.Region + "b", CIDR: netip.MustParsePrefix("10.0.1.0/24")},
			{ID: DefaultSubnetC, Zone: c.Region + "c", CIDR: netip.MustParsePrefix("10.0.2.0/24")},
		}
	}
	if c.SecurityGroups == nil {
		c.SecurityGroups = []SecurityGroup{{ID: DefaultSecurityGroup, Name: "peer-pods"}}
	}
	if c.Types == nil {
		c.Types = Types
	}
	if c.Images == nil {
		c.Images = []Image{
			{ID: DefaultImage, Name: "podvm", BootMode: "uefi"},
			{ID: DefaultImageARM, Name: "podvm-arm64", Architecture: "arm64", BootMode: "uefi"},
		}
	}
	if c.KeyPairs == nil {
		c.KeyPairs = []string{DefaultKeyPair}
	}
	if c.PlacementGroups == nil {
		c.PlacementGroups = []string{DefaultPlacementGroup}
	}
	if c.Keys == nil {
		c.Keys = []Key{DefaultKey}
	}
}
