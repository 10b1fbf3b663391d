// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

// reach connects from a namespace to a server.
func reach(from *nstest.NS, server string, patience time.Duration) error {
	return from.Try(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", server)
		if err == nil {
			err = c.Close()
		}
		return err
	})
}

// path is a connection that a policy may forbid.
type path struct {
	name   string
	from   *nstest.NS
	server string
}

func (p path) wantOpen(t *testing.T, when string) {
	t.Helper()
	if err := reach(p.from, p.server, answerWithin); err != nil {
		t.Errorf("%s: %s: %v", when, p.name, err)
	}
}

func (p path) wantShut(t *testing.T, when string) {
	t.Helper()
	if err := reach(p.from, p.server, 2*silenceFor); !isTimeout(err) {
		t.Errorf("%s: %s: %v, want a timeout", when, p.name, err)
	}
}

// TestPoliciesBind: what a network policy's implementation drops on the node, by the
// pod's address where packets are forwarded (iptables), or at the pod's veth (BPF at its
// tc hooks), is dropped for the pod in the VM, because all of its traffic passes there.
func TestPoliciesBind(t *testing.T) {
	b := newTestbed(t, false)
	b.up()
	b.Stranger.Route("10.30.0.0/24", nstest.NodeUnderlay4.String(), "u0")
	b.Stranger.Route("fd30::/64", nstest.NodeUnderlay6.String(), "u0")
	for _, f := range []struct {
		command                  string
		pod, peer, node, outside netip.Addr
	}{
		{"iptables", nstest.PodAddr4, nstest.PeerAddr4, nstest.NodeCNI4, nstest.StrangerUnderlay4},
		{"ip6tables", nstest.PodAddr6, nstest.PeerAddr6, nstest.NodeCNI6, nstest.StrangerUnderlay6},
	} {
		serverInPod, serverOutside, second := serve(t, b.Guest, f.pod, "pod"), serve(t, b.Stranger, f.outside, "outside"), serve(t, b.Stranger, f.outside, "second")
		in, out := path{"outside to pod", b.Stranger, serverInPod}, path{"pod to outside", b.Guest, serverOutside}
		other := path{"pod to another port", b.Guest, second}
		_, port, _ := net.SplitHostPort(serverOutside)
		for _, p := range []path{in, out, other} {
			p.wantOpen(t, "before")
		}
		rule := func(command string, match ...string) {
			t.Helper()
			b.Node.Do(func() error {
				out, err := exec.Command(f.command, append([]string{"-w", command, "FORWARD"}, match...)...).CombinedOutput()
				if err != nil {
					return fmt.Errorf("%s: %w: %s", f.command, err, out)
				}
				return nil
			})
		}
		for _, c := range []struct {
			name       string
			match      []string
			open, shut []path
		}{
			{"nothing to the pod", []string{"-d", f.pod.String(), "-j", "DROP"}, nil, []path{in, out}},
			{"nothing from the pod", []string{"-s", f.pod.String(), "-j", "DROP"}, nil, []path{in, out}},
			{"no connections to the pod", []string{"-d", f.pod.String(), "-p", "tcp", "--syn", "-j", "DROP"}, []path{out}, []path{in}},
			{"a port outside is shut", []string{"-s", f.pod.String(), "-p", "tcp", "--dport", port, "-j", "DROP"}, []path{in, other}, []path{out}},
		} {
			rule("-I", c.match...)
			for _, p := range c.open {
				p.wantOpen(t, c.name)
			}
			for _, p := range c.shut {
				p.wantShut(t, c.name)
			}
			rule("-D", c.match...)
			for _, p := range c.shut {
				p.wantOpen(t, c.name+", and taken back")
			}
		}
		atVeth(t, b, path{"peer to pod", b.Peer, serverInPod}, path{"pod to node", b.Guest, serve(t, b.Node, f.node, "node")})
	}
}

// atVeth drops at the tc hooks of the node's end of the pod's veth.
func atVeth(t *testing.T, b *testbed, paths ...path) {
	t.Helper()
	veth, err := b.Node.Handle.LinkByIndex(b.Pod.Link("eth0").Attrs().ParentIndex)
	if err != nil {
		t.Fatal(err)
	}
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: veth.Attrs().Index,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	for hook, parent := range map[string]uint32{"ingress": netlink.HANDLE_MIN_INGRESS, "egress": netlink.HANDLE_MIN_EGRESS} {
		if err := b.Node.Handle.QdiscAdd(qdisc); err != nil {
			t.Fatal(err)
		}
		drop := dropProgram(t)
		err := b.Node.Handle.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: veth.Attrs().Index, Parent: parent, Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL},
			Fd:          int(drop.Fd()), Name: "drop", DirectAction: true,
		})
		drop.Close()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			p.wantShut(t, "dropped at the veth's "+hook)
		}
		if err := b.Node.Handle.QdiscDel(qdisc); err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			p.wantOpen(t, "dropped at the veth's "+hook+" no more")
		}
	}
}

// dropProgram is `return TC_ACT_SHOT`.
func dropProgram(t *testing.T) *os.File {
	t.Helper()
	const progLoad, schedCLS, shot = 5, 3, 2 // linux/bpf.h, linux/pkt_cls.h
	insns, license := &[2][8]byte{{0: 0xb7, 4: shot}, {0: 0x95}}, []byte("Dual MIT/GPL\x00")
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(insns)
	pin.Pin(&license[0])
	attr := &struct {
		progType, count uint32
		insns, license  uint64
		rest            [96]byte
	}{progType: schedCLS, count: uint32(len(insns)), insns: uint64(uintptr(unsafe.Pointer(insns))), license: uint64(uintptr(unsafe.Pointer(&license[0])))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, progLoad, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno != 0 {
		t.Fatalf("load a BPF program: %v", errno)
	}
	return os.NewFile(fd, "bpf "+strconv.Itoa(int(fd)))
}
