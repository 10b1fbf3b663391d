// SPDX-License-Identifier: Apache-2.0

package guestnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/podvm/bootconf"
	"github.com/kata-remote/kata-remote/podvm/dhcp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// metadataService is where clouds answer their instances.
var metadataService = netip.MustParsePrefix("169.254.169.254/32")

// Primary is the VM's own interface, with an address that the cloud leased to it.
type Primary struct {
	link   netlink.Link
	client *dhcp.Client
	lease  *dhcp.Lease
}

// AcquirePrimary waits for the VM's first network interface that is no virtual one, in
// the caller's network namespace, and gives it the address, routes and MTU that a DHCP
// server says. ctx bounds the wait for the server. Unavailable: none gave an address.
// NotFound: there is no interface.
func AcquirePrimary(ctx context.Context) (*Primary, error) {
	return acquirePrimary(ctx, "/sys")
}

func acquirePrimary(ctx context.Context, sys string) (*Primary, error) {
	link, err := primaryLink(ctx, sys)
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", link.Attrs().Name, err)
	}
	p := &Primary{link: link, client: dhcp.New(link.Attrs().Name, link.Attrs().HardwareAddr)}
	if p.lease, err = p.client.Acquire(ctx); err != nil {
		return nil, err
	}
	if err := configureLease(link, p.lease); err != nil {
		return nil, fmt.Errorf("the DHCP lease of %s: %w", link.Attrs().Name, err)
	}
	return p, nil
}

// Name of the interface.
func (p *Primary) Name() string { return p.link.Attrs().Name }

// Keep renews the lease until ctx ends. What the server changes is set; an address that
// it takes away goes.
func (p *Primary) Keep(ctx context.Context, log *slog.Logger) {
	p.client.Keep(ctx, p.lease, func(l *dhcp.Lease) {
		old := p.lease
		p.lease = l
		if old.Addr != l.Addr {
			log.Error("the cloud gave this machine another address: the adaptor knows it under the old one", "old", old.Addr, "new", l.Addr)
			// First, because with an address go those that were added after it in the same
			// network (net.ipv4.conf.*.promote_secondaries).
			if err := netlink.AddrDel(p.link, &netlink.Addr{IPNet: ipNet(old.Addr)}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				log.Error("remove the old address", logkey.Error, err.Error())
			}
		}
		if err := configureLease(p.link, l); err != nil {
			log.Error("the renewed DHCP lease cannot be set", logkey.Error, err.Error())
		}
	})
}

// primaryLink waits for the interface.
func primaryLink(ctx context.Context, sys string) (netlink.Link, error) {
	ctx, cancel := context.WithTimeout(ctx, linkWait)
	defer cancel()
	tick := time.NewTicker(linkPoll)
	defer tick.Stop()
	for {
		links, err := netlink.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("list interfaces: %w", err)
		}
		var first netlink.Link
		var names []string
		for _, l := range links {
			a := l.Attrs()
			names = append(names, a.Name)
			if isPrimary(sys, a) && (first == nil || a.Index < first.Attrs().Index) {
				first = l
			}
		}
		if first != nil {
			return first, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("the machine has no network interface (it has: %s): is its driver in the image? %w", strings.Join(names, " "), errdefs.ErrNotFound)
		}
	}
}

// isPrimary tells whether the VM's address may belong on an interface: an Ethernet one,
// of a device, and not the fast half of a pair. Azure's accelerated networking is such:
// the address is on Hyper-V's own interface (hv_netvsc), and a PCI function of another
// driver with the same MAC address is its slave, or will be in a moment.
// https://docs.kernel.org/networking/net_failover.html,
// https://learn.microsoft.com/azure/virtual-network/accelerated-networking-how-it-works
func isPrimary(sys string, a *netlink.LinkAttrs) bool {
	if a.EncapType != "ether" || a.MasterIndex != 0 || a.RawFlags&unix.IFF_SLAVE != 0 {
		return false
	}
	device := filepath.Join(sys, "class", "net", a.Name, "device")
	if _, err := os.Stat(device); err != nil {
		return false
	}
	driver, err := os.Readlink(filepath.Join(device, "driver"))
	if err != nil {
		return true // a device that does not say
	}
	switch name := filepath.Base(driver); {
	case strings.HasPrefix(name, "mlx"), name == "mana":
		buses, err := filepath.Glob(filepath.Join(sys, "bus", "vmbus", "devices", "*"))
		return err == nil && len(buses) == 0
	}
	return true
}

// configureLease sets what a lease says.
func configureLease(link netlink.Link, l *dhcp.Lease) error {
	e := bootconf.Ethernet{Addrs: []netip.Prefix{l.Addr}}
	reached := false
	for _, r := range l.Routes {
		e.Routes = append(e.Routes, bootconf.Route{Dst: r.Dst, Via: r.Via})
		reached = reached || r.Dst.Contains(metadataService.Addr())
	}
	if !reached {
		// A network without a router has its metadata service all the same.
		e.Routes = append(e.Routes, bootconf.Route{Dst: metadataService})
	}
	if l.MTU != 0 {
		// A device that cannot have the MTU keeps its own, which is smaller.
		if err := netlink.LinkSetMTU(link, l.MTU); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("set mtu %d: %w", l.MTU, err)
		}
	}
	return configure(link, e)
}

// outside tells whether a gateway is in none of an interface's networks, as that of a
// /32 address is.
func outside(via netip.Addr, addrs []netip.Prefix) bool {
	for _, p := range addrs {
		if p.Contains(via) {
			return false
		}
	}
	return true
}
