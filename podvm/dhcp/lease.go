// SPDX-License-Identifier: Apache-2.0

package dhcp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// maxRoutes bounds the routes of a lease: more than a cloud gives, and few enough to set.
const maxRoutes = 64

// parse reads an OFFER or ACK. The error says what is wrong with it.
func parse(m *dhcpv4.DHCPv4) (*Lease, error) {
	addr, ok := netip.AddrFromSlice(m.YourIPAddr.To4())
	if !ok || !usable(addr) {
		return nil, fmt.Errorf("it gives the address %s", m.YourIPAddr)
	}
	mask := m.SubnetMask()
	if mask == nil {
		mask = m.YourIPAddr.DefaultMask()
	}
	bits, size := mask.Size()
	if size != 32 {
		return nil, fmt.Errorf("it gives the network mask %s", net.IP(mask))
	}
	server, ok := netip.AddrFromSlice(m.ServerIdentifier().To4())
	if !ok || !usable(server) {
		return nil, errors.New("it does not say which server it is of")
	}
	l := &Lease{Addr: netip.PrefixFrom(addr, bits), Server: server}
	if b := m.Options.Get(dhcpv4.OptionInterfaceMTU); len(b) == 2 {
		if mtu := int(b[0])<<8 | int(b[1]); mtu >= minMTU {
			l.MTU = mtu
		}
	}
	var err error
	if l.Routes, err = routes(m); err != nil {
		return nil, err
	}
	l.times(m)
	return l, nil
}

// usable tells whether a host may have the address.
func usable(a netip.Addr) bool {
	return a.Is4() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// routes reads the classless static routes, or else the routers (RFC 3442: who
// understands the former must ignore the latter).
func routes(m *dhcpv4.DHCPv4) ([]Route, error) {
	var out []Route
	if b := m.Options.Get(dhcpv4.OptionClasslessStaticRoute); b != nil {
		var list dhcpv4.Routes
		if err := list.FromBytes(b); err != nil {
			return nil, fmt.Errorf("its classless static routes: %w", err)
		}
		if len(list) > maxRoutes {
			return nil, fmt.Errorf("it gives %d routes, more than %d", len(list), maxRoutes)
		}
		for _, r := range list {
			dst, ok := netip.AddrFromSlice(r.Dest.IP.To4())
			via, ok2 := netip.AddrFromSlice(r.Router.To4())
			bits, _ := r.Dest.Mask.Size()
			if !ok || !ok2 || !via.IsUnspecified() && !usable(via) {
				return nil, fmt.Errorf("it gives a route to %s by way of %s", r.Dest, r.Router)
			}
			if via.IsUnspecified() {
				via = netip.Addr{} // on link
			}
			out = append(out, Route{Dst: netip.PrefixFrom(dst, bits).Masked(), Via: via})
		}
		return out, nil
	}
	for _, r := range m.Router() {
		if via, ok := netip.AddrFromSlice(r.To4()); ok && usable(via) {
			return []Route{{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Via: via}}, nil
		}
	}
	return nil, nil
}

// times sets how long the lease is for. RFC 2131 4.4.5 has the defaults; T1 and T2 that
// make no sense are treated as not given.
func (l *Lease) times(m *dhcpv4.DHCPv4) {
	l.Time = m.IPAddressLeaseTime(time.Hour)
	if l.Time >= forever || l.Time == 0 {
		l.Time = 0
		return
	}
	l.T1 = m.IPAddressRenewalTime(0)
	l.T2 = m.IPAddressRebindingTime(0)
	if l.T2 <= 0 || l.T2 >= l.Time {
		l.T2 = l.Time * 7 / 8
	}
	if l.T1 <= 0 || l.T1 >= l.T2 {
		l.T1 = l.Time / 2
	}
	if l.T1 >= l.T2 {
		l.T1 = l.T2 / 2
	}
}
