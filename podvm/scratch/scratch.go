// SPDX-License-Identifier: Apache-2.0

// Package scratch gives a pod VM that was started from a disk image the rest of the disk.
//
//	disk  │ image: table, EFI system partition, table's copy │ the cloud made it larger     │
//	                                                         └ dm-crypt, key of this start ─▶ swap
//
// A pod VM keeps everything in memory: root file systems, images and volumes are tmpfs,
// each bounded. Swap lets them be larger than the memory is, and leaves everything as it
// is on a machine without a disk, the bounds included, where a file system would need
// quotas for them. A container with a memory limit swaps only if its swap limit says so,
// which the kubelet sets to none.
//
// What is written there is encrypted with a key that is nowhere but in the kernel, so what
// is left of it after the pod is noise. It is not authenticated: who can write to the disk
// while the pod runs can spoil the pod's data, not read it.
package scratch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Parameter is the word of the kernel command line that names the image's disk by its
// GUID: the image's builder writes it (podvm/image). Without it there is no disk.
const Parameter = "podvmd.disk"

const (
	sector = 512
	// align is where clouds' volumes and everything on them begin.
	align = 1 << 20
	// least is the smallest space that is worth its keeping, bytes: less is what a
	// cloud's rounding leaves.
	least = 64 << 20
	// diskWait bounds the wait for the disk. The machine was started from it, so only
	// its driver has to look.
	diskWait = 10 * time.Second
	diskPoll = 10 * time.Millisecond
)

// Host is where the machine shows its disks. The zero value is the running kernel's.
type Host struct {
	Sys      string        // directory of block devices; empty: /sys/block
	Dev      string        // directory of device nodes; empty: /dev
	Patience time.Duration // for the disk to appear; 0: ten seconds
}

// Space is a part of a disk.
type Space struct {
	Disk   string // device node
	Offset int64  // bytes
	Size   int64  // bytes
}

// DiskID returns the GUID that the kernel command line has, or "".
func DiskID(cmdline string) string {
	for word := range strings.FieldsSeq(cmdline) {
		if id, found := strings.CutPrefix(word, Parameter+"="); found {
			return id
		}
	}
	return ""
}

// Find waits for the disk and returns what is behind the image on it. NotFound: the image
// fills it, or there is none.
func (h Host) Find(ctx context.Context, id string) (Space, error) {
	if h.Sys == "" {
		h.Sys = "/sys/block"
	}
	if h.Dev == "" {
		h.Dev = "/dev"
	}
	if h.Patience == 0 {
		h.Patience = diskWait
	}
	deadline := time.NewTimer(h.Patience)
	defer deadline.Stop()
	tick := time.NewTicker(diskPoll)
	defer tick.Stop()
	for {
		found, err := h.look(id)
		if err != nil {
			return Space{}, err
		}
		if len(found) > 1 {
			return Space{}, fmt.Errorf("scratch space: %s and %s both say they are disk %s: none is used", found[0].Disk, found[1].Disk, id)
		}
		if len(found) == 1 {
			s := found[0]
			if s.Size < least {
				return Space{}, fmt.Errorf("scratch space: %s has %d bytes behind the image: %w", s.Disk, max(s.Size, 0), errdefs.ErrNotFound)
			}
			return s, nil
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return Space{}, fmt.Errorf("scratch space: no disk %s: %w", id, errdefs.ErrNotFound)
		case <-ctx.Done():
			return Space{}, ctx.Err()
		}
	}
}

// look reads all disks' partition tables.
func (h Host) look(id string) ([]Space, error) {
	disks, err := os.ReadDir(h.Sys)
	if err != nil {
		return nil, fmt.Errorf("scratch space: %w", err)
	}
	var out []Space
	for _, d := range disks {
		b, err := os.ReadFile(filepath.Join(h.Sys, d.Name(), "size"))
		if err != nil {
			continue // it went
		}
		sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		if err != nil || sectors < 2 {
			continue // a CD drive without a CD
		}
		path := filepath.Join(h.Dev, d.Name())
		end, err := imageEnd(path, id)
		if err != nil || end == 0 {
			continue // it is another one, or cannot be read
		}
		start := (end + align - 1) / align * align
		out = append(out, Space{Disk: path, Offset: start, Size: sectors*sector - start})
	}
	return out, nil
}

// imageEnd returns where the image on a disk ends, in bytes: behind the second copy of its
// partition table (UEFI 2.10, 5.3.2). 0: it is another disk.
func imageEnd(path, id string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	const headerSize = 92
	h := make([]byte, headerSize)
	if _, err := f.ReadAt(h, sector); err != nil {
		return 0, err
	}
	sum := binary.LittleEndian.Uint32(h[16:])
	clear(h[16:20])
	if string(h[:8]) != "EFI PART" || sum != crc32.ChecksumIEEE(h) || !strings.EqualFold(guid(h[56:72]), id) {
		return 0, nil
	}
	last := binary.LittleEndian.Uint64(h[32:])
	if last >= 1<<40 {
		return 0, errors.New("the partition table's copy is out of the world")
	}
	return (int64(last) + 1) * sector, nil
}

// guid is one as people write it; its first three fields are little-endian on a disk.
func guid(b []byte) string {
	return fmt.Sprintf("%08X-%04X-%04X-%04X-%012X", binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:]),
		binary.LittleEndian.Uint16(b[6:]), b[8:10], b[10:16])
}
