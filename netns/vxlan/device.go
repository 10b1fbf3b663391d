// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
)

// device is what a VXLAN device of ours looks like. All of it but the MTU and the
// MAC address is fixed when the device is made: the kernel can change some of the
// rest later (the remote address of one family, say), but not all, and one way for
// all is simpler than two.
type device struct {
	name   string
	vni    uint32
	port   uint16
	local  netip.Addr
	remote netip.Addr
	mtu    int
	hwaddr net.HardwareAddr // nil: the kernel chooses
}

// place is where a device lives: a namespace of its own, seen through a handle, with
// its UDP socket in the caller's.
type place struct {
	path   string
	file   *os.File        // the namespace
	handle *netlink.Handle // inside it
	caller *netlink.Handle
}

func openPlace(path string) (*place, error) {
	p := &place{path: path}
	if err := p.open(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *place) open() (err error) {
	if p.file, err = netns.OpenFile(p.path); err != nil {
		return err
	}
	if p.handle, err = netns.HandleOf(p.file); err != nil {
		return err
	}
	if p.caller, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	return nil
}

func (p *place) close() {
	if p.handle != nil {
		p.handle.Close()
	}
	if p.caller != nil {
		p.caller.Close()
	}
	if p.file != nil {
		p.file.Close()
	}
}

// isCaller reports whether id, read from a device in this namespace, names the
// caller's namespace.
func (p *place) isCaller(id int) (bool, error) {
	self, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return false, fmt.Errorf("open own network namespace: %w", err)
	}
	defer self.Close()
	want, err := p.handle.GetNetNsIdByFd(int(self.Fd()))
	if err != nil {
		return false, fmt.Errorf("ask for the id of the own network namespace: %w", err)
	}
	return want >= 0 && want == id, nil
}

// find returns the link of that name, nil when there is none.
func find(h *netlink.Handle, name string) (netlink.Link, error) {
	l, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", name, err)
	}
	return l, nil
}

// foreign tells why l is not a device of ours, "" if it is.
func foreign(l netlink.Link) string {
	if l.Type() != "vxlan" {
		return fmt.Sprintf("it is a %s, not a vxlan", l.Type())
	}
	if g := l.Attrs().Group; g != netns.LinkGroup {
		return fmt.Sprintf("its group is %d, not %d", g, netns.LinkGroup)
	}
	return ""
}

func refuse(name, path, why string) error {
	return fmt.Errorf("device %s in network namespace %s is not ours and is left alone: %s: %w", name, path, why, errdefs.ErrFailedPrecondition)
}

// needsRecreate returns which fixed attribute of l differs from d, "" if none does.
func (d device) needsRecreate(p *place, l netlink.Link) (string, error) {
	v, ok := l.(*netlink.Vxlan)
	if !ok {
		return "kind: " + l.Type(), nil
	}
	home, err := p.isCaller(v.NetNsID)
	if err != nil {
		return "", err
	}
	for _, c := range []struct {
		name      string
		have, new any
	}{
		{"VNI", v.VxlanId, int(d.vni)},
		{"UDP port", v.Port, int(d.port)},
		{"local address", addr(v.SrcAddr), d.local.Unmap()},
		{"remote address", addr(v.Group), d.remote.Unmap()},
		{"learning", v.Learning, false},
		{"underlay interface", v.VtepDevIndex, 0},
		{"external control", v.FlowBased, false},
		{"socket in the caller's namespace", home, true},
	} {
		if c.have != c.new {
			return fmt.Sprintf("%s: %v vs %v", c.name, c.have, c.new), nil
		}
	}
	return "", nil
}

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// create makes the device, down, in p with its socket in the caller's namespace.
func (d device) create(p *place) error {
	if taken, err := find(p.caller, d.name); err != nil {
		return err
	} else if taken != nil {
		// Older kernels look for the name in the caller's namespace too.
		return refuse(d.name, "of the caller", "its kind is "+taken.Type())
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = d.name
	attrs.MTU = d.mtu
	attrs.HardwareAddr = d.hwaddr
	attrs.Group = netns.LinkGroup
	attrs.Namespace = netlink.NsFd(p.file.Fd())
	err := p.caller.LinkAdd(&netlink.Vxlan{
		LinkAttrs: attrs,
		VxlanId:   int(d.vni),
		Port:      int(d.port),
		SrcAddr:   d.local.Unmap().AsSlice(),
		Group:     d.remote.Unmap().AsSlice(),
		// Absent means on for IPv4; said here so that both families have a checksum.
		UDPCSum: true,
	})
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("another device of this node has VNI %d on UDP port %d: %w", d.vni, d.port, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("make VXLAN device %s (VNI %d) in %s: %w", d.name, d.vni, p.path, err)
	}
	return nil
}

// ensure makes the device or repairs what can be repaired, and returns it with what
// was changed. names are those it may have, the first one wins; a device of another
// making under any of them is refused. record is the alias the device had before it
// was made again.
func (d device) ensure(p *place, names ...string) (l *netlink.Vxlan, changes []string, alias string, err error) {
	var have netlink.Link
	for _, name := range names {
		if have, err = find(p.handle, name); err != nil {
			return nil, nil, "", err
		}
		if have != nil {
			break
		}
	}
	if have != nil {
		name := have.Attrs().Name
		if why := foreign(have); why != "" {
			return nil, nil, "", refuse(name, p.path, why)
		}
		alias = have.Attrs().Alias
		reason, err := d.needsRecreate(p, have)
		if err != nil {
			return nil, nil, "", err
		}
		if reason != "" {
			if err := p.handle.LinkDel(have); err != nil {
				return nil, nil, "", fmt.Errorf("delete VXLAN device %s: %w", name, err)
			}
			changes = append(changes, fmt.Sprintf("recreate device %s: %s", name, reason))
			have = nil
		}
	}
	if have == nil {
		if err := d.create(p); err != nil {
			return nil, changes, alias, err
		}
		changes = append(changes, "create device "+d.name)
		if have, err = p.handle.LinkByName(d.name); err != nil {
			return nil, changes, alias, fmt.Errorf("find the VXLAN device just made: %w", err)
		}
	}
	if have.Attrs().MTU != d.mtu {
		if err := p.handle.LinkSetMTU(have, d.mtu); err != nil {
			return nil, changes, alias, fmt.Errorf("set MTU %d on %s: %w", d.mtu, have.Attrs().Name, err)
		}
		changes = append(changes, fmt.Sprintf("MTU: %d vs %d", have.Attrs().MTU, d.mtu))
	}
	if d.hwaddr != nil && have.Attrs().HardwareAddr.String() != d.hwaddr.String() {
		if err := p.handle.LinkSetHardwareAddr(have, d.hwaddr); err != nil {
			return nil, changes, alias, fmt.Errorf("set MAC address %s on %s: %w", d.hwaddr, have.Attrs().Name, err)
		}
		changes = append(changes, fmt.Sprintf("MAC address: %s vs %s", have.Attrs().HardwareAddr, d.hwaddr))
	}
	v, ok := have.(*netlink.Vxlan)
	if !ok {
		return nil, changes, alias, refuse(have.Attrs().Name, p.path, "it is a "+have.Type())
	}
	return v, changes, alias, nil
}

// up brings l up and reports whether it was down.
func up(h *netlink.Handle, l netlink.Link) (bool, error) {
	if l.Attrs().Flags&net.FlagUp != 0 {
		return false, nil
	}
	if err := h.LinkSetUp(l); err != nil {
		return false, fmt.Errorf("bring %s up: %w", l.Attrs().Name, err)
	}
	return true, nil
}
