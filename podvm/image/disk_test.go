// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"debug/pe"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"hash/crc32"
	"maps"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// efiProgram makes a PE file with one section, and symbols behind it as the stub has.
func efiProgram(t *testing.T, machine uint16, code string) []byte {
	t.Helper()
	var out bytes.Buffer
	dos := make([]byte, 0x40)
	copy(dos, "MZ")
	binary.LittleEndian.PutUint32(dos[peOffsetField:], 0x40)
	opt := pe.OptionalHeader64{
		Magic: 0x20b, FileAlignment: 512, SectionAlignment: 512, SizeOfHeaders: 1024, SizeOfImage: 8192 + uint32(len(code)),
		NumberOfRvaAndSizes: 16, Subsystem: pe.IMAGE_SUBSYSTEM_EFI_APPLICATION,
	}
	text := pe.SectionHeader32{VirtualSize: uint32(len(code)), VirtualAddress: 8192, SizeOfRawData: roundUp(uint32(len(code)), 512), PointerToRawData: 1024}
	copy(text.Name[:], ".text")
	for _, v := range []any{
		dos, []byte("PE\x00\x00"),
		pe.FileHeader{Machine: machine, NumberOfSections: 1, PointerToSymbolTable: 1024 + text.SizeOfRawData, NumberOfSymbols: 1, SizeOfOptionalHeader: uint16(binary.Size(opt))},
		opt, text,
	} {
		if err := binary.Write(&out, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	b := pad(append(pad(out.Bytes(), 1024), code...), 512)
	return append(b, append(make([]byte, 18), 4, 0, 0, 0)...) // a symbol, and no names
}

func TestAppendSections(t *testing.T) {
	add := []section{{".one", []byte("first")}, {".two", bytes.Repeat([]byte("second"), 2000)}}
	b, err := appendSections(efiProgram(t, pe.IMAGE_FILE_MACHINE_AMD64, "code"), add)
	if err != nil {
		t.Fatal(err)
	}
	f, err := pe.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	opt := f.OptionalHeader.(*pe.OptionalHeader64)
	address, offset := opt.SizeOfHeaders, opt.SizeOfHeaders
	for i, want := range append([]section{{".text", []byte("code")}}, add...) {
		s := f.Sections[i]
		data, err := s.Data()
		if err != nil || s.Name != want.name || !bytes.Equal(data[:s.VirtualSize], want.data) {
			t.Errorf("section %d is %s with %d bytes: %v", i, s.Name, s.VirtualSize, err)
		}
		if s.VirtualAddress < address || s.VirtualAddress%512 != 0 || (i > 0 && s.VirtualAddress%memoryPage != 0) {
			t.Errorf("section %s is at %#x, the one before ends at %#x", s.Name, s.VirtualAddress, address)
		}
		if s.Offset != offset {
			t.Errorf("section %s stands at %d, want %d: a gap cannot be signed", s.Name, s.Offset, offset)
		}
		address, offset = s.VirtualAddress+s.VirtualSize, s.Offset+s.Size
	}
	if int(offset) != len(b) || opt.SizeOfImage < address || f.PointerToSymbolTable != 0 {
		t.Errorf("%d bytes in the file after the sections, image of %d bytes for addresses to %d, symbols at %d", len(b)-int(offset), opt.SizeOfImage, address, f.PointerToSymbolTable)
	}
}

func TestAppendSectionsRefuses(t *testing.T) {
	good := efiProgram(t, pe.IMAGE_FILE_MACHINE_AMD64, "code")
	change := func(at int, v byte) []byte {
		b := bytes.Clone(good)
		b[at] = v
		return b
	}
	const optional = 0x40 + peSignatureSize + coffHeaderSize
	many := make([]section, 30)
	for i := range many {
		many[i] = section{".x", []byte("x")}
	}
	for name, c := range map[string]struct {
		program []byte
		add     []section
		want    string
	}{
		"no program": {[]byte("MZ"), many[:1], "EFI stub"},
		"signed":     {change(optional+securityOffset+4, 8), many[:1], "signed"},
		"no room":    {good, many, "room"},
		"cut short":  {good[:len(good)-4], many[:1], "EFI stub"},
		"empty":      {good, []section{{".x", nil}}, "cannot be added"},
	} {
		if _, err := appendSections(c.program, c.add); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// keyPair writes an RSA key and its certificate.
func keyPair(t *testing.T, name string) (key, cert string) {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(200), Subject: pkix.Name{CommonName: name}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	key, cert = filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	if err := errors.Join(
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600),
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)); err != nil {
		t.Fatal(err)
	}
	return key, cert
}

// run runs a program of Debian's, as another opinion than ours.
func run(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("%v: test/setup.sh installs it", err)
	}
	return string(out), err
}

func TestSign(t *testing.T) {
	key, cert := keyPair(t, "ours")
	_, other := keyPair(t, "somebody else's")
	s, err := readSigner(key, cert)
	if err != nil {
		t.Fatal(err)
	}
	program, err := appendSections(efiProgram(t, pe.IMAGE_FILE_MACHINE_AMD64, "code"), []section{{".linux", bytes.Repeat([]byte("kernel"), 3000)}})
	if err != nil {
		t.Fatal(err)
	}
	signed, err := s.sign(program)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.sign(program); err != nil || !bytes.Equal(signed, again) {
		t.Errorf("two signatures differ: %v", err)
	}
	before, after := sumOf(t, program), sumOf(t, signed)
	if before != after {
		t.Error("signing changed the digest")
	}
	path := filepath.Join(t.TempDir(), "signed.efi")
	verify := func(b []byte, cert string) error {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := run(t, "sbverify", "--cert", cert, path)
		if err == nil && strings.Contains(out, "warning") {
			t.Errorf("sbverify: %s", out)
		}
		return err
	}
	if err := verify(signed, cert); err != nil {
		t.Errorf("sbverify: %v", err)
	}
	if verify(signed, other) == nil {
		t.Error("somebody else's certificate is as good")
	}
	for _, at := range []int{2, 1030, len(program) - 600, len(signed) - 100} {
		b := bytes.Clone(signed)
		b[at] ^= 1
		if verify(b, cert) == nil {
			t.Errorf("byte %d can be changed", at)
		}
	}
}

func sumOf(t *testing.T, program []byte) [sha256.Size]byte {
	t.Helper()
	sum, err := authenticodeHash(program)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

func TestReadSignerRefuses(t *testing.T) {
	key, cert := keyPair(t, "ours")
	_, other := keyPair(t, "somebody else's")
	for want, files := range map[string][2]string{
		"-sign-cert":       {key, ""},
		"is not that of":   {key, other},
		"no private key":   {cert, cert},
		"is not PEM":       {"/dev/null", cert},
		"no such file":     {key + "x", cert},
		"certificate: x50": {key, key},
	} {
		if _, err := readSigner(files[0], files[1]); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", files, err, want)
		}
	}
	if s, err := readSigner("", ""); s != nil || err != nil {
		t.Errorf("none: %v, %v", s, err)
	}
}

// The value is that of systemd 252's "systemd-measure calculate --phase=:" for the same
// four sections (2026-11-22).
func TestPCR11(t *testing.T) {
	var sections []section
	for _, name := range []string{"osrel", "cmdline", "uname", "linux", "initrd"} {
		sections = append(sections, section{"." + name, []byte(name + " of the test")})
	}
	if got := hex.EncodeToString(pcr11(sections)); got != "0cdcdd4cc17912e4307585c58ee0a7f6f150abf635a14359505f1b7bd013fa31" {
		t.Errorf("PCR 11: %s", got)
	}
}

// buildInputs makes what a disk image is built of.
func buildInputs(t *testing.T) (Config, DiskConfig) {
	t.Helper()
	modules := map[string]string{}
	for _, w := range append(slices.Clone(wanted), hardware...) {
		modules["drivers/"+w.Name+".ko"] = "alias=a:" + w.Name
	}
	kernel, stub := tree(t, modules), t.TempDir()
	dir := filepath.Join(stub, "usr/lib/systemd/boot/efi")
	source := t.TempDir()
	if err := errors.Join(
		os.WriteFile(filepath.Join(kernel, "boot/vmlinuz-6.1.0-test"), efiProgram(t, pe.IMAGE_FILE_MACHINE_AMD64, "kernel"), 0o600),
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "linuxx64.efi.stub"), efiProgram(t, pe.IMAGE_FILE_MACHINE_AMD64, "stub"), 0o600),
		os.WriteFile(filepath.Join(stub, ".package"), []byte("systemd-boot-efi 252~1 amd64\n"), 0o600),
		os.WriteFile(filepath.Join(source, "go.mod"), []byte("module podvmd\ngo 1.26\n"), 0o600),
		os.WriteFile(filepath.Join(source, "main.go"), []byte("package main\nfunc main() {}\n"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	podvmd := filepath.Join(source, "podvmd")
	build := exec.Command("go", "build", "-o", podvmd, ".")
	build.Dir = source
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return Config{KernelTree: kernel, Podvmd: podvmd, Out: t.TempDir(), Format: FormatBzImage},
		DiskConfig{Stub: stub, Components: []Component{{"libc6-dev", "2.36-9+deb12u1", "amd64"}}}
}

// copyTree copies files, so that a build finds them under another name.
func copyTree(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return to
}

func buildAll(t *testing.T, cfg Config, d DiskConfig) (*Manifest, map[string][]byte) {
	t.Helper()
	if _, err := Build(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := BuildDisk(cfg, d); err != nil {
		t.Fatal(err)
	}
	m, err := ReadManifest(cfg.Out)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	entries, err := os.ReadDir(cfg.Out)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if files[e.Name()], err = os.ReadFile(filepath.Join(cfg.Out, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return m, files
}

// Two builds in two folders, of inputs in two folders, are the same bytes; and those are
// what others take for a disk.
func TestBuildDisk(t *testing.T) {
	cfg, d := buildInputs(t)
	d.SignKey, d.SignCert = keyPair(t, "ours")
	m, first := buildAll(t, cfg, d)

	second := cfg
	second.KernelTree, second.Out = copyTree(t, cfg.KernelTree), t.TempDir()
	second.Podvmd = filepath.Join(copyTree(t, filepath.Dir(cfg.Podvmd)), "podvmd")
	d2 := d
	d2.Stub = copyTree(t, d.Stub)
	_, again := buildAll(t, second, d2)
	names := slices.Sorted(maps.Keys(first))
	if diff := cmp.Diff([]string{"SHA256SUMS", "disk.efi", "disk.qcow2", "disk.raw", "disk.vhd", "initrd.img", "manifest.json", "sbom.spdx.json", "vmlinuz"}, names); diff != "" {
		t.Error(diff)
	}
	for _, name := range names {
		if !bytes.Equal(first[name], again[name]) {
			t.Errorf("%s differs in two builds", name)
		}
	}

	out := m.Disk
	if out.GUID == "" || !strings.Contains(out.CommandLine, "podvmd.disk="+out.GUID) || strings.Contains(out.CommandLine, "console") || strings.Contains(out.CommandLine, "maxcpus") {
		t.Errorf("disk %s has the command line %q", out.GUID, out.CommandLine)
	}
	checkTable(t, first["disk.raw"], out.GUID)
	checkVHD(t, first["disk.vhd"], first["disk.raw"])
	if log, err := run(t, "qemu-img", "check", out.QCOW2.Path); err != nil {
		t.Errorf("qemu-img: %s", log)
	}
	if log, err := run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", out.Raw.Path, out.QCOW2.Path); err != nil {
		t.Errorf("qcow2: %s", log)
	}
	if log, err := run(t, "qemu-img", "compare", "-f", "raw", "-F", "vpc", out.Raw.Path, out.VHD.Path); err != nil || strings.Contains(log, "checksum") {
		t.Errorf("VHD: %s", log)
	}
	sums := exec.Command("sha256sum", "--strict", "-c", "SHA256SUMS")
	sums.Dir = cfg.Out
	if log, err := sums.CombinedOutput(); err != nil {
		t.Errorf("sha256sum: %s", log)
	}
	if log, err := run(t, "sbverify", "--cert", d.SignCert, out.UKI.Path); err != nil {
		t.Errorf("sbverify: %s", log)
	}
	checkFAT(t, first["disk.raw"], "/EFI/BOOT/BOOTX64.EFI", first["disk.efi"])
	checkBill(t, first["sbom.spdx.json"])

	// Another console is another disk.
	d.Console = "ttyS0"
	other, _ := buildAll(t, cfg, d)
	if other.Disk.GUID == out.GUID || !strings.Contains(other.Disk.CommandLine, "console=ttyS0") {
		t.Errorf("with a console: %+v", other.Disk)
	}
}

// checkTable reads both copies of the partition table.
func checkTable(t *testing.T, disk []byte, id string) {
	t.Helper()
	if len(disk)%mebibyte != 0 || disk[510] != 0x55 || disk[511] != 0xaa || disk[450] != 0xee {
		t.Errorf("disk of %d bytes without a protective MBR", len(disk))
	}
	last := len(disk) - sector
	for _, at := range []int{sector, last} {
		h := bytes.Clone(disk[at : at+gptHeader])
		sum := binary.LittleEndian.Uint32(h[16:])
		clear(h[16:20])
		table := binary.LittleEndian.Uint64(h[72:]) * sector
		entries := disk[table : table+gptEntries*entrySize]
		if string(h[:8]) != "EFI PART" || sum != crc32.ChecksumIEEE(h) || binary.LittleEndian.Uint32(h[88:]) != crc32.ChecksumIEEE(entries) {
			t.Errorf("partition table at %d is damaged", at)
		}
		if guid(h[56:72]).String() != id {
			t.Errorf("disk is %v, want %s", guid(h[56:72]), id)
		}
		if me, other := binary.LittleEndian.Uint64(h[24:]), binary.LittleEndian.Uint64(h[32:]); int(me+other)*sector != sector+last || int(me)*sector != at {
			t.Errorf("table at %d says it is at sector %d and the other at %d", at, me, other)
		}
	}
}

// checkVHD checks the footer, and that its size is of whole mebibytes, as Azure wants it.
func checkVHD(t *testing.T, vhd, disk []byte) {
	t.Helper()
	if !bytes.HasPrefix(vhd, disk) || len(vhd) != len(disk)+sector {
		t.Fatalf("VHD of %d bytes for a disk of %d", len(vhd), len(disk))
	}
	f := bytes.Clone(vhd[len(disk):])
	sum := binary.BigEndian.Uint32(f[64:])
	clear(f[64:68])
	for _, b := range f {
		sum += uint32(b)
	}
	if string(f[:8]) != "conectix" || sum != 1<<32-1 || binary.BigEndian.Uint64(f[48:]) != uint64(len(disk)) || f[63] != 2 {
		t.Errorf("footer %q, sum of checksum and bytes %#x", f[:8], sum)
	}
}

// checkFAT lets fsck.vfat look at the file system, and finds the file in it by another
// way than the writer's: the chain of its clusters.
func checkFAT(t *testing.T, disk []byte, path string, want []byte) {
	t.Helper()
	volume := disk[espStart : len(disk)-mebibyte]
	file := filepath.Join(t.TempDir(), "esp")
	if err := os.WriteFile(file, volume, 0o600); err != nil {
		t.Fatal(err)
	}
	if log, err := run(t, "fsck.vfat", "-n", file); err != nil {
		t.Errorf("fsck.vfat: %s", log)
	}
	reserved, tables, each := int(binary.LittleEndian.Uint16(volume[14:])), int(volume[16]), int(binary.LittleEndian.Uint32(volume[36:]))
	cluster := int(volume[13]) * sector
	read := func(first int) (out []byte) {
		for c := first; c < 0x0ffffff8; c = int(binary.LittleEndian.Uint32(volume[reserved*sector+4*c:])) {
			at := (reserved+tables*each)*sector + (c-2)*cluster
			out = append(out, volume[at:at+cluster]...)
		}
		return out
	}
	next, size := 2, 0
	for _, name := range strings.Split(path[1:], "/") {
		dir := read(next)
		short, err := shortName(name)
		at := bytes.Index(dir, []byte(short))
		if err != nil || at < 0 || at%dirEntry != 0 {
			t.Fatalf("no %s on the file system: %v", name, err)
		}
		e := dir[at:]
		next = int(binary.LittleEndian.Uint16(e[20:]))<<16 | int(binary.LittleEndian.Uint16(e[26:]))
		size = int(binary.LittleEndian.Uint32(e[28:]))
	}
	if got := read(next); !bytes.Equal(got[:size], want) {
		t.Errorf("%s on the file system is not what was written", path)
	}
}

func checkBill(t *testing.T, b []byte) {
	t.Helper()
	var doc spdxDocument
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	ids, purls := map[string]bool{doc.SPDXID: true}, []string{}
	for _, p := range doc.Packages {
		if ids[p.SPDXID] {
			t.Errorf("two packages are %s", p.SPDXID)
		}
		ids[p.SPDXID] = true
		for _, r := range p.Refs {
			purls = append(purls, r.Locator)
		}
	}
	for _, r := range doc.Relationships {
		if !ids[r.Element] || !ids[r.Related] {
			t.Errorf("relationship of what is not there: %+v", r)
		}
	}
	if len(doc.Relationships) != len(doc.Packages) || !strings.HasPrefix(doc.Packages[2].Name, "podvmd") {
		t.Errorf("%d packages, %d relationships, program %s", len(doc.Packages), len(doc.Relationships), doc.Packages[2].Name)
	}
	want := []string{"pkg:deb/debian/systemd-boot-efi@252~1?arch=amd64", "pkg:golang/std@", "pkg:deb/debian/libc6-dev@2.36-9%2Bdeb12u1?arch=amd64"}
	if len(purls) != len(want) {
		t.Fatalf("parts %q", purls)
	}
	for i, w := range want {
		if !strings.HasPrefix(purls[i], w) {
			t.Errorf("part %d is %s, want %s", i, purls[i], w)
		}
	}
}

func TestBuildDiskRefuses(t *testing.T) {
	cfg, d := buildInputs(t)
	if _, err := BuildDisk(cfg, d); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("before Build: %v", err)
	}
	if _, err := Build(cfg); err != nil {
		t.Fatal(err)
	}
	stub := filepath.Join(d.Stub, "usr/lib/systemd/boot/efi/linuxx64.efi.stub")
	if err := os.WriteFile(stub, efiProgram(t, pe.IMAGE_FILE_MACHINE_ARM64, "stub"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := BuildDisk(cfg, d); err == nil || !strings.Contains(err.Error(), "same architecture") {
		t.Errorf("stub of another architecture: %v", err)
	}
	if err := os.Remove(stub); err != nil {
		t.Fatal(err)
	}
	if _, err := BuildDisk(cfg, d); err == nil || !strings.Contains(err.Error(), "fetch.sh stub") {
		t.Errorf("no stub: %v", err)
	}
}

func TestVHDGeometry(t *testing.T) {
	// From the specification's algorithm, by hand: 35 MiB, 1 GiB, and more than fits.
	for sectors, want := range map[uint64][3]int{71680: {843, 5, 17}, 2097152: {2080, 16, 63}, 1 << 40: {65535, 16, 255}} {
		c, h, s := vhdGeometry(sectors)
		if got := [3]int{int(c), int(h), int(s)}; got != want {
			t.Errorf("%d sectors: %v, want %v", sectors, got, want)
		}
	}
}

func TestParseComponent(t *testing.T) {
	if c, err := ParseComponent("libc6-dev=1:2.3:amd64"); err != nil || c != (Component{"libc6-dev", "1:2.3", "amd64"}) {
		t.Errorf("%+v, %v", c, err)
	}
	for _, s := range []string{"", "libc6-dev", "libc6-dev=1", "=1:amd64"} {
		if _, err := ParseComponent(s); err == nil {
			t.Errorf("%q: no error", s)
		}
	}
}
