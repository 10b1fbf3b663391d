// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/kata-remote/kata-remote/podvm/agent/rootfs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// zstdWindow bounds the decoder's memory, bytes. Builders use at most 8 MiB unless
// told to use more.
const zstdWindow = 32 << 20

// errEntries is an archive with more entries than a root file system may have files.
var errEntries = errors.New("a layer's archive has too many entries")

// unpack writes the image's layers into a directory, the lowest first. The last byte
// of each is verified before the next begins; what an error leaves in the directory is
// not to be used. limit bounds the files of a layer, see rootfs.Inodes.
func (i *image) unpack(dir string, limit uint64) error {
	m, err := i.Manifest()
	if err != nil {
		return err
	}
	if m.Config.Size > documentLimit {
		return fmt.Errorf("its configuration has %d bytes, more than %d: %w", m.Config.Size, documentLimit, errdefs.ErrResourceExhausted)
	}
	cfg, err := i.ConfigFile()
	if err != nil {
		return fmt.Errorf("its configuration: %w", err)
	}
	if len(cfg.RootFS.DiffIDs) != len(m.Layers) {
		return fmt.Errorf("it is not a container image: its configuration names %d layers, its manifest %d: %w", len(cfg.RootFS.DiffIDs), len(m.Layers), errdefs.ErrInvalidArgument)
	}
	if cfg.Architecture != "" && cfg.Architecture != platform.Architecture || cfg.OS != "" && cfg.OS != platform.OS {
		return fmt.Errorf("it is for %s/%s and this pod VM is %s: %w", cfg.OS, cfg.Architecture, platform, errdefs.ErrFailedPrecondition)
	}
	for n, d := range m.Layers {
		if err := i.layer(dir, d, cfg.RootFS.DiffIDs[n], rootfs.Inodes(limit)); err != nil {
			return fmt.Errorf("layer %d of %d: %w", n+1, len(m.Layers), err)
		}
	}
	return nil
}

// layer reads one layer to its end and applies it.
func (i *image) layer(dir string, d v1.Descriptor, diffID v1.Hash, entries uint64) error {
	switch {
	case !d.MediaType.IsLayer():
		return fmt.Errorf("it is %s and not a file system: %w", d.MediaType, errdefs.ErrInvalidArgument)
	case !d.MediaType.IsDistributable():
		return fmt.Errorf("the registry does not have it, because its maker does not allow that (%s): %w", d.MediaType, errdefs.ErrFailedPrecondition)
	}
	l, err := i.LayerByDigest(d.Digest)
	if err != nil {
		return err
	}
	blob, err := l.Compressed() // verifies size and digest as it is read
	if err != nil {
		return err
	}
	defer blob.Close()
	in := bufio.NewReader(blob)
	plain, closer, err := decompress(in)
	if err != nil {
		return err
	}
	defer closer()
	sum := sha256.New()
	if err := apply(i.ctx, dir, io.TeeReader(plain, sum), entries); err != nil {
		return err
	}
	// What stands after the compressed stream belongs to the digest.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); diffID.Algorithm != "sha256" || got != diffID.Hex {
		return fmt.Errorf("unpacked it has the digest sha256:%s, the image's configuration says %s: %w", got, diffID, errdefs.ErrDataLoss)
	}
	return nil
}

// decompress recognises how a stream is compressed by its first bytes, since media
// types are often wrong about it.
func decompress(in *bufio.Reader) (io.Reader, func(), error) {
	head, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}): // RFC 1952
		z, err := gzip.NewReader(in)
		return z, func() {}, err
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}): // RFC 8878
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return in, func() {}, nil
}

// apply changes a directory as a layer's archive says, whiteouts included, and reads
// the archive to its end. archive.Apply resolves every name inside of the directory;
// nobody else writes there meanwhile.
func apply(ctx context.Context, dir string, in io.Reader, entries uint64) error {
	var n uint64
	_, err := archive.Apply(ctx, dir, in, archive.WithFilter(func(*tar.Header) (bool, error) {
		if n++; n > entries {
			return false, errEntries
		}
		return true, nil
	}))
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, in) // padding
	return err
}
