// SPDX-License-Identifier: Apache-2.0

// Package catalog answers which instance type a pod would get without asking the
// cloud: what types have comes from a file, and the rest from the adaptor's
// configuration.
//
// The file has a line to a type, with spaces or tabs between its columns:
//
//	type  vCPUs  MiB  [GPUs  [model  [arch  [confidential  [USD per hour]]]]]
//
// Blank lines and lines that begin with # are skipped; "-" stands for what is not
// there or not known, and a space in a model's name is written "_". Text writes it.
package catalog

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/prices"
)

// Read reads a file of types. InvalidArgument: every wrong line, each on a line of its
// own.
func Read(path string) ([]cloud.InstanceType, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	var (
		types []cloud.InstanceType
		first = map[string]int{}
		bad   []string
	)
	for i, line := range strings.Split(string(text), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		at := fmt.Sprintf("%s:%d: ", path, i+1)
		t, err := parse(f)
		name := strings.ToLower(t.Name)
		switch {
		case err != nil:
			bad = append(bad, at+err.Error())
		case first[name] != 0:
			bad = append(bad, fmt.Sprintf("%s%s is on line %d already; remove one", at, t.Name, first[name]))
		default:
			first[name] = i + 1
			types = append(types, t)
		}
	}
	if len(bad) == 0 && len(types) == 0 {
		bad = append(bad, path+": there is no type in it; write at least one line, such as: m6a.large 2 8192")
	}
	if len(bad) > 0 {
		return nil, errdefs.ErrInvalidArgument.WithMessage(strings.Join(bad, "\n"))
	}
	return types, nil
}

func parse(f []string) (t cloud.InstanceType, err error) {
	if len(f) < 3 || len(f) > 8 {
		return t, fmt.Errorf("want 3 to 8 columns (type, vCPUs, MiB, GPUs, model, arch, confidential, USD per hour), got %d", len(f))
	}
	col := func(i int) string {
		if i >= len(f) || f[i] == "-" {
			return ""
		}
		return f[i]
	}
	number := func(i int, what string) (n int) {
		if s := col(i); s != "" && err == nil {
			if n, err = strconv.Atoi(s); err != nil || n < 0 {
				err = fmt.Errorf("%s %q is not a whole number of 0 or more", what, s)
			}
		}
		return n
	}
	t = cloud.InstanceType{
		Name: f[0], VCPUs: number(1, "vCPUs"), MemoryMiB: number(2, "memory"), GPUs: number(3, "GPUs"),
		GPUModel: strings.ReplaceAll(col(4), "_", " "), Arch: col(5), Confidential: col(6) == "yes",
	}
	switch {
	case err != nil:
		return t, err
	case t.VCPUs == 0 || t.MemoryMiB == 0:
		return t, fmt.Errorf("%s has no vCPUs or no memory", t.Name)
	case t.Arch != "" && t.Arch != "amd64" && t.Arch != "arm64":
		return t, fmt.Errorf("arch %q is neither amd64 nor arm64", t.Arch)
	case col(6) != "" && col(6) != "yes" && col(6) != "no":
		return t, fmt.Errorf("confidential is %q; want yes or no", col(6))
	}
	if s := col(7); s != "" {
		if t.PricePerHour, err = strconv.ParseFloat(s, 64); err != nil || t.PricePerHour <= 0 || math.IsInf(t.PricePerHour, 0) || math.IsNaN(t.PricePerHour) {
			return t, fmt.Errorf("price %q is not a number above zero", s)
		}
	}
	return t, nil
}

// Text writes types as Read reads them.
func Text(types []cloud.InstanceType) string {
	var b strings.Builder
	b.WriteString("# type\tvCPUs\tMiB\tGPUs\tmodel\tarch\tconfidential\tUSD per hour\n")
	for _, t := range types {
		confidential, price := "no", "-"
		if t.Confidential {
			confidential = "yes"
		}
		if t.PricePerHour > 0 {
			price = strconv.FormatFloat(t.PricePerHour, 'f', -1, 64)
		}
		fmt.Fprintf(&b, "%s\t%d\t%d\t%d\t%s\t%s\t%s\t%s\n", t.Name, t.VCPUs, t.MemoryMiB, t.GPUs,
			cmp.Or(strings.ReplaceAll(t.GPUModel, " ", "_"), "-"), cmp.Or(t.Arch, "-"), confidential, price)
	}
	return b.String()
}

// Of is the catalog of a configuration, of types whose sizes are known from
// elsewhere; types that it allows and that are not among them are unusable. cfg nil:
// all types, and our guest. FailedPrecondition: the provider has no types.
func Of(cfg *config.Config, types []cloud.InstanceType) (cloud.Catalog, error) {
	if cfg == nil {
		c := cloud.Catalog{Types: slices.Clone(types), Key: "the file of types", OverheadMiB: cloud.DefaultOverheadMiB}
		provider := providerOf(types)
		c.Remark = price(prices.BuiltIn(), provider, prices.Base[provider], c.Types)
		return c, nil
	}
	c := cloud.Catalog{OverheadMiB: cfg.Cloud.OverheadMiB, Confidential: !cfg.Cloud.DisableCVM}
	var names []string
	var region string
	switch cfg.Provider {
	case config.ProviderAWS:
		names, region = cfg.AWS.InstanceTypes, cfg.AWS.Region
		c.Default, c.Key = cfg.AWS.InstanceType, "PODVM_INSTANCE_TYPES"
	case config.ProviderAzure:
		names, region = cfg.Azure.InstanceSizes, cfg.Azure.Region
		c.Default, c.Key = cfg.Azure.InstanceSize, "AZURE_INSTANCE_SIZES"
	default:
		return c, NoTypes(cfg.Provider)
	}
	for _, name := range names {
		t := cloud.InstanceType{Name: name, Unusable: "its size is not known: it is not in the file"}
		for _, o := range types {
			if strings.EqualFold(o.Name, name) {
				t = o
			}
		}
		c.Types = append(c.Types, t)
	}
	c.Remark = price(cfg.Cloud.Prices, cfg.Provider, region, c.Types)
	return c, nil
}

// NoTypes is the answer for providers whose machines come in any size.
func NoTypes(provider string) error {
	return fmt.Errorf("CLOUD_PROVIDER is %s, which has no instance types: a pod gets the vCPUs and the memory that it asks for: %w", provider, errdefs.ErrFailedPrecondition)
}

// price completes the types whose price the file does not have.
func price(t *prices.Table, provider, region string, types []cloud.InstanceType) (remark string) {
	var without []int
	var list []cloud.InstanceType
	for i, typ := range types {
		if typ.PricePerHour == 0 {
			without, list = append(without, i), append(list, typ)
		}
	}
	if len(list) == 0 {
		return ""
	}
	remark = t.Apply(provider, cmp.Or(region, prices.Base[provider]), list)
	for i, at := range without {
		types[at] = list[i]
	}
	return remark
}

// providerOf tells the clouds apart by how they name types: m6a.large,
// Standard_D2as_v5.
func providerOf(types []cloud.InstanceType) string {
	if len(types) > 0 && strings.Contains(types[0].Name, ".") {
		return config.ProviderAWS
	}
	return config.ProviderAzure
}
