// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Images on the node. The host part is a word, not a place: nothing is pulled.
const (
	PauseImage   = "localhost/pause:1"
	BusyboxImage = "localhost/busybox:1"
)

var images = map[string]func(*Bed, string) error{
	"pause":   (*Bed).pauseImage,
	"busybox": (*Bed).busyboxImage,
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

func (b *Bed) pauseImage(out string) error {
	dir := filepath.Join(b.Out, "pause")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(pauseSource), 0o644); err != nil {
		return err
	}
	bin := filepath.Join(dir, "pause")
	if _, err := Run(context.Background(), "env", "CGO_ENABLED=0", "go", "build", "-ldflags=-s -w", "-o", bin, filepath.Join(dir, "main.go")); err != nil {
		return err
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	return writeImage(out, PauseImage, []entry{{"pause", 0o755, program, ""}}, v1.Config{Entrypoint: []string{"/pause"}})
}

// busyboxImage is Debian's static busybox with a link for each of its applets.
func (b *Bed) busyboxImage(out string) error {
	const path = "/bin/busybox"
	program, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	applets, err := Run(context.Background(), path, "--list")
	if err != nil {
		return err
	}
	es := []entry{
		{"bin/", 0o755, nil, ""}, {"etc/", 0o755, nil, ""}, {"tmp/", 0o1777, nil, ""}, {"root/", 0o700, nil, ""}, {"www/", 0o755, nil, ""},
		{"proc/", 0o755, nil, ""}, {"sys/", 0o755, nil, ""}, {"dev/", 0o755, nil, ""},
		{"bin/busybox", 0o755, program, ""},
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"), ""},
		{"etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"), ""},
		{"www/index.html", 0o644, []byte("hello from a container\n"), ""},
	}
	for a := range strings.FieldsSeq(applets) {
		if a != "busybox" {
			es = append(es, entry{"bin/" + a, 0o777, nil, "busybox"})
		}
	}
	return writeImage(out, BusyboxImage, es, v1.Config{Cmd: []string{"/bin/sh"}})
}

// entry is one file of an image: a folder when the name ends with a slash, a link
// when it has a target.
type entry struct {
	name   string
	mode   int64
	data   []byte
	target string
}

func writeImage(out, ref string, es []entry, cfg v1.Config) error {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, e := range es {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.data)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
		switch {
		case e.target != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.target
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(e.data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return err
	}
	cfg.Env = append(cfg.Env, "PATH=/usr/local/bin:/usr/bin:/bin")
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		Architecture: "amd64", OS: "linux", Config: cfg, RootFS: v1.RootFS{Type: "layers"},
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
	return tarball.WriteToFile(out, tag, img)
}
