// SPDX-License-Identifier: Apache-2.0

package cloud

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestChoose(t *testing.T) {
	// Not sorted, and not totally ordered: a binary search over it goes wrong.
	types := []InstanceType{
		{Name: "wide", VCPUs: 8, MemoryMiB: 16384}, {Name: "tall", VCPUs: 2, MemoryMiB: 16385}, {Name: "small", VCPUs: 2, MemoryMiB: 2048},
		{Name: "m5.xlarge", VCPUs: 4, MemoryMiB: 16384}, {Name: "c5.xlarge", VCPUs: 4, MemoryMiB: 8192},
		{Name: "gpu", VCPUs: 4, MemoryMiB: 4096, GPUs: 1, GPUModel: "T4"}, {Name: "gpus", VCPUs: 4, MemoryMiB: 4096, GPUs: 4, GPUModel: "A10G"},
		{Name: "twin", VCPUs: 2, MemoryMiB: 2048},
	}
	plain := Catalog{Types: types, Default: "c5.xlarge", Key: "PODVM_INSTANCE_TYPES"}
	choose(t, []chooseCase{
		{"nothing asked takes the default", plain, Size{}, "c5.xlarge m5.xlarge wide"},
		{"exact fit", plain, Size{VCPUs: 4, MemoryMiB: 8192}, "c5.xlarge m5.xlarge wide"},
		{"beyond a non-monotone neighbour", plain, Size{VCPUs: 8, MemoryMiB: 16384}, "wide"},
		{"vCPUs only", plain, Size{VCPUs: 3}, "c5.xlarge m5.xlarge wide"},
		{"memory only", plain, Size{MemoryMiB: 16385}, "tall"},
		{"first of equals", plain, Size{VCPUs: 1, MemoryMiB: 1}, "small twin c5.xlarge m5.xlarge wide tall"},
		{"gpu", plain, Size{GPUs: 1}, "gpu gpus"},
		{"gpu model", plain, Size{GPUs: 1, GPUModel: "nvidia a10g"}, "gpus"},
		{"gpu model without a number", plain, Size{VCPUs: 8, GPUModel: "T4"}, "wide"},
		{"no such gpu model", plain, Size{GPUs: 1, GPUModel: "A10"}, "which gpu (4 vCPUs, 4096 MiB memory, 1 T4 GPU) could carry, but: T4 GPUs, not A10; add a type that fits to PODVM_INSTANCE_TYPES"},
		{"no gpu type unless asked", plain, Size{VCPUs: 2, MemoryMiB: 4096}, "c5.xlarge m5.xlarge wide tall"},
		{"gpu type when no other fits", Catalog{Types: types[5:7]}, Size{VCPUs: 4}, "gpu gpus"},
		{"named", plain, Size{Type: "tall"}, "tall"},
		{"named in other letters", plain, Size{Type: "M5.XLarge"}, "m5.xlarge"},
		{"named and fitting", plain, Size{Type: "tall", VCPUs: 2}, "tall"},
		{"named, too small", plain, Size{Type: "tall", VCPUs: 4}, "tall (2 vCPUs, 16385 MiB memory) is too small: asked for type tall, 4 vCPUs"},
		{"unknown", plain, Size{Type: "huge"}, `requested instance type ("huge") is not part of supported instance types list: wide, tall`},
		{"default not in the list", Catalog{Types: types, Default: "t9", Key: "K"}, Size{}, `requested instance type ("t9") is not part`},
		{"too large", plain, Size{VCPUs: 2, MemoryMiB: 18432}, "no instance type found for the given vcpus (2) and memory (18432)"},
		{"too large names the key", plain, Size{VCPUs: 16}, "add a larger type to PODVM_INSTANCE_TYPES"},
		{"too many gpus", plain, Size{GPUs: 8}, "4 GPUs, fewer than 8"},
		{"negative", plain, Size{VCPUs: -1}, "below zero"},
		{"empty", Catalog{Key: "K"}, Size{}, "set K"},
		{"no default", Catalog{Types: types}, Size{}, "small twin c5.xlarge m5.xlarge wide tall"},
	})
}

