// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/binary"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// verdict is what a filter does with a frame.
type verdict int

const (
	unknown  verdict = iota // an action that none of our filters has
	redirect                // out of the other interface
	copyUp                  // out of the other interface, and up the stack
	passUp                  // up the stack
)

// rule is one u32 filter in comparable form: all keys must match.
type rule struct {
	pref     uint16
	protocol uint16 // ETH_P_*
	keys     []key
	verdict  verdict
	to       int // index of the other interface; 0 for passUp
}

// key compares 32 bits at an offset from the network header.
type key struct {
	off        int32
	mask, want uint32
}

var matchAll = []key{{}}

func (r rule) equal(o rule) bool {
	return r.pref == o.pref && r.protocol == o.protocol && r.verdict == o.verdict && r.to == o.to && slices.Equal(r.keys, o.keys)
}

// podRules are the filters for what arrives at the pod's interface, whose address is
// mac.
func (p Pair) podRules(tunnel int, mac net.HardwareAddr) []rule {
	to := func(pref, protocol uint16, v verdict, keys ...key) rule {
		return rule{pref: pref, protocol: protocol, keys: keys, verdict: v, to: tunnel}
	}
	up := func(pref, protocol uint16, keys ...key) rule {
		return rule{pref: pref, protocol: protocol, keys: keys, verdict: passUp}
	}
	var out []rule
	own := fromOwn(mac)
	if p.IPv4 {
		if own != nil {
			out = append(out, up(prefLarge4, unix.ETH_P_IP, own...))
		}
		out = append(out,
			to(prefNeighbor4, unix.ETH_P_ARP, copyUp, key{4, 0x0000ffff, 2}),          // operation: reply
			to(prefDirect4, unix.ETH_P_IP, redirect, key{16, 0xf0000000, 0xe0000000}), // to 224.0.0.0/4
			to(prefDirect4, unix.ETH_P_IP, redirect, key{16, 0xffffffff, 0xffffffff}), // to 255.255.255.255
			up(prefLarge4, unix.ETH_P_IP, key{0, 0x0000ffff, 0}))                      // BIG TCP: total length 0
		for _, b := range blocksFrom(p.MTU + 1) {
			out = append(out, up(prefLarge4, unix.ETH_P_IP, key{0, b.mask, b.want})) // total length
		}
	}
	if p.IPv6 {
		if own != nil {
			out = append(out, up(prefLarge6, unix.ETH_P_IPV6, own...))
		}
		icmp := key{4, 0x0000ff00, unix.IPPROTO_ICMPV6 << 8} // next header
		out = append(out,
			to(prefNeighbor6, unix.ETH_P_IPV6, copyUp, icmp, key{40, 0xff000000, 136 << 24}), // neighbour advertisement
			to(prefNeighbor6, unix.ETH_P_IPV6, copyUp, icmp, key{40, 0xff000000, 134 << 24}), // router advertisement
			to(prefDirect6, unix.ETH_P_IPV6, redirect, key{8, 0xffc00000, 0xfe800000}),       // from fe80::/10
			to(prefDirect6, unix.ETH_P_IPV6, redirect, key{24, 0xffc00000, 0xfe800000}),      // to fe80::/10
			to(prefDirect6, unix.ETH_P_IPV6, redirect, key{24, 0xff000000, 0xff000000}),      // to ff00::/8
			up(prefLarge6, unix.ETH_P_IPV6, key{4, 0xffff0000, 0}))                           // BIG TCP: payload length 0
		for _, b := range blocksFrom(p.MTU - ipv6Header + 1) {
			out = append(out, up(prefLarge6, unix.ETH_P_IPV6, key{4, b.mask << 16, b.want << 16})) // payload length
		}
	}
	return append(out, rule{pref: prefAll, protocol: unix.ETH_P_ALL, keys: matchAll, verdict: redirect, to: tunnel})
}

// fromOwn matches frames whose sender is mac itself; nil where it is no Ethernet
// address. The Ethernet header ends where the network header begins.
func fromOwn(mac net.HardwareAddr) []key {
	if len(mac) != 6 {
		return nil
	}
	return []key{
		{-8, 0xffffffff, binary.BigEndian.Uint32(mac[:4])},
		{-4, 0xffff0000, uint32(binary.BigEndian.Uint16(mac[4:])) << 16},
	}
}

const ipv6Header = 40 // bytes; the payload length does not count it

// block is a set of 16-bit numbers: those that equal want under mask.
type block struct{ mask, want uint32 }

// blocksFrom returns the blocks that together hold exactly low to 65535: u32 knows no
// comparison but equality under a mask. low is 1 to 65535; there are at most 16.
func blocksFrom(low int) []block {
	var out []block
	for low <= 0xffff {
		size := low & -low
		out = append(out, block{mask: uint32(0x10000-size) & 0xffff, want: uint32(low)})
		low += size
	}
	return out
}

// filter is r as the netlink library wants it, on l.
func (r rule) filter(l netlink.Link) *netlink.U32 {
	f := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: ingressParent, Priority: r.pref, Protocol: r.protocol},
		Sel:         &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL},
	}
	for _, k := range r.keys {
		f.Sel.Keys = append(f.Sel.Keys, netlink.TcU32Key{Off: k.off, Mask: k.mask, Val: k.want})
	}
	f.Sel.Keys = slices.Clip(f.Sel.Keys) // the library serialises up to the capacity
	f.Sel.Nkeys = uint8(len(f.Sel.Keys))
	switch r.verdict {
	case redirect:
		f.Actions = []netlink.Action{&netlink.MirredAction{ActionAttrs: netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN},
			MirredAction: netlink.TCA_EGRESS_REDIR, Ifindex: r.to}}
	case copyUp:
		f.Actions = []netlink.Action{&netlink.MirredAction{ActionAttrs: netlink.ActionAttrs{Action: netlink.TC_ACT_OK},
			MirredAction: netlink.TCA_EGRESS_MIRROR, Ifindex: r.to}}
	case passUp:
		f.ClassId = classID
	}
	return f
}

// ruleOf is the reverse of filter. What filter cannot make is unknown.
func ruleOf(f *netlink.U32) rule {
	r := rule{pref: f.Priority, protocol: f.Protocol}
	for _, k := range f.Sel.Keys {
		r.keys = append(r.keys, key{k.Off, k.Mask, k.Val})
	}
	switch {
	case len(f.Actions) == 0 && f.ClassId == classID:
		r.verdict = passUp
	case len(f.Actions) == 1:
		m, ok := f.Actions[0].(*netlink.MirredAction)
		if !ok {
			break
		}
		r.to = m.Ifindex
		switch {
		case m.MirredAction == netlink.TCA_EGRESS_REDIR && m.Action == netlink.TC_ACT_STOLEN:
			r.verdict = redirect
		case m.MirredAction == netlink.TCA_EGRESS_MIRROR && m.Action == netlink.TC_ACT_OK:
			r.verdict = copyUp
		}
	}
	return r
}
