// SPDX-License-Identifier: Apache-2.0

package scratch

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Modules are the kernel modules that Swap needs, where they are modules, and Faster one
// that it does without on processors that lack it.
var (
	Modules = []string{"dm_mod", "dm_crypt", "xts"}
	Faster  = "aesni_intel"
)

// mapperName is the device's in the kernel's list.
const mapperName = "scratch"

// Swap makes encrypted swap of a space. What was there is lost.
func Swap(s Space) error {
	key := make([]byte, 64) // AES-256 in XTS mode
	rand.Read(key)
	table := fmt.Appendf(nil, "aes-xts-plain64 %s 0 %s %d 2 no_read_workqueue no_write_workqueue", hex.EncodeToString(key), s.Disk, s.Offset/sector)
	clear(key)
	defer clear(table)
	sectors := s.Size / align * align / sector
	dev, err := mapDevice(mapperName, "crypt", uint64(sectors), table)
	if err != nil {
		return fmt.Errorf("scratch space: encrypt %s: %w", s.Disk, err)
	}
	path := filepath.Join("/dev", fmt.Sprintf("dm-%d", unix.Minor(dev)))
	if err := makeSwap(path, sectors*sector); err != nil {
		return fmt.Errorf("scratch space: %w", err)
	}
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(name)), 0, 0); errno != 0 {
		return fmt.Errorf("scratch space: swap on %s: %w", path, errno)
	}
	return nil
}

// makeSwap writes the header of a swap device, one page (Linux include/linux/swap.h, union
// swap_header).
func makeSwap(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(swapHeader(os.Getpagesize(), size), 0)
	return errors.Join(err, f.Close())
}

func swapHeader(page int, size int64) []byte {
	const magic, info = "SWAPSPACE2", 1024
	h := make([]byte, page)
	binary.NativeEndian.PutUint32(h[info:], 1)
	binary.NativeEndian.PutUint32(h[info+4:], uint32(min(size/int64(page)-1, 1<<32-1)))
	copy(h[page-len(magic):], magic)
	return h
}

// The device mapper's interface (Linux include/uapi/linux/dm-ioctl.h).
const (
	mapperControl = "/dev/mapper/control"
	mapperMinor   = 236 // of the control device (include/linux/miscdevice.h)
	mapperVersion = 4
	mapperHeader  = 312 // struct dm_ioctl
	targetHeader  = 40  // struct dm_target_spec
	secureData    = 1 << 15
	devCreate     = 0xc138fd03
	devRemove     = 0xc138fd04
	devSuspend    = 0xc138fd06 // resumes, without the flag for suspending
	tableLoad     = 0xc138fd09
)

// mapDevice makes a device of one target over sectors, and returns its number.
func mapDevice(name, target string, sectors uint64, params []byte) (dev uint64, err error) {
	control, err := openControl()
	if err != nil {
		return 0, err
	}
	defer control.Close()
	call := func(cmd uintptr, targets uint32, data []byte) (uint64, error) {
		b := make([]byte, mapperHeader+len(data))
		defer clear(b)
		binary.NativeEndian.PutUint32(b, mapperVersion)
		binary.NativeEndian.PutUint32(b[12:], uint32(len(b)))
		binary.NativeEndian.PutUint32(b[16:], mapperHeader)
		binary.NativeEndian.PutUint32(b[20:], targets)
		binary.NativeEndian.PutUint32(b[28:], secureData) // the kernel wipes its copy
		copy(b[48:], name)
		copy(b[mapperHeader:], data)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), cmd, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
			return 0, errno
		}
		return binary.NativeEndian.Uint64(b[40:]), nil
	}
	if dev, err = call(devCreate, 0, nil); err != nil {
		return 0, fmt.Errorf("create device %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			_, rerr := call(devRemove, 0, nil)
			err = errors.Join(err, rerr)
		}
	}()
	spec := make([]byte, targetHeader, targetHeader+len(params)+8)
	defer func() { clear(spec[:cap(spec)]) }()
	binary.NativeEndian.PutUint64(spec[8:], sectors)
	copy(spec[24:], target)
	spec = append(append(spec, params...), 0)
	spec = append(spec, bytes.Repeat([]byte{0}, (8-len(spec)%8)%8)...)
	if _, err = call(tableLoad, 1, spec); err != nil {
		return 0, fmt.Errorf("load its table: %w", err)
	}
	if _, err = call(devSuspend, 0, nil); err != nil {
		return 0, fmt.Errorf("start it: %w", err)
	}
	return dev, nil
}

// openControl opens the device mapper's control device, which no udev has made.
func openControl() (*os.File, error) {
	f, err := os.OpenFile(mapperControl, os.O_RDWR, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	if err := os.MkdirAll(filepath.Dir(mapperControl), 0o755); err != nil {
		return nil, err
	}
	const misc = 10
	if err := unix.Mknod(mapperControl, unix.S_IFCHR|0o600, int(unix.Mkdev(misc, mapperMinor))); err != nil {
		return nil, fmt.Errorf("make %s: %w", mapperControl, err)
	}
	return os.OpenFile(mapperControl, os.O_RDWR, 0)
}
