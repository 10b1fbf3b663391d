// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// network is the machines' subnet and what serves it.
type network struct {
	cfg    Config
	bridge netlink.Link
	dhcp   *net.UDPConn
	meta   []*metadataServer
	served sync.WaitGroup

	mu     sync.Mutex
	byMAC  map[string]*emulation.Machine     // by net.HardwareAddr's text; guarded by mu
	byAddr map[netip.Addr]*emulation.Machine // guarded by mu
}

// defaultMTU is every Ethernet's.
const defaultMTU = 1500

func newNetwork(cfg Config) (_ *network, err error) {
	n := &network{cfg: cfg, byMAC: map[string]*emulation.Machine{}, byAddr: map[netip.Addr]*emulation.Machine{}}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = cfg.Bridge, defaultMTU
	if cfg.MTU != 0 {
		attrs.MTU = cfg.MTU
	}
	// Without an address of its own a bridge takes that of a port, and changes it with
	// the ports, behind the back of the machines' neighbour caches.
	a := cfg.Network.Addr().As4()
	attrs.HardwareAddr = net.HardwareAddr{0x02, 0xfe, a[0], a[1], a[2], a[3]}
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("make bridge %s: %w", cfg.Bridge, err)
	}
	if n.bridge, err = netlink.LinkByName(cfg.Bridge); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	services := append([]netip.Addr{emulation.MetadataAddr}, cfg.Services...)
	addrs := []netip.Prefix{cfg.Network}
	for _, a := range services {
		addrs = append(addrs, netip.PrefixFrom(a, a.BitLen()))
	}
	for _, p := range addrs {
		if err := netlink.AddrAdd(n.bridge, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
			return nil, fmt.Errorf("give bridge %s the address %v: %w", cfg.Bridge, p, err)
		}
	}
	if err := netlink.LinkSetUp(n.bridge); err != nil {
		return nil, fmt.Errorf("set bridge %s up: %w", cfg.Bridge, err)
	}
	if cfg.Uplink {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: n.bridge.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0")), Scope: netlink.SCOPE_LINK}); err != nil {
			return nil, fmt.Errorf("route through bridge %s: %w", cfg.Bridge, err)
		}
	}
	if n.dhcp, err = listenDHCP(cfg.Bridge); err != nil {
		return nil, err
	}
	n.served.Go(n.serveDHCP)
	for _, a := range services {
		m, err := serveMetadata(n, a)
		if err != nil {
			return nil, err
		}
		n.meta = append(n.meta, m)
	}
	return n, nil
}

// close ends what serves and removes the bridge, with which its addresses and routes
// go.
func (n *network) close() error {
	var errs []error
	for _, m := range n.meta {
		errs = append(errs, m.close())
	}
	if n.dhcp != nil {
		errs = append(errs, n.dhcp.Close())
	}
	n.served.Wait()
	if err := netlink.LinkDel(n.bridge); err != nil {
		errs = append(errs, fmt.Errorf("remove bridge %s: %w", n.cfg.Bridge, err))
	}
	return errors.Join(errs...)
}

// admit lets a machine use the network. AlreadyExists: its MAC or address is in use.
func (n *network) admit(m *emulation.Machine) error {
	mac, err := net.ParseMAC(m.MAC)
	if err != nil || len(mac) != 6 {
		return fmt.Errorf("%q is not the address of an Ethernet card: %w", m.MAC, errdefs.ErrInvalidArgument)
	}
	n.mu.Lock()
	if n.byMAC[mac.String()] != nil || n.byAddr[m.Addr.Addr()] != nil {
		n.mu.Unlock()
		return fmt.Errorf("MAC %v or address %v is another machine's: %w", mac, m.Addr.Addr(), errdefs.ErrAlreadyExists)
	}
	n.byMAC[mac.String()], n.byAddr[m.Addr.Addr()] = m, m
	n.mu.Unlock()
	// Known from the start, so that the first packet to it does not wait for an answer
	// that a machine that starts cannot give.
	if err := netlink.NeighSet(n.neighbor(m, mac)); err != nil {
		n.dismiss(m)
		return fmt.Errorf("set neighbour %v: %w", m.Addr.Addr(), err)
	}
	return nil
}

// dismiss is admit's other end.
func (n *network) dismiss(m *emulation.Machine) {
	mac, err := net.ParseMAC(m.MAC)
	if err != nil {
		return // it was never admitted
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byMAC[mac.String()] != m {
		return
	}
	delete(n.byMAC, mac.String())
	delete(n.byAddr, m.Addr.Addr())
	// It may never have been set; and with the bridge it goes in any case.
	_ = netlink.NeighDel(n.neighbor(m, nil))
}

func (n *network) neighbor(m *emulation.Machine, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: n.bridge.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
		IP: m.Addr.Addr().AsSlice(), HardwareAddr: mac}
}

// withMAC returns the machine of a MAC, or nil.
func (n *network) withMAC(mac net.HardwareAddr) *emulation.Machine {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.byMAC[mac.String()]
}

// at returns the machine of an address, or nil.
func (n *network) at(addr netip.Addr) *emulation.Machine {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.byAddr[addr.Unmap()]
}

// tap makes a machine's end of the network and returns the descriptor that keeps it:
// the device vanishes with the last holder, which will be QEMU.
func (n *network) tap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun (modprobe tun): %w", err)
	}
	f := os.NewFile(uintptr(fd), "/dev/net/tun")
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err == nil {
		err = n.plug(name)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("tap %s: %w", name, err), f.Close())
	}
	return f, nil
}

// plug puts a device on the bridge. Machines talk to the node, not to each other.
func (n *network) plug(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return errors.Join(
		netlink.LinkSetMTU(link, n.bridge.Attrs().MTU),
		netlink.LinkSetMaster(link, n.bridge),
		netlink.LinkSetIsolated(link, true),
		netlink.LinkSetUp(link))
}

// onDevice makes a socket one of a device: others cannot reach it, and the same
// address and port on another device is another socket's.
func onDevice(device string, options ...[2]int) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			err = unix.BindToDevice(int(fd), device)
			for _, o := range options {
				level := unix.SOL_SOCKET
				if o[0] == unix.IP_TTL {
					level = unix.IPPROTO_IP
				}
				err = errors.Join(err, unix.SetsockoptInt(int(fd), level, o[0], o[1]))
			}
		}); e != nil {
			return e
		}
		return err
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
