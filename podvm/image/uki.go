// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"errors"
	"fmt"
)

// section is one of a unified kernel image's own.
type section struct {
	name string // at most 8 bytes
	data []byte
}

// Sizes and offsets of the PE format (Microsoft PE and COFF Specification). debug/pe reads
// it and does not write.
const (
	peOffsetField     = 0x3c // in the DOS header: where "PE\0\0" is
	peSignatureSize   = 4
	coffHeaderSize    = 20
	sectionHeaderSize = 40
	checksumOffset    = 64  // in the optional header
	securityOffset    = 144 // in the optional header of PE32+: data directory 4
	memoryPage        = 4096
	// sectionFlags: initialised data, readable.
	sectionFlags = 0x40000040
)

// appendSections returns the EFI program with more sections: systemd-stub finds the
// kernel and what belongs to it by their names (systemd-stub(7);
// uapi-group.org/specifications/specs/unified_kernel_image).
//
// Their addresses begin at pages, behind all there is. The file stays one that can be
// signed: sections stand in it in the order of their headers, with nothing between.
func appendSections(program []byte, add []section) ([]byte, error) {
	f, err := pe.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, fmt.Errorf("EFI stub: %w", err)
	}
	opt, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok {
		return nil, errors.New("EFI stub: not a 64-bit program")
	}
	if opt.FileAlignment == 0 || opt.SectionAlignment == 0 {
		return nil, errors.New("EFI stub: its alignment is zero")
	}
	if opt.NumberOfRvaAndSizes <= pe.IMAGE_DIRECTORY_ENTRY_SECURITY {
		return nil, errors.New("EFI stub: its header has no place for a signature")
	}
	if opt.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_SECURITY].Size != 0 {
		return nil, errors.New("EFI stub: it is signed, which more sections would break")
	}
	at := int(binary.LittleEndian.Uint32(program[peOffsetField:])) + peSignatureSize
	optional := at + coffHeaderSize
	headers := optional + int(f.SizeOfOptionalHeader)
	next := headers + int(f.NumberOfSections)*sectionHeaderSize
	if end := next + len(add)*sectionHeaderSize; end > int(opt.SizeOfHeaders) {
		return nil, fmt.Errorf("EFI stub: its headers have room for %d bytes, and %d more sections need %d", opt.SizeOfHeaders, len(add), end)
	}
	address, end := opt.SizeOfImage, uint32(headers)
	for _, s := range f.Sections {
		address, end = max(address, s.VirtualAddress+s.VirtualSize), max(end, s.Offset+s.Size)
	}
	if int(end) > len(program) {
		return nil, errors.New("EFI stub: it is cut short")
	}
	// The symbols behind the last section would stand between it and the next one.
	out := pad(bytes.Clone(program[:end]), int(opt.FileAlignment))
	clear(out[at+8 : at+16]) // where they are, and how many
	for _, s := range add {
		if len(s.name) > 8 || len(s.data) == 0 {
			return nil, fmt.Errorf("section %s of %d bytes cannot be added", s.name, len(s.data))
		}
		address = roundUp(address, memoryPage)
		h := pe.SectionHeader32{
			VirtualSize: uint32(len(s.data)), VirtualAddress: address,
			SizeOfRawData: roundUp(uint32(len(s.data)), opt.FileAlignment), PointerToRawData: uint32(len(out)),
			Characteristics: sectionFlags,
		}
		copy(h.Name[:], s.name)
		if _, err := binary.Encode(out[next:next+sectionHeaderSize], binary.LittleEndian, h); err != nil {
			return nil, err
		}
		next += sectionHeaderSize
		address += h.VirtualSize
		out = pad(append(out, s.data...), int(opt.FileAlignment))
	}
	binary.LittleEndian.PutUint16(out[at+2:], f.NumberOfSections+uint16(len(add)))
	opt.SizeOfImage = roundUp(address, max(memoryPage, opt.SectionAlignment))
	opt.CheckSum = 0 // nobody asks for it in EFI programs
	for _, s := range add {
		opt.SizeOfInitializedData += roundUp(uint32(len(s.data)), opt.FileAlignment)
	}
	whole, err := binary.Append(nil, binary.LittleEndian, opt)
	copy(out[optional:headers], whole) // a header may have fewer directories than debug/pe's
	return out, err
}

// pad appends zeros up to a multiple of n.
func pad(b []byte, n int) []byte {
	if rest := len(b) % n; rest != 0 {
		b = append(b, make([]byte, n-rest)...)
	}
	return b
}

func roundUp[T uint32 | int | int64](v, to T) T { return (v + to - 1) / to * to }
