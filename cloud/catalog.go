// SPDX-License-Identifier: Apache-2.0

package cloud

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// InstanceType is one size of machine that a cloud sells.
type InstanceType struct {
	Name      string
	VCPUs     int
	MemoryMiB int // as the cloud states it; a guest has less of it, see Catalog.OverheadMiB
	GPUs      int
	GPUModel  string // as the cloud names it; "": unknown, or there are no GPUs
	// Arch is what its processors run: "amd64" or "arm64", as Go names them. "":
	// unknown, and then it fits any image.
	Arch string
	// Confidential tells whether it can run a confidential VM.
	Confidential bool
	// PricePerHour in USD, on demand. 0: unknown.
	PricePerHour float64
	// Unusable is why it cannot be had here, for a person: the region does not
	// offer it, say. "": it can.
	Unusable string
}

// Catalog is the list of types that may be used.
type Catalog struct {
	Types   []InstanceType
	Default string // for a size that asks for nothing; "" means the first in the order of Choose
	Key     string // configuration key that holds the list, for error texts

	Arch         string // of the image; only types of it fit. "": any
	Confidential bool   // only types that can run a confidential VM fit

	// OverheadMiB is what the guest keeps for itself of an instance's memory, besides
	// a share that grows with it (see Usable); DefaultOverheadMiB is what ours keeps.
	// 0: nothing at all, so that a pod may ask for every byte that the type has.
	OverheadMiB int
	// Remark is about the list as a whole, for a person: where its prices are from.
	Remark string
}

// pageShare is the share of memory, one part in this many, with which Linux describes
// the rest: a struct page of 64 bytes for each page of 4096 (include/linux/mm_types.h,
// x86-64 and arm64).
const pageShare = 64

// DefaultOverheadMiB is what our guest keeps for itself besides the share above. In MiB,
// measured in November 2026 on Debian's cloud kernel 6.1 for x86-64, in a machine of
// 2048 MiB under QEMU that waits for its first container:
//
//	37  not in MemTotal (1979 MiB), less the share (32): the kernel's code and data
//	83  MemTotal less MemFree: the root file system, which stays in memory (20), podvmd
//	    (21 resident), slabs (16), stacks, page tables, lists of free pages
//	69  MemFree less MemAvailable: what the kernel does not give to processes
//	64  its bounce buffer for DMA (swiotlb), in machines of 4 GiB and more and in
//	    confidential ones; from the difference of 2 and 8 GiB in its log
//	60  what a cloud's firmware and hypervisor take (an estimate)
//
// which is 313, rounded up.
const DefaultOverheadMiB = 320

// Usable is the memory, MiB, that type t leaves to a pod.
func (c Catalog) Usable(t InstanceType) int {
	if c.OverheadMiB == 0 {
		return t.MemoryMiB
	}
	return max(0, t.MemoryMiB-(t.MemoryMiB+pageShare-1)/pageShare-c.OverheadMiB)
}

// Choose returns the type to use for size, those to try when there is none to be had,
// and why:
//
//   - the type that size names, which must be in the list; then there is no other;
//   - else, when size asks for nothing, the default. The others are those that have
//     at least its vCPUs and memory;
//   - else the first that carries all that is asked for, and the guest's own
//     overhead. The others that do follow.
//
// The order is by price; types of unknown price come after those whose price is
// known; equals go by number of GPUs, then by memory, by vCPUs, and by their place in
// the list, which need not be sorted. Who asks for no GPU gets one only when every
// type that fits has some, or when all prices are known and it is cheaper so; and
// never as an alternative to a type without. A GPU model alone asks for no GPU.
//
// A named type need only have what is asked for, without the overhead: who names a
// type knows what it has.
//
// InvalidArgument: the named type is not in the list or too small, or no type is
// large enough. The choice then tells of each type why.
func (c Catalog) Choose(size Size) (Choice, error) {
	ch := Choice{Size: size, OverheadMiB: c.OverheadMiB, Remark: c.Remark}
	if len(c.Types) == 0 {
		return ch, fmt.Errorf("there is no instance type to choose from; set %s: %w", c.key(), errdefs.ErrInvalidArgument)
	}
	if size.VCPUs < 0 || size.MemoryMiB < 0 || size.GPUs < 0 {
		return ch, fmt.Errorf("a size below zero was asked for (%s): %w", size.Ask(), errdefs.ErrInvalidArgument)
	}
	switch {
	case size.Type != "":
		return c.named(ch)
	case size.VCPUs == 0 && size.MemoryMiB == 0 && size.GPUs == 0 && c.Default != "":
		return c.standard(ch)
	}
	fits := c.sort(c.sift(&ch, size, c.Usable), size.GPUs > 0)
	if len(fits) == 0 {
		return ch, c.nothingFits(size)
	}
	why := "the cheapest that fits"
	switch {
	case len(fits) == 1:
		why = "the only one that fits"
	case fits[0].PricePerHour == 0:
		why = "the smallest that fits; no price is known"
	case slices.ContainsFunc(fits, func(t InstanceType) bool { return t.PricePerHour == 0 }):
		why = "the cheapest that fits, of those whose price is known"
	}
	ch.take(fits[0], why, fits[1:], size.GPUs > 0)
	return ch, nil
}

