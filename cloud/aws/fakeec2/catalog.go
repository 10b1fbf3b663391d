// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"slices"
	"sort"
	"strings"
)

// numbered is something on a page that has no order of its own.
type numbered[T any] struct {
	n int
	v T
}

func number[T any](items []T) []numbered[T] {
	out := make([]numbered[T], len(items))
	for i, v := range items {
		out[i] = numbered[T]{i, v}
	}
	return out
}

func (n numbered[T]) seq() int { return n.n }

func (s *Server) describeTypes(c *call) (obj, error) {
	want := c.strs("InstanceType")
	if len(want) > 100 {
		return nil, errorf(400, "InvalidParameterValue", "The maximum number of instance types that can be specified is 100")
	}
	if len(want) > 0 && c.has("MaxResults") {
		return nil, errorf(400, "InvalidParameterCombination", "The parameter InstanceTypes cannot be used with the parameter MaxResults")
	}
	var missing []string
	for _, t := range want {
		if _, ok := s.types[t]; !ok {
			missing = append(missing, t)
		}
	}
	if len(missing) > 0 {
		return nil, errorf(400, "InvalidInstanceType", "The following supplied instance types do not exist: [%s]", strings.Join(missing, ", "))
	}
	var all []InstanceType
	for _, t := range s.types {
		if len(want) == 0 || slices.Contains(want, t.Name) {
			all = append(all, t)
		}
	}
	sort.Slice(all, func(a, b int) bool { return all[a].Name < all[b].Name })
	all, err := filtered(c, all, func(InstanceType) map[string]string { return nil }, attrs[InstanceType]{
		"instance-type":                         one(func(t InstanceType) string { return t.Name }),
		"current-generation":                    one(func(InstanceType) string { return "true" }),
		"bare-metal":                            one(func(InstanceType) string { return "false" }),
		"hypervisor":                            one(func(InstanceType) string { return "nitro" }),
		"processor-info.supported-architecture": one(func(t InstanceType) string { return t.arch() }),
		"processor-info.supported-features":     InstanceType.features,
		"memory-info.size-in-mib":               one(func(t InstanceType) string { return itoa(t.MemoryMiB) }),
		"vcpu-info.default-vcpus":               one(func(t InstanceType) string { return itoa(t.VCPUs) }),
		"supported-boot-mode":                   InstanceType.bootModes,
		"supported-usage-class":                 func(InstanceType) []string { return []string{"on-demand", "spot"} },
		"supported-virtualization-type":         one(func(InstanceType) string { return "hvm" }),
	})
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 5, 100, number(all), numbered[InstanceType].seq)
	if err != nil {
		return nil, err
	}
	if c.str("NextToken") == "" && !c.has("MaxResults") && len(items) > 100 { // its page is never longer
		c.text["MaxResults"] = "100"
		if items, next, err = page(c, 5, 100, items, numbered[InstanceType].seq); err != nil {
			return nil, err
		}
	}
	set := []obj{}
	for _, n := range items {
		set = append(set, n.v.describe())
	}
	return obj{"instanceTypeSet": set, "nextToken": next}, c.dryRun()
}

func (t InstanceType) features() []string {
	if t.SEVSNP {
		return []string{"amd-sev-snp"}
	}
	return nil
}

func (t InstanceType) describe() obj {
	threads := 2
	if t.arch() == "arm64" {
		threads = 1
	}
	processor := obj{"supportedArchitectures": []string{t.arch()}, "manufacturer": t.manufacturer()}
	if f := t.features(); f != nil {
		processor["supportedFeatures"] = f
	}
	o := obj{"instanceType": t.Name, "currentGeneration": true, "freeTierEligible": false, "supportedUsageClasses": []string{"on-demand", "spot"},
		"supportedRootDeviceTypes": []string{"ebs"}, "supportedVirtualizationTypes": []string{"hvm"}, "bareMetal": false, "hypervisor": "nitro",
		"processorInfo": processor, "memoryInfo": obj{"sizeInMiB": t.MemoryMiB}, "instanceStorageSupported": false,
		"vCpuInfo": obj{"defaultVCpus": t.VCPUs, "defaultCores": t.VCPUs / threads, "defaultThreadsPerCore": threads},
		"ebsInfo":  obj{"ebsOptimizedSupport": "default", "encryptionSupport": "supported", "nvmeSupport": "required"},
		"networkInfo": obj{"networkPerformance": "Up to 12.5 Gigabit", "maximumNetworkInterfaces": 3, "maximumNetworkCards": 1,
			"defaultNetworkCardIndex": 0, "ipv4AddressesPerInterface": 10, "ipv6AddressesPerInterface": 10, "ipv6Supported": true,
			"enaSupport": "required", "efaSupported": false, "encryptionInTransitSupported": true},
		"placementGroupInfo": obj{"supportedStrategies": []string{"cluster", "partition", "spread"}}, "hibernationSupported": false,
		"burstablePerformanceSupported": t.Burstable, "dedicatedHostsSupported": true, "autoRecoverySupported": true,
		"supportedInRegion": true, "supportedBootModes": t.bootModes(), "nitroEnclavesSupport": "unsupported", "nitroTpmSupport": "supported"}
	if t.GPUs > 0 {
		o["gpuInfo"] = obj{"totalGpuMemoryInMiB": t.GPUs * t.GPUMemoryMiB, "gpus": []obj{{"name": t.GPUName, "manufacturer": "NVIDIA",
			"count": t.GPUs, "memoryInfo": obj{"sizeInMiB": t.GPUMemoryMiB}}}}
	}
	return o
}

