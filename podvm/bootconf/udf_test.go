// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// unpacked is a disk of testdata.
func unpacked(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadUDF(t *testing.T) {
	b := unpacked(t, "azure-cd.udf.gz")
	if _, err := readISO(bytes.NewReader(b)); !errors.Is(err, errNotISO) {
		t.Fatalf("the disk is ISO 9660 as well: %v", err)
	}
	doc, err := readVolumeFile(bytes.NewReader(b), ovfFile)
	if err != nil || !bytes.HasPrefix(doc, []byte("<?xml")) || !bytes.HasSuffix(doc, []byte("</Environment>\n")) {
		t.Errorf("%q, %v", doc, err)
	}
	if doc, err := readVolumeFile(bytes.NewReader(b), "other.xml"); doc != nil || err != nil {
		t.Errorf("a file that is not there: %q, %v", doc, err)
	}
	if v, err := readUDF(bytes.NewReader(unpacked(t, "empty-2.01.udf.gz"))); err != nil || len(v.files) != 0 {
		t.Errorf("empty disk: %+v, %v", v, err)
	}
	if _, err := readUDF(bytes.NewReader(make([]byte, 1<<20))); !errors.Is(err, errNotUDF) {
		t.Errorf("zeros: %v", err)
	}
	if _, err := readUDF(bytes.NewReader(b[:258*isoSector])); err == nil {
		t.Error("read a disk that is cut short")
	}
}

// TestAzureCD: the whole way from the drive to the files, beside an empty drive.
func TestAzureCD(t *testing.T) {
	cd := AzureCD{Disks{Sys: t.TempDir(), Dev: t.TempDir(), Wait: -1}}
	if err := os.WriteFile(filepath.Join(cd.Dev, "sr0"), unpacked(t, "azure-cd.udf.gz"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sda", "sr0"} {
		if err := os.Mkdir(filepath.Join(cd.Sys, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := Read(context.Background(), cd)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Files) != 1 || string(cfg.Files[0].Content) != "{}\n" || cfg.Hostname != "podvm-udf-0123" || cfg.Source != cd.Name() {
		t.Errorf("got %+v", cfg)
	}
	if err := os.Remove(filepath.Join(cd.Dev, "sr0")); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(context.Background(), cd); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "ovf-env.xml (looked at: sda sr0)") {
		t.Errorf("without the CD: %v", err)
	}
}

func TestParseOVFRefuses(t *testing.T) {
	set := func(inside string) string {
		return `<Environment xmlns:wa="w"><wa:ProvisioningSection><wa:LinuxProvisioningConfigurationSet>` + inside + `</wa:LinuxProvisioningConfigurationSet></wa:ProvisioningSection></Environment>`
	}
	for name, c := range map[string]struct {
		doc, want string
		none      bool
	}{
		"no custom data":    {set("<wa:HostName>h</wa:HostName>"), "no CustomData", true},
		"empty custom data": {set("<wa:CustomData> </wa:CustomData>"), "CustomData is empty", true},
		"Windows":           {`<Environment><ProvisioningSection/></Environment>`, "no LinuxProvisioningConfigurationSet", true},
		"not base64":        {set("<wa:CustomData>s3cret!</wa:CustomData>"), "CustomData is not base64", false},
		"not XML":           {"\n" + set("<wa:UserPassword>s3cret"), "line 2: not XML", false},
		"something else":    {"<s3cret/>", "is not an OVF environment", false},
		"other encoding":    {`<?xml version="1.0" encoding="s3cret"?><Environment/>`, "is not an OVF environment", false},
		"nothing":           {"", "is not an OVF environment", false},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseOVF([]byte(c.doc))
			if errdefs.IsNotFound(err) != c.none || errdefs.IsInvalidArgument(err) == c.none || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func FuzzParseOVF(f *testing.F) {
	f.Add([]byte(`<Environment><ProvisioningSection><LinuxProvisioningConfigurationSet><CustomData>YQ==</CustomData></LinuxProvisioningConfigurationSet></ProvisioningSection></Environment>`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		if s, err := parseOVF(doc); (err == nil) == (s == nil || len(s.UserData) == 0) {
			t.Errorf("%+v, %v", s, err)
		}
	})
}

// FuzzReadUDF changes the descriptors of a good disk, with a checksum that is right again.
func FuzzReadUDF(f *testing.F) {
	good := unpacked(f, "azure-cd.udf.gz")
	f.Add(uint16(256), uint16(16), uint32(1))
	f.Add(uint16(259), uint16(172), uint32(1<<31))
	f.Fuzz(func(t *testing.T, sector, at uint16, value uint32) {
		disk := bytes.Clone(good)
		off := int(sector)*isoSector + int(at)%(isoSector-4)
		if off+4 > len(disk) {
			return
		}
		binary.LittleEndian.PutUint32(disk[off:], value)
		tag := disk[int(sector)*isoSector:][:16]
		tag[4] = 0
		var sum byte
		for _, b := range tag {
			sum += b
		}
		tag[4] = sum
		// No panic, no endless loop, no huge allocation is all that is asked of garbage.
		if b, err := readVolumeFile(bytes.NewReader(disk), ovfFile); err == nil && len(b) > MaxDocument {
			t.Errorf("%d bytes", len(b))
		}
	})
}
