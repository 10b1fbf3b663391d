// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// ImportSized imports an image of about so many MiB that has busybox in it. It is
// busybox and files of 1 MiB, half of whose bytes do not compress.
func (b *Bed) ImportSized(ctx context.Context, ref string, mib int) error {
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	l, err := newSizedLayer(program, mib)
	if err != nil {
		return err
	}
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		Architecture: "amd64", OS: "linux", RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{Env: []string{"PATH=/bin"}},
	})
	if err != nil {
		return err
	}
	if img, err = mutate.AppendLayers(img, l); err != nil {
		return err
	}
	tag, err := name.NewTag(ref)
	if err != nil {
		return err
	}
	archive := filepath.Join(b.Out, "sized.tar")
	defer os.Remove(archive)
	if err := tarball.WriteToFile(archive, tag, img); err != nil {
		return err
	}
	return b.importArchive(ctx, archive)
}

// sizedLayer is a layer that is made anew each time it is read, and never compressed.
type sizedLayer struct {
	program []byte
	mib     int
	hash    v1.Hash
	size    int64
}

func newSizedLayer(program []byte, mib int) (*sizedLayer, error) {
	l := &sizedLayer{program: program, mib: mib}
	h := sha256.New()
	r, err := l.Uncompressed()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if l.size, err = io.Copy(h, r); err != nil {
		return nil, err
	}
	l.hash = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}
	return l, nil
}

func (l *sizedLayer) Digest() (v1.Hash, error)            { return l.hash, nil }
func (l *sizedLayer) DiffID() (v1.Hash, error)            { return l.hash, nil }
func (l *sizedLayer) Size() (int64, error)                { return l.size, nil }
func (l *sizedLayer) MediaType() (types.MediaType, error) { return types.OCIUncompressedLayer, nil }
func (l *sizedLayer) Compressed() (io.ReadCloser, error)  { return l.Uncompressed() }
func (l *sizedLayer) Uncompressed() (io.ReadCloser, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(l.write(w)) }()
	return r, nil
}

func (l *sizedLayer) write(out io.Writer) error {
	w := tar.NewWriter(out)
	file := func(name string, mode int64, data []byte) error {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	for _, dir := range []string{"bin/", "data/", "proc/", "sys/", "dev/", "etc/", "tmp/"} {
		if err := w.WriteHeader(&tar.Header{Name: dir, Mode: 0o755, ModTime: time.Unix(0, 0), Typeflag: tar.TypeDir}); err != nil {
			return err
		}
	}
	if err := file("bin/busybox", 0o755, l.program); err != nil {
		return err
	}
	for _, applet := range []string{"sh", "sleep", "cat"} {
		if err := w.WriteHeader(&tar.Header{Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777, ModTime: time.Unix(0, 0), Typeflag: tar.TypeSymlink}); err != nil {
			return err
		}
	}
	random := rand.NewChaCha8([32]byte{byte(l.mib)})
	data := make([]byte, 1<<20)
	for i := range l.mib {
		if _, err := random.Read(data[:len(data)/2]); err != nil {
			return err
		}
		if err := file(fmt.Sprintf("data/%04d", i), 0o644, data); err != nil {
			return err
		}
	}
	return w.Close()
}
