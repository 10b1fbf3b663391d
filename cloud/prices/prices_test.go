// SPDX-License-Identifier: Apache-2.0

package prices

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

func TestBuiltIn(t *testing.T) {
	table := BuiltIn()
	for _, typ := range []string{"m6a.large", "t3.small", "g4dn.xlarge", "p5.48xlarge"} {
		if usd, from := table.Price("aws", "us-east-1", typ); usd <= 0 || from != "us-east-1" {
			t.Errorf("%s: %v of %q", typ, usd, from)
		}
	}
	for _, typ := range []string{"Standard_DC2as_v5", "Standard_B2als_v2", "standard_d2as_v5", "Standard_NC4as_T4_v3"} {
		if usd, from := table.Price("azure", "westeurope", typ); usd <= 0 || from != "eastus" {
			t.Errorf("%s: %v of %q", typ, usd, from)
		}
	}
	// What matters is the order: more of a family costs more.
	for _, pair := range [][2]string{{"m6a.large", "m6a.xlarge"}, {"c6a.large", "m6a.large"}, {"m6a.large", "r6a.large"}, {"t3.small", "t3.medium"}, {"g4dn.xlarge", "g5.xlarge"}, {"m6a.48xlarge", "p4d.24xlarge"}} {
		a, _ := table.Price("aws", "us-east-1", pair[0])
		b, _ := table.Price("aws", "us-east-1", pair[1])
		if a >= b {
			t.Errorf("%s costs %v and %s %v", pair[0], a, pair[1], b)
		}
	}
	if usd, from := table.Price("aws", "us-east-1", "x9.huge"); usd != 0 || from != "" {
		t.Errorf("no such type: %v of %q", usd, from)
	}
}

func TestApply(t *testing.T) {
	table, err := Parse("p", "# a comment\n\naws\tus-east-1\tm6a.large\t0.0864\naws\teu-west-1\tm6a.xlarge\t0.19\r\naws\teu-west-1\tm6a.large\t0.096\naws\tus-east-1\tt3.small\t.02\n")
	if err != nil {
		t.Fatal(err)
	}
	types := []cloud.InstanceType{{Name: "m6a.large"}, {Name: "m6a.xlarge"}, {Name: "t3.small"}, {Name: "new.large", PricePerHour: 3}}
	for _, tc := range []struct {
		region, remark string
		want           [4]float64
	}{
		{"eu-west-1", "prices: p; t3.small as in us-east-1, as there are none for eu-west-1", [4]float64{0.096, 0.19, 0.02}},
		{"us-east-1", "prices: p", [4]float64{0.0864, 0, 0.02}},
	} {
		remark := table.Apply("aws", tc.region, types)
		for i, typ := range types {
			if typ.PricePerHour != tc.want[i] {
				t.Errorf("%s: %s costs %v, want %v", tc.region, typ.Name, typ.PricePerHour, tc.want[i])
			}
		}
		if remark != tc.remark {
			t.Errorf("%s: %q", tc.region, remark)
		}
	}
	if remark := table.Apply("aws", "ap-east-1", types[:1]); remark != "prices: p; all of them as in us-east-1, as there are none for ap-east-1" {
		t.Errorf("%q", remark)
	}
}

func TestEveryWrongLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prices")
	text := "aws\tus-east-1\tm6a.large\t0.0864\naws us-east-1 m6a.large 1\naws\tus-east-1\tx\t-1\ngcp\tr\tx\t1\naws\tus-east-1\tM6a.Large\t2\naws\tr\tx\tNaN\naws\tr\t\t1\naws\tr\tx\t1\t#\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(path)
	if !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	lines := strings.Split(err.Error(), "\n")
	want := []string{":2: want provider, region", `:3: price "-1" of x`, `:4: provider "gcp"`, ":5: M6a.Large in us-east-1 has a price already, on line 1", `:6: price "NaN"`, ":7: want provider", ":8: want provider"}
	if len(lines) != len(want) {
		t.Fatalf("%d problems, want %d:\n%v", len(lines), len(want), err)
	}
	for i, w := range want {
		if !strings.HasPrefix(lines[i], path+w) {
			t.Errorf("%q, want it to begin with the path and %q", lines[i], w)
		}
	}
	for name, text := range map[string]string{"empty": "# nothing\n", "absent": ""} {
		path := filepath.Join(t.TempDir(), name)
		if text != "" {
			os.WriteFile(path, []byte(text), 0o600)
		}
		if _, err := Load(path); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
