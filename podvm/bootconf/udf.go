// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unicode/utf16"
)

// Numbers of ECMA-167, third edition, and of OSTA's UDF 1.02 and 2.01 on top of it, which
// is what is on optical disks and what Windows writes into their images. A reader of our
// own for the reason that iso9660.go has.
const (
	udfAnchor      = 256 // sector
	udfMaxSequence = 64  // sectors of the volume descriptor sequence; writers make 16
	udfMaxRoot     = 64 << 10

	tagAnchor        = 2
	tagPartition     = 5
	tagLogicalVolume = 6
	tagTerminator    = 8
	tagFileSet       = 256
	tagFileID        = 257
	tagFileEntry     = 261
	tagExtendedEntry = 266

	udfDirectory = 0x02 // file characteristics of a file identifier
	udfDeleted   = 0x04
	udfParent    = 0x08
)

var (
	errNotUDF     = errors.New("not a UDF file system")
	errCorruptUDF = errors.New("it is corrupt")
)

// udfVolume is the root directory of a UDF file system.
type udfVolume struct {
	start uint32            // sector in which the partition begins
	files map[string]uint32 // by name: block of the file's entry, in the partition
}

// readUDF reads the root directory. errNotUDF: the disk has no such file system.
func readUDF(r io.ReaderAt) (*udfVolume, error) {
	if !hasUDF(r) {
		return nil, errNotUDF
	}
	anchor, err := udfDescriptor(r, udfAnchor, tagAnchor)
	if err != nil {
		return nil, errNotUDF // a bridge whose other half is to be read
	}
	fileSet, v, err := readUDFSequence(r, binary.LittleEndian.Uint32(anchor[20:]), binary.LittleEndian.Uint32(anchor[16:]))
	if err != nil {
		return nil, err
	}
	set, err := udfDescriptor(r, int64(v.start)+int64(fileSet), tagFileSet)
	if err != nil {
		return nil, fmt.Errorf("file set: %w", err)
	}
	root, err := v.content(r, binary.LittleEndian.Uint32(set[404:]), udfMaxRoot)
	if err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	if v.files, err = udfNames(root); err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	return v, nil
}

// hasUDF looks for the name of the standard in the volume recognition sequence.
func hasUDF(r io.ReaderAt) bool {
	b := make([]byte, isoSector)
	for i := int64(0); i < isoMaxVolumes; i++ {
		if _, err := r.ReadAt(b, (isoFirst+i)*isoSector); err != nil {
			return false
		}
		switch string(b[1:6]) {
		case "NSR02", "NSR03":
			return true
		case "CD001", "BEA01", "BOOT2", "CDW02":
		default:
			return false
		}
	}
	return false
}

// udfDescriptor reads a sector that must hold a descriptor of that tag.
func udfDescriptor(r io.ReaderAt, at int64, tag uint16) ([]byte, error) {
	b, got, err := udfTagged(r, at)
	if err == nil && got != tag {
		err = fmt.Errorf("descriptor %d in place of %d: %w", got, tag, errCorruptUDF)
	}
	return b, err
}

// udfTagged reads a sector that must begin with a descriptor's tag (3/7.2).
func udfTagged(r io.ReaderAt, at int64) (b []byte, tag uint16, err error) {
	b = make([]byte, isoSector)
	if _, err := r.ReadAt(b, at*isoSector); err != nil {
		return nil, 0, fmt.Errorf("read sector %d: %w", at, err)
	}
	var sum byte
	for i, c := range b[:16] {
		if i != 4 {
			sum += c
		}
	}
	if sum != b[4] {
		return nil, 0, errCorruptUDF
	}
	return b, binary.LittleEndian.Uint16(b), nil
}

// readUDFSequence reads the volume descriptor sequence and returns the block of the file
// set descriptor, and the partition that it is in.
func readUDFSequence(r io.ReaderAt, at, length uint32) (fileSet uint32, v *udfVolume, err error) {
	var volume []byte
	starts := map[uint16]uint32{} // by partition number
	for i := uint32(0); i < min(length/isoSector, udfMaxSequence); i++ {
		b, tag, err := udfTagged(r, int64(at)+int64(i))
		if err != nil {
			return 0, nil, err
		}
		switch tag {
		case tagPartition:
			starts[binary.LittleEndian.Uint16(b[22:])] = binary.LittleEndian.Uint32(b[188:])
		case tagLogicalVolume:
			volume = b
		}
		if tag == tagTerminator {
			break
		}
	}
	if volume == nil {
		return 0, nil, fmt.Errorf("no logical volume: %w", errCorruptUDF)
	}
	if size := binary.LittleEndian.Uint32(volume[212:]); size != isoSector {
		return 0, nil, fmt.Errorf("blocks of %d bytes, want %d", size, isoSector)
	}
	// One partition map of type 1: what a disk has that is written once. The others are
	// for rewritable ones.
	maps := volume[440:]
	if n := binary.LittleEndian.Uint32(volume[268:]); n != 1 || maps[0] != 1 {
		return 0, nil, fmt.Errorf("%d partition maps, the first of type %d: want one of type 1", n, maps[0])
	}
	start, ok := starts[binary.LittleEndian.Uint16(maps[4:])]
	if !ok {
		return 0, nil, fmt.Errorf("no partition: %w", errCorruptUDF)
	}
	return binary.LittleEndian.Uint32(volume[252:]), &udfVolume{start: start}, nil
}

