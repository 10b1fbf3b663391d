// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"
)

// Numbers of ECMA-119 (ISO 9660). A reader of our own keeps the kernel's isofs, its
// cdrom and nls modules out of the image and their loading out of the start.
const (
	isoSector     = 2048
	isoFirst      = 16 // sector of the first volume descriptor
	isoMaxVolumes = 16 // more descriptors than any writer makes
	isoMaxRoot    = 64 << 10

	volumePrimary       = 1
	volumeSupplementary = 2
	volumeTerminator    = 255

	flagDirectory = 0x02
	flagMultiple  = 0x80 // the file goes on in another extent
)

var errNotISO = errors.New("not an ISO 9660 file system")

// isoFile is a file in the root directory.
type isoFile struct {
	offset, size int64
}

// isoVolume is the root directory of an ISO 9660 file system.
type isoVolume struct {
	label string
	files map[string]isoFile
}

// readISO reads the label and the root directory. Names come from Rock Ridge where
// there are any, else from Joliet, else from ISO 9660 itself; of the last, writers
// have folded "user-data" to "USER_DAT" or the like, see plainName. errNotISO: no
// volume descriptor.
func readISO(r io.ReaderAt) (*isoVolume, error) {
	var primary, joliet []byte
	for i := int64(0); i < isoMaxVolumes; i++ {
		b := make([]byte, isoSector)
		if _, err := r.ReadAt(b, (isoFirst+i)*isoSector); err != nil {
			if i == 0 && errors.Is(err, io.EOF) {
				return nil, errNotISO
			}
			return nil, fmt.Errorf("read volume descriptor: %w", err)
		}
		if string(b[1:6]) != "CD001" {
			if i == 0 {
				return nil, errNotISO
			}
			break
		}
		if b[0] == volumeTerminator {
			break
		}
		if b[0] == volumePrimary && primary == nil {
			primary = b
		}
		// Joliet: escape sequences for UCS-2 levels 1 to 3.
		if esc := string(b[88:91]); b[0] == volumeSupplementary && (esc == "%/@" || esc == "%/C" || esc == "%/E") {
			joliet = b
		}
	}
	if primary == nil {
		return nil, errNotISO
	}
	v := &isoVolume{label: strings.TrimRight(string(primary[40:72]), " \x00")}
	files, rockRidge, err := readISORoot(r, primary, false)
	if err != nil {
		return nil, err
	}
	if joliet != nil && !rockRidge {
		if files, _, err = readISORoot(r, joliet, true); err != nil {
			return nil, err
		}
	}
	v.files = files
	return v, nil
}

// readISORoot lists the root directory of a volume.
func readISORoot(r io.ReaderAt, volume []byte, joliet bool) (files map[string]isoFile, rockRidge bool, err error) {
	root := volume[156:190]
	at := int64(binary.LittleEndian.Uint32(root[2:])) * isoSector
	size := int64(binary.LittleEndian.Uint32(root[10:]))
	if size > isoMaxRoot {
		return nil, false, fmt.Errorf("the root directory has %d bytes, more than %d", size, isoMaxRoot)
	}
	dir := make([]byte, size)
	if _, err := r.ReadAt(dir, at); err != nil {
		return nil, false, fmt.Errorf("read root directory: %w", err)
	}
	files = make(map[string]isoFile)
	for off := 0; off < len(dir); {
		n := int(dir[off])
		if n == 0 { // records do not cross sectors
			off = (off/isoSector + 1) * isoSector
			continue
		}
		if n < 34 || off+n > len(dir) || 33+int(dir[off+32]) > n {
			return nil, false, errors.New("the root directory is corrupt")
		}
		rec := dir[off : off+n]
		off += n
		if rec[25]&flagDirectory != 0 {
			continue
		}
		raw := rec[33 : 33+int(rec[32])]
		name := plainName(string(raw))
		if joliet {
			name = jolietName(raw)
		}
		// System use fields begin at an even offset.
		if rr := rockRidgeName(rec[min(n, (33+len(raw)+1)&^1):]); rr != "" && !joliet {
			name, rockRidge = rr, true
		}
		if rec[25]&flagMultiple != 0 {
			return nil, false, fmt.Errorf("file %s has several extents", name)
		}
		files[name] = isoFile{
			offset: int64(binary.LittleEndian.Uint32(rec[2:])) * isoSector,
			size:   int64(binary.LittleEndian.Uint32(rec[10:])),
		}
	}
	return files, rockRidge, nil
}

// plainName undoes what ISO 9660 does to a name: upper case, "_" for characters
// outside its set, a dot at the end, a version number.
func plainName(s string) string {
	s, _, _ = strings.Cut(s, ";")
	return strings.ReplaceAll(strings.ToLower(strings.TrimRight(s, ".")), "_", "-")
}

// jolietName reads big-endian UCS-2.
func jolietName(b []byte) string {
	u := make([]uint16, 0, len(b)/2)
	for i := 0; i+1 < len(b); i += 2 {
		u = append(u, binary.BigEndian.Uint16(b[i:]))
	}
	s, _, _ := strings.Cut(string(utf16.Decode(u)), ";")
	return strings.TrimRight(s, ".")
}

// rockRidgeName joins the NM fields among a record's system use fields (IEEE P1282).
func rockRidgeName(b []byte) string {
	var name strings.Builder
	for len(b) >= 4 {
		n := int(b[2])
		if n < 4 || n > len(b) {
			break
		}
		if string(b[:2]) == "NM" && n > 5 && b[4]&^1 == 0 {
			name.Write(b[5:n])
		}
		b = b[n:]
	}
	return name.String()
}

// read returns the content of a file, nil when there is none of that name.
func (v *isoVolume) read(r io.ReaderAt, name string) ([]byte, error) {
	f, ok := v.files[name]
	if !ok {
		return nil, nil
	}
	if f.size > MaxDocument {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", name, f.size, MaxDocument)
	}
	b := make([]byte, f.size)
	if _, err := r.ReadAt(b, f.offset); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}
