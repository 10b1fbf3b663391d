// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// newRegistry is a registry with the image tools/busybox, under the tags 1 and, with
// another file, 2.
func newRegistry(t *testing.T) (n Names) {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	n.Registry = strings.TrimPrefix(srv.URL, "http://")
	for _, tag := range []string{"1", "2"} {
		b, err := archive(t, tag)
		if err != nil {
			t.Fatal(err)
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err != nil {
			t.Fatal(err)
		}
		img, err := mutate.AppendLayers(empty.Image, layer)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := name.ParseReference(n.Registry + "/tools/busybox:" + tag)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, img, remote.WithContext(t.Context())); err != nil {
			t.Fatal(err)
		}
		if tag == "1" {
			digest, err := img.Digest()
			if err != nil {
				t.Fatal(err)
			}
			n.Digest = digest.String()
		}
	}
	return n
}

// archive is a root file system with busybox and a file that names the tag.
func archive(t *testing.T, tag string) ([]byte, error) {
	dir := filepath.Join(shortDir(t), "root")
	if err := makeRoot(dir); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		return nil, err
	}
	text := fmt.Sprintf("image %s\n", tag)
	if err := w.WriteHeader(&tar.Header{Name: "etc/tag", Mode: 0o644, Size: int64(len(text))}); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(w, text); err != nil {
		return nil, err
	}
	err := w.Close()
	return b.Bytes(), err
}
