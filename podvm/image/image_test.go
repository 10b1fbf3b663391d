// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/podvm/kmod"
)

// elfFile makes a minimal 64-bit ELF file with one section, or one program header.
func elfFile(t *testing.T, section string, data []byte, progs ...elf.Prog64) []byte {
	t.Helper()
	var out bytes.Buffer
	hdr := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64,
		Phentsize: 56, Phnum: uint16(len(progs)), Shentsize: 64,
	}
	copy(hdr.Ident[:], elf.ELFMAG)
	hdr.Ident[elf.EI_CLASS], hdr.Ident[elf.EI_DATA], hdr.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	names := "\x00.shstrtab\x00" + section + "\x00"
	body := uint64(64 + 56*len(progs))
	hdr.Phoff = 64
	hdr.Shoff, hdr.Shnum, hdr.Shstrndx = body+uint64(len(data)+len(names)), 3, 1
	sections := []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_STRTAB), Off: body + uint64(len(data)), Size: uint64(len(names)), Addralign: 1},
		{Name: 11, Type: uint32(elf.SHT_PROGBITS), Off: body, Size: uint64(len(data)), Addralign: 1},
	}
	for i := range progs {
		progs[i].Off += body
	}
	for _, v := range []any{hdr, progs, data, []byte(names), sections} {
		if err := binary.Write(&out, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	return out.Bytes()
}

// tree makes an unpacked kernel package with the given modules and their .modinfo.
func tree(t *testing.T, modules map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	put := func(path string, data []byte) {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("boot/vmlinuz-6.1.0-test", []byte("kernel"))
	put("lib/modules/6.1.0-test/modules.builtin", []byte("kernel/lib/built-in.ko\n"))
	for path, info := range modules {
		put("lib/modules/6.1.0-test/kernel/"+path, elfFile(t, ".modinfo", []byte(strings.ReplaceAll(info, " ", "\x00")+"\x00")))
	}
	return dir
}

func names(ms []Module) []string {
	var out []string
	for _, m := range ms {
		out = append(out, m.Name)
	}
	return out
}

func TestResolve(t *testing.T) {
	k, err := OpenKernel(tree(t, map[string]string{
		"net/vxlan.ko":          "name=vxlan depends=udp-tunnel,built_in license=GPL",
		"net/udp-tunnel.ko":     "depends=base",
		"base.ko":               "depends=",
		"virtio/virtio_pci.ko":  "depends=ring,pci-only",
		"virtio/virtio_mmio.ko": "depends=ring",
		"virtio/ring.ko":        "depends=ring_base",
		"virtio/ring_base.ko":   "depends=",
		"virtio/pci-only.ko":    "depends=",
		"unwanted.ko":           "depends=nowhere",
	}))
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.Resolve([]Want{{Name: "virtio_pci", When: "pci"}, {Name: "virtio_mmio", When: "mmio"}, {Name: "vxlan"}, {Name: "missing", Optional: true}})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"ring_base", "ring", "pci_only", "virtio_pci", "virtio_mmio", "base", "udp_tunnel", "vxlan"}
	if d := cmp.Diff(want, names(got)); d != "" {
		t.Errorf("order: %s", d)
	}
	when := map[string]string{}
	for _, m := range got {
		when[m.Name] = m.When
	}
	if when["ring"] != "" || when["ring_base"] != "" || when["pci_only"] != "pci" || when["virtio_mmio"] != "mmio" {
		t.Errorf("conditions: %v", when)
	}
	if d := cmp.Diff([]string{"udp_tunnel"}, got[7].Deps); d != "" {
		t.Errorf("what vxlan needs: %s", d)
	}
}

// What is needed on demand, or by some hardware, is not loaded at every start because
// both need it.
func TestResolveConditions(t *testing.T) {
	k, err := OpenKernel(tree(t, map[string]string{
		"card.ko": "depends=lib", "net.ko": "depends=card", "lib.ko": "depends=", "tool.ko": "depends=other", "other.ko": "depends=", "all.ko": "depends=base", "cd.ko": "depends=base", "base.ko": "depends=",
	}))
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.Resolve([]Want{
		{Name: "card", When: kmod.Hardware}, {Name: "net", When: kmod.Demand},
		{Name: "tool", When: kmod.Demand}, {Name: "other", When: kmod.Hardware},
		{Name: "cd", When: kmod.Hardware}, {Name: "all"},
	})
	if err != nil {
		t.Fatal(err)
	}
	when := map[string]string{}
	for _, m := range got {
		when[m.Name] = m.When
	}
	want := map[string]string{
		"card": kmod.Hardware, "lib": kmod.Hardware, "net": kmod.Demand, "tool": kmod.Demand, "other": kmod.Hardware,
		"cd": kmod.Hardware, "all": "", "base": "",
	}
	if d := cmp.Diff(want, when); d != "" {
		t.Error(d)
	}
}

func TestSoftDependency(t *testing.T) {
	info := parseModinfo([]byte("depends=a,b\x00softdep=pre: c d post: e\x00softdep=post: f\x00alias=x\x00"))
	if d := cmp.Diff(modinfo{deps: []string{"a", "b"}, softPre: []string{"c", "d"}, aliases: []string{"x"}}, info, cmp.AllowUnexported(modinfo{})); d != "" {
		t.Error(d)
	}
}

func TestResolveRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		modules map[string]string
		want    []string
	}{
		"missing":     {map[string]string{"other.ko": "depends="}, []string{"no module top"}},
		"missing dep": {map[string]string{"top.ko": "depends=gone"}, []string{"no module gone", "needed by top"}},
		"circle":      {map[string]string{"top.ko": "depends=a", "a.ko": "depends=top"}, []string{"top → a → top"}},
		"compressed":  {map[string]string{"top.ko.xz": "depends="}, []string{"module top", "compressed"}},
	} {
		t.Run(name, func(t *testing.T) {
			k, err := OpenKernel(tree(t, c.modules))
			if err != nil {
				t.Fatal(err)
			}
			_, err = k.Resolve([]Want{{Name: "top"}})
			for _, w := range c.want {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Errorf("got %v, want %q", err, w)
				}
			}
		})
	}
}

