// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
)

const (
	testVNI  = 0x012345
	testPort = 9000
	testDev  = "ppvx12345"

	// answerWithin bounds the wait for a packet that must come: far above what a busy
	// machine needs, and never spent when the test passes.
	answerWithin = 10 * time.Second
	// silenceFor is how long a packet that must not come is waited for. Packets of a
	// veth path arrive before the sender's system call returns, or microseconds later.
	silenceFor = 150 * time.Millisecond
)

// testbed is a topology with the description of a tunnel through it.
type testbed struct {
	*nstest.Topology
	t     *testing.T
	node  NodeTunnel
	guest GuestTunnel
	// Those of the pod's further interfaces.
	moreNodes  []NodeTunnel
	moreGuests []GuestTunnel
}

func (b *testbed) nodes() []NodeTunnel   { return append([]NodeTunnel{b.node}, b.moreNodes...) }
func (b *testbed) guests() []GuestTunnel { return append([]GuestTunnel{b.guest}, b.moreGuests...) }

// newTestbed makes no tunnel yet.
func newTestbed(t *testing.T, underlay6 bool) *testbed {
	t.Helper()
	top := nstest.NewTopology(t)
	// As some distributions have it: what goes up the stack must pass this too.
	top.Pod.Sysctl("ipv4/conf/all/rp_filter", "1")
	pods, err := netns.Inspect(t.Context(), top.Pod.Path)
	if err != nil {
		t.Fatal(err)
	}
	pod := pods.Interfaces[0]
	local, remote := nstest.NodeUnderlay4, nstest.VMUnderlay4
	if underlay6 {
		local, remote = nstest.NodeUnderlay6, nstest.VMUnderlay6
	}
	b := &testbed{Topology: top, t: t}
	b.node = NodeTunnel{
		NetNS: top.Pod.Path, Device: testDev, VNI: testVNI, Port: testPort, Local: local, Remote: remote,
		MTU: min(pod.MTU, 1500-Overhead(remote)), PodInterface: pod.Name, PodAddrs: pod.Addrs, PodHWAddr: pod.HWAddr,
	}
	b.guest = GuestTunnel{NetNS: top.Guest.Path, Device: "vxlan0", VNI: testVNI, Port: testPort, Remote: local, Pod: pod}
	return b
}

func (b *testbed) ensureNode() ([]string, error) {
	var changes []string
	err := b.Node.Try(func() (err error) {
		changes, err = ReconcileNode(b.t.Context(), b.nodes()...)
		return err
	})
	return changes, err
}

func (b *testbed) removeNode() error {
	return b.Node.Try(func() error { return RemoveNode(context.Background(), b.nodes()...) })
}

func (b *testbed) ensureGuest() error {
	return b.VM.Try(func() error { return EnsureGuest(b.t.Context(), b.guests()...) })
}

// up makes both ends.
func (b *testbed) up() {
	b.t.Helper()
	if _, err := b.ensureNode(); err != nil {
		b.t.Fatal(err)
	}
	if err := b.ensureGuest(); err != nil {
		b.t.Fatal(err)
	}
}

// serve answers HTTP with body on an address of ns until the test ends.
func serve(t *testing.T, ns *nstest.NS, addr netip.Addr, body string) string {
	t.Helper()
	return serveTo(t, ns, addr, body, func(r io.Reader) { io.Copy(io.Discard, r) })
}

// serveTo is serve that gives what is posted to take.
func serveTo(t *testing.T, ns *nstest.NS, addr netip.Addr, body string, take func(io.Reader)) string {
	t.Helper()
	var l net.Listener
	ns.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		take(r.Body)
		io.WriteString(w, body)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return l.Addr().String()
}

// get fetches from ns and returns the body. It sends post if that is not nil.
func get(ns *nstest.NS, addr string, post io.Reader) (string, error) {
	dial := func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = ns.Try(func() error {
			c, err = (&net.Dialer{Timeout: answerWithin}).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: 4 * answerWithin}
	var resp *http.Response
	var err error
	if post == nil {
		resp, err = client.Get("http://" + addr)
	} else {
		resp, err = client.Post("http://"+addr, "application/octet-stream", post)
	}
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// pinger sends echo requests from a namespace.
type pinger struct {
	conn *icmp.PacketConn
	v6   bool
	seq  int
}

func newPinger(t *testing.T, ns *nstest.NS, v6 bool) *pinger {
	t.Helper()
	p := &pinger{v6: v6}
	ns.Do(func() (err error) {
		if v6 {
			p.conn, err = icmp.ListenPacket("ip6:ipv6-icmp", "::")
		} else {
			p.conn, err = icmp.ListenPacket("ip4:icmp", "0.0.0.0")
		}
		return err
	})
	t.Cleanup(func() { p.conn.Close() })
	return p
}

// echo sends one echo request with size bytes of data to addr.
func (p *pinger) echo(addr netip.Addr, size int) error {
	p.seq++
	msg := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: p.seq, Data: make([]byte, size)}}
	if p.v6 {
		msg.Type = ipv6.ICMPTypeEchoRequest
	}
	b, err := msg.Marshal(nil)
	if err != nil {
		return err
	}
	_, err = p.conn.WriteTo(b, &net.IPAddr{IP: addr.AsSlice()})
	return err
}

// ping is echo that waits for the reply.
func (p *pinger) ping(addr netip.Addr, size int) error {
	if err := p.echo(addr, size); err != nil {
		return err
	}
	proto, reply := 1, icmp.Type(ipv4.ICMPTypeEchoReply)
	if p.v6 {
		proto, reply = 58, ipv6.ICMPTypeEchoReply
	}
	if err := p.conn.SetReadDeadline(time.Now().Add(answerWithin)); err != nil {
		return err
	}
	buf := make([]byte, 65536)
	for {
		n, from, err := p.conn.ReadFrom(buf)
		if err != nil {
			return fmt.Errorf("no reply from %s: %w", addr, err)
		}
		m, err := icmp.ParseMessage(proto, buf[:n])
		if err != nil {
			continue
		}
		echo, ok := m.Body.(*icmp.Echo)
		if ok && m.Type == reply && echo.Seq == p.seq && from.String() == addr.String() {
			if len(echo.Data) != size {
				return fmt.Errorf("reply has %d bytes, not %d", len(echo.Data), size)
			}
			return nil
		}
	}
}

// ping is one ping of 56 bytes, or less.
func ping(t *testing.T, ns *nstest.NS, addr netip.Addr) error {
	t.Helper()
	return newPinger(t, ns, addr.Is6()).ping(addr, 56)
}

// isTimeout reports that a deadline passed.
func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func addrOf(s string) netip.Addr { return netip.MustParseAddr(s) }

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func equalAddr(a, b netip.Addr) bool     { return a == b }
func equalPrefix(a, b netip.Prefix) bool { return a == b }

// dropped is the counter of the source filter in ns.
func dropped(t *testing.T, ns *nstest.NS) (n uint64) {
	t.Helper()
	ns.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		table := &nftables.Table{Name: sourceTable, Family: nftables.TableFamilyINet}
		rules, err := c.GetRules(table, &nftables.Chain{Name: sourceChain, Table: table})
		for _, r := range rules {
			for _, e := range r.Exprs {
				if counter, ok := e.(*expr.Counter); ok {
					n += counter.Packets
				}
			}
		}
		return err
	})
	return n
}