func TestChooseByPrice(t *testing.T) {
	// What things cost need not follow from their sizes.
	priced := []InstanceType{
		{Name: "small", VCPUs: 2, MemoryMiB: 4096, PricePerHour: 0.03}, {Name: "dear", VCPUs: 4, MemoryMiB: 8192, PricePerHour: 0.20},
		{Name: "cheap", VCPUs: 4, MemoryMiB: 16384, PricePerHour: 0.15}, {Name: "same", VCPUs: 8, MemoryMiB: 16384, PricePerHour: 0.15},
		{Name: "huge", VCPUs: 96, MemoryMiB: 786432, PricePerHour: 5}, {Name: "gpu", VCPUs: 8, MemoryMiB: 32768, GPUs: 1, GPUModel: "L4", PricePerHour: 0.8},
	}
	unpriced := append([]InstanceType{{Name: "new", VCPUs: 8, MemoryMiB: 8192}}, priced...)
	cvm := []InstanceType{
		{Name: "plain", VCPUs: 4, MemoryMiB: 8192, PricePerHour: 1, Arch: "amd64"}, {Name: "arm", VCPUs: 4, MemoryMiB: 8192, PricePerHour: 1, Arch: "arm64", Confidential: true},
		{Name: "snp", VCPUs: 4, MemoryMiB: 8192, PricePerHour: 2, Arch: "amd64", Confidential: true},
		{Name: "gone", VCPUs: 4, MemoryMiB: 8192, PricePerHour: 1, Confidential: true, Unusable: "not offered in zone 1"},
	}
	choose(t, []chooseCase{
		{"cheapest, not smallest", Catalog{Types: priced}, Size{VCPUs: 3, MemoryMiB: 5000}, "cheap same dear huge"},
		{"a gpu type is cheaper than a larger one", Catalog{Types: priced}, Size{MemoryMiB: 20000}, "gpu huge"},
		{"unknown prices come last", Catalog{Types: unpriced}, Size{VCPUs: 3, MemoryMiB: 5000}, "cheap same dear huge new"},
		{"and gpus after a price that is unknown", Catalog{Types: unpriced[:1:1]}, Size{VCPUs: 3}, "new"},
		{"no gpu on a guess", Catalog{Types: []InstanceType{priced[5], unpriced[0]}}, Size{VCPUs: 3}, "new"},
		{"default by price", Catalog{Types: priced}, Size{}, "small cheap same dear huge"},
		{"default stays the default", Catalog{Types: priced, Default: "dear"}, Size{}, "dear cheap same huge"},

		{"the guest's own memory", Catalog{Types: priced, OverheadMiB: 128}, Size{MemoryMiB: 4096}, "cheap same dear huge"},
		{"all that is left", Catalog{Types: priced, OverheadMiB: 128}, Size{MemoryMiB: 4096 - 64 - 128}, "small cheap same dear huge"},
		{"a byte more", Catalog{Types: priced, OverheadMiB: 128}, Size{MemoryMiB: 4096 - 64 - 127}, "cheap same dear huge"},
		{"named by one who knows", Catalog{Types: priced, OverheadMiB: 128}, Size{Type: "small", MemoryMiB: 4096}, "small"},

		{"confidential, and of the image's kind", Catalog{Types: cvm, Arch: "amd64", Confidential: true}, Size{VCPUs: 4}, "snp"},
		{"not confidential", Catalog{Types: cvm, Arch: "amd64"}, Size{VCPUs: 4}, "plain snp"},
		{"named, but not confidential", Catalog{Types: cvm, Confidential: true}, Size{Type: "plain"}, "cannot run a confidential VM, and DISABLECVM is not true"},
		{"named, but not to be had", Catalog{Types: cvm}, Size{Type: "gone"}, "cannot be used: not offered in zone 1"},
		{"default not to be had", Catalog{Types: cvm, Default: "gone"}, Size{}, "not offered in zone 1"},
		{"none to be had", Catalog{Types: cvm[3:]}, Size{VCPUs: 1}, "could carry, but: not offered in zone 1"},
	})
}

