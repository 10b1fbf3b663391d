// SPDX-License-Identifier: Apache-2.0

// Package diskimagetest makes small folders as `make podvm-image` does, for tests of
// what publishes them.
package diskimagetest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

const mib = 1 << 20

// Blocks are the half mebibytes of the disk that are not empty.
var Blocks = []int{0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22, 23, 24, 25, 26, 27, 28, 30, 43}

// Disk is the content of an image's disk, 22 MiB of which only some blocks are not empty;
// none given: Blocks. seed, below 128, makes it another one.
func Disk(seed byte, blocks ...int) []byte {
	disk := make([]byte, 22*mib)
	if len(blocks) == 0 {
		blocks = Blocks
	}
	for _, b := range blocks {
		for i := range 600 {
			disk[b*mib/2+i*7] = byte(b) ^ byte(i) ^ seed<<1 | 1
		}
	}
	return disk
}

// VHD is a disk with the footer of a fixed VHD (its fields: podvm/image/formats.go).
func VHD(disk []byte) []byte {
	f := make([]byte, 512)
	copy(f, "conectix")
	binary.BigEndian.PutUint32(f[8:], 2)
	binary.BigEndian.PutUint32(f[12:], 0x00010000)
	binary.BigEndian.PutUint64(f[16:], 1<<64-1)
	binary.BigEndian.PutUint64(f[40:], uint64(len(disk)))
	binary.BigEndian.PutUint64(f[48:], uint64(len(disk)))
	binary.BigEndian.PutUint32(f[60:], 2)
	sum := uint32(0)
	for _, b := range f {
		sum += uint32(b)
	}
	binary.BigEndian.PutUint32(f[64:], ^sum)
	return append(disk[:len(disk):len(disk)], f...)
}

// Write makes the folder of an image and returns its path. seed, blocks: see Disk.
func Write(t testing.TB, seed byte, blocks ...int) string {
	t.Helper()
	dir := t.TempDir()
	disk := Disk(seed, blocks...)
	entry := func(name string, b []byte) map[string]any {
		writeSparse(t, filepath.Join(dir, name), b)
		sum := sha256.Sum256(b)
		return map[string]any{"file": name, "size": len(b), "sha256": hex.EncodeToString(sum[:])}
	}
	m := map[string]any{"kernel_version": "6.1.0-test", "disk": map[string]any{"architecture": "amd64", "raw": entry("disk.raw", disk), "vhd": entry("disk.vhd", VHD(disk))}}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "manifest.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// writeSparse leaves holes where there is nothing, which saves tests most of the writing.
func writeSparse(t testing.TB, path string, b []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(b))); err != nil {
		t.Fatal(err)
	}
	zero := make([]byte, mib/2)
	for at := 0; at < len(b); at += len(zero) {
		if part := b[at:min(at+len(zero), len(b))]; !bytes.Equal(part, zero[:len(part)]) {
			if _, err := f.WriteAt(part, int64(at)); err != nil {
				t.Fatal(err)
			}
		}
	}
}
