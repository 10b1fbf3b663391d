// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

// forge sends from ns to the VXLAN port of dst an Ethernet frame under vni.
func forge(t *testing.T, ns *nstest.NS, dst netip.Addr, vni uint32, frame []byte) {
	t.Helper()
	header := binary.BigEndian.AppendUint32(nil, 0x08000000) // flag I (RFC 7348 §5)
	header = binary.BigEndian.AppendUint32(header, vni<<8)
	sendUDP(t, ns, dst, append(header, frame...))
}

func sendUDP(t *testing.T, ns *nstest.NS, dst netip.Addr, payload []byte) {
	t.Helper()
	ns.Do(func() error {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, testPort)))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(payload)
		return err
	})
}

// udpFrame is an Ethernet frame with a UDP datagram over IPv4, as the pod would send.
func udpFrame(dstMAC, srcMAC net.HardwareAddr, src, dst netip.AddrPort, data string) []byte {
	udp := binary.BigEndian.AppendUint16(nil, src.Port())
	udp = binary.BigEndian.AppendUint16(udp, dst.Port())
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(data)))
	udp = append(udp, 0, 0) // no checksum
	udp = append(udp, data...)
	ip := []byte{0x45, 0}
	ip = binary.BigEndian.AppendUint16(ip, uint16(20+len(udp)))
	ip = append(ip, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	ip = append(ip, src.Addr().AsSlice()...)
	ip = append(ip, dst.Addr().AsSlice()...)
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum%0xffff))
	return slices.Concat(dstMAC, srcMAC, []byte{8, 0}, ip, udp)
}

// TestInjection: only the pod VM reaches the pod's tunnel on the node, and only under
// its own VNI; only the worker reaches the guest end.
func TestInjection(t *testing.T) {
	for name, underlay6 := range map[string]bool{"underlay IPv4": false, "underlay IPv6": true} {
		t.Run(name, func(t *testing.T) {
			b := newTestbed(t, underlay6)
			b.up()
			// A second tunnel of the node, whose VM is the stranger.
			other := b.node
			other.NetNS, other.Device, other.VNI = b.Peer.Path, "ppvxother", 7
			other.PodHWAddr, other.PodAddrs = b.Peer.Link("eth0").Attrs().HardwareAddr, []netip.Prefix{netip.PrefixFrom(nstest.PeerAddr4, 24)}
			other.Remote = nstest.StrangerUnderlay4
			vm := nstest.VMUnderlay4
			if underlay6 {
				other.Remote, vm = nstest.StrangerUnderlay6, nstest.VMUnderlay6
			}
			b.Node.Do(func() error { return EnsureNode(t.Context(), other) })

			toNode := sink(t, b.Node, nstest.NodeCNI4)
			toPod := sink(t, b.Guest, nstest.PodAddr4)
			nodeAddr := toNode.LocalAddr().(*net.UDPAddr).AddrPort()
			podAddr := toPod.LocalAddr().(*net.UDPAddr).AddrPort()
			podMAC := b.node.PodHWAddr
			fromPod := udpFrame(b.Node.Link("cni0").Attrs().HardwareAddr, podMAC, podAddr, nodeAddr, "from pod")
			toGuest := udpFrame(podMAC, b.Node.Link("cni0").Attrs().HardwareAddr, nodeAddr, podAddr, "to pod")

			for _, c := range []struct {
				name    string
				from    *nstest.NS
				to      netip.Addr
				vni     uint32
				frame   []byte
				sink    *net.UDPConn
				arrives bool
			}{
				{"the VM under its VNI", b.VM, b.node.Local, testVNI, fromPod, toNode, true},
				{"a stranger under the pod's VNI", b.Stranger, b.node.Local, testVNI, fromPod, toNode, false},
				{"the VM under the VNI of another", b.VM, b.node.Local, 7, fromPod, toNode, false},
				{"the VM under a VNI of nobody", b.VM, b.node.Local, 8, fromPod, toNode, false},
				{"another VM under its own VNI", b.Stranger, b.node.Local, 7, fromPod, toNode, true},
				{"the worker to the guest", b.Node, vm, testVNI, toGuest, toPod, true},
				{"a stranger to the guest", b.Stranger, vm, testVNI, toGuest, toPod, false},
			} {
				forge(t, c.from, c.to, c.vni, c.frame)
				within := silenceFor
				if c.arrives {
					within = answerWithin
				}
				_, err := receive(c.sink, within)
				if got := err == nil; got != c.arrives {
					t.Errorf("%s: arrived=%v (%v), want %v", c.name, got, err, c.arrives)
				}
			}
			// Too short for a VNI: dropped like the rest, and nothing breaks.
			before := dropped(t, b.Node)
			sendUDP(t, b.VM, b.node.Local, []byte{8, 0, 0})
			if got := dropped(t, b.Node) - before; got != 1 {
				t.Errorf("a truncated packet: %d dropped, want 1", got)
			}
			if err := ping(t, b.Node, nstest.PodAddr4); err != nil {
				t.Errorf("after all that: %v", err)
			}
		})
	}
}

// TestSourceFilterComesAndGoes: elements of several tunnels, and the table with the
// last of them.
func TestSourceFilterComesAndGoes(t *testing.T) {
	ns := nstest.New(t, "node")
	before := ns.Snapshot()
	sources := []Source{
		{addrOf("10.0.0.1"), 1, 9000},
		{addrOf("10.0.0.1"), 2, 9000},
		{addrOf("fd00::1"), 2, 9001},
		{addrOf("10.0.0.2"), maxVNI, 9000},
	}
	list := func() (out []Source) {
		ns.Do(func() (err error) {
			out, err = ListNode(t.Context())
			return err
		})
		return out
	}
	ns.Do(func() error {
		for _, s := range sources {
			for _, want := range []bool{true, false} {
				changed, err := allowSource(t.Context(), s)
				if err != nil {
					return err
				}
				if changed != want {
					t.Errorf("allow %v: changed=%v, want %v", s, changed, want)
				}
			}
		}
		return nil
	})
	equal := cmp.Comparer(equalAddr)
	if d := cmp.Diff(sources, list(), equal); d != "" {
		t.Errorf("list (-want +got):\n%s", d)
	}
	for len(sources) > 0 {
		ns.Do(func() error { return disallowSource(t.Context(), sources[0]) })
		ns.Do(func() error { return disallowSource(t.Context(), sources[0]) })
		sources = sources[1:]
		if got := list(); len(got) != len(sources) || (len(got) > 0 && !cmp.Equal(sources, got, equal)) {
			t.Errorf("after a removal: %v, want %v", got, sources)
		}
	}
	if d := cmp.Diff(before, ns.Snapshot()); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}
