// SPDX-License-Identifier: Apache-2.0

// Package cloudbed puts an emulated cloud beside a testbed: the emulation of AWS or
// Azure on an address of the node, virtual machines behind its instances (package
// machines), and the configuration with which an adaptor uses it, in the keys that
// people have in peer-pods-cm and peer-pods-secret.
//
//	cloud-api-adaptor ── HTTP(S) ── fakeec2 | fakearm ── machines.Host ── QEMU
//	        └────────────── cloud0 10.0.0.1/24 ── taps ─────────────────────┘
//
// It belongs into namespaces of its own (testbed.Isolate).
package cloudbed

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/cloud/local"
	"github.com/kata-remote/kata-remote/podvm/image"
	"github.com/kata-remote/kata-remote/test/machines"
)

// Config says what to start. The zero value of a field takes the default named.
type Config struct {
	// Provider is the cloud, one of Providers. Required.
	Provider string
	// Image is what instances boot: a folder with the pod VM's kernel and initramfs, or
	// a disk. Required unless Paper.
	Image string
	// Dir takes consoles, certificates and uploads. Required.
	Dir string
	// Accel is how machines run. Default: what a test boot finds to work.
	Accel local.Accel
	// Paper instances have no machines: they exist in the cloud's answers only.
	Paper bool
	// InstanceTime is how long a cloud takes until an instance of it is switched on.
	// Default: 1 s.
	InstanceTime time.Duration
	// Wrap, if not nil, stands before the emulation: a test sees each request there,
	// and may hold its answer back.
	Wrap func(http.Handler) http.Handler
	// Started, if not nil, is told of each machine when it has been switched on.
	Started func(emulation.Machine)
}

const defaultInstanceTime = time.Second

// subnet is the one that all emulated instances are in, with the node's address.
var subnet = netip.MustParsePrefix("10.0.0.1/24")

// Cloud is a cloud that runs.
type Cloud struct {
	// Env is the adaptor's configuration, KEY=VALUE.
	Env []string
	// Endpoint is where the cloud's API is.
	Endpoint string
	// Device is the network between node and machines; "" with Paper.
	Device string

	cfg      Config
	host     *machines.Host // nil with Paper
	emulated provider
	server   *http.Server
	served   chan error
	asked    atomic.Int64 // requests to the metadata service
	told     atomic.Int64 // requests to the wire server
	started  atomic.Int64 // machines
}

// provider is an emulation and what is known of it here.
type provider interface {
	http.Handler
	// env is the adaptor's configuration, given where the emulation listens.
	env(url string) []string
	// leaks tells what exists that was made through the API.
	leaks() error
	close()
}

// WireServer is where Azure's hosts listen to their machines, which tell it that they
// are ready.
var WireServer = netip.MustParseAddr(fakearm.WireServerAddr)

// kind is how a cloud is emulated.
type kind struct {
	new  func(Config, emulation.Host) provider
	tls  bool                   // its SDK insists on HTTPS
	host func(*machines.Config) // what its networks and machines have
}

var kinds = map[string]kind{
	"aws": {new: newAWS, host: func(c *machines.Config) {
		// MTU of a VPC ("Network MTU for your EC2 instance", EC2 User Guide).
		c.MTU, c.NVMe = 9001, true
	}},
	"azure": {new: newAzure, tls: true, host: func(c *machines.Config) {
		// What Azure's DHCP routes besides the default.
		c.Routes = []netip.Prefix{netip.PrefixFrom(WireServer, 32), netip.PrefixFrom(emulation.MetadataAddr, 32)}
		c.Services = []netip.Addr{WireServer}
	}},
}

// Providers are the clouds that can be emulated.
func Providers() []string { return slices.Sorted(maps.Keys(kinds)) }

