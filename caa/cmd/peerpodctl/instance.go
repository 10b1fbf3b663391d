// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-remote/kata-remote/caa/catalog"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/caa/daemon"
	"github.com/kata-remote/kata-remote/cloud"
)

// cloudTimeout bounds what is asked of a cloud: a few calls, each of them retried.
const cloudTimeout = time.Minute

// newProvider makes the provider of a configuration; tests bring their own.
var newProvider = daemon.NewProvider

func instanceCommand(asked *bool) *cobra.Command {
	instance := &cobra.Command{
		Use: "instance", Short: "instances and their types", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return fmt.Errorf("give a verb: explain") },
	}
	var (
		size                      cloud.Size
		path, typesFile, output   string
		maxVCPUs, maxMem, maxGPUs = 1 << 16, 1 << 30, 1 << 10
	)
	c := &cobra.Command{
		Use: "explain", Args: cobra.NoArgs,
		Short: "which instance type a pod would get, and why",
		Long: `explain shows which instance type a pod would get that asks for so much, which others
would be tried when there is no capacity, and why the rest would not do.

What may be used comes from the adaptor's configuration: the environment and --config.
What the types have is asked of the cloud with the configuration's credentials, or comes
from --types-file: a line to a type with its name, vCPUs and MiB, and after them, if
need be, GPUs, their model, amd64 or arm64, confidential (yes or no), USD per hour.
--output types prints such a file. With --types-file and without CLOUD_PROVIDER, all of
the file's types may be used.`,
		Example: `  peerpodctl instance explain --vcpus 3 --memory 5000
  peerpodctl instance explain --gpus 1 --gpu-model T4 --config /etc/peerpod/adaptor.conf
  peerpodctl instance explain --memory 8192 --types-file types`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, n := range []struct {
				flag       string
				value, max int
			}{{"vcpus", size.VCPUs, maxVCPUs}, {"memory", size.MemoryMiB, maxMem}, {"gpus", size.GPUs, maxGPUs}} {
				if n.value < 0 || n.value > n.max {
					return fmt.Errorf("--%s is %d; want 0 to %d", n.flag, n.value, n.max)
				}
			}
			if output != "table" && output != "json" && output != "types" {
				return fmt.Errorf("--output is %q; want table, json or types", output)
			}
			*asked = true
			ctx, cancel := context.WithTimeout(cmd.Context(), cloudTimeout)
			defer cancel()
			choice, err := explain(ctx, path, typesFile, size)
			if len(choice.Considered) == 0 {
				return err
			}
			text, terr := choiceText(choice, output)
			fmt.Fprint(cmd.OutOrStdout(), text)
			return errors.Join(err, terr)
		},
	}
	f := c.Flags()
	f.IntVar(&size.VCPUs, "vcpus", 0, "vCPUs asked for (annotation default_vcpus)")
	f.IntVar(&size.MemoryMiB, "memory", 0, "memory asked for, `MiB` (annotation default_memory)")
	f.IntVar(&size.GPUs, "gpus", 0, "GPUs asked for (annotation default_gpus)")
	f.StringVar(&size.GPUModel, "gpu-model", "", "their `model`, as the cloud calls it (annotation default_gpu_model)")
	f.StringVar(&size.Type, "type", "", "an instance type by `name` (annotation machine_type)")
	f.StringVar(&path, "config", "", "the adaptor's configuration `file`; the environment overrides it")
	f.StringVar(&typesFile, "types-file", "", "`file` with the sizes of types, instead of asking the cloud")
	f.StringVarP(&output, "output", "o", "table", "table, json or types")
	instance.AddCommand(c)
	return instance
}

// explain makes the choice of the provider that is configured, or the same from a file
// of types.
func explain(ctx context.Context, path, typesFile string, size cloud.Size) (cloud.Choice, error) {
	var cfg *config.Config
	if path != "" || os.Getenv("CLOUD_PROVIDER") != "" || typesFile == "" {
		var err error
		if cfg, err = config.Load(path, os.Environ(), config.Flags{}); err != nil {
			return cloud.Choice{}, fmt.Errorf("the configuration is wrong:\n%w", err)
		}
	}
	if typesFile != "" {
		types, err := catalog.Read(typesFile)
		if err != nil {
			return cloud.Choice{}, err
		}
		c, err := catalog.Of(cfg, types)
		if err != nil {
			return cloud.Choice{}, err
		}
		return c.Choose(size)
	}
	if cfg.Provider == config.ProviderLocal {
		return cloud.Choice{}, catalog.NoTypes(cfg.Provider)
	}
	p, err := newProvider(cfg)
	if err != nil {
		return cloud.Choice{}, err
	}
	e, ok := p.(cloud.Explainer)
	if !ok {
		return cloud.Choice{}, catalog.NoTypes(cfg.Provider)
	}
	choice, err := e.Explain(ctx, size)
	if err != nil && len(choice.Considered) == 0 {
		return choice, fmt.Errorf("%w; without the cloud, give the sizes of types with --types-file", err)
	}
	return choice, err
}

// choiceView is a choice in --output json. Its keys are a promise.
type choiceView struct {
	Asked        askedView  `json:"asked"`
	OverheadMiB  int        `json:"overheadMiB"`
	Type         string     `json:"type"` // "": none fits
	Alternatives []string   `json:"alternatives"`
	Considered   []typeView `json:"considered"`
	Remark       string     `json:"remark,omitempty"`
}

type askedView struct {
	Type      string `json:"type,omitempty"`
	VCPUs     int    `json:"vcpus"`
	MemoryMiB int    `json:"memoryMiB"`
	GPUs      int    `json:"gpus"`
	GPUModel  string `json:"gpuModel,omitempty"`
}

type typeView struct {
	Type         string  `json:"type"`
	VCPUs        int     `json:"vcpus"`
	MemoryMiB    int     `json:"memoryMiB"`
	GPUs         int     `json:"gpus"`
	GPUModel     string  `json:"gpuModel,omitempty"`
	Arch         string  `json:"arch,omitempty"`
	Confidential bool    `json:"confidential"`
	PricePerHour float64 `json:"usdPerHour,omitempty"` // absent: unknown
	Outcome      string  `json:"outcome"`              // taken, alternative or no
	Reason       string  `json:"reason"`
}

func choiceText(c cloud.Choice, output string) (string, error) {
	switch output {
	case "types":
		types := make([]cloud.InstanceType, 0, len(c.Considered))
		for _, v := range c.Considered {
			types = append(types, v.Type)
		}
		return catalog.Text(types), nil
	case "table":
		return fmt.Sprintf("asked for %s\n\n", c.Ask()) + c.Table(), nil
	}
	v := choiceView{
		Asked:       askedView{c.Size.Type, c.Size.VCPUs, c.Size.MemoryMiB, c.Size.GPUs, c.Size.GPUModel},
		OverheadMiB: c.OverheadMiB, Type: c.Type.Name, Alternatives: []string{}, Considered: []typeView{}, Remark: c.Remark,
	}
	for _, t := range c.Alternatives {
		v.Alternatives = append(v.Alternatives, t.Name)
	}
	for _, o := range c.Considered {
		t := o.Type
		v.Considered = append(v.Considered, typeView{t.Name, t.VCPUs, t.MemoryMiB, t.GPUs, t.GPUModel, t.Arch, t.Confidential, t.PricePerHour, o.Outcome.String(), o.Reason})
	}
	b, err := json.MarshalIndent(v, "", "  ")
	return string(b) + "\n", err
}
