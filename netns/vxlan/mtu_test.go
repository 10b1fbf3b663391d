// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

// eachPath runs f for every IP version of the pod over every one of the underlay.
func eachPath(t *testing.T, f func(t *testing.T, b *testbed, pod netip.Addr)) {
	for _, underlay6 := range []bool{false, true} {
		for _, pod := range []netip.Addr{nstest.PodAddr4, nstest.PodAddr6} {
			t.Run(fmt.Sprintf("pod %s underlay6=%v", pod, underlay6), func(t *testing.T) {
				b := newTestbed(t, underlay6)
				b.up()
				f(t, b, pod)
			})
		}
	}
}

// udpHeaders is the IP and UDP header together, in bytes.
func udpHeaders(a netip.Addr) int {
	if a.Is4() {
		return 28
	}
	return 48
}

// sink receives UDP on an address of ns.
func sink(t *testing.T, ns *nstest.NS, addr netip.Addr) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	ns.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// dialUDP connects from ns to what s receives on, with the given path MTU discovery.
func dialUDP(t *testing.T, ns *nstest.NS, s *net.UDPConn, discover int) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	ns.Do(func() (err error) {
		c, err = net.DialUDP("udp", nil, s.LocalAddr().(*net.UDPAddr))
		return err
	})
	t.Cleanup(func() { c.Close() })
	level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if s.LocalAddr().(*net.UDPAddr).IP.To4() == nil {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	control(t, c, func(fd int) error { return unix.SetsockoptInt(fd, level, option, discover) })
	return c
}

func control(t *testing.T, c syscall.Conn, f func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil || inner != nil {
		t.Fatal(err, inner)
	}
}

// pathMTU is what the kernel knows of the way of a connected socket to an address.
func pathMTU(t *testing.T, c *net.UDPConn, to netip.Addr) (mtu int) {
	t.Helper()
	level, option := unix.IPPROTO_IP, unix.IP_MTU
	if to.Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	control(t, c, func(fd int) (err error) {
		mtu, err = unix.GetsockoptInt(fd, level, option)
		return err
	})
	return mtu
}

// receive returns the size of the next datagram, an error after the given time.
func receive(s *net.UDPConn, within time.Duration) (int, error) {
	if err := s.SetReadDeadline(time.Now().Add(within)); err != nil {
		return 0, err
	}
	n, _, err := s.ReadFromUDPAddrPort(make([]byte, 65536))
	return n, err
}

// TestTooBigIsAnswered: a datagram that must not be fragmented and is larger than
// the tunnel carries is answered with the right MTU, from the node and from a pod
// beside, and one of exactly that MTU arrives.
func TestTooBigIsAnswered(t *testing.T) {
	eachPath(t, func(t *testing.T, b *testbed, pod netip.Addr) {
		s := sink(t, b.Guest, pod)
		for name, from := range map[string]*nstest.NS{"node": b.Node, "peer": b.Peer} {
			c := dialUDP(t, from, s, unix.IP_PMTUDISC_DO)
			if _, err := c.Write(make([]byte, 1500-udpHeaders(pod))); err != nil {
				t.Fatalf("%s: the first datagram of 1500 bytes: %v", name, err)
			}
			if _, err := receive(c, answerWithin); !errors.Is(err, unix.EMSGSIZE) {
				t.Fatalf("%s: a datagram too large for the tunnel: %v, want %v", name, err, unix.EMSGSIZE)
			}
			if mtu := pathMTU(t, c, pod); mtu != b.node.MTU {
				t.Errorf("%s: path MTU is %d, want %d", name, mtu, b.node.MTU)
			}
			size := b.node.MTU - udpHeaders(pod)
			if _, err := c.Write(make([]byte, size)); err != nil {
				t.Fatalf("%s: a datagram of the path MTU: %v", name, err)
			}
			if n, err := receive(s, answerWithin); n != size || err != nil {
				t.Errorf("%s: received %d bytes, %v; want %d", name, n, err, size)
			}
		}
	})
}

// TestTooBigIsFragmented: a datagram that may be fragmented arrives whole, also one
// whose sender's own fragments are too large. With IPv6 only the sender fragments, so
// the first one teaches it and the second arrives.
func TestTooBigIsFragmented(t *testing.T) {
	eachPath(t, func(t *testing.T, b *testbed, pod netip.Addr) {
		s := sink(t, b.Guest, pod)
		for _, size := range []int{b.node.MTU + 1 - udpHeaders(pod), 1500 - udpHeaders(pod), 5000} {
			c := dialUDP(t, b.Peer, s, unix.IP_PMTUDISC_DONT)
			if pod.Is4() {
				if _, err := c.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				if n, err := receive(s, answerWithin); n != size || err != nil {
					t.Errorf("received %d bytes, %v; want %d", n, err, size)
				}
				continue
			}
			// The answer may come before or after the next datagram leaves.
			var n int
			var err error
			for deadline := time.Now().Add(answerWithin); n != size && time.Now().Before(deadline); {
				if _, err = c.Write(make([]byte, size)); err != nil && !errors.Is(err, unix.EMSGSIZE) {
					t.Fatal(err)
				}
				if n, err = receive(s, silenceFor); err != nil && !isTimeout(err) {
					t.Fatal(err)
				}
			}
			if n != size {
				t.Errorf("received %d bytes, %v; want %d", n, err, size)
			}
		}
	})
}

