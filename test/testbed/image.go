// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Images on the node. The host part is a word, not a place: nothing is pulled.
const (
	PauseImage   = "localhost/pause:1"
	BusyboxImage = "localhost/busybox:1"
)

// Image is an image that is made on the spot.
type Image struct {
	Ref    string
	Files  []File
	Config v1.Config
}

// File is one entry of an image: a folder when the name ends with a slash, a link
// when it has a target. Names have no slash in front.
type File struct {
	Name   string
	Mode   int64
	Data   []byte
	Target string
}

// pauseSource is what a pod's first container runs: nothing, until it is asked to
// end. As process 1 of a shared process namespace it reaps.
const pauseSource = `package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	for {
		select {
		case <-end:
			return
		case <-child:
			for {
				if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}
}
`

// Build compiles a Go program of one file that uses the standard library alone, for
// images.
func (b *Bed) Build(ctx context.Context, name, source string) ([]byte, error) {
	dir := filepath.Join(b.Out, "build", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(source), 0o644); err != nil {
		return nil, err
	}
	bin := filepath.Join(dir, name)
	if _, err := Run(ctx, "env", "CGO_ENABLED=0", "go", "build", "-ldflags=-s -w", "-o", bin, filepath.Join(dir, "main.go")); err != nil {
		return nil, err
	}
	return os.ReadFile(bin)
}

// Pause is the image of a pod's first container.
func (b *Bed) Pause(ctx context.Context) (Image, error) {
	program, err := b.Build(ctx, "pause", pauseSource)
	return Image{PauseImage, []File{{"pause", 0o755, program, ""}}, v1.Config{Entrypoint: []string{"/pause"}}}, err
}

// Busybox is Debian's static busybox with a link for each of its applets.
func (b *Bed) Busybox(ctx context.Context) (Image, error) {
	const path = "/bin/busybox"
	program, err := os.ReadFile(path)
	if err != nil {
		return Image{}, err
	}
	applets, err := Run(ctx, path, "--list")
	if err != nil {
		return Image{}, err
	}
	files := []File{
		{"bin/", 0o755, nil, ""}, {"etc/", 0o755, nil, ""}, {"tmp/", 0o1777, nil, ""}, {"root/", 0o700, nil, ""}, {"www/", 0o755, nil, ""},
		{"proc/", 0o755, nil, ""}, {"sys/", 0o755, nil, ""}, {"dev/", 0o755, nil, ""},
		{"bin/busybox", 0o755, program, ""},
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"), ""},
		{"etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"), ""},
		{"www/index.html", 0o644, []byte("hello from a container\n"), ""},
	}
	for a := range strings.FieldsSeq(applets) {
		if a != "busybox" {
			files = append(files, File{"bin/" + a, 0o777, nil, "busybox"})
		}
	}
	return Image{BusyboxImage, files, v1.Config{Cmd: []string{"/bin/sh"}}}, nil
}

// Import gives images to the running containerd, where CRI finds them.
func (b *Bed) Import(ctx context.Context, images ...Image) error {
	for _, img := range images {
		archive := filepath.Join(b.Out, "image.tar")
		if err := img.write(archive); err != nil {
			return fmt.Errorf("make image %s: %w", img.Ref, err)
		}
		if err := b.importArchive(ctx, archive); err != nil {
			return err
		}
		os.Remove(archive)
	}
	return nil
}

func (b *Bed) importArchive(ctx context.Context, archive string) error {
	args := []string{"-a", ContainerdSocket, "-n", "k8s.io", "images", "import"}
	if b.Generation.V2 {
		args = append(args, "--local") // its transfer service wants a platform's unpacker configured
	}
	_, err := Run(ctx, b.program("ctr"), append(args, archive)...)
	return err
}

// Push puts the image into the registry that Ref names, and returns its digest.
func (i Image) Push(ctx context.Context, options ...remote.Option) (v1.Hash, error) {
	img, err := i.build()
	if err != nil {
		return v1.Hash{}, err
	}
	ref, err := name.ParseReference(i.Ref)
	if err != nil {
		return v1.Hash{}, err
	}
	if err := remote.Write(ref, img, append(options, remote.WithContext(ctx))...); err != nil {
		return v1.Hash{}, fmt.Errorf("push %s: %w", i.Ref, err)
	}
	return img.Digest()
}

// Tag gives an image on the node another name, which may have a digest, and waits
// until CRI knows it.
func (b *Bed) Tag(ctx context.Context, from, to string) error {
	if _, err := Run(ctx, b.program("ctr"), "-a", ContainerdSocket, "-n", "k8s.io", "images", "tag", "--force", from, to); err != nil {
		return err
	}
	return Poll(ctx, func(ctx context.Context) error {
		_, err := b.Crictl(ctx, "inspecti", "-q", to)
		return err
	})
}

// build makes the image of one layer. Of files of the same name the last one counts,
// as in any archive.
func (i Image) build() (v1.Image, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, e := range i.Files {
		h := &tar.Header{Name: e.Name, Mode: e.Mode, Size: int64(len(e.Data)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
		switch {
		case e.Target != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.Target
		case strings.HasSuffix(e.Name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.Data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	cfg := i.Config
	cfg.Env = append(cfg.Env, "PATH=/usr/local/bin:/usr/bin:/bin")
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		Architecture: "amd64", OS: "linux", Config: cfg, RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(img, l)
}

// write makes an archive that ctr imports.
func (i Image) write(out string) error {
	img, err := i.build()
	if err != nil {
		return err
	}
	tag, err := name.NewTag(i.Ref)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(out, tag, img)
}
