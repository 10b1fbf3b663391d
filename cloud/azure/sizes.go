// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/compute/armcompute/v8"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// sizesFor is how long a list of sizes is used: what a subscription may have where
// changes by the day.
const sizesFor = time.Hour

// size is a VM size as it is offered in the region.
type size struct {
	cloud.InstanceType
	zones      []string // those with it
	tech       string   // of confidential VMs: SNP, TDX; "" is none
	noTrusted  bool     // TrustedLaunch is not to be had
	noSpot     bool
	noPremium  bool     // no premium storage
	placements []string // of an ephemeral OS disk; none: there cannot be one
	cacheBytes int64
	tempMiB    int64
	nvmeMiB    int64
	why        string // this subscription may not use it; "" it may
}

// sku is the part of a resource SKU (Microsoft.Compute/skus) that matters here. Of
// the SDK's type a list takes ten times the memory.
type sku struct {
	ResourceType string `json:"resourceType"`
	Name         string `json:"name"`
	Capabilities []struct{ Name, Value string }
	LocationInfo []struct {
		Location string   `json:"location"`
		Zones    []string `json:"zones"`
	} `json:"locationInfo"`
	Restrictions []struct {
		Type            string   `json:"type"` // Location, Zone
		Values          []string `json:"values"`
		ReasonCode      string   `json:"reasonCode"`
		RestrictionInfo struct {
			Zones []string `json:"zones"`
		} `json:"restrictionInfo"`
	} `json:"restrictions"`
}

// size reads a SKU. Capabilities: learn.microsoft.com, "Resource SKUs - List".
func (s sku) size(region string) size {
	caps := map[string]string{}
	for _, c := range s.Capabilities {
		caps[c.Name] = c.Value
	}
	number := func(name string) float64 {
		n, err := strconv.ParseFloat(caps[name], 64)
		if err != nil {
			return 0
		}
		return n
	}
	no := func(name string) bool { return strings.EqualFold(caps[name], "False") }
	z := size{
		tech:      caps["ConfidentialComputingType"],
		noTrusted: strings.EqualFold(caps["TrustedLaunchDisabled"], "True"),
		noSpot:    no("LowPriorityCapable"), noPremium: no("PremiumIO"),
		cacheBytes: int64(number("CachedDiskBytes")),
		tempMiB:    int64(number("MaxResourceVolumeMB")),
		nvmeMiB:    int64(number("NvmeDiskSizeInMiB")),
	}
	z.Name = s.Name
	z.VCPUs = int(number("vCPUs"))
	if n := int(number("vCPUsAvailable")); n > 0 { // constrained sizes
		z.VCPUs = n
	}
	z.MemoryMiB = int(math.Round(number("MemoryGB") * 1024))
	z.GPUs = int(number("GPUs"))
	z.Confidential = caps["ConfidentialComputingType"] != ""
	switch caps["CpuArchitectureType"] {
	case "x64":
		z.Arch = "amd64"
	case "Arm64":
		z.Arch = "arm64"
	}
	if strings.EqualFold(caps["EphemeralOSDiskSupported"], "True") {
		for p := range strings.SplitSeq(caps["SupportedEphemeralOSDiskPlacements"], ",") {
			if p = strings.TrimSpace(p); p != "" {
				z.placements = append(z.placements, p)
			}
		}
		if len(z.placements) == 0 { // older sizes do not say
			z.placements = []string{string(armcompute.DiffDiskPlacementCacheDisk), string(armcompute.DiffDiskPlacementResourceDisk)}
		}
	}
	for _, l := range s.LocationInfo {
		if strings.EqualFold(l.Location, region) {
			z.zones = append(z.zones, l.Zones...)
		}
	}
	for _, r := range s.Restrictions {
		if strings.EqualFold(r.Type, "Zone") {
			z.zones = slices.DeleteFunc(z.zones, func(n string) bool { return slices.Contains(r.RestrictionInfo.Zones, n) })
		} else {
			z.why = r.ReasonCode
		}
	}
	slices.Sort(z.zones)
	return z
}

// placement is where an ephemeral OS disk of so many GiB has room; "": nowhere. The
// cache disk is the fastest and costs no storage that a pod would use.
func (z size) placement(gib int) armcompute.DiffDiskPlacement {
	need := int64(gib) << 30
	for _, p := range []struct {
		name armcompute.DiffDiskPlacement
		room int64
	}{
		{armcompute.DiffDiskPlacementCacheDisk, z.cacheBytes},
		{armcompute.DiffDiskPlacementResourceDisk, z.tempMiB << 20},
		{armcompute.DiffDiskPlacementNvmeDisk, z.nvmeMiB << 20},
	} {
		if slices.Contains(z.placements, string(p.name)) && p.room > 0 && p.room >= need {
			return p.name
		}
	}
	return ""
}

// unusable says why the configuration has no use for a size; "": it has. That it cannot
// carry confidential VMs the catalog says.
func (c Config) unusable(z size) string {
	switch {
	case z.why != "":
		return fmt.Sprintf("it is not offered to this subscription in %s (%s)", c.Region, z.why)
	case z.VCPUs == 0 || z.MemoryMiB == 0:
		return "it has no CPUs or memory in Azure's list"
	case c.SecurityType != SecurityConfidential && z.Confidential:
		return "it carries confidential VMs only; use another size, or set DISABLECVM to false"
	case c.SecurityType == SecurityTrusted && z.noTrusted:
		return "it cannot carry VMs with trusted launch; use another size, or set AZURE_SECURITY_TYPE to " + SecurityStandard
	case c.Spot == MarketOnly && z.noSpot:
		return "it is not sold as spot; use another size, or set AZURE_SPOT to true"
	case len(c.Zones) > 0 && len(c.zonesOf(z)) == 0:
		return fmt.Sprintf("it is in none of AZURE_ZONES (%s) but in %s", strings.Join(c.Zones, ", "), cmpOr(strings.Join(z.zones, ", "), "no zone"))
	}
	return ""
}

