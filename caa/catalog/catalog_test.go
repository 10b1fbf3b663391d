// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/prices"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "types")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadsWhatTextWrites(t *testing.T) {
	types := []cloud.InstanceType{
		{Name: "a.large", VCPUs: 2, MemoryMiB: 8192},
		{Name: "Standard_NC1", VCPUs: 4, MemoryMiB: 512, GPUs: 2, GPUModel: "RTX PRO 6000", Arch: "arm64", Confidential: true, PricePerHour: 0.0123},
	}
	got, err := Read(write(t, Text(types)))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(types, got); d != "" {
		t.Error(d)
	}
}

func TestEveryWrongLine(t *testing.T) {
	path := write(t, "a 2 1024\nA 2 1024\nb 2\nc two 1024\nd 2 -1\ne 0 1024\nf 2 1 0 - x86\ng 2 1 0 - - maybe\nh 2 1 0 - - yes free\n i 1 1 1 1 1 1 1 1\n")
	_, err := Read(path)
	if !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	want := []string{"2: A is on line 1", "3: want 3 to 8", `4: vCPUs "two"`, `5: memory "-1"`, "6: e has no", `7: arch "x86"`, `8: confidential is "maybe"`, `9: price "free"`, "10: want 3 to 8"}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != len(want) {
		t.Fatalf("%d problems, want %d:\n%v", len(lines), len(want), err)
	}
	for i, w := range want {
		if !strings.HasPrefix(lines[i], path+":"+w) {
			t.Errorf("%q does not begin with the path and %q", lines[i], w)
		}
	}
	for _, path := range []string{write(t, "# none\n"), "/absent"} {
		if _, err := Read(path); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestOf(t *testing.T) {
	types := []cloud.InstanceType{{Name: "standard_d2as_v5", VCPUs: 2, MemoryMiB: 8192}, {Name: "Standard_D4as_v5", VCPUs: 4, MemoryMiB: 16384, PricePerHour: 9}, {Name: "m6a.large", VCPUs: 2, MemoryMiB: 8192}}
	c, err := Of(&config.Config{
		Provider: config.ProviderAzure, Cloud: config.Cloud{OverheadMiB: 7, Prices: prices.BuiltIn(), DisableCVM: true},
		Azure: config.Azure{Region: "westeurope", InstanceSize: "Standard_D4as_v5", InstanceSizes: []string{"Standard_D4as_v5", "Standard_D2as_v5", "Standard_D8as_v5"}},
	}, types)
	if err != nil || len(c.Types) != 3 || c.Default != "Standard_D4as_v5" || c.Key != "AZURE_INSTANCE_SIZES" || c.OverheadMiB != 7 || c.Confidential {
		t.Fatalf("%+v, %v", c, err)
	}
	if c.Types[0].PricePerHour != 9 || c.Types[1].PricePerHour == 0 || c.Types[1].VCPUs != 2 || !strings.Contains(c.Types[2].Unusable, "not in the file") {
		t.Errorf("%+v", c.Types)
	}
	if !strings.Contains(c.Remark, "as in eastus, as there are none for westeurope") {
		t.Errorf("remark %q", c.Remark)
	}
	if c, err := Of(nil, types); err != nil || len(c.Types) != 3 || c.Default != "" || c.OverheadMiB != cloud.DefaultOverheadMiB || c.Types[0].PricePerHour == 0 || c.Types[2].PricePerHour != 0 || strings.Contains(c.Remark, "as in") {
		t.Errorf("%+v, %v", c, err)
	}
	if types[0].PricePerHour != 0 {
		t.Error("the caller's types were changed")
	}
	if _, err := Of(&config.Config{Provider: config.ProviderLocal}, types); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("local: %v", err)
	}
}
