// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

const (
	// cniPlugins is where Debian's containernetworking-plugins are.
	cniPlugins = "/usr/lib/cni"

	// limitRate is so low that a busy machine keeps up, in bits per second.
	limitRate = 20_000_000
	// limitBurst is what the bucket holds, in bits: a tenth of a second, to make good
	// for moments in which nobody here got the CPU.
	limitBurst = 2_000_000
	// tolerance of the measured rate against the limit.
	tolerance = 0.10
	// measureFor is long against the burst.
	measureFor = 2 * time.Second
	// measurements are made until one is within the tolerance: a machine that does not
	// get to send for a while makes one too low, and no machine makes one too high.
	measurements = 5
)

// bandwidth runs the CNI plug-in on the pod's interface, as a chain of plug-ins does for
// a pod with kubernetes.io/ingress-bandwidth and egress-bandwidth: a token bucket on the
// node's end of the veth for what goes to the pod, and one on an ifb device, to which
// all that comes from the pod is redirected.
func bandwidth(b *testbed, command string) {
	b.t.Helper()
	port, err := b.Node.Handle.LinkByIndex(b.Pod.Link("eth0").Attrs().ParentIndex)
	if err != nil {
		b.t.Fatal(err)
	}
	conf, err := json.Marshal(map[string]any{
		"cniVersion": "0.4.0", "name": "testbed", "type": "bandwidth",
		"ingressRate": limitRate, "ingressBurst": limitBurst, "egressRate": limitRate, "egressBurst": limitBurst,
		"prevResult": map[string]any{
			"cniVersion": "0.4.0",
			"interfaces": []map[string]any{
				{"name": port.Attrs().Name, "mac": port.Attrs().HardwareAddr.String()},
				{"name": "eth0", "mac": b.node.PodHWAddr.String(), "sandbox": b.Pod.Path},
			},
		},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.Node.Do(func() error {
		cmd := exec.Command(cniPlugins + "/bandwidth")
		cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=pod", "CNI_NETNS=" + b.Pod.Path, "CNI_IFNAME=eth0", "CNI_PATH=" + cniPlugins}
		cmd.Stdin = strings.NewReader(string(conf))
		out, err := cmd.CombinedOutput() // starts it on this thread, in this namespace
		if err != nil {
			return fmt.Errorf("CNI plug-in bandwidth (make setup installs it): %w: %s", err, out)
		}
		return nil
	})
}

// TestBandwidth: the limits of the CNI's bandwidth plug-in hold for the pod in the VM,
// both ways.
func TestBandwidth(t *testing.T) {
	b := newTestbed(t, false)
	b.up()
	bandwidth(b, "ADD")
	shapers := tokenBuckets(t, b.Node)
	if len(shapers) != 2 {
		t.Fatalf("the plug-in made token buckets on %v, want two", shapers)
	}
	for name, p := range map[string]struct {
		from, to *nstest.NS
		addr     netip.Addr
	}{
		"to the pod":         {b.Peer, b.Guest, nstest.PodAddr4},
		"from the pod":       {b.Guest, b.Peer, nstest.PeerAddr4},
		"to the pod, IPv6":   {b.Peer, b.Guest, nstest.PodAddr6},
		"from the pod, IPv6": {b.Guest, b.Peer, nstest.PeerAddr6},
	} {
		t.Run(name, func(t *testing.T) {
			f := startFlow(t, p.from, p.to, p.addr)
			// The bucket is full when the flow begins.
			deadline := time.Now().Add(3 * answerWithin)
			for f.received(t) < 2*limitBurst/8 {
				if time.Now().After(deadline) {
					t.Fatalf("%d bytes have arrived in %v", f.received(t), 3*answerWithin)
				}
				time.Sleep(10 * time.Millisecond)
			}
			var seen []float64
			for range measurements {
				// TCP counts what it carries, the limit what is on the wire.
				segment := float64(b.node.MTU - udpHeaders(p.addr) - 24)
				ratio := f.rate(t) * (segment + float64(udpHeaders(p.addr)) + 24 + 14) / segment / limitRate
				seen = append(seen, ratio)
				if ratio > 1-tolerance && ratio < 1+tolerance {
					t.Logf("%.3f of the limit", ratio)
					return
				}
			}
			t.Errorf("%.3f of the limit, want 1 ± %.2f", seen, tolerance)
		})
	}
	bandwidth(b, "DEL")
}

// tokenBuckets are the devices of ns with one.
func tokenBuckets(t *testing.T, ns *nstest.NS) (on []string) {
	t.Helper()
	links, err := ns.Handle.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		qdiscs, err := ns.Handle.QdiscList(l)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range qdiscs {
			if _, ok := q.(*netlink.Tbf); ok {
				on = append(on, l.Attrs().Name)
			}
		}
	}
	return on
}

// flow is one TCP connection that carries as much as it can.
type flow struct{ receiver *net.TCPConn }

// startFlow runs it until the test ends.
func startFlow(t *testing.T, from, to *nstest.NS, addr netip.Addr) *flow {
	t.Helper()
	var l net.Listener
	to.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	defer l.Close()
	var sender, receiver net.Conn
	from.Do(func() (err error) {
		ctx, cancel := context.WithTimeout(t.Context(), answerWithin)
		defer cancel()
		sender, err = (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		return err
	})
	receiver, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{}, 2)
	go func() {
		block := make([]byte, 1<<16)
		for err := error(nil); err == nil; {
			_, err = sender.Write(block)
		}
		done <- struct{}{}
	}()
	go func() {
		io.Copy(io.Discard, receiver)
		done <- struct{}{}
	}()
	t.Cleanup(func() {
		sender.Close()
		receiver.Close()
		<-done
		<-done
	})
	return &flow{receiver.(*net.TCPConn)}
}

// received is how many bytes have arrived, whether anybody has read them or not.
func (f *flow) received(t *testing.T) (n uint64) {
	t.Helper()
	control(t, f.receiver, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil {
			n = info.Bytes_received
		}
		return err
	})
	return n
}

// rate measures the flow, in bits per second.
func (f *flow) rate(t *testing.T) float64 {
	t.Helper()
	begin, first := time.Now(), f.received(t)
	<-time.After(measureFor)
	last := f.received(t)
	return float64(last-first) * 8 / time.Since(begin).Seconds()
}
