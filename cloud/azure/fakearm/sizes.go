// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Size is a virtual machine size, as the SKU list describes it.
type Size struct {
	Name, Family    string
	VCPUs           int
	MemoryMiB       int
	GPUs            int
	Arch            string   // x64 or Arm64
	Generations     []string // V1, V2
	Zones           []string
	RestrictedZones []string // not for this subscription
	Restricted      bool     // nowhere for this subscription
	Confidential    string   // SNP, TDX or ""
	NoTrustedLaunch bool
	Spot            bool
	Premium         bool
	Accelerated     bool // networking
	HostEncryption  bool
	// Room for an ephemeral OS disk, in GB.
	CacheGB, TempGB, NvmeGB int
}

// Ephemeral tells whether an OS disk can be kept on the host.
func (z Size) Ephemeral() bool { return z.CacheGB+z.TempGB+z.NvmeGB > 0 }

// DefaultSizes are a few real sizes of each kind that a pod can ask for. Source:
// learn.microsoft.com, "Sizes for virtual machines in Azure", and the capabilities in
// published output of the SKU list.
func DefaultSizes() []Size {
	all, two := []string{"1", "2", "3"}, []string{"V1", "V2"}
	d := func(name, family string, vcpus, gib, cache, temp int) Size {
		return Size{Name: name, Family: family, VCPUs: vcpus, MemoryMiB: gib << 10, Arch: "x64", Generations: two, Zones: all, Spot: true,
			Premium: true, Accelerated: true, HostEncryption: true, CacheGB: cache, TempGB: temp}
	}
	cvm := func(name, family, tech string, vcpus, gib, cache, temp int) Size {
		z := d(name, family, vcpus, gib, cache, temp)
		z.Confidential, z.Generations, z.Zones, z.NoTrustedLaunch = tech, []string{"V2"}, []string{"1", "2"}, true
		return z
	}
	gpu := func(name, family string, vcpus, gib, gpus, temp int) Size {
		z := d(name, family, vcpus, gib, 0, temp)
		z.GPUs, z.Zones = gpus, []string{"1", "2"}
		return z
	}
	arm := d("Standard_D2ps_v5", "standardDPSv5Family", 2, 8, 0, 0)
	arm.Arch, arm.Generations, arm.NoTrustedLaunch = "Arm64", []string{"V2"}, true
	b := d("Standard_B2s", "standardBSFamily", 2, 4, 30, 8)
	b.Spot, b.Accelerated = false, false
	return []Size{
		b,
		d("Standard_D2s_v5", "standardDSv5Family", 2, 8, 0, 0),
		d("Standard_D4s_v5", "standardDSv5Family", 4, 16, 0, 0),
		d("Standard_D8s_v5", "standardDSv5Family", 8, 32, 0, 0),
		d("Standard_D2ds_v5", "standardDDSv5Family", 2, 8, 50, 75),
		d("Standard_D2as_v5", "standardDASv5Family", 2, 8, 0, 0),
		d("Standard_D4as_v5", "standardDASv5Family", 4, 16, 0, 0),
		d("Standard_D8as_v5", "standardDASv5Family", 8, 32, 0, 0),
		d("Standard_E4as_v5", "standardEASv5Family", 4, 32, 0, 0),
		d("Standard_F2s_v2", "standardFSv2Family", 2, 4, 32, 16),
		cvm("Standard_DC2as_v5", "standardDCASv5Family", "SNP", 2, 8, 0, 0),
		cvm("Standard_DC4as_v5", "standardDCASv5Family", "SNP", 4, 16, 0, 0),
		cvm("Standard_DC2ads_v5", "standardDCADSv5Family", "SNP", 2, 8, 0, 75),
		cvm("Standard_DC2es_v5", "standardDCESv5Family", "TDX", 2, 8, 0, 0),
		cvm("Standard_DC2eds_v5", "standardDCEDSv5Family", "TDX", 2, 8, 0, 47),
		gpu("Standard_NC4as_T4_v3", "Standard NCASv3_T4 Family", 4, 28, 1, 176),
		gpu("Standard_NC24ads_A100_v4", "StandardNCADSA100v4Family", 24, 220, 1, 64),
		gpu("Standard_NC6s_v3", "standardNCSv3Family", 6, 112, 1, 736),
		arm,
	}
}

func (s *Server) sizeNames() []string {
	var names []string
	for _, z := range s.sizes {
		names = append(names, z.Name)
	}
	slices.Sort(names)
	return names
}

// Restrict makes a size unavailable to this subscription in zones, or everywhere
// (none named): the SKU list shows it, and a PUT is refused with SkuNotAvailable.
func (s *Server) Restrict(size string, zones ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	z, ok := s.sizes[strings.ToLower(size)]
	if !ok {
		panic("fakearm: there is no size " + size)
	}
	z.Restricted = len(zones) == 0
	z.RestrictedZones = zones
	s.sizes[strings.ToLower(size)] = z
}

