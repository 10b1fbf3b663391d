// SPDX-License-Identifier: Apache-2.0

package cloud

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestChoose(t *testing.T) {
	// Not sorted, and not totally ordered: a binary search over it goes wrong.
	types := []InstanceType{
		{"wide", 8, 16384, 0}, {"tall", 2, 16385, 0}, {"small", 2, 2048, 0}, {"m5.xlarge", 4, 16384, 0},
		{"c5.xlarge", 4, 8192, 0}, {"gpu", 4, 4096, 1}, {"twin", 2, 2048, 0},
	}
	c := Catalog{Types: types, Default: "c5.xlarge", Key: "PODVM_INSTANCE_TYPES"}
	for _, tc := range []struct {
		name string
		size Size
		want string // type, or words of the error
	}{
		{"nothing asked takes the default", Size{}, "c5.xlarge"},
		{"exact fit", Size{VCPUs: 4, MemoryMiB: 8192}, "c5.xlarge"},
		{"beyond a non-monotone neighbour", Size{VCPUs: 8, MemoryMiB: 16384}, "wide"},
		{"least memory wins", Size{VCPUs: 3}, "c5.xlarge"},
		{"memory only", Size{MemoryMiB: 16385}, "tall"},
		{"first of equals", Size{VCPUs: 1, MemoryMiB: 1}, "small"},
		{"gpu", Size{GPUs: 1}, "gpu"},
		{"no gpu type unless asked", Size{VCPUs: 2, MemoryMiB: 4096}, "c5.xlarge"},
		{"named", Size{Type: "tall"}, "tall"},
		{"named and fitting", Size{Type: "tall", VCPUs: 2}, "tall"},
		{"named, too small", Size{Type: "tall", VCPUs: 4}, "tall (2 vCPUs, 16385 MiB memory) is too small: asked for type tall, 4 vCPUs"},
		{"unknown", Size{Type: "huge"}, `requested instance type ("huge") is not part of supported instance types list: wide, tall`},
		{"too large", Size{VCPUs: 2, MemoryMiB: 18432}, "no instance type found for the given vcpus (2) and memory (18432)"},
		{"too large names the key", Size{VCPUs: 16}, "add a larger type to PODVM_INSTANCE_TYPES"},
		{"negative", Size{VCPUs: -1}, "below zero"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := c.Choose(tc.size)
			if err != nil {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("Choose(%+v): %v; want InvalidArgument with %q", tc.size, err, tc.want)
				}
				return
			}
			if got.Name != tc.want {
				t.Fatalf("Choose(%+v) = %s, want %s", tc.size, got.Name, tc.want)
			}
		})
	}
	if _, err := (Catalog{Key: "K"}).Choose(Size{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "set K") {
		t.Fatalf("empty catalog: %v", err)
	}
	if got, err := (Catalog{Types: types}).Choose(Size{}); err != nil || got.Name != "small" {
		t.Fatalf("no default: %v, %v; want the smallest", got, err)
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
