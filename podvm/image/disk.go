// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"debug/pe"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kata-remote/kata-remote/podvm/scratch"
	"github.com/klauspost/compress/zstd"
)

// DiskConfig says what disk images to build of an image's parts.
type DiskConfig struct {
	// Stub is the directory of the unpacked package systemd-boot-efi (fetch.sh stub).
	Stub string
	// SignKey and SignCert are files, PEM, of the RSA key that signs for UEFI Secure Boot
	// and of its certificate. Both empty: the image is not signed, and firmware with Secure
	// Boot on refuses it.
	SignKey, SignCert string
	// Console is a serial console's name, as "ttyS0", on which the kernel and podvmd speak.
	// Empty: nothing leaves the machine that way.
	Console string
	// Components are named in the bill of materials beside what the image's parts tell of
	// themselves.
	Components []Component
}

// Disk describes the disk images of a Manifest.
type Disk struct {
	Architecture string `json:"architecture"` // "amd64" or "arm64"
	CommandLine  string `json:"command_line"` // of the kernel
	GUID         string `json:"guid"`         // of the disk: the guest knows its own by it
	Size         int64  `json:"size"`         // of the disk, bytes
	// SignedBy is the SHA-256 of the certificate (DER) of the key that signed the image;
	// empty: it is not signed.
	SignedBy string `json:"signed_by,omitempty"`
	// Authenticode is the SHA-256 of the unified kernel image as firmware computes it
	// before it starts it: what Secure Boot compares, and an event in TPM's PCR 4.
	Authenticode string `json:"authenticode"`
	// PCR11 is the SHA-256 value of TPM's PCR 11 after the stub has measured the image's
	// parts into it, at the kernel's start.
	PCR11   string   `json:"pcr11"`
	Modules []string `json:"modules"` // in load order

	UKI   Artefact `json:"uki"`   // what is at BootPath on the disk
	Raw   Artefact `json:"raw"`   // AWS, and everything else
	VHD   Artefact `json:"vhd"`   // Azure
	QCOW2 Artefact `json:"qcow2"` // QEMU, OpenStack, libvirt
	SBOM  Artefact `json:"sbom"`  // SPDX 2.3, JSON
}

// Artefacts lists the disk's files.
func (d *Disk) Artefacts() []Artefact { return []Artefact{d.UKI, d.Raw, d.VHD, d.QCOW2, d.SBOM} }

// Names of files in the output directory.
const (
	ukiFile   = "disk.efi"
	rawFile   = "disk.raw"
	vhdFile   = "disk.vhd"
	qcow2File = "disk.qcow2"
	sbomFile  = "sbom.spdx.json"
	sumsFile  = "SHA256SUMS"
)

// machine is an architecture in the languages of those who name it.
type machine struct {
	name string // Go's and Debian's
	elf  elf.Machine
	pe   uint16
	stub string // file of systemd-boot-efi
	boot string // where firmware looks on a disk it knows nothing of (UEFI 2.10, 3.5.1.1)
}

var machines = []machine{
	{"amd64", elf.EM_X86_64, pe.IMAGE_FILE_MACHINE_AMD64, "linuxx64.efi.stub", "/EFI/BOOT/BOOTX64.EFI"},
	{"arm64", elf.EM_AARCH64, pe.IMAGE_FILE_MACHINE_ARM64, "linuxaa64.efi.stub", "/EFI/BOOT/BOOTAA64.EFI"},
}

// machineOf tells for which machine a program is.
func machineOf(program string) (machine, error) {
	f, err := elf.Open(program)
	if err != nil {
		return machine{}, fmt.Errorf("%s: %w", program, err)
	}
	defer f.Close()
	i := slices.IndexFunc(machines, func(m machine) bool { return m.elf == f.Machine })
	if i < 0 {
		return machine{}, fmt.Errorf("%s is for %v, of which there are no disk images", program, f.Machine)
	}
	return machines[i], nil
}

// diskCommandLine is CommandLine for a cloud's machine. There, drivers of network cards
// make as many queues as there are CPUs when they are loaded, so all are started. The check
// of the timer is one that the kernel leaves out by itself under KVM and Hyper-V, and that
// fails now and then on an emulated machine that does not get its processor.
func diskCommandLine(on machine, id guid, console string) string {
	var words []string
	if on.elf == elf.EM_X86_64 {
		words = append(words, "no_timer_check")
	}
	for w := range strings.FieldsSeq(CommandLine) {
		if !strings.HasPrefix(w, "maxcpus=") {
			words = append(words, w)
		}
	}
	if console != "" {
		words = append(words, "console="+console)
	}
	return strings.Join(append(words, scratch.Parameter+"="+id.String()), " ")
}

