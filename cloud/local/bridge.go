// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bridgeRecord says that the bridge is ours. It is on disk before the bridge is
// made and goes after it.
type bridgeRecord struct {
	Name   string       `json:"name"`
	Addr   netip.Prefix `json:"addr"`
	BootID string       `json:"boot_id"` // a link does not survive a reboot: one that is there then is not ours
}

func (p *Provider) bridgePath() string { return filepath.Join(p.cfg.StateDir, "bridge.json") }

// loadBridge returns nil when we have no bridge.
func (p *Provider) loadBridge() (*bridgeRecord, error) {
	b, err := os.ReadFile(p.bridgePath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r := &bridgeRecord{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", p.bridgePath(), err)
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if r.BootID != boot {
		return nil, nil
	}
	return r, nil
}

// ensureBridge makes or repairs the bridge. The state lock is held.
// FailedPrecondition: a link of that name is not ours, or the subnet is in use.
func (p *Provider) ensureBridge() (netlink.Link, error) {
	name, want := p.cfg.Bridge, p.cfg.gateway()
	rec, err := p.loadBridge()
	if err != nil {
		return nil, err
	}
	if rec != nil && (rec.Name != name || rec.Addr != want) {
		return nil, fmt.Errorf("instances exist on bridge %s with %s, the configuration says %s with %s; delete the pods first or take the change back: %w",
			rec.Name, rec.Addr, name, want, errdefs.ErrFailedPrecondition)
	}
	link, err := netlink.LinkByName(name)
	if err != nil && !isLinkNotFound(err) {
		return nil, fmt.Errorf("bridge %s: %w", name, err)
	}
	if err == nil && (rec == nil || link.Type() != "bridge") {
		return nil, fmt.Errorf("a %s named %s exists that this provider did not make; remove it or set another LOCAL_BRIDGE: %w", link.Type(), name, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		if err := p.subnetFree(); err != nil {
			return nil, err
		}
		if link, err = p.makeBridge(name, want); err != nil {
			return nil, err
		}
	}
	return link, p.configureBridge(link, want)
}

func (p *Provider) makeBridge(name string, addr netip.Prefix) (netlink.Link, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(bridgeRecord{Name: name, Addr: addr, BootID: boot})
	if err != nil {
		return nil, err
	}
	if err := writeFile(p.bridgePath(), b); err != nil {
		return nil, fmt.Errorf("record bridge %s: %w", name, err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, p.cfg.MTU
	// A bridge without an address of its own takes that of a port and changes it
	// when ports come and go, behind the back of every neighbour cache.
	attrs.HardwareAddr = macOf(addr.Addr())
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("make bridge %s: %w", name, err)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("bridge %s: %w", name, err)
	}
	return link, nil
}

func (p *Provider) configureBridge(link netlink.Link, addr netip.Prefix) error {
	name := link.Attrs().Name
	if link.Attrs().MTU != p.cfg.MTU {
		if err := netlink.LinkSetMTU(link, p.cfg.MTU); err != nil {
			return fmt.Errorf("set MTU of bridge %s: %w", name, err)
		}
	}
	a := &netlink.Addr{IPNet: ipNet(addr)}
	if addr.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD // nobody else is on this bridge
	}
	if err := netlink.AddrReplace(link, a); err != nil {
		return fmt.Errorf("set address of bridge %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set bridge %s up: %w", name, err)
	}
	return nil
}

// subnetFree refuses a subnet that the node uses already: traffic to it would
// vanish in our bridge.
func (p *Provider) subnetFree() error {
	routes, err := netlink.RouteList(nil, family(p.cfg.Subnet.Addr()))
	if err != nil {
		return fmt.Errorf("read routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		dst, ok := prefixOf(r.Dst)
		if ok && dst.Bits() > 0 && dst.Overlaps(p.cfg.Subnet) {
			return fmt.Errorf("subnet %s is in use on this node (route to %s); set another LOCAL_SUBNET: %w", p.cfg.Subnet, dst, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// removeBridge removes the bridge if we have one. The state lock is held and no
// instance is left.
func (p *Provider) removeBridge() error {
	rec, err := p.loadBridge()
	if err != nil {
		return err
	}
	if rec != nil {
		link, err := netlink.LinkByName(rec.Name)
		if err == nil && link.Type() == "bridge" {
			err = netlink.LinkDel(link)
		}
		if err != nil && !isLinkNotFound(err) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove bridge %s: %w", rec.Name, err)
		}
	}
	for _, path := range []string{p.bridgePath() + newSuffix, p.bridgePath()} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// openTap makes the instance's tap and returns the descriptor that keeps it: the
// device vanishes with the last holder, which will be QEMU.
func openTap(r *record, bridge netlink.Link) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun (modprobe tun): %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	f := os.NewFile(uintptr(fd), "/dev/net/tun")
	ifr, err := unix.NewIfreq(r.Tap)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// IFF_TUN_EXCL: fail instead of joining a device that somebody else made.
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		if errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("a device of that name exists that this provider did not make: %w", errdefs.ErrFailedPrecondition)
		}
		return nil, errors.Join(fmt.Errorf("make tap %s: %w", r.Tap, err), f.Close())
	}
	if err := plugTap(r.Tap, bridge); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func plugTap(name string, bridge netlink.Link) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	if err := netlink.LinkSetMTU(link, bridge.Attrs().MTU); err != nil {
		return fmt.Errorf("set MTU of tap %s: %w", name, err)
	}
	if err := netlink.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("put tap %s on bridge %s: %w", name, bridge.Attrs().Name, err)
	}
	// VMs talk to the node, never to each other.
	if err := netlink.LinkSetIsolated(link, true); err != nil {
		return fmt.Errorf("isolate tap %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set tap %s up: %w", name, err)
	}
	return nil
}

// setNeighbor makes the VM's address known, so that the first packet to it does
// not wait for an answer that a booting guest cannot give yet.
func setNeighbor(r *record, bridge netlink.Link) error {
	mac, err := r.mac()
	if err != nil {
		return err
	}
	if err := netlink.NeighSet(neighbor(r, bridge, mac)); err != nil {
		return fmt.Errorf("set neighbour %s on %s: %w", r.Addr.Addr(), bridge.Attrs().Name, err)
	}
	return nil
}

func removeNeighbor(r *record) error {
	if !r.Addr.IsValid() {
		return nil
	}
	bridge, err := netlink.LinkByName(r.Bridge)
	if isLinkNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	err = netlink.NeighDel(neighbor(r, bridge, nil))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove neighbour %s from %s: %w", r.Addr.Addr(), r.Bridge, err)
	}
	return nil
}

func neighbor(r *record, bridge netlink.Link, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{
		LinkIndex: bridge.Attrs().Index, Family: family(r.Addr.Addr()), State: netlink.NUD_PERMANENT,
		IP: r.Addr.Addr().AsSlice(), HardwareAddr: mac,
	}
}

func isLinkNotFound(err error) bool {
	var nf netlink.LinkNotFoundError
	return errors.As(err, &nf)
}

func family(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), ok
}