func cmpOr(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// zonesOf are the wanted zones that have a size, in the configuration's order.
func (c Config) zonesOf(z size) []string {
	var out []string
	for _, n := range c.Zones {
		if slices.Contains(z.zones, n) {
			out = append(out, n)
		}
	}
	return out
}

// catalog is what is known of the sizes in the configuration.
type catalog struct {
	sizes   map[string]size // by name in lower case
	choose  cloud.Catalog   // those that can be used
	problem error           // with those that cannot; joined
	at      time.Time
}

// named is a size by its name; Azure does not mind case.
func (c *catalog) named(name string) (size, bool) {
	z, ok := c.sizes[strings.ToLower(name)]
	return z, ok
}

// catalog returns the sizes, asked for once an hour. When that fails, what was known
// before is still right for most.
func (p *Provider) catalog(ctx context.Context) (*catalog, error) {
	unlock, err := p.work.lock(ctx, "sizes")
	if err != nil {
		return nil, err
	}
	defer unlock()
	p.mu.Lock()
	have := p.sizes
	p.mu.Unlock()
	if have != nil && time.Since(have.at) < sizesFor {
		return have, nil
	}
	fresh, err := p.fetchCatalog(ctx)
	if err != nil {
		if have != nil && ctx.Err() == nil {
			return have, nil
		}
		return nil, fmt.Errorf("ask for the VM sizes of %s: %w", p.cfg.Region, err)
	}
	p.mu.Lock()
	p.sizes = fresh
	p.mu.Unlock()
	return fresh, nil
}

func (p *Provider) fetchCatalog(ctx context.Context) (*catalog, error) {
	all, err := list[sku](ctx, p.arm, call{
		path: "/subscriptions/" + p.cfg.SubscriptionID + "/providers/Microsoft.Compute/skus", version: apiSKU,
		query: url.Values{"$filter": {fmt.Sprintf("location eq '%s'", p.cfg.Region)}}, counts: subject{family: familyList},
	})
	if err != nil {
		return nil, err
	}
	c := &catalog{sizes: map[string]size{}, at: time.Now()}
	for _, s := range all {
		if strings.EqualFold(s.ResourceType, "virtualMachines") {
			c.sizes[strings.ToLower(s.Name)] = s.size(p.cfg.Region)
		}
	}
	c.choose = cloud.Catalog{
		Key: "AZURE_INSTANCE_SIZES", Default: p.cfg.InstanceSize,
		Confidential: p.cfg.SecurityType == SecurityConfidential, OverheadMiB: p.cfg.OverheadMiB,
	}
	var errs []error
	for _, name := range p.cfg.InstanceSizes {
		key := "AZURE_INSTANCE_SIZES"
		if strings.EqualFold(name, p.cfg.InstanceSize) {
			key = "AZURE_INSTANCE_SIZE"
		}
		z, ok := c.named(name)
		if !ok {
			z.Name, z.Unusable = name, fmt.Sprintf("%s has no such size%s", p.cfg.Region, c.closest(name))
			errs = append(errs, badKey(key, "names %q: %s", name, z.Unusable))
		} else if z.Unusable = p.cfg.unusable(z); z.Unusable != "" {
			errs = append(errs, badKey(key, "names %s: %s", z.Name, z.Unusable))
		} else if c.choose.Confidential && !z.Confidential {
			errs = append(errs, badKey(key, "names %s: it cannot carry confidential VMs; use a DC or EC size, or set DISABLECVM to true", z.Name))
		}
		c.choose.Types = append(c.choose.Types, z.InstanceType)
	}
	c.choose.Remark = p.cfg.Prices.Apply("azure", p.cfg.Region, c.choose.Types)
	c.problem = errors.Join(errs...)
	return c, nil
}

// closest suggests a size for a name that is none.
func (c *catalog) closest(name string) string {
	want := "standard_" + strings.TrimPrefix(strings.ToLower(strings.ReplaceAll(name, " ", "_")), "standard_")
	if z, ok := c.sizes[want]; ok {
		return "; did you mean " + z.Name + "?"
	}
	return "; `az vm list-skus` shows them"
}

// Prepare asks for what every Create needs to know, so that the first one need not.
func (p *Provider) Prepare(ctx context.Context) error {
	if _, err := p.key.line(); err != nil {
		return err
	}
	_, err := p.catalog(ctx)
	return err
}

// Plan implements cloud.Provider. The sizes are asked for once an hour.
func (p *Provider) Plan(ctx context.Context, want cloud.Size) (cloud.Plan, error) {
	image := want.Image
	switch {
	case image == "":
		image = p.cfg.ImageID
	case kindOfImage(image) == imageUnknown:
		return cloud.Plan{}, fmt.Errorf("image %q is no image: use the id of a gallery image version, a managed image, /SharedGalleries/... or /CommunityGalleries/...: %w",
			image, errdefs.ErrInvalidArgument)
	}
	choice, err := p.Explain(ctx, want)
	if err != nil {
		return cloud.Plan{}, err
	}
	return choice.Plan(image), nil
}

// Explain implements cloud.Explainer.
func (p *Provider) Explain(ctx context.Context, want cloud.Size) (cloud.Choice, error) {
	if err := ctx.Err(); err != nil {
		return cloud.Choice{}, err
	}
	c, err := p.catalog(ctx)
	if err != nil {
		return cloud.Choice{}, err
	}
	return c.choose.Choose(want)
}