// skus answers Microsoft.Compute/skus: sizes, and a disk SKU to be told apart from
// them. The only filter is by location.
func (s *Server) skus(c *call) (*reply, *apiError) {
	if err := c.versionOf("Microsoft.Compute/skus", skuVersions); err != nil {
		return nil, err
	}
	if err := c.authorize("Microsoft.Compute/skus/read", "/subscriptions/"+s.cfg.Subscription); err != nil {
		return nil, err
	}
	c.fault = s.fault(c.r.Method, "Microsoft.Compute/skus", "", nil)
	if c.fault != nil {
		if err := c.fault.err(); err != nil {
			return nil, err
		}
	}
	if err := s.throttle(c.now, "ListSKU"); err != nil {
		return nil, err
	}
	if f := c.query("$filter"); f != "" {
		where, ok := strings.CutPrefix(f, "location eq '")
		where, closed := strings.CutSuffix(where, "'")
		if !ok || !closed {
			return nil, badRequest("BadRequest", "", "The filter '%s' is not supported: only \"location eq '...'\" is.", f)
		}
		if !strings.EqualFold(where, s.cfg.Region) {
			return s.page(c, 0, nil)
		}
	}
	names := s.sizeNames()
	return s.page(c, len(names)+1, func(i int) any {
		if i == len(names) {
			return map[string]any{"resourceType": "disks", "name": "Standard_LRS", "tier": "Standard", "size": "S4", "locations": []string{s.cfg.Region},
				"capabilities": []any{map[string]any{"name": "MaxSizeGiB", "value": "32"}}, "restrictions": []any{}}
		}
		return s.sku(s.sizes[strings.ToLower(names[i])])
	})
}

func (s *Server) sku(z Size) map[string]any {
	short := strings.TrimPrefix(z.Name, "Standard_")
	caps := []any{}
	add := func(name string, value any) {
		caps = append(caps, map[string]any{"name": name, "value": fmt.Sprint(value)})
	}
	yes := func(b bool) string { return map[bool]string{true: "True", false: "False"}[b] }
	add("MaxResourceVolumeMB", z.TempGB<<10)
	add("OSVhdSizeMB", 1047552)
	add("vCPUs", z.VCPUs)
	add("HyperVGenerations", strings.Join(z.Generations, ","))
	add("MemoryGB", strconv.FormatFloat(float64(z.MemoryMiB)/1024, 'f', -1, 64))
	add("MaxDataDiskCount", 4*z.VCPUs)
	add("CpuArchitectureType", z.Arch)
	add("LowPriorityCapable", yes(z.Spot))
	add("PremiumIO", yes(z.Premium))
	add("VMDeploymentTypes", "IaaS")
	add("vCPUsAvailable", z.VCPUs)
	add("vCPUsPerCore", 2)
	add("EphemeralOSDiskSupported", yes(z.Ephemeral()))
	if z.CacheGB > 0 {
		add("CachedDiskBytes", z.CacheGB<<30)
	}
	if z.Ephemeral() {
		var places []string
		for _, p := range []struct {
			name string
			gb   int
		}{{"CacheDisk", z.CacheGB}, {"ResourceDisk", z.TempGB}, {"NvmeDisk", z.NvmeGB}} {
			if p.gb > 0 {
				places = append(places, p.name)
			}
		}
		add("SupportedEphemeralOSDiskPlacements", strings.Join(places, ","))
	}
	add("EncryptionAtHostSupported", yes(z.HostEncryption))
	add("AcceleratedNetworkingEnabled", yes(z.Accelerated))
	add("RdmaEnabled", "False")
	add("MaxNetworkInterfaces", 2)
	if z.GPUs > 0 {
		add("GPUs", z.GPUs)
	}
	if z.Confidential != "" {
		add("ConfidentialComputingType", z.Confidential)
	}
	if z.NoTrustedLaunch {
		add("TrustedLaunchDisabled", "True")
	}
	restrictions := []any{}
	where := map[string]any{"locations": []string{s.cfg.Region}}
	if z.Restricted {
		restrictions = append(restrictions, map[string]any{"type": "Location", "values": []string{s.cfg.Region}, "restrictionInfo": where, "reasonCode": "NotAvailableForSubscription"})
	}
	if len(z.RestrictedZones) > 0 {
		restrictions = append(restrictions, map[string]any{"type": "Zone", "values": []string{s.cfg.Region}, "reasonCode": "NotAvailableForSubscription",
			"restrictionInfo": map[string]any{"locations": []string{s.cfg.Region}, "zones": z.RestrictedZones}})
	}
	return map[string]any{"resourceType": "virtualMachines", "name": z.Name, "tier": "Standard", "size": short, "family": z.Family,
		"locations":    []string{s.cfg.Region},
		"locationInfo": []any{map[string]any{"location": s.cfg.Region, "zones": z.Zones, "zoneDetails": []any{}}},
		"capabilities": caps, "restrictions": restrictions}
}