// BuildDisk makes the disk images in cfg.Out beside what Build wrote there, and returns
// the manifest with them in it. It does not need the result of Build's kernel format: the
// disk has the distribution's own kernel. The error names what to change.
func BuildDisk(cfg Config, d DiskConfig) (*Manifest, error) {
	m, err := ReadManifest(cfg.Out)
	if err != nil {
		return nil, err
	}
	sign, err := readSigner(d.SignKey, d.SignCert)
	if err != nil {
		return nil, err
	}
	p, err := readParts(cfg, d, sign != nil)
	if err != nil {
		return nil, err
	}
	disk := &Disk{Architecture: p.machine.name, Modules: moduleNames(p.modules)}
	ids := p.identity(d.Console)
	diskID, partitionID := newGUID(ids[:16]), newGUID(ids[16:])
	disk.GUID, disk.CommandLine = diskID.String(), diskCommandLine(p.machine, diskID, d.Console)
	sections := p.sections(disk.CommandLine)
	uki, err := appendSections(p.stub, sections)
	if err != nil {
		return nil, err
	}
	if sign != nil {
		if uki, err = sign.sign(uki); err != nil {
			return nil, fmt.Errorf("sign: %w", err)
		}
		sum := sha256.Sum256(sign.cert.Raw)
		disk.SignedBy = hex.EncodeToString(sum[:])
	}
	if len(uki) > MaxSize {
		return nil, fmt.Errorf("the disk's content has %d bytes, %d more than allowed: take modules out of hardware or make podvmd smaller", len(uki), len(uki)-MaxSize)
	}
	sum, err := authenticodeHash(uki)
	if err != nil {
		return nil, err
	}
	disk.Authenticode, disk.PCR11 = hex.EncodeToString(sum[:]), hex.EncodeToString(pcr11(sections))
	raw, err := drawDisk(uki, p.machine.boot, diskID, partitionID)
	if err != nil {
		return nil, err
	}
	disk.Size = int64(len(raw))
	bill := billOfMaterials(p, d, disk)
	for _, a := range []struct {
		to    *Artefact
		name  string
		write func(io.Writer) error
	}{
		{&disk.UKI, ukiFile, func(w io.Writer) error { _, err := w.Write(uki); return err }},
		{&disk.Raw, rawFile, func(w io.Writer) error { _, err := w.Write(raw); return err }},
		{&disk.VHD, vhdFile, func(w io.Writer) error { return writeVHD(w, raw, diskID) }},
		{&disk.QCOW2, qcow2File, func(w io.Writer) error { return writeQCOW2(w, raw) }},
		{&disk.SBOM, sbomFile, bill.write},
	} {
		if *a.to, err = writeArtefact(cfg.Out, a.name, a.write); err != nil {
			return nil, err
		}
	}
	m.Disk = disk
	if err := writeManifest(cfg.Out, m); err != nil {
		return nil, err
	}
	_, err = writeArtefact(cfg.Out, sumsFile, func(w io.Writer) error { return writeSums(w, m) })
	return m, err
}

// writeSums writes the digests in the form that sha256sum -c reads.
func writeSums(w io.Writer, m *Manifest) error {
	for _, a := range append(m.Artefacts(), m.Disk.Artefacts()...) {
		if _, err := fmt.Fprintf(w, "%s  %s\n", a.SHA256, a.File); err != nil {
			return err
		}
	}
	return nil
}

// parts is what a disk image is made of.
type parts struct {
	machine machine
	release string // of the kernel
	stub    []byte
	kernel  []byte
	initrd  []byte // compressed
	modules []Module

	kernelPackage, stubPackage Component
	podvmd                     string // path
}

