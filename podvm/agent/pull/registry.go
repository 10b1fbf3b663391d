// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

const (
	// documentLimit bounds a manifest, a token's answer or an image's configuration,
	// bytes: they are held in memory. containerd takes manifests of 8 MiB.
	documentLimit = 8 << 20
	// stallTimeout is how long a registry may send nothing while something is due.
	stallTimeout = time.Minute
	dialTimeout  = 30 * time.Second
	tlsTimeout   = 30 * time.Second
)

// parsed is a reference.
type parsed struct {
	name  name.Reference
	exact bool // it has a digest
}

// parse reads a reference as the container runtimes write them.
func (s *Store) parse(reference string) (parsed, error) {
	if reference == "" {
		return parsed{}, fmt.Errorf("the reference is empty: %w", errdefs.ErrInvalidArgument)
	}
	if strings.HasPrefix(reference, "sha256:") {
		return parsed{}, fmt.Errorf("that is the id of an image on the node, not a reference to one in a registry: %w", errdefs.ErrInvalidArgument)
	}
	ref, err := name.ParseReference(reference)
	if err == nil && slices.ContainsFunc(s.cfg.Insecure, func(r string) bool { return sameRegistry(r, ref.Context().RegistryStr()) }) {
		ref, err = name.ParseReference(reference, name.Insecure)
	}
	if err != nil {
		return parsed{}, fmt.Errorf("it is not a reference to an image, such as registry.example.com/name:tag or registry.example.com/name@sha256:...: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	_, exact := ref.(name.Digest)
	return parsed{ref, exact}, nil
}

// sameRegistry tells whether an entry of a list, host or host:port, means a registry.
func sameRegistry(entry, registry string) bool {
	if strings.EqualFold(entry, registry) {
		return true
	}
	host, _, err := net.SplitHostPort(registry)
	return err == nil && (strings.EqualFold(entry, host) || strings.EqualFold(entry, "["+host+"]"))
}

// image is one that the registry has and whose content may be read.
type image struct {
	v1.Image
	digest v1.Hash
	ctx    context.Context // of its requests; made by resolve, ended by close
	cancel context.CancelFunc
	idle   func()
}

// close ends the image's requests. Nothing more can be read from it.
func (i *image) close() {
	i.cancel()
	i.idle()
}

// resolve asks the registry what a reference stands for, on this machine's platform.
// The image's requests go on when ctx has ended.
func (s *Store) resolve(ctx context.Context, ref parsed) (*image, error) {
	creds, err := readCredentials(s.cfg.AuthFile)
	if err != nil {
		return nil, err
	}
	requests, cancel := context.WithCancel(s.life)
	stop := context.AfterFunc(ctx, cancel)
	transport, idle := s.transport()
	i := &image{ctx: requests, cancel: cancel, idle: idle}
	i.Image, i.digest, err = fetch(ref.name, remote.WithContext(requests), remote.WithTransport(transport), remote.WithAuthFromKeychain(creds),
		remote.WithPlatform(platform), remote.WithUserAgent("podvmd"))
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		i.close()
		if s.life.Err() != nil {
			return nil, fmt.Errorf("the agent is ending: %w", errdefs.ErrUnavailable)
		}
		return nil, s.explain(ref, ctx, err)
	}
	return i, nil
}

// fetch reads the manifest.
func fetch(ref name.Reference, options ...remote.Option) (v1.Image, v1.Hash, error) {
	d, err := remote.Get(ref, options...)
	if err != nil {
		return nil, v1.Hash{}, err
	}
	if d.MediaType.IsSchema1() {
		return nil, v1.Hash{}, fmt.Errorf("its manifest has the form of 2015 (schema 1), which nothing reads any more; push the image anew: %w", errdefs.ErrNotImplemented)
	}
	if d.MediaType.IsIndex() {
		if err := hasPlatform(d); err != nil {
			return nil, v1.Hash{}, err
		}
	}
	img, err := d.Image()
	if err != nil {
		return nil, v1.Hash{}, err
	}
	digest, err := img.Digest()
	return img, digest, err
}

// platform is what images must be made for.
var platform = v1.Platform{OS: "linux", Architecture: runtime.GOARCH}

// hasPlatform tells that an index has no image for this machine. One that says
// nothing is taken for linux/amd64, as remote.Descriptor.Image takes it.
func hasPlatform(d *remote.Descriptor) error {
	index, err := d.ImageIndex()
	if err != nil {
		return err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, c := range m.Manifests {
		given := v1.Platform{OS: "linux", Architecture: "amd64"}
		if c.Platform != nil {
			given = *c.Platform
		}
		if given.Satisfies(platform) {
			return nil
		}
	}
	return fmt.Errorf("it has no image for %s, which this pod VM is: %w", platform, errdefs.ErrNotFound)
}

// transport is what requests go through, and a function that drops its idle
// connections.
func (s *Store) transport() (http.RoundTripper, func()) {
	dialer := net.Dialer{Timeout: dialTimeout}
	t := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return stallingConn{c}, nil
		},
		TLSClientConfig: &tls.Config{RootCAs: s.roots}, TLSHandshakeTimeout: tlsTimeout,
		ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 1,
	}
	return guard{t, s.mayBePlain}, t.CloseIdleConnections
}

// stallingConn ends reads that bring nothing.
type stallingConn struct{ net.Conn }

func (c stallingConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(stallTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

// mayBePlain tells whether a host may be spoken to in plain HTTP.
func (s *Store) mayBePlain(u *url.URL) bool {
	if ip := net.ParseIP(u.Hostname()); ip != nil && ip.IsLoopback() || u.Hostname() == "localhost" {
		return true
	}
	return slices.ContainsFunc(s.cfg.Insecure, func(r string) bool { return sameRegistry(r, u.Host) })
}

// guard is below everything that go-containerregistry does to a request. It would try
// plain HTTP at every private address, follow redirects to it, and read documents of
// 100 MiB into memory.
type guard struct {
	next  http.RoundTripper
	plain func(*url.URL) bool
}

// plainError refuses a request.
type plainError struct{ host string }

func (e *plainError) Error() string { return "plain HTTP to " + e.host + " is not allowed" }

// networkError is a body that ended early.
type networkError struct{ error }

func (e *networkError) Unwrap() error { return e.error }

func (g guard) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !g.plain(r.URL) {
		return nil, &plainError{r.URL.Host}
	}
	resp, err := g.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	limit := int64(documentLimit)
	if isBlob(r) {
		limit = -1
	}
	resp.Body = &body{ReadCloser: resp.Body, left: limit}
	return resp, nil
}

// isBlob recognises requests whose answers are streamed and bounded by their size in
// the manifest, wherever the registry redirects them to.
func isBlob(r *http.Request) bool {
	for ; r != nil; r = r.Response.Request {
		if strings.Contains(r.URL.Path, "/blobs/") {
			return true
		}
		if r.Response == nil {
			return false
		}
	}
	return false
}

type body struct {
	io.ReadCloser
	left int64 // bytes that may still come; < 0: any number
}

func (b *body) Read(p []byte) (int, error) {
	if b.left >= 0 && int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left >= 0 {
		if b.left -= int64(n); b.left < 0 {
			b.left = 0
			return 0, fmt.Errorf("the registry sends a document of more than %d MiB: %w", documentLimit>>20, errdefs.ErrResourceExhausted)
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = &networkError{err}
	}
	return n, err
}
