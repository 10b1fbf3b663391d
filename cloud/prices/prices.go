// SPDX-License-Identifier: Apache-2.0

// Package prices knows what instances cost, well enough to tell which of two types is
// the cheaper one. The table in the binary holds estimates (prices.tsv says of when);
// a file of the same form replaces it.
//
// A table has a line to a price and four columns with a tab between them: provider,
// region, type, USD per hour. Blank lines, and lines that begin with #, are skipped. A
// type that has no price in a region has the one of the provider's base region, since
// regions differ by a factor that is much the same for all their types.
package prices

import (
	_ "embed"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

//go:embed prices.tsv
var builtIn string

// Base is the region of each provider whose prices stand in for those of others.
var Base = map[string]string{"aws": "us-east-1", "azure": "eastus"}

// Table is a list of prices. It does not change, and is safe for concurrent use.
type Table struct {
	source string // for a person
	usd    map[key]float64
}

// key is in lower case: Azure's names are used in both.
type key struct{ provider, region, typ string }

// BuiltIn is the table in the binary.
var BuiltIn = sync.OnceValue(func() *Table {
	t, err := Parse("prices.tsv", builtIn)
	if err != nil {
		panic(fmt.Sprintf("prices: the table in the binary: %v", err)) // a test reads it
	}
	t.source = "estimates in the binary, of mid 2025"
	return t
})

// Load reads a table from a file. InvalidArgument: every line that is wrong, each on
// a line of its own with what to write there.
func Load(path string) (*Table, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return Parse(path, string(text))
}

// Parse is Load for a text; name is where it is from.
func Parse(name, text string) (*Table, error) {
	var (
		t     = &Table{source: name, usd: map[key]float64{}}
		first = map[key]int{}
		bad   []string
	)
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSuffix(line, "\r")
		if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
			continue
		}
		wrong := func(format string, a ...any) {
			bad = append(bad, fmt.Sprintf("%s:%d: ", name, i+1)+fmt.Sprintf(format, a...))
		}
		f := strings.Split(line, "\t")
		if len(f) != 4 || slices.ContainsFunc(f, func(s string) bool { return s == "" || strings.ContainsAny(s, " ") }) {
			wrong("want provider, region, type and USD per hour with one tab between them, got %q", line)
			continue
		}
		if Base[f[0]] == "" {
			wrong("provider %q is not known; want aws or azure", f[0])
			continue
		}
		usd, err := strconv.ParseFloat(f[3], 64)
		if err != nil || usd <= 0 || math.IsInf(usd, 0) || math.IsNaN(usd) {
			wrong("price %q of %s is not a number above zero, such as 0.0864; leave the line out when it is unknown", f[3], f[2])
			continue
		}
		k := key{f[0], strings.ToLower(f[1]), strings.ToLower(f[2])}
		if n := first[k]; n != 0 {
			wrong("%s in %s has a price already, on line %d; remove one", f[2], f[1], n)
			continue
		}
		first[k] = i + 1
		t.usd[k] = usd
	}
	if len(bad) == 0 && len(t.usd) == 0 {
		bad = append(bad, name+": there is no price in it; write at least one line")
	}
	if len(bad) > 0 {
		return nil, errdefs.ErrInvalidArgument.WithMessage(strings.Join(bad, "\n"))
	}
	return t, nil
}

// Price of an instance in USD per hour, and the region whose price it is: the one
// asked for, or the provider's base region. 0 and "" when it is unknown.
func (t *Table) Price(provider, region, typ string) (usd float64, from string) {
	for _, r := range []string{region, Base[provider]} {
		if usd := t.usd[key{provider, strings.ToLower(r), strings.ToLower(typ)}]; usd > 0 {
			return usd, r
		}
	}
	return 0, ""
}

// Apply sets the price of each type and returns a remark for the catalog: where the
// prices are from, and which are those of another region.
func (t *Table) Apply(provider, region string, types []cloud.InstanceType) (remark string) {
	var elsewhere []string
	for i := range types {
		usd, from := t.Price(provider, region, types[i].Name)
		types[i].PricePerHour = usd
		if usd > 0 && from != region {
			elsewhere = append(elsewhere, types[i].Name)
		}
	}
	remark = "prices: " + t.source
	if len(elsewhere) > 0 {
		which := strings.Join(elsewhere, ", ")
		if len(elsewhere) == len(types) {
			which = "all of them"
		}
		remark += fmt.Sprintf("; %s as in %s, as there are none for %s", which, Base[provider], region)
	}
	return remark
}