// named takes the type that was asked for by name.
func (c Catalog) named(ch Choice) (Choice, error) {
	t, ok := c.find(ch.Size.Type)
	if !ok {
		for _, t := range c.Types {
			ch.Considered = append(ch.Considered, Verdict{Type: t, Reason: "another type was named"})
		}
		return ch, c.unknown(ch.Size.Type)
	}
	reason := c.unfit(t, ch.Size, t.MemoryMiB)
	for _, o := range c.Types {
		switch {
		case o.Name != t.Name:
			ch.Considered = append(ch.Considered, Verdict{Type: o, Reason: "another type was named"})
		case reason != "":
			ch.Considered = append(ch.Considered, Verdict{Type: o, Reason: reason})
		}
	}
	if reason != "" && c.sized(t, ch.Size, t.MemoryMiB) {
		return ch, fmt.Errorf("instance type %s cannot be used: %s; name another of %s: %w", t, reason, c.key(), errdefs.ErrInvalidArgument)
	}
	if reason != "" {
		return ch, fmt.Errorf("instance type %s is too small: asked for %s; ask for less or name a larger type: %w", t, ch.Size.Ask(), errdefs.ErrInvalidArgument)
	}
	ch.take(t, "named by the pod", nil, false)
	return ch, nil
}

// standard takes the default type.
func (c Catalog) standard(ch Choice) (Choice, error) {
	t, ok := c.find(c.Default)
	if !ok {
		return ch, c.unknown(c.Default)
	}
	if reason := c.unfit(t, Size{}, t.MemoryMiB); reason != "" {
		return ch, fmt.Errorf("the default instance type %s cannot be used: %s; choose another: %w", t, reason, errdefs.ErrInvalidArgument)
	}
	// What works on the default must work on what stands in for it.
	like := Size{VCPUs: t.VCPUs, MemoryMiB: t.MemoryMiB, GPUs: t.GPUs, GPUModel: t.GPUModel}
	fits := c.sort(c.sift(&ch, like, func(o InstanceType) int { return o.MemoryMiB }), t.GPUs > 0)
	fits = slices.DeleteFunc(fits, func(o InstanceType) bool { return o.Name == t.Name })
	ch.take(t, "the default, as nothing is asked for", fits, t.GPUs > 0)
	return ch, nil
}

// sift returns the types that fit and notes of the others why they do not.
func (c Catalog) sift(ch *Choice, size Size, usable func(InstanceType) int) []InstanceType {
	var fits []InstanceType
	for _, t := range c.Types {
		if reason := c.unfit(t, size, usable(t)); reason != "" {
			ch.Considered = append(ch.Considered, Verdict{Type: t, Reason: reason})
		} else {
			fits = append(fits, t)
		}
	}
	return fits
}

// unfit says all that keeps t from carrying size, or only that it cannot be had. "":
// nothing does.
func (c Catalog) unfit(t InstanceType, size Size, usable int) string {
	if t.Unusable != "" {
		return t.Unusable
	}
	var why []string
	bad := func(format string, a ...any) { why = append(why, fmt.Sprintf(format, a...)) }
	if c.Arch != "" && t.Arch != "" && t.Arch != c.Arch {
		bad("its processors are %s and the image is for %s", t.Arch, c.Arch)
	}
	if c.Confidential && !t.Confidential {
		bad("it cannot run a confidential VM, and DISABLECVM is not true")
	}
	if t.VCPUs < size.VCPUs {
		bad("%s, fewer than %d", count(t.VCPUs, "vCPU"), size.VCPUs)
	}
	switch {
	case usable >= size.MemoryMiB:
	case usable == t.MemoryMiB:
		bad("%d MiB memory, less than %d", t.MemoryMiB, size.MemoryMiB)
	default:
		bad("%d MiB memory, of which %d are left beside the guest, less than %d", t.MemoryMiB, usable, size.MemoryMiB)
	}
	switch {
	case t.GPUs == 0 && size.GPUs > 0:
		bad("no GPU")
	case t.GPUs < size.GPUs:
		bad("%s, fewer than %d", count(t.GPUs, "GPU"), size.GPUs)
	case size.GPUs > 0 && size.GPUModel != "" && !sameModel(t.GPUModel, size.GPUModel):
		if t.GPUModel == "" {
			bad("GPUs of an unknown model, not %s", size.GPUModel)
		} else {
			bad("%s GPUs, not %s", t.GPUModel, size.GPUModel)
		}
	}
	return strings.Join(why, "; ")
}

