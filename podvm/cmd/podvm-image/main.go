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
	var disk image.DiskConfig
	flag.StringVar(&cfg.KernelTree, "kernel", "", "directory of an unpacked kernel package (podvm/image/fetch.sh prints one)")
	flag.StringVar(&cfg.Podvmd, "podvmd", "_output/bin/podvmd", "podvmd, linked statically")
	flag.StringVar(&cfg.Out, "out", "_output/podvm", "output directory")
	flag.StringVar((*string)(&cfg.Format), "format", "", "form of the initramfs image's kernel, vmlinux or vmlinuz (default vmlinux on amd64)")
	flag.StringVar(&cfg.Authorities, "authorities", "", "`file` of certificates, PEM, of those whose registries the pod VM trusts (default none)")
	flag.StringVar(&disk.Stub, "stub", "", "directory of the unpacked package systemd-boot-efi (podvm/image/fetch.sh stub prints one); with it, disk images are built as well")
	flag.StringVar(&disk.SignKey, "sign-key", "", "`file` of an RSA key, PEM, that signs the disk images for UEFI Secure Boot (default: not signed)")
	flag.StringVar(&disk.SignCert, "sign-cert", "", "`file` of the key's certificate, PEM")
	flag.StringVar(&disk.Console, "console", "", "serial console of the disk images, such as ttyS0 (default none)")
	flag.Func("component", "`name=version:architecture` of a Debian package linked into podvmd, for the bill of materials; may come several times", func(s string) error {
		c, err := image.ParseComponent(s)
		disk.Components = append(disk.Components, c)
		return err
	})
	flag.Parse()
	if err := run(cfg, disk); err != nil {
		fmt.Fprintln(os.Stderr, "podvm-image:", err)
		os.Exit(1)
	}
}

func run(cfg image.Config, disk image.DiskConfig) error {
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if cfg.KernelTree == "" {
		return fmt.Errorf("-kernel is missing: give the directory that podvm/image/fetch.sh prints")
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
	if disk.Stub == "" {
		return nil
	}
	if m, err = image.BuildDisk(cfg, disk); err != nil {
		return err
	}
	for _, a := range m.Disk.Artefacts() {
		fmt.Printf("%s\t%.1f MiB\n", a.Path, float64(a.Size)/(1<<20))
	}
	fmt.Printf("disk content\t%.1f MiB of %d MiB allowed\n", float64(m.Disk.UKI.Size)/(1<<20), image.MaxSize>>20)
	return nil
}