// content reads what the file entry in a block describes (4/14.9, 4/14.17).
func (v *udfVolume) content(r io.ReaderAt, block uint32, limit uint64) ([]byte, error) {
	b, tag, err := udfTagged(r, int64(v.start)+int64(block))
	if err != nil {
		return nil, err
	}
	lengths := 168
	switch tag {
	case tagFileEntry:
	case tagExtendedEntry:
		lengths = 208
	default:
		return nil, fmt.Errorf("descriptor %d in place of a file's: %w", tag, errCorruptUDF)
	}
	size := binary.LittleEndian.Uint64(b[56:])
	if size > limit {
		return nil, fmt.Errorf("it has %d bytes, more than %d", size, limit)
	}
	from := uint64(lengths) + 8 + uint64(binary.LittleEndian.Uint32(b[lengths:]))
	to := from + uint64(binary.LittleEndian.Uint32(b[lengths+4:]))
	if to > uint64(len(b)) {
		return nil, errCorruptUDF
	}
	described := b[from:to]
	step := 8 // short descriptors: length, block
	switch binary.LittleEndian.Uint16(b[34:]) & 7 {
	case 0:
	case 1:
		step = 16 // long ones: and partition, and more
	case 3:
		if uint64(len(described)) < size {
			return nil, errCorruptUDF
		}
		return described[:size], nil
	default:
		return nil, errors.New("its space is described in a way that is not known")
	}
	out := make([]byte, 0, size)
	for ; len(described) >= step && uint64(len(out)) < size; described = described[step:] {
		length := binary.LittleEndian.Uint32(described)
		if length>>30 != 0 {
			return nil, errors.New("part of it was not written")
		}
		if length == 0 {
			break
		}
		part := make([]byte, min(uint64(length), size-uint64(len(out))))
		at := int64(v.start) + int64(binary.LittleEndian.Uint32(described[4:]))
		if _, err := r.ReadAt(part, at*isoSector); err != nil {
			return nil, fmt.Errorf("read sector %d: %w", at, err)
		}
		out = append(out, part...)
	}
	if uint64(len(out)) < size {
		return nil, errCorruptUDF
	}
	return out, nil
}

// udfNames lists the files of a directory (4/14.4).
func udfNames(dir []byte) (map[string]uint32, error) {
	const fixed = 38
	files := make(map[string]uint32)
	for len(dir) >= fixed {
		if binary.LittleEndian.Uint16(dir) != tagFileID {
			return nil, errCorruptUDF
		}
		use, name := int(binary.LittleEndian.Uint16(dir[36:])), int(dir[19])
		if fixed+use+name > len(dir) {
			return nil, errCorruptUDF
		}
		if dir[18]&(udfDirectory|udfDeleted|udfParent) == 0 {
			files[udfName(dir[fixed+use:fixed+use+name])] = binary.LittleEndian.Uint32(dir[24:])
		}
		dir = dir[min(len(dir), (fixed+use+name+3)&^3):]
	}
	return files, nil
}

// udfName reads OSTA's compressed Unicode (UDF 2.1.1).
func udfName(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	var u []uint16
	switch kind := b[0]; kind {
	case 8:
		for _, c := range b[1:] {
			u = append(u, uint16(c))
		}
	case 16:
		for i := 1; i+1 < len(b); i += 2 {
			u = append(u, binary.BigEndian.Uint16(b[i:]))
		}
	}
	return string(utf16.Decode(u))
}

// read returns the content of a file, nil when there is none of that name.
func (v *udfVolume) read(r io.ReaderAt, name string) ([]byte, error) {
	block, ok := v.files[name]
	if !ok {
		return nil, nil
	}
	b, err := v.content(r, block, MaxDocument)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}
