// SPDX-License-Identifier: Apache-2.0

// Package machines runs the machines of an emulated cloud under QEMU, on a network of
// the cloud's kind: one bridge for a subnet, DHCP that leases each machine the address
// that the cloud chose, and the metadata service at its well-known address.
//
//	adaptor, emulation ── bridge 10.0.0.1/24 ─┬─ tap ── machine 10.0.0.4   (DHCP by MAC)
//	                      169.254.169.254:80  └─ tap ── machine 10.0.0.5
//
// A Host is an emulation.Host. It works in the network namespace it is made in and
// belongs into one of its own (testbed.Isolate): it takes a subnet, a link-local
// address and UDP port 67 of a device.
package machines

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/cloud/local"
)

// Config of a Host. The zero value of a field takes the default named.
type Config struct {
	// Network is the subnet, with the address of the node in it, which is the
	// machines' gateway. Required.
	Network netip.Prefix
	// Dir takes the consoles, a file ID.console for each machine, and what machines
	// need while they run. It is made if it is missing, and the consoles stay. Required.
	Dir string
	// Bridge is the name of the device, at most 9 bytes. Default: cloud0.
	Bridge string
	// MTU of the network, in bytes; it is also what DHCP tells. Default: 1500, and DHCP
	// tells nothing.
	MTU int
	// Uplink gives the node a default route through the network, as a worker node has
	// that is an instance of the same network itself.
	Uplink bool
	// Routes through the gateway are what DHCP tells beside the default one (RFC 3442).
	Routes []netip.Prefix
	// Services are further addresses of the cloud's at whose port 80 a machine's Metadata
	// answers, such as Azure's wire server.
	Services []netip.Addr
	// Accel is how machines run. Default: local.AccelTCG, which works everywhere.
	Accel local.Accel
	// NVMe makes the disk of a machine that has one an NVMe drive; otherwise it is a
	// virtio one.
	NVMe bool
	// MaxVCPUs and MaxMemoryMiB are what a machine gets at most, whatever it is said to
	// have: the node is smaller than a cloud. Defaults: 2 and 2048.
	MaxVCPUs, MaxMemoryMiB int
}

// maxBridgeName leaves room for the number of a tap within IFNAMSIZ-1.
const maxBridgeName = 9

func (c Config) complete() (Config, error) {
	if c.Bridge == "" {
		c.Bridge = "cloud0"
	}
	if c.Accel == "" {
		c.Accel = local.AccelTCG
	}
	if c.MaxVCPUs == 0 {
		c.MaxVCPUs = 2
	}
	if c.MaxMemoryMiB == 0 {
		c.MaxMemoryMiB = 2048
	}
	switch {
	case !c.Network.IsValid() || !c.Network.Addr().Is4() || c.Network.Addr() == c.Network.Masked().Addr():
		return c, fmt.Errorf("network %v is not an IPv4 network with the node's address in it", c.Network)
	case len(c.Bridge) > maxBridgeName:
		return c, fmt.Errorf("bridge %q has more than %d bytes", c.Bridge, maxBridgeName)
	case c.Dir == "":
		return c, errors.New("no folder for the consoles is given")
	}
	var err error
	c.Dir, err = filepath.Abs(c.Dir) // QEMU runs in another folder
	return c, err
}

// Host is a place where machines run. Make it with New.
type Host struct {
	cfg Config
	net *network

	mu     sync.Mutex
	guests map[string]*guest // by id; guarded by mu
	taps   int               // made so far; guarded by mu
	closed bool              // guarded by mu
	ended  sync.WaitGroup    // of the guests' goroutines
}

var _ emulation.Host = (*Host)(nil)

// New makes the network. Close removes it.
func New(cfg Config) (*Host, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, fmt.Errorf("machines: %w", err)
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	h := &Host{cfg: cfg, guests: map[string]*guest{}}
	if h.net, err = newNetwork(cfg); err != nil {
		return nil, fmt.Errorf("machines: %w", err)
	}
	return h, nil
}

// Close ends every machine and removes the network. No Exited is called after it has
// begun.
func (h *Host) Close() error {
	h.mu.Lock()
	h.closed = true
	all := make([]*guest, 0, len(h.guests))
	for _, g := range h.guests {
		all = append(all, g)
	}
	h.mu.Unlock()
	for _, g := range all {
		g.stop()
	}
	h.ended.Wait()
	return h.net.close()
}

// idRule keeps ids usable as names of files.
var idRule = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,127}$`)

// Start implements emulation.Host. AlreadyExists: there is a machine of that id, MAC
// or address. InvalidArgument: it does not fit this host's network.
func (h *Host) Start(ctx context.Context, m emulation.Machine) error {
	if !idRule.MatchString(m.ID) {
		return fmt.Errorf("machine id %q: %w", m.ID, errdefs.ErrInvalidArgument)
	}
	if m.Gateway != h.cfg.Network.Addr() || m.Addr.Masked() != h.cfg.Network.Masked() {
		return fmt.Errorf("machine %s: address %v with gateway %v is not of the network %v: %w", m.ID, m.Addr, m.Gateway, h.cfg.Network, errdefs.ErrInvalidArgument)
	}
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return fmt.Errorf("machine %s: the host is closed: %w", m.ID, errdefs.ErrFailedPrecondition)
	}
	if h.guests[m.ID] != nil {
		h.mu.Unlock()
		return fmt.Errorf("machine %s: %w", m.ID, errdefs.ErrAlreadyExists)
	}
	h.taps++
	g := newGuest(h, m, fmt.Sprintf("%s-%d", h.cfg.Bridge, h.taps%10_000))
	h.guests[m.ID] = g
	h.ended.Add(1)
	h.mu.Unlock()

	if err := g.start(ctx); err != nil {
		return fmt.Errorf("machine %s: %w", m.ID, err)
	}
	return nil
}

// gone forgets a guest that has ended, and tells whoever wants to know of one that
// was not asked to.
func (h *Host) gone(g *guest, asked bool) {
	defer h.ended.Done()
	h.mu.Lock()
	delete(h.guests, g.m.ID)
	tell := !asked && !h.closed && g.m.Exited != nil
	h.mu.Unlock()
	if tell {
		g.m.Exited()
	}
}

// Stop implements emulation.Host.
func (h *Host) Stop(ctx context.Context, id string) error {
	h.mu.Lock()
	g := h.guests[id]
	h.mu.Unlock()
	if g == nil {
		return nil
	}
	g.stop()
	select {
	case <-g.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for machine %s to end: %w", id, ctx.Err())
	}
}

// Console implements emulation.Host, for machines that have ended, too. NotFound: no
// machine of that id was started in this host's folder.
func (h *Host) Console(id string) ([]byte, error) {
	if !idRule.MatchString(id) {
		return nil, fmt.Errorf("machine id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	b, err := tail(h.consolePath(id), consoleTail)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("machine %s: %w", id, errdefs.ErrNotFound)
	}
	return b, err
}

func (h *Host) consolePath(id string) string { return filepath.Join(h.cfg.Dir, id+".console") }

// Device is the name of the bridge.
func (h *Host) Device() string { return h.cfg.Bridge }
