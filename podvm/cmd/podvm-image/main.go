// SPDX-License-Identifier: Apache-2.0

// Command podvm-image builds the pod VM image from an unpacked kernel package and
// podvmd, and prints path and size of each artefact.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/kata-remote/kata-remote/podvm/image"
)

func main() {
	var cfg image.Config
	flag.StringVar(&cfg.KernelTree, "kernel", "", "directory of an unpacked kernel package (podvm/image/fetch-kernel.sh prints one)")
	flag.StringVar(&cfg.Podvmd, "podvmd", "_output/bin/podvmd", "podvmd, linked statically")
	flag.StringVar(&cfg.Out, "out", "_output/podvm", "output directory")
	flag.StringVar((*string)(&cfg.Format), "format", string(image.FormatELF), "form of the kernel: vmlinux or vmlinuz")
	flag.StringVar(&cfg.Authorities, "authorities", "", "`file` of certificates, PEM, of those whose registries the pod VM trusts (default none)")
	flag.Parse()
	if err := run(cfg); err != nil {
		fmt.Fprintln(os.Stderr, "podvm-image:", err)
		os.Exit(1)
	}
}

func run(cfg image.Config) error {
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if cfg.KernelTree == "" {
		return fmt.Errorf("-kernel is missing: give the directory that podvm/image/fetch-kernel.sh prints")
	}
	m, err := image.Build(cfg)
	if err != nil {
		return err
	}
	if cfg.Authorities == "" {
		fmt.Fprintln(os.Stderr, "podvm-image: no -authorities: for pulls over HTTPS the pod VM trusts only those of the adaptor's PULL_CA_FILE")
	}
	total := int64(0)
	for _, a := range m.Artefacts() {
		fmt.Printf("%s\t%.1f MiB\n", a.Path, float64(a.Size)/(1<<20))
		total += a.Size
	}
	fmt.Printf("total\t%.1f MiB of %d MiB allowed\n", float64(total)/(1<<20), image.MaxSize>>20)
	return nil
}
