// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"encoding/binary"
	"io"
)

// writeVHD writes a disk of whole mebibytes as a fixed VHD, the only form Azure takes: the
// disk, and a footer (Microsoft, Virtual Hard Disk Image Format Specification 1.0). id
// makes the footer this disk's.
func writeVHD(w io.Writer, disk []byte, id guid) error {
	f := make([]byte, sector)
	size := uint64(len(disk))
	copy(f, "conectix")
	binary.BigEndian.PutUint32(f[8:], 2) // reserved bit, always set
	binary.BigEndian.PutUint32(f[12:], 0x00010000)
	binary.BigEndian.PutUint64(f[16:], 1<<64-1) // no dynamic header
	// f[24:28], the time of creation, in seconds since 2000, stays 0.
	copy(f[28:], "win ")
	binary.BigEndian.PutUint32(f[32:], 0x000a0000)
	copy(f[36:], "Wi2k")
	binary.BigEndian.PutUint64(f[40:], size) // at creation
	binary.BigEndian.PutUint64(f[48:], size) // now; what Azure goes by
	cylinders, heads, perTrack := vhdGeometry(size / sector)
	binary.BigEndian.PutUint16(f[56:], cylinders)
	f[58], f[59] = heads, perTrack
	binary.BigEndian.PutUint32(f[60:], 2) // fixed
	copy(f[68:], id[:])
	sum := uint32(0)
	for _, b := range f {
		sum += uint32(b)
	}
	binary.BigEndian.PutUint32(f[64:], ^sum)
	if _, err := w.Write(disk); err != nil {
		return err
	}
	_, err := w.Write(f)
	return err
}

// vhdGeometry is the specification's appendix, "CHS Calculation".
func vhdGeometry(sectors uint64) (cylinders uint16, heads, perTrack byte) {
	sectors = min(sectors, 65535*16*255)
	var h, s, tracks uint64
	if sectors >= 65535*16*63 {
		s, h = 255, 16
		tracks = sectors / s
	} else {
		s = 17
		tracks = sectors / s
		h = max((tracks+1023)/1024, 4)
		if tracks >= h*1024 || h > 16 {
			s, h = 31, 16
			tracks = sectors / s
		}
		if tracks >= h*1024 {
			s, h = 63, 16
			tracks = sectors / s
		}
	}
	return uint16(tracks / h), byte(h), byte(s)
}

// qcowCluster is the usual size of a cluster, in bytes; an L2 table and a block of
// reference counts have that size too.
const (
	qcowBits    = 16
	qcowCluster = 1 << qcowBits
)

// writeQCOW2 writes a disk of whole mebibytes as a qcow2 image of version 3 without options (QEMU
// docs/interop/qcow2.txt). Clusters of zeros take no room.
//
// The file: header, table of blocks of reference counts, the one block that all clusters
// fit into, L1 table, the L2 tables, the clusters.
func writeQCOW2(w io.Writer, disk []byte) error {
	const perL2 = qcowCluster / 8
	zero := make([]byte, qcowCluster)
	clusters := len(disk) / qcowCluster
	tables := (clusters + perL2 - 1) / perL2
	l2 := make([]byte, tables*qcowCluster)
	l1 := make([]byte, qcowCluster)
	next := uint64(4 + tables)
	const copied = 1 << 63
	var data [][]byte
	for i := range clusters {
		c := disk[i*qcowCluster : (i+1)*qcowCluster]
		if bytes.Equal(c, zero) {
			continue
		}
		binary.BigEndian.PutUint64(l2[i*8:], next*qcowCluster|copied)
		next++
		data = append(data, c)
	}
	for i := range tables {
		binary.BigEndian.PutUint64(l1[i*8:], uint64(4+i)*qcowCluster|copied)
	}
	counts := make([]byte, qcowCluster) // 32768 of two bytes: 2 GiB of file
	for i := range next {
		binary.BigEndian.PutUint16(counts[i*2:], 1)
	}
	blocks := make([]byte, qcowCluster)
	binary.BigEndian.PutUint64(blocks, 2*qcowCluster)
	header := make([]byte, qcowCluster)
	copy(header, "QFI\xfb")
	binary.BigEndian.PutUint32(header[4:], 3)
	binary.BigEndian.PutUint32(header[20:], qcowBits)
	binary.BigEndian.PutUint64(header[24:], uint64(len(disk)))
	binary.BigEndian.PutUint32(header[36:], uint32(tables))
	binary.BigEndian.PutUint64(header[40:], 3*qcowCluster)
	binary.BigEndian.PutUint64(header[48:], qcowCluster)
	binary.BigEndian.PutUint32(header[56:], 1)
	binary.BigEndian.PutUint32(header[96:], 4) // 16 bits to a count
	binary.BigEndian.PutUint32(header[100:], 104)
	for _, part := range append([][]byte{header, blocks, counts, l1, l2}, data...) {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}
