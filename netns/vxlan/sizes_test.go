// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

// sizes are the MTUs of the CNI's network and of the one between node and VM.
type sizes struct {
	cni, underlay int
	underlay6     bool
	want          int // of the tunnel
}

// newSizedTestbed is newTestbed with these MTUs.
func newSizedTestbed(t *testing.T, s sizes) *testbed {
	t.Helper()
	b := newTestbed(t, s.underlay6)
	b.UnderlayMTU(s.underlay)
	b.CNIMTU(s.cni)
	b.guest.Pod.MTU = s.cni
	b.node.MTU = CarriedMTU(s.cni, s.underlay, b.node.Remote, b.node.PodAddrs)
	return b
}

// TestSizes: on small, ordinary and jumbo networks a pod gets what fits the tunnel, what
// is larger is answered with the MTU that fits or fragmented, and TCP is whole both ways
// though its senders begin with the CNI's MTU.
func TestSizes(t *testing.T) {
	for _, s := range []sizes{
		{9000, 1500, false, 1450},
		{9000, 1500, true, 1430},
		{9000, 9000, false, 8950},
		{9000, 9001, true, 8931},
		{1500, 9000, false, 1500},
		{1500, 1450, false, 1400},
		{1500, 1450, true, 1380},
		{1500, 1360, true, 1290},
		{1500, 1280, false, 1280}, // 1230 fits, IPv6 wants 1280: the underlay fragments
	} {
		t.Run(fmt.Sprintf("CNI %d, underlay %d, IPv6 %v", s.cni, s.underlay, s.underlay6), func(t *testing.T) {
			b := newSizedTestbed(t, s)
			b.up()
			if b.node.MTU != s.want || b.Guest.Link("eth0").Attrs().MTU != s.want || b.Pod.Link(testDev).Attrs().MTU != s.want {
				t.Errorf("MTU %d wanted of the node, which has %d; the guest has %d; want %d",
					b.node.MTU, b.Pod.Link(testDev).Attrs().MTU, b.Guest.Link("eth0").Attrs().MTU, s.want)
			}
			for _, pod := range []netip.Addr{nstest.PodAddr4, nstest.PodAddr6} {
				t.Run(pod.String(), func(t *testing.T) { b.sized(t, s, pod) })
			}
		})
	}
}

// sized checks one address of the pod.
func (b *testbed) sized(t *testing.T, s sizes, pod netip.Addr) {
	peer := nstest.PeerAddr4
	if pod.Is6() {
		peer = nstest.PeerAddr6
	}
	in := sink(t, b.Guest, pod)
	c := dialUDP(t, b.Peer, in, unix.IP_PMTUDISC_DO)
	if s.cni > s.want {
		if _, err := c.Write(make([]byte, s.cni-udpHeaders(pod))); err != nil {
			t.Fatal(err)
		}
		if _, err := receive(c, answerWithin); !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("a datagram of %d bytes: %v, want %v", s.cni, err, unix.EMSGSIZE)
		}
		if mtu := pathMTU(t, c, pod); mtu != s.want {
			t.Errorf("path MTU %d, want %d", mtu, s.want)
		}
	}
	out := sink(t, b.Peer, peer)
	for name, p := range map[string]struct{ from, to *net.UDPConn }{
		"to the pod":   {c, in},
		"from the pod": {dialUDP(t, b.Guest, out, unix.IP_PMTUDISC_DO), out},
	} {
		size := s.want - udpHeaders(pod)
		if _, err := p.from.Write(make([]byte, size)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if n, err := receive(p.to, answerWithin); n != size || err != nil {
			t.Errorf("%s: a datagram of the tunnel's MTU: %d bytes, %v; want %d", name, n, err, size)
		}
	}
	b.announceLarge(t, s.cni, pod)
	sent := make([]byte, 2<<20)
	rand.NewChaCha8([32]byte{byte(s.cni)}).Read(sent)
	for name, p := range map[string]struct {
		from, to *nstest.NS
		addr     netip.Addr
	}{"to the pod": {b.Peer, b.Guest, pod}, "from the pod": {b.Guest, b.Peer, peer}} {
		got := make(chan [sha256.Size]byte, 1)
		addr := hashing(t, p.to, p.addr, got)
		if _, err := get(p.from, addr, bytes.NewReader(sent)); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if <-got != sha256.Sum256(sent) {
			t.Errorf("%s: %d bytes arrived changed", name, len(sent))
		}
	}
}

// announceLarge lets the guest announce segments as large as the CNI's MTU, so that the
// sender has to be told better.
func (b *testbed) announceLarge(t *testing.T, mtu int, pod netip.Addr) {
	t.Helper()
	family, near := unix.AF_INET, nstest.PeerAddr4
	if pod.Is6() {
		family, near = unix.AF_INET6, nstest.PeerAddr6
	}
	routes, err := b.Guest.Handle.RouteList(b.Guest.Link("eth0"), family)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.Contains(near.AsSlice()) {
			r.AdvMSS = mtu - udpHeaders(pod) - 12 // TCP's header has 12 bytes more than UDP's
			if err := b.Guest.Handle.RouteReplace(&r); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no route to %s in %v", near, routes)
}

// hashing is serve that tells the hash of what was posted.
func hashing(t *testing.T, ns *nstest.NS, addr netip.Addr, got chan<- [sha256.Size]byte) string {
	t.Helper()
	return serveTo(t, ns, addr, "thanks", func(r io.Reader) {
		h := sha256.New()
		io.Copy(h, r)
		got <- [sha256.Size]byte(h.Sum(nil))
	})
}

// TestTooSmallForIPv6: an underlay of IPv6 that cannot carry what the pod's IPv6 asks for
// is refused with both figures; a pod of IPv4 runs on it.
func TestTooSmallForIPv6(t *testing.T) {
	b := newSizedTestbed(t, sizes{cni: 1500, underlay: 1280, underlay6: true})
	if _, err := b.ensureNode(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("node: %v, want InvalidArgument", err)
	}
	if err := b.ensureGuest(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("guest: %v, want InvalidArgument", err)
	}
	b.node.PodAddrs = podFamilies["IPv4"]
	b.guest.Pod.Addrs = podFamilies["IPv4"]
	b.guest.Pod.Routes = nil
	b.node.MTU = CarriedMTU(1500, 1280, b.node.Remote, b.node.PodAddrs)
	b.up()
	if got := b.Guest.Link("eth0").Attrs().MTU; got != 1210 {
		t.Errorf("MTU %d, want 1210", got)
	}
}
