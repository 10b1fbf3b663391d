// SPDX-License-Identifier: Apache-2.0

// Package diskimage reads the disk images of a pod VM as `make podvm-image` writes them:
// a folder with manifest.json in it (docs/image.md has its fields), to be published in
// a cloud.
package diskimage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Format is one of the files that hold the disk.
type Format string

// Formats.
const (
	Raw Format = "raw" // the disk itself
	VHD Format = "vhd" // with a footer of 512 bytes
)

// Architectures of the manifest.
const (
	AMD64 = "amd64"
	ARM64 = "arm64"
)

// Image is a file that has been found to be what the manifest says. Close it.
type Image struct {
	Format       Format
	Size         int64  // of the file, bytes
	SHA256       string // of the file, hex
	Architecture string // AMD64 or ARM64
	Version      string // of the kernel in it: what a person tells images apart by
	Content      int64  // bytes of the chunks that are not empty
	f            *os.File
}

// Tag is the value of cloud.TagImage.
func (i *Image) Tag() string { return "sha256:" + i.SHA256 }

// Short is the beginning of the digest, for names.
func (i *Image) Short() string { return i.SHA256[:12] }

// Open reads the manifest of a folder and verifies the file of a format: its size and
// digest. InvalidArgument: something is missing or is not what the manifest says.
func Open(ctx context.Context, dir string, format Format) (*Image, error) {
	var m struct {
		KernelVersion string `json:"kernel_version"`
		Disk          *struct {
			Architecture string `json:"architecture"`
			Raw, VHD     struct {
				File   string `json:"file"`
				Size   int64  `json:"size"`
				SHA256 string `json:"sha256"`
			}
		} `json:"disk"`
	}
	path := filepath.Join(dir, "manifest.json")
	bad := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, bad("no image in %s: %w; build one with `make podvm-image`, and name its folder with --image", dir, err)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, bad("%s: %w", path, err)
	}
	if m.Disk == nil {
		return nil, bad("%s tells of no disk image: build it with `make podvm-image`", path)
	}
	file := m.Disk.Raw
	if format == VHD {
		file = m.Disk.VHD
	}
	if file.File == "" || file.File != filepath.Base(file.File) {
		return nil, bad("%s names no file of the format %s beside it", path, format)
	}
	if len(file.SHA256) != 2*sha256.Size || file.Size <= 0 {
		return nil, bad("%s has no size or digest of %s", path, file.File)
	}
	if m.Disk.Architecture != AMD64 && m.Disk.Architecture != ARM64 {
		return nil, bad("%s is for the architecture %q, which is neither %s nor %s", path, m.Disk.Architecture, AMD64, ARM64)
	}
	i := &Image{Format: format, Size: file.Size, SHA256: file.SHA256, Architecture: m.Disk.Architecture, Version: m.KernelVersion}
	if i.f, err = os.Open(filepath.Join(dir, file.File)); err != nil {
		return nil, bad("%w", err)
	}
	err = i.Chunks(ctx, func(c Chunk) error {
		if !c.Zero {
			i.Content += int64(len(c.Data))
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, i.f.Close())
	}
	return i, nil
}

// Close closes the file.
func (i *Image) Close() error { return i.f.Close() }

// ChunkSize is how the image is cut, in bytes. EBS has blocks of this size, and Azure
// takes up to 4 MiB at once; smaller ones leave out more that is empty.
const ChunkSize = 512 << 10

// Chunk is a piece of an image.
type Chunk struct {
	Index int
	At    int64
	Data  []byte // its owner's to keep; the last one of an image may be short
	Zero  bool   // nothing but zeros
}

// Chunks calls f for each piece, in order, and verifies what it reads.
// InvalidArgument: that is not what the manifest says, which is known after the last
// piece only. An error of f ends it.
func (i *Image) Chunks(ctx context.Context, f func(Chunk) error) error {
	sum := sha256.New()
	r := io.NewSectionReader(i.f, 0, i.Size+1)
	zero := make([]byte, ChunkSize)
	var at int64
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		buf := make([]byte, ChunkSize)
		got, err := io.ReadFull(r, buf)
		if got > 0 && at+int64(got) <= i.Size {
			buf = buf[:got]
			sum.Write(buf)
			if err := f(Chunk{n, at, buf, bytes.Equal(buf, zero[:got])}); err != nil {
				return err
			}
		}
		at += int64(got)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", i.f.Name(), err)
		}
	}
	if at != i.Size {
		return fmt.Errorf("%s has not the %d bytes that its manifest says; build the image again: %w", i.f.Name(), i.Size, errdefs.ErrInvalidArgument)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != i.SHA256 {
		return fmt.Errorf("%s is damaged: its digest is %s, and its manifest says %s; build the image again: %w", i.f.Name(), got, i.SHA256, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Progress of a publication.
type Progress struct {
	Step        string // what is done now: "find", "upload", "register", ...
	Done, Total int64  // bytes of the upload; both 0 in other steps
	Skipped     int64  // bytes among Done that were there from before
}

// Published is an image in a cloud.
type Published struct {
	ID      string `json:"id"`   // what PODVM_AMI_ID or AZURE_IMAGE_ID is set to
	Name    string `json:"name"` // what the console shows
	Digest  string `json:"digest"`
	Version string `json:"version"`
	Existed bool   `json:"existed"` // it was there before
	// Sent and Skipped are bytes that went to the cloud, and that were there from an
	// interrupted publication.
	Sent    int64 `json:"sentBytes"`
	Skipped int64 `json:"skippedBytes"`
}

// Pruned is what has become of one published image.
type Pruned struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Digest  string `json:"digest"`
	Created string `json:"created"` // RFC 3339
	Removed bool   `json:"removed"` // in a dry run: it would be
	Reason  string `json:"reason"`
}
