// SPDX-License-Identifier: Apache-2.0

// Package iso9660 makes small ISO 9660 images (ECMA-119): the seeds and provisioning
// discs that a machine is given on a CD-ROM drive. The data stays in memory on its way
// to the caller's file: such an image holds keys, and writers that stage files leave
// them in a temporary directory after a crash.
package iso9660

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"
)

const sector = 2048 // bytes, ECMA-119 §6.1

// Image makes an image of files in one flat directory, with a volume label and a date
// of at. Names are written as they are, which Linux reads.
func Image(label string, files map[string][]byte, at time.Time) ([]byte, error) {
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names) // §9.3
	// Sectors: 16 volume descriptor, 17 terminator, 18 and 19 path tables, 20 root
	// directory, then the files.
	const root, first = 20, 21
	next := uint32(first)
	dir := dirEntry("\x00", root, sector, true, at)
	dir = append(dir, dirEntry("\x01", root, sector, true, at)...)
	for _, n := range names {
		dir = append(dir, dirEntry(n+";1", next, len(files[n]), false, at)...)
		next += sectors(len(files[n]))
	}
	if len(dir) > sector {
		return nil, fmt.Errorf("ISO 9660 image: %d files do not fit one directory sector", len(files))
	}
	img := make([]byte, int(next)*sector)
	copy(img[16*sector:], volumeDescriptor(label, next, dirEntry("\x00", root, sector, true, at), at))
	copy(img[17*sector:], "\xffCD001\x01")
	copy(img[18*sector:], []byte{1, 0, root, 0, 0, 0, 1, 0, 0, 0})
	copy(img[19*sector:], []byte{1, 0, 0, 0, 0, root, 0, 1, 0, 0})
	copy(img[root*sector:], dir)
	next = first
	for _, n := range names {
		copy(img[int(next)*sector:], files[n])
		next += sectors(len(files[n]))
	}
	return img, nil
}

func sectors(n int) uint32 { return uint32((n + sector - 1) / sector) }

// both16 and both32 write a number in both byte orders, §7.2.3 and §7.3.3.
func both16(b []byte, n uint16) {
	binary.LittleEndian.PutUint16(b, n)
	binary.BigEndian.PutUint16(b[2:], n)
}

func both32(b []byte, n uint32) {
	binary.LittleEndian.PutUint32(b, n)
	binary.BigEndian.PutUint32(b[4:], n)
}

// dirEntry is a directory record, §9.1.
func dirEntry(name string, at uint32, size int, isDir bool, t time.Time) []byte {
	t = t.UTC()
	b := make([]byte, 33+len(name)+(len(name)+1)%2)
	b[0] = byte(len(b))
	both32(b[2:], at)
	both32(b[10:], uint32(size))
	copy(b[18:], []byte{byte(t.Year() - 1900), byte(t.Month()), byte(t.Day()), byte(t.Hour()), byte(t.Minute()), byte(t.Second()), 0})
	if isDir {
		b[25] = 2
	}
	both16(b[28:], 1)
	b[32] = byte(len(name))
	copy(b[33:], name)
	return b
}

// volumeDescriptor is the primary volume descriptor, §8.4.
func volumeDescriptor(label string, size uint32, root []byte, t time.Time) []byte {
	b := bytes.Repeat([]byte{0}, sector)
	copy(b, "\x01CD001\x01")
	copy(b[8:], strings.Repeat(" ", 32))
	copy(b[40:], fmt.Sprintf("%-32s", label))
	both32(b[80:], size)
	both16(b[120:], 1)
	both16(b[124:], 1)
	both16(b[128:], sector)
	both32(b[132:], 10) // length of the path table
	binary.LittleEndian.PutUint32(b[140:], 18)
	binary.BigEndian.PutUint32(b[148:], 19)
	copy(b[156:], root)
	copy(b[190:], strings.Repeat(" ", 623)) // names of persons and files: none
	stamp := t.UTC().Format("20060102150405") + "00\x00"
	none := strings.Repeat("0", 16) + "\x00"
	copy(b[813:], stamp+stamp+none+none)
	b[881] = 1
	return b
}
