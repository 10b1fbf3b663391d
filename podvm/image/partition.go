// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"unicode/utf16"
)

const (
	mebibyte = 1 << 20
	// gptEntries of entrySize bytes each take 32 sectors (UEFI 2.10, 5.3).
	gptEntries  = 128
	entrySize   = 128
	gptHeader   = 92
	gptSectors  = 1 + gptEntries*entrySize/sector
	espStart    = mebibyte // in bytes: where every tool puts a first partition
	partitionID = "peer pod"
)

// guid is a GUID as it stands on a disk: its first three fields little-endian.
type guid [16]byte

// espType is C12A7328-F81F-11D2-BA4B-00A0C93EC93B, the EFI system partition.
var espType = guid{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}

// newGUID makes one of 16 bytes of a digest, version 8 (RFC 9562: vendor's own).
func newGUID(digest []byte) guid {
	g := guid(digest[:16])
	g[7] = g[7]&0x0f | 0x80
	g[8] = g[8]&0x3f | 0x80
	return g
}

// String is a GUID as people write it.
func (g guid) String() string {
	return fmt.Sprintf("%08X-%04X-%04X-%04X-%012X", binary.LittleEndian.Uint32(g[:]), binary.LittleEndian.Uint16(g[4:]),
		binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:])
}

// writePartitions makes disk, whose size is whole mebibytes, one with a single partition:
// the EFI system partition, from espStart to the last mebibyte, which is for the second
// copy of the table.
func writePartitions(disk []byte, id, partition guid) {
	sectors := uint64(len(disk) / sector)
	// The protective MBR: one partition of type 0xee over all.
	binary.LittleEndian.PutUint32(disk[446+8:], 1)
	binary.LittleEndian.PutUint32(disk[446+12:], uint32(sectors-1))
	copy(disk[446:], []byte{0, 0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	disk[510], disk[511] = 0x55, 0xaa

	entries := make([]byte, gptEntries*entrySize)
	copy(entries, espType[:])
	copy(entries[16:], partition[:])
	binary.LittleEndian.PutUint64(entries[32:], espStart/sector)
	binary.LittleEndian.PutUint64(entries[40:], sectors-mebibyte/sector-1)
	for i, c := range utf16.Encode([]rune(partitionID)) {
		binary.LittleEndian.PutUint16(entries[56+2*i:], c)
	}
	header := func(at, other, table uint64) []byte {
		h := make([]byte, sector)
		copy(h, "EFI PART")
		binary.LittleEndian.PutUint32(h[8:], 0x00010000)
		binary.LittleEndian.PutUint32(h[12:], gptHeader)
		binary.LittleEndian.PutUint64(h[24:], at)
		binary.LittleEndian.PutUint64(h[32:], other)
		binary.LittleEndian.PutUint64(h[40:], 1+gptSectors)
		binary.LittleEndian.PutUint64(h[48:], sectors-1-gptSectors)
		copy(h[56:], id[:])
		binary.LittleEndian.PutUint64(h[72:], table)
		binary.LittleEndian.PutUint32(h[80:], gptEntries)
		binary.LittleEndian.PutUint32(h[84:], entrySize)
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:gptHeader]))
		return h
	}
	copy(disk[sector:], header(1, sectors-1, 2))
	copy(disk[2*sector:], entries)
	copy(disk[(sectors-gptSectors)*sector:], entries)
	copy(disk[(sectors-1)*sector:], header(sectors-1, 1, sectors-gptSectors))
}
