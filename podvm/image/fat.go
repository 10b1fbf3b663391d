// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// The FAT32 file system (Microsoft FAT Specification, 2005).
const (
	// fatReserved are the sectors before the tables: boot sector, FSInfo, their copies.
	fatReserved = 32
	fatCopies   = 2
	// fat32Least is how many clusters a FAT32 has at least: with fewer, a driver takes it
	// for a FAT16.
	fat32Least  = 65525
	fatEnd      = 0x0fffffff
	dirEntry    = 32
	fatDir      = 0x10
	fatArchive  = 0x20
	fatMedia    = 0xf8
	fatInfoAt   = 1
	fatBackupAt = 6
	// fatDate is 1980-01-01, the format's first day.
	fatDate = 1<<5 | 1
)

// fat is a file system under construction: one directory below the other, a file in the
// last.
type fat struct {
	sectors    int // of the volume
	perCluster int // sectors
	perTable   int // sectors
	clusters   int
}

// fatFor plans a volume that holds a file of the given size with perCluster sectors to a
// cluster.
func fatFor(size, dirs, perCluster int) fat {
	cluster := perCluster * sector
	f := fat{perCluster: perCluster}
	f.clusters = max(fat32Least+16, (size+cluster-1)/cluster+dirs+1)
	f.perTable = ((f.clusters+2)*4 + sector - 1) / sector
	f.sectors = fatReserved + fatCopies*f.perTable + f.clusters*perCluster
	return f
}

// write fills volume, which has at least f.sectors, with a file at path, whose names are
// upper case and of the form 8.3. hidden is the sector of the disk where the volume
// begins. Sectors that are more than the plan's become clusters.
func (f fat) write(volume []byte, hidden int, serial uint32, path string, data []byte) error {
	f.sectors = len(volume) / sector
	f.clusters = min((f.sectors-fatReserved-fatCopies*f.perTable)/f.perCluster, f.perTable*sector/4-2)
	f.sectors = fatReserved + fatCopies*f.perTable + f.clusters*f.perCluster
	if f.clusters < fat32Least {
		return errors.New("FAT: the volume is too small")
	}
	names := strings.Split(strings.Trim(path, "/"), "/")
	table := make([]byte, f.perTable*sector)
	set := func(cluster, value int) { binary.LittleEndian.PutUint32(table[4*cluster:], uint32(value)) }
	set(0, 0x0fffff00|fatMedia)
	set(1, fatEnd)
	cluster := f.perCluster * sector
	at := func(n int) []byte {
		return volume[(fatReserved+fatCopies*f.perTable)*sector+(n-2)*cluster:]
	}
	// Clusters from 2 on: the root, the directories, the file.
	next := 2
	for i, name := range names {
		short, err := shortName(name)
		if err != nil {
			return err
		}
		dir := at(next)
		entries := 0
		add := func(name string, attr byte, first, size int) {
			e := dir[entries*dirEntry:]
			copy(e, name)
			e[11] = attr
			for _, at := range []int{16, 18, 24} {
				binary.LittleEndian.PutUint16(e[at:], fatDate)
			}
			binary.LittleEndian.PutUint16(e[20:], uint16(first>>16))
			binary.LittleEndian.PutUint16(e[26:], uint16(first))
			binary.LittleEndian.PutUint32(e[28:], uint32(size))
			entries++
		}
		if i > 0 {
			parent := next - 1
			if i == 1 {
				parent = 0 // the root
			}
			add(".          ", fatDir, next, 0)
			add("..         ", fatDir, parent, 0)
		}
		set(next, fatEnd)
		next++
		if i == len(names)-1 {
			add(short, fatArchive, next, len(data))
		} else {
			add(short, fatDir, next, 0)
		}
	}
	count := (len(data) + cluster - 1) / cluster
	if next+count > f.clusters+2 {
		return errors.New("FAT: the volume is too small for the file")
	}
	for i := range count {
		set(next+i, next+i+1)
	}
	set(next+count-1, fatEnd)
	copy(at(next), data)
	for i := range fatCopies {
		copy(volume[(fatReserved+i*f.perTable)*sector:], table)
	}
	f.bootSectors(volume, hidden, serial, next+count)
	return nil
}

// bootSectors writes the boot sector and FSInfo, and their copies. free is the first
// cluster that is free.
func (f fat) bootSectors(volume []byte, hidden int, serial uint32, free int) {
	b := make([]byte, 2*sector)
	copy(b, "\xeb\x58\x90MSWIN4.1")
	binary.LittleEndian.PutUint16(b[11:], sector)
	b[13] = byte(f.perCluster)
	binary.LittleEndian.PutUint16(b[14:], fatReserved)
	b[16] = fatCopies
	b[21] = fatMedia
	binary.LittleEndian.PutUint16(b[24:], 63)  // sectors of a track
	binary.LittleEndian.PutUint16(b[26:], 255) // heads
	binary.LittleEndian.PutUint32(b[28:], uint32(hidden))
	binary.LittleEndian.PutUint32(b[32:], uint32(f.sectors))
	binary.LittleEndian.PutUint32(b[36:], uint32(f.perTable))
	binary.LittleEndian.PutUint32(b[44:], 2) // the root's cluster
	binary.LittleEndian.PutUint16(b[48:], fatInfoAt)
	binary.LittleEndian.PutUint16(b[50:], fatBackupAt)
	b[64], b[66] = 0x80, 0x29
	binary.LittleEndian.PutUint32(b[67:], serial)
	copy(b[71:], "NO NAME    FAT32   ")
	b[510], b[511] = 0x55, 0xaa
	info := b[sector:]
	binary.LittleEndian.PutUint32(info, 0x41615252)
	binary.LittleEndian.PutUint32(info[484:], 0x61417272)
	binary.LittleEndian.PutUint32(info[488:], uint32(f.clusters+2-free))
	binary.LittleEndian.PutUint32(info[492:], uint32(free))
	binary.LittleEndian.PutUint32(info[508:], 0xaa550000)
	copy(volume, b)
	copy(volume[fatBackupAt*sector:], b)
}

// shortName is a name in a directory's form: 8 and 3 bytes, filled up with spaces.
func shortName(name string) (string, error) {
	base, ext, _ := strings.Cut(name, ".")
	if base == "" || len(base) > 8 || len(ext) > 3 || strings.ToUpper(name) != name || strings.ContainsAny(name, " /\\") {
		return "", fmt.Errorf("FAT: %q is not an upper-case name of the form 8.3", name)
	}
	return fmt.Sprintf("%-8s%-3s", base, ext), nil
}