func TestOpenKernelRefuses(t *testing.T) {
	if _, err := OpenKernel(t.TempDir()); err == nil || !strings.Contains(err.Error(), "boot/vmlinuz-") {
		t.Errorf("empty directory: %v", err)
	}
	dir := tree(t, nil)
	if err := os.WriteFile(filepath.Join(dir, "boot/vmlinuz-2"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKernel(dir); err == nil || !strings.Contains(err.Error(), "has 2 files") {
		t.Errorf("two kernels: %v", err)
	}
}

// signed is a module's content with a signature.
func signed(body string) []byte {
	b := []byte(body + "SIGNATURE")
	b = append(b, make([]byte, 8)...)
	b = binary.BigEndian.AppendUint32(b, uint32(len("SIGNATURE")))
	return append(b, signatureMagic...)
}

func TestStripSignature(t *testing.T) {
	for in, want := range map[string]string{string(signed("code")): "code", "code": "code", "": ""} {
		got, err := stripSignature([]byte(in))
		if err != nil || string(got) != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
	for _, in := range []string{signatureMagic, string(signed(""))[3:]} {
		if _, err := stripSignature([]byte(in)); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
}

func TestHideUnwindTables(t *testing.T) {
	for name, hidden := range map[string]bool{".orc_unwind": true, ".orc_unwind_ip": true, ".text": false} {
		m := elfFile(t, name, []byte("content"))
		// The third section header's flags, which elfFile leaves 0.
		shoff := binary.LittleEndian.Uint64(m[0x28:])
		binary.LittleEndian.PutUint64(m[shoff+2*64+8:], uint64(elf.SHF_ALLOC))
		before := bytes.Clone(m)
		out, err := hideUnwindTables(m)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m, before) {
			t.Error("the input was changed")
		}
		f, err := elf.NewFile(bytes.NewReader(out))
		if err != nil {
			t.Fatal(err)
		}
		s := f.Sections[2]
		if hidden != (s.Name != name) || hidden != (s.Flags&elf.SHF_ALLOC == 0) {
			t.Errorf("%s became %s with flags %v", name, s.Name, s.Flags)
		}
	}
	if _, err := hideUnwindTables([]byte("garbage")); err == nil {
		t.Error("garbage: no error")
	}
}

type entry struct {
	Name string
	Mode cpio.FileMode
	Data string
}

func readArchive(t *testing.T, b []byte) []entry {
	t.Helper()
	var out []entry
	r := cpio.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) || h.Uid != 0 || h.Guid != 0 {
			t.Errorf("%s: time %v, owner %d:%d", h.Name, h.ModTime, h.Uid, h.Guid)
		}
		out = append(out, entry{h.Name, h.Mode, string(data) + h.Linkname})
	}
}

// certificate is one of nobody in particular.
const certificate = `-----BEGIN CERTIFICATE-----
MIIBdDCCARmgAwIBAgIUYQElXZpwlEpJfZyQOcVzbFL8w/gwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAeFw0yNjExMjEyMjE3MDNaFw0zNjExMTgyMjE3MDNa
MA8xDTALBgNVBAMMBHRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATK6J7I
1jyGEKVLJimvMQfx/pjFCPuFjgtqzOUxa7lBIK8QXoD1K/zasK/hlsYOPAZAnPtg
7+MeB+OJKmjU15KGo1MwUTAdBgNVHQ4EFgQU0uqn+RDyBATcc8wmWDNUS5HDpEww
HwYDVR0jBBgwFoAU0uqn+RDyBATcc8wmWDNUS5HDpEwwDwYDVR0TAQH/BAUwAwEB
/zAKBggqhkjOPQQDAgNJADBGAiEAsQMgEsLz/QhoZQlgCE5Hc2udhU97N1u0RxN1
7choPegCIQD461odvy3e3U65frjGtTkYZb/4ibrVSG7RX5OMzNwDrA==
-----END CERTIFICATE-----
`

func TestInitramfs(t *testing.T) {
	dir := t.TempDir()
	podvmd, module := filepath.Join(dir, "podvmd"), filepath.Join(dir, "a-b.ko")
	code := string(elfFile(t, ".text", []byte("code")))
	if err := errors.Join(os.WriteFile(podvmd, []byte("program"), 0o600), os.WriteFile(module, signed(code), 0o600)); err != nil {
		t.Fatal(err)
	}
	authorities := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(authorities, []byte(certificate), 0o600); err != nil {
		t.Fatal(err)
	}
	modules := []Module{
		{Name: "a_b", Path: module, When: "pci", Aliases: []string{"pci:v1*"}},
		{Name: "c", Path: module, When: kmod.Demand, Aliases: []string{"rtnl-link-c", "fs-c"}},
	}
	build := func(signed bool) []byte {
		var b bytes.Buffer
		if err := writeInitramfs(&b, contents{podvmd: podvmd, authorities: authorities, modules: modules, signed: signed}); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	first := build(false)
	if !bytes.Equal(first, build(false)) {
		t.Error("two builds differ")
	}
	got := readArchive(t, first)
	for _, want := range []entry{
		{"init", cpio.TypeReg | 0o755, "program"},
		{"etc/ssl/certs/ca-certificates.crt", cpio.TypeReg | 0o644, certificate},
		{"proc", cpio.TypeDir | 0o755, ""},
		{"lib/modules/a_b.ko", cpio.TypeReg | 0o644, code},
		{"lib/modules/list", cpio.TypeReg | 0o644, "a_b a_b.ko pci\nc c.ko demand\n"},
		{"lib/modules/aliases", cpio.TypeReg | 0o644, "rtnl-link-c c\nfs-c c\n"}, // those of others are loaded without being asked for
		{"sbin/modprobe", cpio.TypeSymlink | 0o777, "/init"},
	} {
		if !slices.Contains(got, want) {
			t.Errorf("no entry %v among %v", want, got)
		}
	}
	seen := map[string]bool{".": true}
	for _, e := range got {
		if !seen[filepath.Dir(e.Name)] {
			t.Errorf("%s stands before its directory", e.Name)
		}
		seen[e.Name] = true
		if e.Name == kmod.ListFile[1:] {
			if _, err := kmod.ReadList(strings.NewReader(e.Data)); err != nil {
				t.Error(err)
			}
		}
	}
	if withSignature := readArchive(t, build(true)); !slices.Contains(withSignature, entry{"lib/modules/a_b.ko", cpio.TypeReg | 0o644, string(signed(code))}) {
		t.Error("the signature was not kept")
	}
	if err := writeInitramfs(io.Discard, contents{podvmd: podvmd, authorities: podvmd}); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("authorities that are none: %v", err)
	}
	var without bytes.Buffer
	if err := writeInitramfs(&without, contents{podvmd: podvmd}); err != nil {
		t.Fatal(err)
	}
	for _, e := range readArchive(t, without.Bytes()) {
		if e.Data == certificate {
			t.Error("authorities nobody gave")
		}
	}
}

// lz4 compresses into literals only, which is valid LZ4.
func lz4(data []byte) []byte {
	var block []byte
	n := len(data)
	if n < 15 {
		block = append(block, byte(n<<4))
	} else {
		block = append(block, 0xf0)
		for n -= 15; n >= 255; n -= 255 {
			block = append(block, 255)
		}
		block = append(block, byte(n))
	}
	block = append(block, data...)
	out := []byte{0x02, 0x21, 0x4c, 0x18}
	return append(binary.LittleEndian.AppendUint32(out, uint32(len(block))), block...)
}

// bzImage wraps a payload as boot.rst describes.
func bzImage(payload []byte) []byte {
	b := make([]byte, 2*sector)
	b[setupSectsOffset] = 1
	copy(b[headerMagicOffset:], "HdrS")
	binary.LittleEndian.PutUint16(b[protocolOffset:], 0x20f)
	binary.LittleEndian.PutUint32(b[payloadOffset:], 0)
	binary.LittleEndian.PutUint32(b[payloadLengthOffset:], uint32(len(payload)))
	return append(b, payload...)
}

func TestExtractELF(t *testing.T) {
	text := append(bytes.Repeat([]byte("text"), 100), make([]byte, 1000)...)
	kernel := elfFile(t, ".text", text,
		elf.Prog64{Type: uint32(elf.PT_LOAD), Vaddr: 0x1000, Paddr: 0x2000, Filesz: uint64(len(text)), Memsz: 5000, Flags: 5},
		elf.Prog64{Type: uint32(elf.PT_NOTE), Filesz: 8})
	payload := append(lz4(kernel), 0, 0, 0, 0)
	slim, err := extractELF(bzImage(payload))
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(slim))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Progs) != 2 || len(f.Sections) != 0 {
		t.Fatalf("%d segments and %d sections, want 2 and 0", len(f.Progs), len(f.Sections))
	}
	load := f.Progs[0]
	if load.Paddr != 0x2000 || load.Memsz != 5000 || load.Filesz != 400 {
		t.Errorf("segment %+v", load.ProgHeader)
	}
	got, err := io.ReadAll(load.Open())
	if err != nil || !bytes.Equal(got, text[:400]) {
		t.Errorf("content of the segment: %q, %v", got, err)
	}
	if note, err := io.ReadAll(f.Progs[1].Open()); err != nil || string(note) != "texttext" {
		t.Errorf("notes: %q, %v", note, err)
	}
}

