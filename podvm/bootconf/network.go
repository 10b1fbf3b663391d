// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"net"
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Ethernet is one network interface of the VM and what it gets.
type Ethernet struct {
	ID       string           // the document's name for it
	HWAddr   net.HardwareAddr // the interface with this address is meant
	MTU      int              // bytes; 0: the driver's
	Addrs    []netip.Prefix
	Routes   []Route
	Gateway  netip.Addr // IPv4 default gateway; invalid: none
	Gateway6 netip.Addr // IPv6 default gateway; invalid: none
}

// Route is one route of an Ethernet.
type Route struct {
	Dst netip.Prefix
	Via netip.Addr // invalid: on link
}

// netplan is the part of network configuration version 2 that is understood.
// https://cloudinit.readthedocs.io/en/latest/reference/network-config-format-v2.html
type netplan struct {
	Version   *int                 `yaml:"version"`
	Ethernets map[string]netplanIf `yaml:"ethernets"`
}

type netplanIf struct {
	Match struct {
		MACAddress string `yaml:"macaddress"`
	} `yaml:"match"`
	Addresses []string `yaml:"addresses"`
	Gateway4  string   `yaml:"gateway4"`
	Gateway6  string   `yaml:"gateway6"`
	MTU       *int     `yaml:"mtu"`
	DHCP4     bool     `yaml:"dhcp4"`
	DHCP6     bool     `yaml:"dhcp6"`
	Routes    []struct {
		To  string `yaml:"to"`
		Via string `yaml:"via"`
	} `yaml:"routes"`
}

const (
	// minMTU is IPv4's smallest, RFC 791.
	minMTU = 68
	// maxMTU is what a virtio-net device can have.
	maxMTU = 65535
)

// ParseNetworkConfig reads a network configuration of version 2 with static
// addresses. The interfaces are sorted by id. InvalidArgument names the key.
func ParseNetworkConfig(doc []byte) ([]Ethernet, error) {
	if len(doc) > MaxDocument {
		return nil, invalid("the document has %d bytes, more than %d", len(doc), MaxDocument)
	}
	n, plain := plainNetwork(doc)
	if !plain {
		n = netplan{}
		if err := decodeStrict(doc, &n); err != nil {
			return nil, err
		}
	}
	switch {
	case n.Version == nil:
		return nil, invalid("version is missing")
	case *n.Version != 2:
		return nil, invalid("version is %d, want 2", *n.Version)
	case len(n.Ethernets) == 0:
		return nil, invalid("ethernets is missing")
	}
	var out []Ethernet
	for id, c := range n.Ethernets {
		e, err := c.parse(id)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b Ethernet) int { return strings.Compare(a.ID, b.ID) })
	for i, e := range out {
		for _, o := range out[:i] {
			if slices.Equal(o.HWAddr, e.HWAddr) {
				return nil, invalid("ethernets.%s.match.macaddress is that of ethernets.%s", e.ID, o.ID)
			}
		}
	}
	return out, nil
}

func (c netplanIf) parse(id string) (Ethernet, error) {
	e := Ethernet{ID: id}
	bad := func(key, format string, a ...any) (Ethernet, error) {
		return Ethernet{}, invalid("ethernets.%s.%s "+format, append([]any{id, key}, a...)...)
	}
	if c.DHCP4 || c.DHCP6 {
		return bad("dhcp4", "or dhcp6 is set: give addresses, or no network configuration at all, which has DHCP give one to the first interface")
	}
	mac, err := net.ParseMAC(c.Match.MACAddress)
	if err != nil || len(mac) != 6 {
		return bad("match.macaddress", "%q is not a MAC address", c.Match.MACAddress)
	}
	e.HWAddr = mac
	if c.MTU != nil {
		if e.MTU = *c.MTU; e.MTU < minMTU || e.MTU > maxMTU {
			return bad("mtu", "is %d, want %d to %d", e.MTU, minMTU, maxMTU)
		}
	}
	if len(c.Addresses) == 0 {
		return bad("addresses", "is missing")
	}
	for _, a := range c.Addresses {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			return bad("addresses", "has %q, want an address with a prefix length", a)
		}
		e.Addrs = append(e.Addrs, p)
	}
	gateway := func(s string, is4 bool) (netip.Addr, bool) {
		if s == "" {
			return netip.Addr{}, true
		}
		a, err := netip.ParseAddr(s)
		return a, err == nil && a.Is4() == is4
	}
	var ok bool
	if e.Gateway, ok = gateway(c.Gateway4, true); !ok {
		return bad("gateway4", "%q is not an IPv4 address", c.Gateway4)
	}
	if e.Gateway6, ok = gateway(c.Gateway6, false); !ok {
		return bad("gateway6", "%q is not an IPv6 address", c.Gateway6)
	}
	for _, r := range c.Routes {
		dst, via, reason := parseRoute(r.To, r.Via)
		if reason != "" {
			return bad("routes", "%s", reason)
		}
		e.Routes = append(e.Routes, Route{Dst: dst, Via: via})
	}
	return e, nil
}

// parseRoute reads "to", a prefix or "default", and "via"; a reason means it cannot.
func parseRoute(to, via string) (dst netip.Prefix, gw netip.Addr, reason string) {
	var err error
	if via != "" {
		if gw, err = netip.ParseAddr(via); err != nil {
			return dst, gw, "has via " + quote(via) + ", want an address"
		}
	}
	switch {
	case to != "default":
		if dst, err = netip.ParsePrefix(to); err != nil {
			return dst, gw, "has to " + quote(to) + ", want a prefix or default"
		}
		dst = dst.Masked()
	case !gw.IsValid():
		return dst, gw, "has a default route without via"
	case gw.Is4():
		dst = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	default:
		dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if gw.IsValid() && gw.Is4() != dst.Addr().Is4() {
		return dst, gw, "mixes IPv4 and IPv6 in to " + quote(to) + " via " + quote(via)
	}
	return dst, gw, ""
}

func quote(s string) string { return `"` + s + `"` }

// maxHostname is the kernel's, sethostname(2).
const maxHostname = 64

// isHostname takes letters, digits, and between them dots and dashes.
func isHostname(s string) bool {
	if s == "" || len(s) > maxHostname || strings.Trim(s, "-.") != s {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.')
	})
}

// ParseMetaData returns local-hostname from a NoCloud meta-data document, or the
// empty string. Other keys differ from cloud to cloud and are ignored.
func ParseMetaData(doc []byte) (hostname string, err error) {
	var m struct {
		Hostname string `yaml:"local-hostname"`
	}
	if len(doc) > MaxDocument {
		return "", invalid("the document has %d bytes, more than %d", len(doc), MaxDocument)
	}
	var plain bool
	if m.Hostname, plain = plainHostname(doc); !plain {
		m.Hostname = ""
		if err := yaml.Unmarshal(doc, &m); err != nil {
			return "", invalid("%s", yamlReason(err))
		}
	}
	if m.Hostname != "" && !isHostname(m.Hostname) {
		return "", invalid("local-hostname %q is not a host name", m.Hostname)
	}
	return m.Hostname, nil
}
