// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

// Offsets in the bzImage's setup header, Linux Documentation/arch/x86/boot.rst.
const (
	setupSectsOffset    = 0x1f1 // byte: sectors of 512 bytes before the protected-mode code, less one
	headerMagicOffset   = 0x202 // "HdrS"
	protocolOffset      = 0x206 // u16: boot protocol version
	payloadOffset       = 0x248 // u32, from protocol 2.08: payload, from the protected-mode code
	payloadLengthOffset = 0x24c // u32
	payloadProtocol     = 0x208
	sector              = 512
)

// maxKernel bounds the memory for a kernel: a corrupt length must not take it all.
const maxKernel = 256 << 20

func (k *Kernel) read(format KernelFormat) ([]byte, error) {
	b, err := os.ReadFile(k.image)
	if err != nil {
		return nil, fmt.Errorf("read kernel: %w", err)
	}
	switch format {
	case FormatBzImage:
		return b, nil
	case FormatELF:
		v, err := extractELF(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", k.image, err)
		}
		return v, nil
	}
	return nil, fmt.Errorf("kernel format %q is neither %q nor %q", format, FormatELF, FormatBzImage)
}

// extractELF returns the kernel that a bzImage decompresses when it starts, as an
// ELF file reduced to what a loader needs.
func extractELF(bz []byte) ([]byte, error) {
	if len(bz) < payloadLengthOffset+4 || string(bz[headerMagicOffset:headerMagicOffset+4]) != "HdrS" {
		return nil, errors.New("not a Linux bzImage")
	}
	if binary.LittleEndian.Uint16(bz[protocolOffset:]) < payloadProtocol {
		return nil, errors.New("the kernel's boot protocol is older than 2.08 and does not tell where its payload is")
	}
	start := (int(bz[setupSectsOffset])+1)*sector + int(binary.LittleEndian.Uint32(bz[payloadOffset:]))
	end := start + int(binary.LittleEndian.Uint32(bz[payloadLengthOffset:]))
	if start >= end || end > len(bz) {
		return nil, errors.New("the kernel's payload lies outside the file")
	}
	v, err := decompress(bz[start:end])
	if err != nil {
		return nil, fmt.Errorf("decompress the kernel's payload: %w", err)
	}
	return slimELF(v)
}

// decompress knows the forms distributions use. Four bytes with the length follow
// the compressed data of all but gzip, which has them itself.
func decompress(p []byte) ([]byte, error) {
	if len(p) < 8 {
		return nil, io.ErrUnexpectedEOF
	}
	body := p[:len(p)-4]
	switch {
	case bytes.HasPrefix(p, []byte{0x02, 0x21, 0x4c, 0x18}):
		return decompressLZ4(body[4:])
	case bytes.HasPrefix(p, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxKernel))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.DecodeAll(body, nil)
	case bytes.HasPrefix(p, []byte{0x1f, 0x8b}):
		r, err := gzip.NewReader(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		r.Multistream(false)
		return io.ReadAll(io.LimitReader(r, maxKernel))
	}
	return nil, fmt.Errorf("unknown compression %x: use -format %s", p[:4], FormatBzImage)
}

// decompressLZ4 reads LZ4's legacy frame (after its magic number): blocks, each
// with its compressed length before it and at most 8 MiB when decompressed.
func decompressLZ4(p []byte) ([]byte, error) {
	var out []byte
	for len(p) > 0 {
		if len(p) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		n := int(binary.LittleEndian.Uint32(p))
		if p = p[4:]; n > len(p) {
			return nil, io.ErrUnexpectedEOF
		}
		var err error
		if out, err = appendLZ4Block(out, p[:n]); err != nil {
			return nil, err
		}
		p = p[n:]
	}
	return out, nil
}

var errLZ4 = errors.New("corrupt LZ4 block")

// appendLZ4Block decompresses one block (lz4_Block_format.md): a sequence is a token
// of two lengths, literals, and a match in what the block has given so far.
func appendLZ4Block(out, p []byte) ([]byte, error) {
	base := len(out)
	length := func(n int) (int, bool) {
		if n != 15 {
			return n, true
		}
		for len(p) > 0 {
			b := p[0]
			p = p[1:]
			n += int(b)
			if b != 255 {
				return n, n < maxKernel
			}
		}
		return 0, false
	}
	for len(p) > 0 {
		token := p[0]
		p = p[1:]
		literals, ok := length(int(token >> 4))
		if !ok || literals > len(p) || len(out)+literals > maxKernel {
			return nil, errLZ4
		}
		out = append(out, p[:literals]...)
		if p = p[literals:]; len(p) == 0 {
			break // the last sequence has literals only
		}
		if len(p) < 2 {
			return nil, errLZ4
		}
		offset := int(binary.LittleEndian.Uint16(p))
		p = p[2:]
		match, ok := length(int(token & 15))
		if match += 4; !ok || offset == 0 || offset > len(out)-base || len(out)+match > maxKernel {
			return nil, errLZ4
		}
		for from := len(out) - offset; match > 0; {
			n := min(match, len(out)-from)
			out = append(out, out[from:from+n]...)
			match -= n
		}
	}
	return out, nil
}

// slimELF keeps the program headers, the loaded segments and the notes of a
// kernel. Sections go, and so do the zeros at a segment's end: the loader makes
// them again, because a segment's size in memory is kept.
func slimELF(v []byte) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(v))
	if err != nil {
		return nil, fmt.Errorf("the kernel's payload: %w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.ByteOrder != binary.LittleEndian {
		return nil, errors.New("the kernel's payload is not a 64-bit little-endian ELF file")
	}
	var hdr elf.Header64
	if _, err := binary.Decode(v, binary.LittleEndian, &hdr); err != nil {
		return nil, err
	}
	hdr.Phoff, hdr.Shoff, hdr.Shnum, hdr.Shentsize, hdr.Shstrndx = uint64(binary.Size(hdr)), 0, 0, 0, 0
	var progs []elf.Prog64
	var data [][]byte
	offset := hdr.Phoff + uint64(len(f.Progs)*binary.Size(elf.Prog64{}))
	for _, p := range f.Progs {
		if p.Off > uint64(len(v)) || p.Filesz > uint64(len(v))-p.Off {
			return nil, errors.New("a segment of the kernel lies outside the file")
		}
		body := v[p.Off : p.Off+p.Filesz]
		if p.Type == elf.PT_LOAD {
			body = bytes.TrimRight(body, "\x00")
		}
		offset = (offset + 15) &^ 15
		progs = append(progs, elf.Prog64{
			Type: uint32(p.Type), Flags: uint32(p.Flags), Off: offset, Vaddr: p.Vaddr, Paddr: p.Paddr,
			Filesz: uint64(len(body)), Memsz: p.Memsz, Align: p.Align,
		})
		data = append(data, body)
		offset += uint64(len(body))
	}
	out := bytes.NewBuffer(make([]byte, 0, offset))
	if err := errors.Join(binary.Write(out, binary.LittleEndian, hdr), binary.Write(out, binary.LittleEndian, progs)); err != nil {
		return nil, err
	}
	for i, body := range data {
		out.Write(make([]byte, progs[i].Off-uint64(out.Len())))
		out.Write(body)
	}
	return out.Bytes(), nil
}