// sized tells whether t is large enough, whatever else is wrong with it.
func (c Catalog) sized(t InstanceType, size Size, usable int) bool {
	return t.VCPUs >= size.VCPUs && usable >= size.MemoryMiB && t.GPUs >= size.GPUs
}

// sort puts types in the order in which to try them.
func (c Catalog) sort(types []InstanceType, gpus bool) []InstanceType {
	// A GPU that nobody asked for is not taken on a guess about prices.
	guess := !gpus && slices.ContainsFunc(types, func(t InstanceType) bool { return t.GPUs == 0 && t.PricePerHour == 0 })
	slices.SortStableFunc(types, func(a, b InstanceType) int {
		if guess && (a.GPUs == 0) != (b.GPUs == 0) {
			return cmp.Compare(a.GPUs, b.GPUs)
		}
		if (a.PricePerHour == 0) != (b.PricePerHour == 0) {
			return cmp.Compare(b.PricePerHour, a.PricePerHour)
		}
		return cmp.Or(cmp.Compare(a.PricePerHour, b.PricePerHour), a.size(b))
	})
	return types
}

func (t InstanceType) size(o InstanceType) int {
	return cmp.Or(cmp.Compare(t.GPUs, o.GPUs), cmp.Compare(t.MemoryMiB, o.MemoryMiB), cmp.Compare(t.VCPUs, o.VCPUs))
}

// find compares without case: Azure writes its names in both and takes them in any.
func (c Catalog) find(name string) (InstanceType, bool) {
	for _, t := range c.Types {
		if strings.EqualFold(t.Name, name) {
			return t, true
		}
	}
	return InstanceType{}, false
}

func (c Catalog) unknown(name string) error {
	names := make([]string, 0, len(c.Types))
	for _, t := range c.Types {
		names = append(names, t.Name)
	}
	return fmt.Errorf("requested instance type (%q) is not part of supported instance types list: %s; name one of these or add it to %s: %w",
		name, strings.Join(names, ", "), c.key(), errdefs.ErrInvalidArgument)
}

func (c Catalog) nothingFits(size Size) error {
	said := fmt.Sprintf("no instance type found for the given vcpus (%d) and memory (%d): asked for %s", size.VCPUs, size.MemoryMiB, size.Ask())
	for _, t := range c.Types {
		if c.sized(t, size, c.Usable(t)) {
			return fmt.Errorf("%s, which %s could carry, but: %s; add a type that fits to %s: %w", said, t, c.unfit(t, size, c.Usable(t)), c.key(), errdefs.ErrInvalidArgument)
		}
	}
	largest := slices.MaxFunc(c.Types, InstanceType.size)
	return fmt.Errorf("%s, the largest of %s is %s: %s; ask for less or add a larger type to %s: %w",
		said, c.key(), largest, c.unfit(largest, size, c.Usable(largest)), c.key(), errdefs.ErrInvalidArgument)
}

func (c Catalog) key() string {
	if c.Key == "" {
		return "the list of instance types"
	}
	return c.Key
}

// sameModel compares names of GPUs as people write them: "NVIDIA T4", "nvidia-t4",
// "Tesla T4" and "T4" are one.
func sameModel(a, b string) bool { return bareModel(a) == bareModel(b) }

func bareModel(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == ' ' || r == '-' || r == '_' || r == '.' {
			return -1
		}
		return r
	}, strings.ToLower(s))
	for _, maker := range []string{"nvidia", "amd", "tesla"} {
		s = strings.TrimPrefix(s, maker)
	}
	return s
}

// String names the type and its size.
func (t InstanceType) String() string {
	return fmt.Sprintf("%s (%s)", t.Name, Size{VCPUs: t.VCPUs, MemoryMiB: t.MemoryMiB, GPUs: t.GPUs, GPUModel: t.GPUModel}.Ask())
}

// Ask says in words what the size asks for.
func (s Size) Ask() string {
	var p []string
	if s.Type != "" {
		p = append(p, "type "+s.Type)
	}
	if s.VCPUs != 0 {
		p = append(p, count(s.VCPUs, "vCPU"))
	}
	if s.MemoryMiB != 0 {
		p = append(p, fmt.Sprintf("%d MiB memory", s.MemoryMiB))
	}
	if s.GPUs != 0 {
		p = append(p, count(s.GPUs, strings.TrimSpace(s.GPUModel+" GPU")))
	}
	if len(p) == 0 {
		return "nothing in particular"
	}
	return strings.Join(p, ", ")
}

func count(n int, what string) string { return fmt.Sprintf("%d %s", n, noun(n, what)) }

func noun(n int, what string) string {
	if n == 1 {
		return what
	}
	return what + "s"
}
