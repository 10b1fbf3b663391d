// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/podvm/image"
)

// Debian's package ovmf has UEFI firmware, and one whose Secure Boot trusts the package's
// own "snakeoil" key and no other.
const (
	firmware       = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	firmwareVars   = "/usr/share/OVMF/OVMF_VARS_4M.fd"
	secureFirmware = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
	secureVars     = "/usr/share/OVMF/OVMF_VARS_4M.snakeoil.fd"
	snakeoilKey    = "/usr/share/ovmf/PkKek-1-snakeoil.key"
	snakeoilCert   = "/usr/share/ovmf/PkKek-1-snakeoil.pem"
)

// diskImage builds the disk images, with a serial console. signed: by the key that the
// firmware trusts.
func diskImage(t *testing.T, signed bool) *image.Manifest {
	t.Helper()
	cfg := imageConfig(t)
	d := image.DiskConfig{Stub: fetch(t, "stub"), Console: "ttyS0"}
	if signed {
		d.SignKey, d.SignCert = filepath.Join(t.TempDir(), "key.pem"), snakeoilCert
		if out, err := exec.Command("openssl", "pkey", "-in", snakeoilKey, "-passin", "pass:snakeoil", "-out", d.SignKey).CombinedOutput(); err != nil {
			t.Fatalf("take the passphrase off the key: %v\n%s", err, out)
		}
	}
	if _, err := image.Build(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := image.BuildDisk(cfg, d); err != nil {
		t.Fatal(err)
	}
	m, err := image.ReadManifest(cfg.Out)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// uefi are the arguments for a machine with firmware. What the firmware writes is lost.
func uefi(code, vars string) []string {
	return []string{
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=" + code,
		"-drive", "if=pflash,format=raw,unit=1,snapshot=on,file=" + vars,
	}
}

// secure are those of a machine with Secure Boot, whose variables only code in System
// Management Mode can change.
func secure() (feature string, args []string) {
	return ",smm=on", append(uefi(secureFirmware, secureVars), "-global", "driver=cfi.pflash01,property=secure,value=on")
}

// The very files that clouds are given start by themselves under firmware, each with its
// user data as its cloud has it.
func TestDisk(t *testing.T) {
	m := diskImage(t, true)
	disk, err := os.ReadFile(m.Disk.Raw.Path)
	if err != nil {
		t.Fatal(err)
	}
	feature, secureArgs := secure()

	// With Secure Boot, from an NVMe drive, as on Nitro. What the cloud made the disk larger
	// by becomes swap, and nobody can read there what was swapped.
	t.Run("EC2", func(t *testing.T) {
		c, node := newCredentials(t), nstest.New(t, "node")
		path := filepath.Join(t.TempDir(), "disk")
		const size = 512 << 20
		if err := errors.Join(os.WriteFile(path, disk, 0o600), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
		v := launch(t, node, 2, feature, slices.Concat(secureArgs, ec2SMBIOS, []string{
			"-drive", "if=none,id=disk,format=raw,file=" + path, "-device", "nvme,drive=disk,serial=disk,bootindex=0",
		})...)
		serveCloud(t, node, ec2Metadata(userData(t, c.config())))
		askAgent(t, v.dial(guestAddr+":15150"), c.tlsConfig(c.client))
		v.waitFor(`"step":"cpus"`)
		wantMarks(t, v.output(), "root", "modules", "seed", "nic", "tunnel", "agent", "listening", "cpus", "scratch")
		after, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(after[:len(disk)], disk) {
			t.Error("the image was changed by its start")
		}
		page := after[len(disk):][:os.Getpagesize()]
		if bytes.Count(page, []byte{0}) > len(page)/8 || bytes.Contains(page, []byte("SWAPSPACE2")) {
			t.Errorf("the first page of the scratch space is not encrypted: %q", page[:64])
		}
	})

	// From the VHD, with the user data on a CD behind a SCSI controller: two drivers that are
	// loaded because the hardware is there, one of them behind the other.
	t.Run("Azure", func(t *testing.T) {
		c, node := newCredentials(t), nstest.New(t, "node")
		v := launch(t, node, 2, "", slices.Concat(uefi(firmware, firmwareVars), azureSMBIOS, []string{
			"-drive", "if=none,id=disk,format=vpc,snapshot=on,file=" + m.Disk.VHD.Path, "-device", "virtio-blk-pci,drive=disk,disable-legacy=on,bootindex=0",
			"-device", "virtio-scsi-pci,disable-legacy=on",
			"-drive", "if=none,id=cd,format=raw,media=cdrom,readonly=on,file=" + azureCD(t, userData(t, c.config())), "-device", "scsi-cd,drive=cd",
		})...)
		serveCloud(t, node, azureMetadata())
		askAgent(t, v.dial(guestAddr+":15150"), c.tlsConfig(c.client))
		v.waitFor(`"step":"cpus"`)
	})

	// With one byte changed, Secure Boot does not start it.
	t.Run("changed", func(t *testing.T) {
		program, err := os.ReadFile(m.Disk.UKI.Path)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(disk, program)
		if at < 0 {
			t.Fatal("the program is not on the disk in one piece")
		}
		changed := bytes.Clone(disk)
		changed[at+len(program)*3/4] ^= 1 // in the initramfs
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		v := launch(t, nstest.New(t, "node"), 1, feature, slices.Concat(secureArgs, []string{
			"-drive", "if=none,id=disk,format=raw,snapshot=on,file=" + path, "-device", "virtio-blk-pci,drive=disk,disable-legacy=on,bootindex=0",
		})...)
		v.waitFor("Access Denied")
		if strings.Contains(v.output(), `"msg"`) {
			t.Error("podvmd ran")
		}
	})
}