// offering says that a type can be had at a place.
type offering struct{ typ, place string }

func (s *Server) describeOfferings(c *call) (obj, error) {
	kind := c.or("LocationType", "region")
	var all []offering
	for _, t := range s.types {
		switch kind {
		case "region":
			all = append(all, offering{t.Name, s.cfg.Region})
		case "availability-zone":
			for _, z := range s.zones() {
				if t.Zones == nil || slices.Contains(t.Zones, z) {
					all = append(all, offering{t.Name, z})
				}
			}
		default:
			return nil, errorf(400, "UnsupportedOperation", "This emulation has no locations of the type %s", kind)
		}
	}
	sort.Slice(all, func(a, b int) bool { return all[a].typ+all[a].place < all[b].typ+all[b].place })
	all, err := filtered(c, all, func(offering) map[string]string { return nil }, attrs[offering]{
		"instance-type": one(func(o offering) string { return o.typ }),
		"location":      one(func(o offering) string { return o.place }),
	})
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 5, 1000, number(all), numbered[offering].seq)
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, n := range items {
		set = append(set, obj{"instanceType": n.v.typ, "locationType": kind, "location": n.v.place})
	}
	return obj{"instanceTypeOfferingSet": set, "nextToken": next}, c.dryRun()
}

func (s *Server) describeZones(c *call) (obj, error) {
	for _, z := range c.strs("ZoneName") {
		if !slices.Contains(s.zones(), z) {
			return nil, errorf(400, "InvalidParameterValue", "Invalid availability zone: [%s]", z)
		}
	}
	all, err := filtered(c, s.zones(), func(string) map[string]string { return nil }, attrs[string]{
		"zone-name":   one(func(z string) string { return z }),
		"region-name": one(func(string) string { return s.cfg.Region }),
		"state":       one(func(string) string { return "available" }),
		"zone-type":   one(func(string) string { return "availability-zone" }),
	})
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, z := range all {
		if names := c.strs("ZoneName"); len(names) > 0 && !slices.Contains(names, z) {
			continue
		}
		set = append(set, obj{"zoneName": z, "zoneState": "available", "regionName": s.cfg.Region, "zoneType": "availability-zone", "zoneId": s.zoneID(z),
			"optInStatus": "opt-in-not-required", "messageSet": []obj{}, "groupName": s.cfg.Region + "-zg-1", "networkBorderGroup": s.cfg.Region})
	}
	return obj{"availabilityZoneInfo": set}, c.dryRun()
}

// zoneID is a zone's name that is the same in all accounts, such as "use1-az1".
func (s *Server) zoneID(zone string) string {
	short := ""
	for i, part := range strings.Split(s.cfg.Region, "-") {
		if i == 0 || part[0] >= '0' && part[0] <= '9' {
			short += part
		} else {
			short += part[:1]
		}
	}
	return short + "-az" + itoa(1+slices.Index(s.zones(), zone))
}

func (s *Server) describeRegions(c *call) (obj, error) {
	return obj{"regionInfo": []obj{{"regionName": s.cfg.Region, "regionEndpoint": "ec2." + s.cfg.Region + ".amazonaws.com",
		"optInStatus": "opt-in-not-required"}}}, c.dryRun()
}

func (s *Server) describeKeyPairs(c *call) (obj, error) {
	for _, k := range c.strs("KeyName") {
		if !slices.Contains(s.cfg.KeyPairs, k) {
			return nil, errorf(400, "InvalidKeyPair.NotFound", "The key pair '%s' does not exist", k)
		}
	}
	all, err := filtered(c, s.cfg.KeyPairs, func(string) map[string]string { return nil }, attrs[string]{
		"key-name": one(func(k string) string { return k }),
	})
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for i, k := range all {
		if names := c.strs("KeyName"); len(names) > 0 && !slices.Contains(names, k) {
			continue
		}
		set = append(set, obj{"keyName": k, "keyPairId": "key-0123456789abcde" + itoa(10+i), "keyType": "ed25519", "tagSet": []obj{}})
	}
	return obj{"keySet": set}, c.dryRun()
}

func (s *Server) describePlacementGroups(c *call) (obj, error) {
	for _, g := range c.strs("GroupName") {
		if !slices.Contains(s.cfg.PlacementGroups, g) {
			return nil, errorf(400, "InvalidPlacementGroup.Unknown", "The Placement Group '%s' is unknown.", g)
		}
	}
	all, err := filtered(c, s.cfg.PlacementGroups, func(string) map[string]string { return nil }, attrs[string]{
		"group-name": one(func(g string) string { return g }),
		"state":      one(func(string) string { return "available" }),
		"strategy":   one(func(string) string { return "spread" }),
	})
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for i, g := range all {
		if names := c.strs("GroupName"); len(names) > 0 && !slices.Contains(names, g) {
			continue
		}
		set = append(set, obj{"groupName": g, "state": "available", "strategy": "spread", "groupId": "pg-0123456789abcde" + itoa(10+i), "tagSet": []obj{}})
	}
	return obj{"placementGroupSet": set}, c.dryRun()
}
