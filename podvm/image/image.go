// SPDX-License-Identifier: Apache-2.0

// Package image builds the pod VM image: a kernel and an initramfs that holds
// podvmd and the few kernel modules a pod VM needs. There is no other file system,
// no udev and no shell in it.
//
// The input is a distribution's kernel package unpacked into a directory (boot/ and
// lib/modules/, see fetch.sh) and podvmd as a static binary. The output
// directory then holds
//
//	vmlinux or vmlinuz   the kernel
//	initrd.img           the initramfs, cpio "newc", not compressed
//	manifest.json        what they are, see Manifest
//
// and for clouds, where firmware starts a disk, what BuildDisk makes of the same parts
// (docs/image.md has the formats' fields):
//
//	disk.raw  ┬ partition table (GPT)
//	          ├ EFI system partition, FAT32
//	          │   └ /EFI/BOOT/BOOTX64.EFI, also disk.efi: one EFI program,
//	          │       systemd's stub │ .osrel .cmdline .uname │ .linux │ .initrd │ signature
//	          └ partition table's copy
//	disk.vhd, disk.qcow2   the same disk
//	sbom.spdx.json         what it is made of
//	SHA256SUMS             of all of them
//
// Two builds from the same input are the same bytes.
//
// # Why everything is in the one EFI program
//
// The other way is a root file system under dm-verity whose hash is in the program. What
// would be on it is podvmd, which every start reads to its end, and modules that one
// machine in ten loads: there is nothing that need not be read. The initramfs would still
// have podvmd, to set up dm-verity, and the modules of the disk's driver, of the device
// mapper and of the file system, and the start would wait for the disk. It would gain
// 18 MiB of memory that could be dropped and read again. As it is, one digest says what
// runs, which Secure Boot checks and a TPM measures, and after the kernel's start nobody
// reads the disk any more: who changes it later changes nothing.
//
// # Why not compressed
//
// Decompression is the guest's work. From QEMU's start to the open port, without KVM,
// least of three (QEMU 7.2, 2026-11-21): 2.26 s plain, 2.23 s with LZ4, 2.34 s with
// zstd. LZ4 gains nothing that is worth a second format. The kernel is by default the
// ELF file taken out of the distribution's bzImage, which QEMU starts through its PVH
// entry point: 2.26 s against 2.38 s.
//
// On a disk it is compressed, with zstd: a cloud's volume gives 125 MiB a second at best,
// and a fresh one a fraction of that, so 17 MiB less are worth more than the 0.05 s that a
// real processor takes for them. (Emulated, they cost 0.4 s of 8, most of it firmware.)
package image