// TestTooBigPing: the echo request that people try first.
func TestTooBigPing(t *testing.T) {
	eachPath(t, func(t *testing.T, b *testbed, pod netip.Addr) {
		p := newPinger(t, b.Peer, pod.Is6())
		level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
		raw, header := syscall.Conn(nil), 28
		if pod.Is6() {
			level, option, header = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, 48
			raw = p.conn.IPv6PacketConn().PacketConn.(syscall.Conn)
		} else {
			raw = p.conn.IPv4PacketConn().PacketConn.(syscall.Conn)
		}
		control(t, raw, func(fd int) error { return unix.SetsockoptInt(fd, level, option, unix.IP_PMTUDISC_DO) })
		if err := p.ping(pod, b.node.MTU-header); err != nil {
			t.Errorf("echo request of the tunnel's MTU: %v", err)
		}
		err := p.echo(pod, b.node.MTU+1-header)
		for deadline := time.Now().Add(answerWithin); err == nil && time.Now().Before(deadline); {
			err = p.echo(pod, b.node.MTU+1-header) // refused once the answer is in
		}
		if !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("echo request one byte larger than the tunnel's MTU: %v, want %v", err, unix.EMSGSIZE)
		}
	})
}

// TestTCPFindsPathMTU: a guest that announces too large a segment size (as one behind
// a NAT could) gets its data after the ICMP has corrected the sender, whose
// super-packets have segments that do not fit.
func TestTCPFindsPathMTU(t *testing.T) {
	eachPath(t, func(t *testing.T, b *testbed, pod netip.Addr) {
		family, gw := unix.AF_INET, nstest.NodeCNI4
		if pod.Is6() {
			family, gw = unix.AF_INET6, nstest.NodeCNI6
		}
		l := b.Guest.Link("eth0")
		routes, err := b.Guest.Handle.RouteList(l, family)
		if err != nil {
			t.Fatal(err)
		}
		changed := 0
		for _, r := range routes {
			if r.Dst != nil && r.Dst.Contains(gw.AsSlice()) {
				r.AdvMSS = 1500 - udpHeaders(pod) - 12 // TCP's header has 12 bytes more than UDP's
				if err := b.Guest.Handle.RouteReplace(&r); err != nil {
					t.Fatal(err)
				}
				changed++
			}
		}
		if changed == 0 {
			t.Fatalf("no route to %s in %v", gw, routes)
		}
		body := strings.Repeat("x", 2<<20)
		got, err := get(b.Peer, serve(t, b.Guest, pod, "thanks"), bytes.NewReader([]byte(body)))
		if err != nil || got != "thanks" {
			t.Errorf("POST of %d bytes: %q, %v", len(body), got, err)
		}
	})
}

// TestMulticastPasses: what has no path MTU is redirected at any size; the underlay
// fragments it where it can.
func TestMulticastPasses(t *testing.T) {
	for _, underlay6 := range []bool{false, true} {
		b := newTestbed(t, underlay6)
		b.up()
		size := 1500
		if underlay6 {
			size = b.node.MTU // larger ones are lost
		}
		multicast(t, b.Peer, b.Guest, "eth0", "239.1.2.3", size-28)
		multicast(t, b.Guest, b.Peer, "eth0", "239.1.2.3", 1500-28)
		multicast(t, b.Peer, b.Guest, "eth0", "ff02::1:2:3", size-48)
	}
}

// multicast sends a datagram to a group that only the receiver has joined.
func multicast(t *testing.T, from, to *nstest.NS, dev, group string, size int) {
	t.Helper()
	ip := net.ParseIP(group)
	in := func(ns *nstest.NS, f func(*net.Interface) error) {
		t.Helper()
		ns.Do(func() error {
			ifi, err := net.InterfaceByName(dev)
			if err != nil {
				return err
			}
			return f(ifi)
		})
	}
	var s, c *net.UDPConn
	in(to, func(ifi *net.Interface) (err error) {
		s, err = net.ListenMulticastUDP("udp", ifi, &net.UDPAddr{IP: ip, Port: 5353})
		return err
	})
	defer s.Close()
	in(from, func(ifi *net.Interface) (err error) {
		c, err = net.DialUDP("udp", nil, &net.UDPAddr{IP: ip, Port: 5353, Zone: strconv.Itoa(ifi.Index)})
		if err != nil || ip.To4() == nil {
			return err
		}
		// Without it the route decides on the interface.
		return ipv4.NewPacketConn(c).SetMulticastInterface(ifi)
	})
	defer c.Close()
	if _, err := c.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if n, err := receive(s, answerWithin); n != size || err != nil {
		t.Errorf("to %s at %s: received %d bytes, %v; want %d", group, dev, n, err, size)
	}
}

// TestGuestMTU: the smaller of the CNI's and the underlay's less the overhead.
func TestGuestMTU(t *testing.T) {
	for _, c := range []struct {
		cni, underlay int
		underlay6     bool
		want          int
	}{
		{1500, 1500, false, 1450},
		{1500, 1500, true, 1430},
		{1500, 9001, false, 1500},
		{1400, 1460, false, 1400},
		{1400, 1420, true, 1350},
		{9000, 9000, false, 8950},
		{9000, 1450, true, 1380},
		{1500, 1280, false, 1280}, // IPv6's least: the underlay fragments
	} {
		b := newTestbed(t, c.underlay6)
		b.VM.MTU("u0", c.underlay)
		b.guest.Pod.MTU = c.cni
		if err := b.ensureGuest(); err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if got := b.Guest.Link("eth0").Attrs().MTU; got != c.want {
			t.Errorf("%+v: MTU %d", c, got)
		}
	}
}