func readParts(cfg Config, d DiskConfig, signed bool) (*parts, error) {
	p := &parts{podvmd: cfg.Podvmd}
	var err error
	if p.machine, err = machineOf(cfg.Podvmd); err != nil {
		return nil, err
	}
	if err := checkStatic(cfg.Podvmd); err != nil {
		return nil, err
	}
	k, err := OpenKernel(cfg.KernelTree)
	if err != nil {
		return nil, err
	}
	p.release = k.Release
	if p.modules, err = k.Resolve(slices.Concat(wanted, hardware)); err != nil {
		return nil, err
	}
	if err := k.checkForbidden(p.modules); err != nil {
		return nil, err
	}
	if p.kernel, err = k.read(FormatBzImage); err != nil {
		return nil, err
	}
	if p.stub, err = os.ReadFile(filepath.Join(d.Stub, "usr/lib/systemd/boot/efi", p.machine.stub)); err != nil {
		return nil, fmt.Errorf("EFI stub (podvm/image/fetch.sh stub prints its directory): %w", err)
	}
	for name, program := range map[string][]byte{"EFI stub": p.stub, "kernel": p.kernel} {
		f, err := pe.NewFile(bytes.NewReader(program))
		if err != nil {
			return nil, fmt.Errorf("%s: not an EFI program: %w", name, err)
		}
		if f.Machine != p.machine.pe {
			return nil, fmt.Errorf("%s: it is for machine %#x, podvmd for %s: fetch that of the same architecture", name, f.Machine, p.machine.name)
		}
	}
	p.kernelPackage, p.stubPackage = readPackage(cfg.KernelTree), readPackage(d.Stub)
	p.initrd, err = compress(func(w io.Writer) error {
		return writeInitramfs(w, contents{podvmd: cfg.Podvmd, authorities: cfg.Authorities, modules: p.modules, signed: signed})
	})
	return p, err
}

// compress is zstd, which the kernel knows. One thread makes the same bytes each time.
func compress(write func(io.Writer) error) ([]byte, error) {
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8<<20))
	if err != nil {
		return nil, err
	}
	if err := write(z); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// identity is a digest of all that makes this disk another one than others, but for the
// command line, which has part of it.
func (p *parts) identity(console string) [sha256.Size]byte {
	h := sha256.New()
	for _, b := range [][]byte{[]byte("peer pod disk"), p.stub, p.kernel, p.initrd, p.osRelease(), []byte(console)} {
		sum := sha256.Sum256(b)
		h.Write(sum[:])
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// osRelease is os-release(5) of the image, which boot managers show.
func (p *parts) osRelease() []byte {
	return fmt.Appendf(nil, "ID=peerpod\nNAME=\"peer pod VM\"\nPRETTY_NAME=\"peer pod VM, Linux %s\"\nVERSION_ID=%s\n", p.release, p.release)
}

// sections of the unified kernel image, in the order in which they stand in it.
func (p *parts) sections(cmdline string) []section {
	return []section{
		{".osrel", p.osRelease()}, {".cmdline", []byte(cmdline)}, {".uname", []byte(p.release)},
		{".linux", p.kernel}, {".initrd", p.initrd},
	}
}

// pcr11 computes what systemd-stub makes of TPM's PCR 11: for each section that is there,
// in this order of its own, its name with a zero byte and then its content
// (systemd 252, src/boot/efi/stub.c and src/fundamental/tpm-pcr.h).
func pcr11(sections []section) []byte {
	pcr := make([]byte, sha256.Size)
	extend := func(b []byte) {
		sum := sha256.Sum256(b)
		next := sha256.Sum256(append(slices.Clone(pcr), sum[:]...))
		pcr = next[:]
	}
	for _, name := range []string{".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb"} {
		for _, s := range sections {
			if s.name == name {
				extend(append([]byte(name), 0))
				extend(s.data)
			}
		}
	}
	return pcr
}

// drawDisk is a disk with an EFI system partition that holds the program and nothing else.
func drawDisk(uki []byte, path string, id, partition guid) ([]byte, error) {
	const perCluster = 1
	f := fatFor(len(uki), strings.Count(path, "/"), perCluster)
	disk := make([]byte, roundUp(espStart+f.sectors*sector, mebibyte)+mebibyte)
	if err := f.write(disk[espStart:len(disk)-mebibyte], espStart/sector, binary.LittleEndian.Uint32(partition[:]), path, uki); err != nil {
		return nil, err
	}
	writePartitions(disk, id, partition)
	return disk, nil
}

func moduleNames(modules []Module) []string {
	var out []string
	for _, m := range modules {
		out = append(out, m.Name)
	}
	return out
}