import (
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

const (
	// MaxSize is the most bytes the artefacts of an image may have together.
	MaxSize = 64 << 20
	// ManifestFile is the name of the manifest in the output directory.
	ManifestFile = "manifest.json"
	initrdFile   = "initrd.img"
)

// KernelFormat is the form in which the kernel is put into the image.
type KernelFormat string

const (
	// FormatELF is the uncompressed kernel for loaders that know PVH (QEMU, Cloud
	// Hypervisor, Firecracker). It starts without decompressing itself.
	FormatELF KernelFormat = "vmlinux"
	// FormatBzImage is the distribution's file as it is, for every other loader.
	FormatBzImage KernelFormat = "vmlinuz"
)

// CommandLine is the kernel command line the image is meant to be started with.
// A console= argument is the starter's business. random.trust_cpu and an early
// panic reboot keep a start from hanging; cryptomgr.notests leaves out self-tests
// of ciphers that cost a tenth of an emulated kernel's start. With maxcpus=1 the
// start runs on one CPU; podvmd takes the others into use once it listens.
const CommandLine = "quiet loglevel=3 panic=-1 random.trust_cpu=on cryptomgr.notests maxcpus=1"

// Config says what to build. All fields but Format and Authorities are needed.
type Config struct {
	KernelTree string       // unpacked kernel package
	Podvmd     string       // static binary that becomes /init
	Out        string       // output directory; made if missing
	Format     KernelFormat // of the kernel; "": FormatELF, or FormatBzImage where there is no PVH
	// Authorities is a file of certificates, PEM, of those whose registries the pod VM
	// trusts when it pulls images. "": it trusts none but those it is told of.
	Authorities string
}

// Artefact is one file of the image.
type Artefact struct {
	Path   string `json:"-"` // where Build wrote it
	File   string `json:"file"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

// Manifest describes an image. It stands beside the artefacts as JSON.
type Manifest struct {
	KernelVersion string   `json:"kernel_version"` // as uname -r says
	KernelFormat  string   `json:"kernel_format"`
	CommandLine   string   `json:"command_line"`
	Kernel        Artefact `json:"kernel"`
	Initrd        Artefact `json:"initrd"`
	Modules       []string `json:"modules"` // in load order
	// Disk is what BuildDisk made; nil: it was not called.
	Disk *Disk `json:"disk,omitempty"`
}

// Artefacts lists the manifest's files.
func (m *Manifest) Artefacts() []Artefact { return []Artefact{m.Kernel, m.Initrd} }

// Build makes the image and returns its manifest. Files of an earlier build in the
// output directory are replaced. The error names what to change: a tree that is no
// kernel package, a module that is missing from it, a podvmd that is not static, an
// image over MaxSize.
func Build(cfg Config) (*Manifest, error) {
	k, err := OpenKernel(cfg.KernelTree)
	if err != nil {
		return nil, err
	}
	modules, err := k.Resolve(wanted)
	if err != nil {
		return nil, err
	}
	if err := k.checkForbidden(modules); err != nil {
		return nil, err
	}
	if err := checkStatic(cfg.Podvmd); err != nil {
		return nil, err
	}
	if cfg.Format == "" {
		m, err := machineOf(cfg.Podvmd)
		if err != nil {
			return nil, err
		}
		cfg.Format = FormatBzImage
		if m.elf == elf.EM_X86_64 {
			cfg.Format = FormatELF
		}
	}
	kernel, err := k.read(cfg.Format)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Out, 0o755); err != nil {
		return nil, fmt.Errorf("make output directory: %w", err)
	}
	m := &Manifest{KernelVersion: k.Release, KernelFormat: string(cfg.Format), CommandLine: CommandLine, Modules: moduleNames(modules)}
	m.Kernel, err = writeArtefact(cfg.Out, string(cfg.Format), func(w io.Writer) error {
		_, err := w.Write(kernel)
		return err
	})
	if err != nil {
		return nil, err
	}
	m.Initrd, err = writeArtefact(cfg.Out, initrdFile, func(w io.Writer) error {
		return writeInitramfs(w, contents{podvmd: cfg.Podvmd, authorities: cfg.Authorities, modules: modules, signed: cfg.Format == FormatBzImage})
	})
	if err != nil {
		return nil, err
	}
	if total := m.Kernel.Size + m.Initrd.Size; total > MaxSize {
		return nil, fmt.Errorf("the image has %d bytes, %d more than allowed: take modules out of wanted or make podvmd smaller", total, total-MaxSize)
	}
	return m, writeManifest(cfg.Out, m)
}

func writeManifest(dir string, m *Manifest) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	_, err = writeArtefact(dir, ManifestFile, func(w io.Writer) error {
		_, err := w.Write(append(b, '\n'))
		return err
	})
	return err
}

// ReadManifest reads the manifest of the image in dir and fills in the artefacts'
// paths.
func ReadManifest(dir string) (*Manifest, error) {
	b, err := os.ReadFile(filepath.Join(dir, ManifestFile))
	if err != nil {
		return nil, fmt.Errorf("read image manifest: %w", err)
	}
	m := new(Manifest)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, ManifestFile), err)
	}
	m.Kernel.Path = filepath.Join(dir, m.Kernel.File)
	m.Initrd.Path = filepath.Join(dir, m.Initrd.File)
	if d := m.Disk; d != nil {
		for _, a := range []*Artefact{&d.UKI, &d.Raw, &d.VHD, &d.QCOW2, &d.SBOM} {
			a.Path = filepath.Join(dir, a.File)
		}
	}
	return m, nil
}

// writeArtefact writes a file beside its final name and renames it, so that a
// build that is cut short leaves the old file whole.
func writeArtefact(dir, name string, write func(io.Writer) error) (a Artefact, err error) {
	f, err := os.CreateTemp(dir, "."+name+".*")
	if err != nil {
		return a, fmt.Errorf("write %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", name, err), os.Remove(f.Name()))
		}
	}()
	sum := sha256.New()
	count := &countingWriter{}
	if err := errors.Join(write(io.MultiWriter(f, sum, count)), f.Chmod(0o644), f.Close()); err != nil {
		return a, err
	}
	path := filepath.Join(dir, name)
	if err := os.Rename(f.Name(), path); err != nil {
		return a, err
	}
	return Artefact{Path: path, File: name, Size: count.n, SHA256: hex.EncodeToString(sum.Sum(nil))}, nil
}

type countingWriter struct{ n int64 }

func (c *countingWriter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}