func TestExtractELFRefuses(t *testing.T) {
	good := bzImage(append(lz4([]byte("not ELF")), 0, 0, 0, 0))
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"short":       {good[:100], "not a Linux bzImage"},
		"no magic":    {make([]byte, 4096), "not a Linux bzImage"},
		"truncated":   {good[:len(good)-1], "outside the file"},
		"compression": {bzImage([]byte("\xfd7zXZ\x00aaaaaaaa")), "unknown compression"},
		"no elf":      {good, "payload"},
		"bad lz4":     {bzImage([]byte{2, 0x21, 0x4c, 0x18, 3, 0, 0, 0, 0x0f, 9, 0, 0, 0, 0, 0}), "LZ4"},
		"short block": {bzImage([]byte{2, 0x21, 0x4c, 0x18, 99, 0, 0, 0, 1, 0, 0, 0, 0}), "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := extractELF(c.b); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// A block out of the LZ4 specification's elements: literals, an overlapping match and
// a long match length.
func TestLZ4Block(t *testing.T) {
	block := []byte{0x2f, 'a', 'b', 2, 0, 1, 0x10, 'c'} // "ab", match 20 at offset 2, "c"
	got, err := appendLZ4Block(nil, block)
	if want := strings.Repeat("ab", 11) + "c"; err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func FuzzLZ4Block(f *testing.F) {
	f.Add([]byte{0x2f, 'a', 'b', 2, 0, 1, 0x10, 'c'})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = appendLZ4Block(nil, b) // must not panic
	})
}

func TestBuildRefusesDynamicPodvmd(t *testing.T) {
	podvmd := filepath.Join(t.TempDir(), "podvmd")
	b := elfFile(t, ".interp", []byte("/lib/ld.so\x00"), elf.Prog64{Type: uint32(elf.PT_INTERP), Filesz: 11})
	if err := os.WriteFile(podvmd, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := checkStatic(podvmd); err == nil || !strings.Contains(err.Error(), "-static") {
		t.Errorf("got %v", err)
	}
}

// TestForbidden: neither as a module nor built in.
func TestForbidden(t *testing.T) {
	dir := tree(t, map[string]string{"drivers/net/macvlan.ko": "name=macvlan", "drivers/net/vxlan.ko": "name=vxlan"})
	k, err := OpenKernel(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.checkForbidden([]Module{{Name: "vxlan"}}); err != nil {
		t.Error(err)
	}
	if err := k.checkForbidden([]Module{{Name: "vxlan"}, {Name: "macvlan"}}); err == nil || !strings.Contains(err.Error(), "macvlan") {
		t.Errorf("a module: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lib/modules/6.1.0-test/modules.builtin"), []byte("kernel/net/8021q/8021q.ko\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if k, err = OpenKernel(dir); err != nil {
		t.Fatal(err)
	}
	if err := k.checkForbidden(nil); err == nil || !strings.Contains(err.Error(), "8021q") {
		t.Errorf("built in: %v", err)
	}
}
