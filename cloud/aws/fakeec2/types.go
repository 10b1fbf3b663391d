// SPDX-License-Identifier: Apache-2.0

package fakeec2

import "strings"

// InstanceType is what a region offers. Sizes are the vendor's ("Amazon EC2 instance
// types", November 2026).
type InstanceType struct {
	Name         string
	VCPUs        int
	MemoryMiB    int
	Architecture string // "": x86_64
	SEVSNP       bool   // can run with AMD SEV-SNP
	GPUs         int
	GPUName      string // as in DescribeInstanceTypes, such as "T4"
	GPUMemoryMiB int    // of one GPU
	Burstable    bool
	// Zones offer it; nil: all do.
	Zones []string
}

func (t InstanceType) arch() string {
	if t.Architecture == "" {
		return "x86_64"
	}
	return t.Architecture
}

// bootModes are the ways an instance of the type can start.
func (t InstanceType) bootModes() []string {
	if t.arch() == "arm64" {
		return []string{"uefi"}
	}
	return []string{"legacy-bios", "uefi"}
}

// quota names the account limit that counts the type's vCPUs.
func (t InstanceType) quota() string {
	switch {
	case strings.HasPrefix(t.Name, "g"):
		return "g"
	case strings.HasPrefix(t.Name, "p"):
		return "p"
	}
	return "standard"
}

// manufacturer of the type's processor: the letter behind the generation tells.
func (t InstanceType) manufacturer() string {
	family, _, _ := strings.Cut(t.Name, ".")
	switch {
	case t.arch() == "arm64":
		return "AWS"
	case len(family) > 2 && family[2] == 'a':
		return "AMD"
	}
	return "Intel"
}

// Types are those a Config offers unless it says otherwise.
var Types = func() []InstanceType {
	var all []InstanceType
	sizes := []struct {
		name  string
		vcpus int
	}{{"large", 2}, {"xlarge", 4}, {"2xlarge", 8}, {"4xlarge", 16}, {"8xlarge", 32}, {"12xlarge", 48}, {"16xlarge", 64}}
	for _, f := range []struct {
		name   string
		gib    int // of memory for each vCPU
		arch   string
		sevsnp int // the most vCPUs that can run with SEV-SNP
	}{
		{"m5", 4, "", 0}, {"m6i", 4, "", 0}, {"m6a", 4, "", 32}, {"m7i", 4, "", 0}, {"m7a", 4, "", 0}, {"m7g", 4, "arm64", 0},
		{"c5", 2, "", 0}, {"c6i", 2, "", 0}, {"c6a", 2, "", 64}, {"c7i", 2, "", 0}, {"c7g", 2, "arm64", 0},
		{"r5", 8, "", 0}, {"r6i", 8, "", 0}, {"r6a", 8, "", 16}, {"r7i", 8, "", 0}, {"r7g", 8, "arm64", 0},
	} {
		for _, z := range sizes {
			if f.name == "m5" || f.name == "c5" || f.name == "r5" {
				if z.name == "12xlarge" || z.name == "16xlarge" {
					continue
				}
			}
			all = append(all, InstanceType{Name: f.name + "." + z.name, VCPUs: z.vcpus, MemoryMiB: z.vcpus * f.gib * 1024,
				Architecture: f.arch, SEVSNP: z.vcpus <= f.sevsnp})
		}
	}
	for _, f := range []struct{ name, arch string }{{"t3", ""}, {"t3a", ""}, {"t4g", "arm64"}} {
		for _, z := range []InstanceType{{Name: "nano", VCPUs: 2, MemoryMiB: 512}, {Name: "micro", VCPUs: 2, MemoryMiB: 1024},
			{Name: "small", VCPUs: 2, MemoryMiB: 2048}, {Name: "medium", VCPUs: 2, MemoryMiB: 4096}, {Name: "large", VCPUs: 2, MemoryMiB: 8192},
			{Name: "xlarge", VCPUs: 4, MemoryMiB: 16384}, {Name: "2xlarge", VCPUs: 8, MemoryMiB: 32768}} {
			z.Name, z.Architecture, z.Burstable = f.name+"."+z.Name, f.arch, true
			all = append(all, z)
		}
	}
	gpu := func(name string, vcpus, gib, gpus int, model string, mib int) {
		all = append(all, InstanceType{Name: name, VCPUs: vcpus, MemoryMiB: gib * 1024, GPUs: gpus, GPUName: model, GPUMemoryMiB: mib})
	}
	gpu("g4dn.xlarge", 4, 16, 1, "T4", 16384)
	gpu("g4dn.2xlarge", 8, 32, 1, "T4", 16384)
	gpu("g4dn.12xlarge", 48, 192, 4, "T4", 16384)
	gpu("g5.xlarge", 4, 16, 1, "A10G", 24576)
	gpu("g5.2xlarge", 8, 32, 1, "A10G", 24576)
	gpu("g5.12xlarge", 48, 192, 4, "A10G", 24576)
	gpu("g6.xlarge", 4, 16, 1, "L4", 22888)
	gpu("g6.2xlarge", 8, 32, 1, "L4", 22888)
	gpu("p3.2xlarge", 8, 61, 1, "V100", 16384)
	gpu("p4d.24xlarge", 96, 1152, 8, "A100", 40960)
	gpu("p5.48xlarge", 192, 2048, 8, "H100", 81920)
	return all
}()