// Start starts a cloud. Close ends it.
func Start(ctx context.Context, cfg Config) (_ *Cloud, err error) {
	k, ok := kinds[cfg.Provider]
	if !ok {
		return nil, fmt.Errorf("there is no emulation of a cloud %q, but of %q", cfg.Provider, Providers())
	}
	if cfg.InstanceTime == 0 {
		cfg.InstanceTime = defaultInstanceTime
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	c := &Cloud{cfg: cfg, served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("emulated cloud %s: %w", cfg.Provider, err), c.Close())
		}
	}()
	var host emulation.Host
	if !cfg.Paper {
		if cfg.Accel == "" {
			if cfg.Accel, err = bestAccel(ctx, cfg); err != nil {
				return nil, err
			}
		}
		hc := machines.Config{Network: subnet, Dir: filepath.Join(cfg.Dir, "consoles"), Uplink: true, Accel: cfg.Accel}
		k.host(&hc)
		if c.host, err = machines.New(hc); err != nil {
			return nil, err
		}
		c.Device, host = c.host.Device(), counting{c.host, c}
	}
	c.emulated = k.new(cfg, host)
	return c, c.listen(k)
}

// listen serves the emulation on the node's loopback.
func (c *Cloud) listen(k kind) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	scheme := "http"
	if k.tls {
		scheme = "https"
		cert, err := newCertificate(c.certificatePath())
		if err != nil {
			return errors.Join(err, l.Close())
		}
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	}
	var h http.Handler = c.emulated
	if c.cfg.Wrap != nil {
		h = c.cfg.Wrap(h)
	}
	// A caller that is killed is no news, and what requests do wrong they are told.
	c.server = &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)}
	go func() { c.served <- c.server.Serve(l) }()
	c.Endpoint = scheme + "://" + l.Addr().String()
	c.Env = []string{"CLOUD_PROVIDER=" + c.cfg.Provider}
	if k.tls {
		// What Go's programs take for the authorities of their machine (package crypto/x509).
		c.Env = append(c.Env, "SSL_CERT_FILE="+c.certificatePath())
	}
	c.Env = append(c.Env, c.emulated.env(c.Endpoint)...)
	return nil
}

func (c *Cloud) certificatePath() string { return filepath.Join(c.cfg.Dir, "endpoint.pem") }

// Leaks is nil when nothing exists any more that was made through the cloud's API, and
// otherwise tells what.
func (c *Cloud) Leaks() error { return c.emulated.leaks() }

// MetadataRequests is how many requests the metadata service has had.
func (c *Cloud) MetadataRequests() int64 { return c.asked.Load() }

// WireServerRequests is how many requests Azure's wire server has had.
func (c *Cloud) WireServerRequests() int64 { return c.told.Load() }

// leftIn makes an error of what is left in a cloud.
func leftIn(left []string) error {
	if len(left) == 0 {
		return nil
	}
	return fmt.Errorf("the cloud still has %s", strings.Join(left, ", "))
}

// Machines is how many machines were ever started.
func (c *Cloud) Machines() int64 { return c.started.Load() }

// Close ends the cloud: its API, then every machine, then their network. Consoles stay
// in Dir.
func (c *Cloud) Close() error {
	var errs []error
	if c.server != nil {
		errs = append(errs, c.server.Close())
		<-c.served
	}
	if c.emulated != nil {
		c.emulated.close()
	}
	if c.host != nil {
		errs = append(errs, c.host.Close())
	}
	return errors.Join(errs...)
}

// counting counts machines, and what they ask the metadata service.
type counting struct {
	emulation.Host
	cloud *Cloud
}

// Start implements emulation.Host.
func (h counting) Start(ctx context.Context, m emulation.Machine) error {
	h.cloud.started.Add(1)
	if inner := m.Metadata; inner != nil {
		m.Metadata = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Host == WireServer.String() {
				h.cloud.told.Add(1)
				inner.ServeHTTP(w, r)
				return
			}
			h.cloud.asked.Add(1)
			inner.ServeHTTP(w, r)
		})
	}
	err := h.Host.Start(ctx, m)
	if err == nil && h.cloud.cfg.Started != nil {
		h.cloud.cfg.Started(m)
	}
	return err
}

// bestAccel is how the embedded provider would run machines here.
func bestAccel(ctx context.Context, cfg Config) (local.Accel, error) {
	man, err := image.ReadManifest(cfg.Image)
	if err != nil { // a disk, whose kernel nobody has seen
		return local.AccelTCG, nil
	}
	p, err := local.New(local.Config{Kernel: man.Kernel.Path, Initrd: man.Initrd.Path, StateDir: filepath.Join(cfg.Dir, "accel")})
	if err != nil {
		return "", err
	}
	accel, _, err := p.Accel(ctx)
	return accel, err
}