type chooseCase struct {
	name string
	c    Catalog
	size Size
	want string // type and alternatives, or words of the error
}

func choose(t *testing.T, cases []chooseCase) {
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tc.c.Choose(tc.size)
			if err != nil {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("Choose(%+v): %v; want InvalidArgument with %q", tc.size, err, tc.want)
				}
				for _, v := range got.Considered {
					if v.Outcome != OutcomeUnfit || v.Reason == "" {
						t.Errorf("after %v, %s is %s (%q)", err, v.Type.Name, v.Outcome, v.Reason)
					}
				}
				return
			}
			names := []string{got.Type.Name}
			for _, a := range got.Alternatives {
				names = append(names, a.Name)
			}
			if s := strings.Join(names, " "); s != tc.want {
				t.Fatalf("Choose(%+v) = %s, want %s", tc.size, s, tc.want)
			}
			considered(t, tc.c, got)
		})
	}
}

// considered checks that an explanation tells of every type once, and of those that
// were chosen in their order.
func considered(t *testing.T, c Catalog, got Choice) {
	t.Helper()
	seen := map[string]bool{}
	var order []InstanceType
	for _, v := range got.Considered {
		if seen[v.Type.Name] || v.Reason == "" {
			t.Errorf("%s twice, or without a reason", v.Type.Name)
		}
		seen[v.Type.Name] = true
		if v.Outcome != OutcomeUnfit {
			order = append(order, v.Type)
		}
	}
	if len(seen) != len(c.Types) {
		t.Errorf("%d of %d types considered", len(seen), len(c.Types))
	}
	if d := cmp.Diff(append([]InstanceType{got.Type}, got.Alternatives...), order); d != "" {
		t.Error(d)
	}
}

// TestOrderOfTheList: the answer does not depend on it, but for equals.
func TestOrderOfTheList(t *testing.T) {
	types := []InstanceType{
		{Name: "a", VCPUs: 2, MemoryMiB: 2048, PricePerHour: 0.1}, {Name: "b", VCPUs: 4, MemoryMiB: 2048, PricePerHour: 0.1},
		{Name: "c", VCPUs: 2, MemoryMiB: 4096, PricePerHour: 0.05}, {Name: "d", VCPUs: 2, MemoryMiB: 1024}, {Name: "e", VCPUs: 2, MemoryMiB: 2048, GPUs: 1, PricePerHour: 0.1},
	}
	for range 50 {
		rand.Shuffle(len(types), func(i, j int) { types[i], types[j] = types[j], types[i] })
		got, err := Catalog{Types: types}.Choose(Size{VCPUs: 1, GPUs: 0})
		if err != nil || got.Type.Name != "c" || len(got.Alternatives) != 3 || got.Alternatives[0].Name != "a" || got.Alternatives[2].Name != "d" {
			t.Fatalf("of %v: %s, %v", types, got, err)
		}
	}
}

