// SPDX-License-Identifier: Apache-2.0

package scratch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

const testID = "9CB552EA-6126-8823-8E05-FC26C9F85387"

// host has a disk of the given bytes, for each name, with a partition table of an image
// of 36 MiB if id is not empty.
type host struct {
	t *testing.T
	Host
}

func newHost(t *testing.T) host {
	return host{t, Host{Sys: t.TempDir(), Dev: t.TempDir(), Patience: 10 * time.Millisecond}}
}

func (h host) disk(name string, size int64, change func([]byte)) {
	h.t.Helper()
	b := make([]byte, 4096)
	t := b[sector:]
	copy(t, "EFI PART")
	binary.LittleEndian.PutUint64(t[32:], 36<<20/sector-1)
	copy(t[56:], "\xea\x52\xb5\x9c\x26\x61\x23\x88\x8e\x05\xfc\x26\xc9\xf8\x53\x87")
	binary.LittleEndian.PutUint32(t[16:], crc32.ChecksumIEEE(t[:92]))
	if change != nil {
		change(t)
	}
	if err := errors.Join(
		os.MkdirAll(filepath.Join(h.Sys, name), 0o755),
		os.WriteFile(filepath.Join(h.Sys, name, "size"), fmt.Appendf(nil, "%d\n", size/sector), 0o644),
		os.WriteFile(filepath.Join(h.Dev, name), b, 0o644)); err != nil {
		h.t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	h := newHost(t)
	h.disk("sr0", 0, nil)
	h.disk("sda", 1<<30, func(b []byte) { b[56] ^= 1 })          // another image's
	h.disk("sdb", 1<<30, func(b []byte) { b[40] ^= 1 })          // damaged
	h.disk("sdc", 1<<30, func(b []byte) { copy(b, "NOT PART") }) // no table
	h.disk("nvme0n1", 1<<30+4096, nil)
	got, err := h.Find(t.Context(), strings.ToLower(testID))
	want := Space{Disk: filepath.Join(h.Dev, "nvme0n1"), Offset: 36 << 20, Size: 1<<30 + 4096 - 36<<20}
	if err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	h.disk("vdz", 1<<30, nil)
	if _, err := h.Find(t.Context(), testID); err == nil || !strings.Contains(err.Error(), "nvme0n1 and") || !strings.Contains(err.Error(), "vdz both") {
		t.Errorf("two disks: %v", err)
	}
}

func TestFindNothing(t *testing.T) {
	h := newHost(t)
	if _, err := h.Find(t.Context(), testID); !errdefs.IsNotFound(err) {
		t.Errorf("no disk: %v", err)
	}
	h.disk("vda", 37<<20, nil)
	if _, err := h.Find(t.Context(), testID); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "1048576 bytes behind") {
		t.Errorf("a full disk: %v", err)
	}
}

func TestDiskID(t *testing.T) {
	for cmdline, want := range map[string]string{
		"quiet podvmd.disk=" + testID + " panic=-1\n": testID,
		"quiet xpodvmd.disk=1":                        "",
		"":                                            "",
	} {
		if got := DiskID(cmdline); got != want {
			t.Errorf("%q: %q", cmdline, got)
		}
	}
}

func TestSwapHeader(t *testing.T) {
	h := swapHeader(4096, 1<<30)
	if string(h[4086:]) != "SWAPSPACE2" || h[1024] != 1 || binary.NativeEndian.Uint32(h[1028:]) != 1<<18-1 {
		t.Errorf("header %q with last page %d", h[4086:], binary.NativeEndian.Uint32(h[1028:]))
	}
}
