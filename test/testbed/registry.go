// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// registryConfig is where containerd looks for what stands in for a registry.
const registryConfig = "/etc/containerd/certs.d"

// Registry is an image registry in memory, on a port of the node.
type Registry struct {
	server *http.Server
	addr   string
	done   chan error
}

// StartRegistry starts a registry that containerd asks in place of every other: an
// image pushed as registry.example/a/b:c is pulled under that name, and no name has to
// be changed. Call it before StartContainerd.
func (b *Bed) StartRegistry() (*Registry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(b.Log("registry"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		l.Close()
		return nil, err
	}
	r := &Registry{addr: l.Addr().String(), done: make(chan error, 1)}
	r.server = &http.Server{Handler: registry.New(registry.Logger(stdlog.New(log, "", stdlog.LstdFlags)))}
	go func() {
		err := r.server.Serve(l)
		r.done <- errors.Join(err, log.Close())
	}()
	// _default is containerd's word for any registry (containerd, docs/hosts.md).
	dir := filepath.Join(registryConfig, "_default")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	hosts := fmt.Sprintf("[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", r.addr)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	return r, nil
}

// Stop ends it.
func (r *Registry) Stop() error {
	err := r.server.Close()
	if end := <-r.done; !errors.Is(end, http.ErrServerClosed) {
		err = errors.Join(err, end)
	}
	return err
}

// Push stores an image. Its name must be whole: registry/path:tag.
func (r *Registry) Push(ctx context.Context, image Image) error {
	_, rest, ok := strings.Cut(image.Ref, "/")
	name, tag, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 {
		return fmt.Errorf("push %s: a name is registry/path:tag", image.Ref)
	}
	img, err := image.build()
	if err != nil {
		return fmt.Errorf("make image %s: %w", image.Ref, err)
	}
	if err := r.push(ctx, name, tag, img); err != nil {
		return fmt.Errorf("push %s: %w", image.Ref, err)
	}
	return nil
}

func (r *Registry) push(ctx context.Context, name, tag string, img v1.Image) error {
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			return err
		}
		content, err := l.Compressed()
		if err != nil {
			return err
		}
		err = r.blob(ctx, name, d.String(), content)
		if err := errors.Join(err, content.Close()); err != nil {
			return err
		}
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	d, err := img.ConfigName()
	if err != nil {
		return err
	}
	if err := r.blob(ctx, name, d.String(), bytes.NewReader(config)); err != nil {
		return err
	}
	manifest, err := img.RawManifest()
	if err != nil {
		return err
	}
	typ, err := img.MediaType()
	if err != nil {
		return err
	}
	return r.send(ctx, http.MethodPut, "/v2/"+name+"/manifests/"+tag, string(typ), bytes.NewReader(manifest))
}

// blob uploads in one request (OCI distribution specification, "Single POST").
func (r *Registry) blob(ctx context.Context, name, digest string, content io.Reader) error {
	return r.send(ctx, http.MethodPost, "/v2/"+name+"/blobs/uploads/?digest="+url.QueryEscape(digest), "application/octet-stream", content)
}

func (r *Registry) send(ctx context.Context, method, path, typ string, body io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+r.addr+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", typ)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text)
	}
	return nil
}