func TestChoiceInWords(t *testing.T) {
	c := Catalog{OverheadMiB: 128, Remark: "prices: a guess", Types: []InstanceType{
		{Name: "t3.small", VCPUs: 2, MemoryMiB: 2048, PricePerHour: 0.0208}, {Name: "m6a.2xlarge", VCPUs: 8, MemoryMiB: 32768, PricePerHour: 0.3456},
		{Name: "m6a.xlarge", VCPUs: 4, MemoryMiB: 16384, PricePerHour: 0.1728}, {Name: "x.new", VCPUs: 4, MemoryMiB: 16384},
		{Name: "g4dn.xlarge", VCPUs: 4, MemoryMiB: 16384, GPUs: 1, GPUModel: "T4", PricePerHour: 0.526},
	}}
	got, err := c.Choose(Size{VCPUs: 3, MemoryMiB: 5000, GPUModel: "T4"})
	if err != nil {
		t.Fatal(err)
	}
	const line = "asked for 3 vCPUs, 5000 MiB memory (GPU model T4, but no number of GPUs, so none): m6a.xlarge (4 vCPUs, 16384 MiB memory) at $0.1728 per hour, the cheapest that fits, of those whose price is known; " +
		"then m6a.2xlarge, x.new; not g4dn.xlarge (it has GPUs, for which nobody asked), t3.small (2 vCPUs, fewer than 3; 2048 MiB memory, of which 1888 are left beside the guest, less than 5000); prices: a guess"
	if d := cmp.Diff(line, got.String()); d != "" {
		t.Error(d)
	}
	const table = `
TYPE         VCPUS  MIB    GPUS  USD/HOUR  CHOICE       REASON
m6a.xlarge   4      16384  -     0.1728    taken        the cheapest that fits, of those whose price is known
m6a.2xlarge  8      32768  -     0.3456    alternative  fits, tried as number 2
x.new        4      16384  -     ?         alternative  fits, tried as number 3
g4dn.xlarge  4      16384  1 T4  0.5260    no           it has GPUs, for which nobody asked
t3.small     2      2048   -     0.0208    no           2 vCPUs, fewer than 3; 2048 MiB memory, of which 1888 are left beside the guest, less than 5000
prices: a guess
`
	if d := cmp.Diff(table[1:], got.Table()); d != "" {
		t.Error(d)
	}
	if got, err := c.Choose(Size{VCPUs: 99}); err == nil || !strings.HasPrefix(got.String(), "asked for 99 vCPUs: no type; not t3.small (2 vCPUs, fewer than 99), m6a.2xlarge (") {
		t.Errorf("%v: %s", err, got)
	}
	if p := got.Plan("ami"); p.Type != "m6a.xlarge" || p.MemoryMiB != 16384 || p.VCPUs != 4 || p.Image != "ami" || !slices.Equal(p.Alternatives, []string{"m6a.2xlarge", "x.new"}) {
		t.Errorf("%+v", p)
	}
}

func TestValidate(t *testing.T) {
	ok := CreateRequest{Token: "t", Name: "podvm-a", SandboxID: "s", Owner: Owner{Cluster: "c", Node: "n"}, Tags: map[string]string{"team": "x"}}
	if err := ok.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, breakIt := range map[string]func(*CreateRequest){
		"empty token":  func(r *CreateRequest) { r.Token = "" },
		"long token":   func(r *CreateRequest) { r.Token = strings.Repeat("x", 65) },
		"token space":  func(r *CreateRequest) { r.Token = "a b" },
		"name case":    func(r *CreateRequest) { r.Name = "PodVM" },
		"name dash":    func(r *CreateRequest) { r.Name = "podvm-" },
		"long name":    func(r *CreateRequest) { r.Name = strings.Repeat("x", 64) },
		"no sandbox":   func(r *CreateRequest) { r.SandboxID = "" },
		"no cluster":   func(r *CreateRequest) { r.Owner.Cluster = "" },
		"no node":      func(r *CreateRequest) { r.Owner.Node = "" },
		"reserved tag": func(r *CreateRequest) { r.Tags = map[string]string{"PeerPod-Token": "x"} },
		"name tag":     func(r *CreateRequest) { r.Tags = map[string]string{"name": "x"} },
		"empty tag":    func(r *CreateRequest) { r.Tags = map[string]string{"": "x"} },
	} {
		r := ok
		breakIt(&r)
		if err := r.Validate(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
}

func TestFingerprint(t *testing.T) {
	a := CreateRequest{Token: "1", Name: "a", UserData: []byte("x"), Tags: map[string]string{"a": "1", "b": "2"}}
	b := a
	b.Token = "2"
	b.Tags = map[string]string{"b": "2", "a": "1"}
	if a.Fingerprint() != b.Fingerprint() {
		t.Error("token or order of tags changed the fingerprint")
	}
	b.UserData = []byte("y")
	if a.Fingerprint() == b.Fingerprint() {
		t.Error("other user data, same fingerprint")
	}
	if (CreateRequest{Tags: map[string]string{}, UserData: []byte{}}).Fingerprint() != (CreateRequest{}).Fingerprint() {
		t.Error("empty and nil differ")
	}
}
