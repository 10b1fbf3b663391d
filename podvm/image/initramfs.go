// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/x509"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/kata-remote/kata-remote/podvm/kmod"
)

// epoch is the time all files of the image have.
var epoch = time.Unix(0, 0)

// directories of the initramfs. The mount points among them are what podvmd mounts
// on; the others are what containers and libraries expect of any Linux.
var directories = []string{"dev", "etc", "etc/ssl", "etc/ssl/certs", "lib", "lib/modules", "proc", "run", "sbin", "sys", "tmp", "var"}

// authoritiesFile is where crypto/x509 looks first.
const authoritiesFile = "etc/ssl/certs/ca-certificates.crt"

// contents is what goes into an initramfs.
type contents struct {
	podvmd      string // path
	authorities string // path, or ""
	modules     []Module
	signed      bool // modules stay as they are, else see slimModule
}

// writeInitramfs writes a cpio archive in the "newc" form. The kernel unpacks it in
// order, so a directory stands before what is in it.
func writeInitramfs(w io.Writer, c contents) error {
	a := archive{w: cpio.NewWriter(w)}
	for _, d := range directories {
		a.dir(d)
	}
	a.file("init", 0o755, func() ([]byte, error) { return os.ReadFile(c.podvmd) })
	a.link(kmod.RequestPath[1:], "/init")
	if c.authorities != "" {
		a.file(authoritiesFile, 0o644, func() ([]byte, error) { return readAuthorities(c.authorities) })
	}
	var aliases []kmod.Alias
	list := make([]kmod.Module, 0, len(c.modules))
	for _, m := range c.modules {
		entry := kmod.Module{Name: m.Name, File: m.Name + ".ko", When: m.When, Deps: m.Deps}
		list = append(list, entry)
		if m.When == kmod.Demand || m.When == kmod.Hardware {
			for _, name := range m.Aliases {
				aliases = append(aliases, kmod.Alias{Pattern: name, Module: m.Name})
			}
		}
		a.file(path.Join(kmod.Dir[1:], entry.File), 0o644, func() ([]byte, error) {
			b, err := os.ReadFile(m.Path)
			if err != nil || c.signed {
				return b, err
			}
			return slimModule(b)
		})
	}
	a.file(kmod.ListFile[1:], 0o644, func() ([]byte, error) {
		var b bytes.Buffer
		err := kmod.WriteList(&b, list)
		return b.Bytes(), err
	})
	a.file(kmod.AliasFile[1:], 0o644, func() ([]byte, error) {
		var b bytes.Buffer
		err := kmod.WriteAliases(&b, aliases)
		return b.Bytes(), err
	})
	if a.err != nil {
		return a.err
	}
	return a.w.Close()
}

// readAuthorities reads a file of certificates and refuses one that has none.
func readAuthorities(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if !x509.NewCertPool().AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s has no certificate in PEM", path)
	}
	return b, nil
}

// archive adds entries until the first error.
type archive struct {
	w     *cpio.Writer
	inode int64
	err   error
}

func (a *archive) dir(name string) {
	a.add(&cpio.Header{Name: name, Mode: cpio.TypeDir | 0o755, Links: 2}, nil)
}

func (a *archive) file(name string, mode cpio.FileMode, read func() ([]byte, error)) {
	if a.err != nil {
		return
	}
	data, err := read()
	if err != nil {
		a.err = fmt.Errorf("initramfs: %w", err)
		return
	}
	a.add(&cpio.Header{Name: name, Mode: cpio.TypeReg | mode, Size: int64(len(data)), Links: 1}, data)
}

func (a *archive) link(name, target string) {
	a.add(&cpio.Header{Name: name, Mode: cpio.TypeSymlink | 0o777, Size: int64(len(target)), Links: 1}, []byte(target))
}

func (a *archive) add(h *cpio.Header, data []byte) {
	if a.err != nil {
		return
	}
	a.inode++
	h.Inode, h.ModTime = a.inode, epoch
	if err := a.w.WriteHeader(h); err != nil {
		a.err = fmt.Errorf("initramfs: %s: %w", h.Name, err)
		return
	}
	if _, err := a.w.Write(data); err != nil {
		a.err = fmt.Errorf("initramfs: %s: %w", h.Name, err)
	}
}

// slimModule takes out of a module what the kernel works on while loading it and a pod
// VM has no use for. Of the 440 ms that an emulated guest spent between init and
// listening, 90 went to signatures, for files that stand in one archive with podvmd,
// and 50 to sorting unwind tables, without which the kernel's own stack traces guess
// frames inside these modules (QEMU 7.2, 2026-11-21).
//
// Only a kernel started by UEFI Secure Boot insists on signatures, and such a start
// begins with a bzImage.
func slimModule(m []byte) ([]byte, error) {
	m, err := stripSignature(m)
	if err != nil {
		return nil, err
	}
	return hideUnwindTables(m)
}

// hideUnwindTables gives the sections .orc_unwind and .orc_unwind_ip names that the
// kernel does not look for, and takes them from what is loaded: their relocations are
// then skipped too (kernel/module/main.c, apply_relocations; arch/x86/kernel/module.c,
// module_finalize).
func hideUnwindTables(m []byte) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(m))
	if err != nil {
		return nil, err
	}
	var hdr elf.Header64
	if _, err := binary.Decode(m, binary.LittleEndian, &hdr); err != nil {
		return nil, err
	}
	m = bytes.Clone(m)
	names := f.Sections[hdr.Shstrndx].Offset
	for i, s := range f.Sections {
		if s.Name != ".orc_unwind" && s.Name != ".orc_unwind_ip" {
			continue
		}
		var sh elf.Section64
		at := m[hdr.Shoff+uint64(i)*uint64(hdr.Shentsize):]
		if _, err := binary.Decode(at, binary.LittleEndian, &sh); err != nil {
			return nil, err
		}
		sh.Flags &^= uint64(elf.SHF_ALLOC)
		if _, err := binary.Encode(at, binary.LittleEndian, &sh); err != nil {
			return nil, err
		}
		// The name may be the end of another one's; that loses its meaning as well.
		m[names+uint64(sh.Name)] = '_'
	}
	return m, nil
}

const (
	// signatureMagic ends a signed module. Before it stand 12 bytes, struct
	// module_signature, the last 4 of which are the big-endian length of the
	// signature before that (include/linux/module_signature.h).
	signatureMagic = "~Module signature appended~\n"
	signatureInfo  = 12
)

// stripSignature returns a module without its signature, if it has one.
func stripSignature(m []byte) ([]byte, error) {
	body, signed := bytes.CutSuffix(m, []byte(signatureMagic))
	if !signed {
		return m, nil
	}
	if len(body) < signatureInfo {
		return nil, errors.New("the module's signature is cut short")
	}
	info := body[len(body)-signatureInfo:]
	body = body[:len(body)-signatureInfo]
	n := int64(binary.BigEndian.Uint32(info[signatureInfo-4:]))
	if n > int64(len(body)) {
		return nil, errors.New("the module's signature is longer than the module")
	}
	return body[:int64(len(body))-n], nil
}

// checkStatic refuses a podvmd that needs a dynamic loader: there is none in the
// image, and the kernel's message for it ("No working init found") tells nothing.
func checkStatic(podvmd string) error {
	f, err := elf.Open(podvmd)
	if err != nil {
		return fmt.Errorf("podvmd %s: %w", podvmd, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("podvmd %s is linked dynamically: build it with -ldflags '-extldflags -static'", podvmd)
		}
	}
	return nil
}
