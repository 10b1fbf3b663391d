// SPDX-License-Identifier: Apache-2.0

package vxlan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
)

func (b *testbed) snapshots() string {
	return "node\n" + b.Node.Snapshot() + "\npod\n" + b.Pod.Snapshot()
}

// podFamilies are what the pod may have, by name.
var podFamilies = map[string][]netip.Prefix{
	"IPv4":       {netip.MustParsePrefix("10.30.0.5/24")},
	"IPv6":       {netip.MustParsePrefix("fd30::5/64")},
	"dual stack": {netip.MustParsePrefix("10.30.0.5/24"), netip.MustParsePrefix("fd30::5/64")},
}

// TestEnsureTwiceRemoveTwice: the second Ensure changes nothing, ifindex included,
// and Remove leaves both namespaces as they were, once or twice.
func TestEnsureTwiceRemoveTwice(t *testing.T) {
	for name, addrs := range podFamilies {
		t.Run(name, func(t *testing.T) {
			b := newTestbed(t, false)
			b.node.PodAddrs = addrs
			before := b.snapshots()
			if changes, err := b.ensureNode(); err != nil || len(changes) == 0 {
				t.Fatal(changes, err)
			}
			between := b.snapshots()
			changes, err := b.ensureNode()
			if err != nil || len(changes) != 0 {
				t.Errorf("second Ensure changed %q, %v", changes, err)
			}
			if d := cmp.Diff(between, b.snapshots()); d != "" {
				t.Errorf("second Ensure (-before +after):\n%s", d)
			}
			for range 2 {
				if err := b.removeNode(); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, b.snapshots()); d != "" {
					t.Errorf("after Remove (-before +after):\n%s", d)
				}
			}
		})
	}
}

// TestRemoveKeepsFormerState: values, a qdisc and a filter that were there before
// Ensure are there after Remove, and the filter has the first word in between.
func TestRemoveKeepsFormerState(t *testing.T) {
	b := newTestbed(t, false)
	b.Pod.Sysctl("ipv4/conf/eth0/forwarding", "1")
	b.Pod.Sysctl("ipv6/conf/eth0/accept_ra", "1")
	eth0 := b.Pod.Link("eth0")
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: eth0.Attrs().Index,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := b.Pod.Handle.QdiscAdd(qdisc); err != nil {
		t.Fatal(err)
	}
	if err := b.Pod.Handle.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: eth0.Attrs().Index, Parent: 0xfffffff2, Priority: 5, Protocol: unix.ETH_P_ALL},
		ClassId:     netlink.MakeHandle(1, 7),
		Sel:         &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: 1, Keys: []netlink.TcU32Key{{Mask: 0xff, Val: 0x12, Off: 8}}},
	}); err != nil {
		t.Fatal(err)
	}
	before := b.snapshots()
	b.up()
	if !strings.Contains(b.Pod.Snapshot(), "filter eth0 5 ") {
		t.Error("the foreign filter is gone after Ensure")
	}
	if err := ping(t, b.Node, nstest.PodAddr4); err != nil {
		t.Error(err)
	}
	if err := b.removeNode(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, b.snapshots()); d != "" {
		t.Errorf("after Remove (-before +after):\n%s", d)
	}
}

// damages are what may be missing of the node end.
var damages = map[string]func(b *testbed) error{
	"device gone": func(b *testbed) error { return b.Pod.Handle.LinkDel(b.Pod.Link(testDev)) },
	"device down": func(b *testbed) error { return b.Pod.Handle.LinkSetDown(b.Pod.Link(testDev)) },
	"record gone with everything after it": func(b *testbed) error {
		if err := b.removeNode(); err != nil {
			return err
		}
		p, err := openPlaceIn(b)
		if err != nil {
			return err
		}
		defer p.close()
		return b.Node.Try(func() error {
			return device{name: testDev, vni: testVNI, port: testPort, local: b.node.Local, remote: b.node.Remote, mtu: b.node.MTU}.create(p)
		})
	},
	"qdisc of the pod gone":    func(b *testbed) error { return dropQdisc(b.Pod, "eth0") },
	"qdisc of the device gone": func(b *testbed) error { return dropQdisc(b.Pod, testDev) },
	"rules gone": func(b *testbed) error {
		return errors.Join(removeRules(b.Pod.Handle, unix.AF_INET), removeRules(b.Pod.Handle, unix.AF_INET6))
	},
	"moving of rule local cut short": func(b *testbed) error {
		return errors.Join(b.Pod.Handle.RuleAdd(firstLocal(unix.AF_INET)), b.Pod.Handle.RuleAdd(firstLocal(unix.AF_INET6)))
	},
	"source filter flushed": func(b *testbed) error { return b.Node.Try(flushTables) },
	"marks flushed":         func(b *testbed) error { return b.Pod.Try(flushTables) },
	"sysctls back": func(b *testbed) error {
		b.Pod.Sysctl("ipv4/conf/eth0/forwarding", "0")
		b.Pod.Sysctl("ipv6/conf/all/forwarding", "0")
		return nil
	},
}

// TestRepair: whatever part of the node end is missing, as after a crash in the
// middle or another's clean-up, Ensure makes it again and Remove still leaves nothing.
func TestRepair(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			b := newTestbed(t, false)
			before := b.snapshots()
			b.up()
			if err := damage(b); err != nil {
				t.Fatal(err)
			}
			if changes, err := b.ensureNode(); err != nil || len(changes) == 0 {
				t.Fatalf("repair: %q, %v", changes, err)
			}
			for _, addr := range []netip.Addr{nstest.PodAddr4, nstest.PodAddr6} {
				if err := ping(t, b.Node, addr); err != nil {
					t.Error(err)
				}
				s := sink(t, b.Guest, addr)
				c := dialUDP(t, b.Node, s, unix.IP_PMTUDISC_DO)
				if _, err := c.Write(make([]byte, 1500-udpHeaders(addr))); err != nil {
					t.Fatal(err)
				}
				if _, err := receive(c, answerWithin); !errors.Is(err, unix.EMSGSIZE) {
					t.Errorf("too large a datagram to %s: %v, want %v", addr, err, unix.EMSGSIZE)
				}
			}
			if changes, err := b.ensureNode(); err != nil || len(changes) != 0 {
				t.Errorf("Ensure after repair changed %q, %v", changes, err)
			}
			if err := b.removeNode(); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(before, b.snapshots()); d != "" {
				t.Errorf("after Remove (-before +after):\n%s", d)
			}
			// The same damage, but straight to Remove.
			if _, err := b.ensureNode(); err != nil {
				t.Fatal(err)
			}
			if err := damage(b); err != nil {
				t.Fatal(err)
			}
			if err := b.removeNode(); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(before, b.snapshots()); d != "" {
				t.Errorf("after damage and Remove (-before +after):\n%s", d)
			}
		})
	}
}

// countdown is a context that is done after it has been asked n times.
type countdown struct {
	context.Context
	n int
}

func (c *countdown) Err() error {
	if c.n--; c.n < 0 {
		return context.Canceled
	}
	return nil
}

// TestCutShort: Ensure is cut short at each place where it looks at its context; then
// Remove leaves nothing, and Ensure goes on from there.
func TestCutShort(t *testing.T) {
	b := newTestbed(t, false)
	before := b.snapshots()
	cuts := 0
	for n := 0; ; n++ {
		ensure := func() error {
			return b.Node.Try(func() error { return EnsureNode(&countdown{t.Context(), n}, b.node) })
		}
		err := ensure()
		if err == nil {
			break
		}
		cuts++
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("cut %d: %v", n, err)
		}
		if err := b.removeNode(); err != nil {
			t.Fatalf("cut %d: %v", n, err)
		}
		if d := cmp.Diff(before, b.snapshots()); d != "" {
			t.Errorf("cut %d and Remove (-before +after):\n%s", n, d)
		}
		if err := ensure(); !errors.Is(err, context.Canceled) {
			t.Fatalf("cut %d again: %v", n, err)
		}
		if _, err := b.ensureNode(); err != nil {
			t.Fatalf("cut %d: %v", n, err)
		}
		if changes, err := b.ensureNode(); err != nil || len(changes) != 0 {
			t.Errorf("cut %d and Ensure twice: %q, %v", n, changes, err)
		}
		if err := b.removeNode(); err != nil {
			t.Fatalf("cut %d: %v", n, err)
		}
		if d := cmp.Diff(before, b.snapshots()); d != "" {
			t.Errorf("cut %d, Ensure and Remove (-before +after):\n%s", n, d)
		}
	}
	if cuts < 5 {
		t.Errorf("only %d cuts: the test does not reach into EnsureNode", cuts)
	}
}

// TestRecreate: a fixed attribute makes the device anew and the reason is told; the
// MTU does not.
func TestRecreate(t *testing.T) {
	b := newTestbed(t, false)
	before := b.snapshots()
	b.up()
	index := func() int { return b.Pod.Link(testDev).Attrs().Index }
	old := index()
	b.node.MTU = 1400
	changes, err := b.ensureNode()
	if err != nil || index() != old || len(changes) == 0 || b.Pod.Link(testDev).Attrs().MTU != 1400 {
		t.Errorf("new MTU: ifindex %d, was %d; %q, %v", index(), old, changes, err)
	}
	b.node.Remote = nstest.StrangerUnderlay4
	b.guest.Remote = nstest.NodeUnderlay4
	changes, err = b.ensureNode()
	want := "recreate device ppvx12345: remote address: 10.20.0.2 vs 10.20.0.3"
	if err != nil || !strings.Contains(strings.Join(changes, "\n"), want) {
		t.Errorf("new remote address: %q, %v; want %q", changes, err, want)
	}
	b.Stranger.Do(func() error { return EnsureGuest(t.Context(), b.guest) })
	if err := b.removeNode(); err != nil {
		t.Fatal(err)
	}
	// The former VM's element is the caller's to remove, under its own record.
	b.node.Remote = nstest.VMUnderlay4
	if err := b.removeNode(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, b.snapshots()); d != "" {
		t.Errorf("after Remove (-before +after):\n%s", d)
	}
}

// TestForeignDevice: a device of our name that we did not make, or a VNI in use, is
// refused by name and difference and left alone, also by Remove.
func TestForeignDevice(t *testing.T) {
	for name, c := range map[string]struct {
		make func(b *testbed) error
		want []string
	}{
		"bridge": {func(b *testbed) error { b.Pod.Bridge(testDev); return nil }, []string{testDev, "it is a bridge, not a vxlan"}},
		"vxlan as ours, but not made by us": {func(b *testbed) error {
			return b.Pod.Handle.LinkAdd(strangersVXLAN(testDev))
		}, []string{testDev, "its group is 0"}},
		"name taken on the node": {func(b *testbed) error { b.Node.Bridge(testDev); return nil }, []string{testDev, "bridge"}},
		"VNI taken": {func(b *testbed) error {
			return b.Node.Handle.LinkAdd(strangersVXLAN("other"))
		}, []string{"VNI 74565 on UDP port 9000"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTestbed(t, false)
			if err := c.make(b); err != nil {
				t.Fatal(err)
			}
			before := b.snapshots()
			_, err := b.ensureNode()
			if !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("%v, want FailedPrecondition", err)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			if err := b.removeNode(); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(before, b.snapshots()); d != "" {
				t.Errorf("(-before +after):\n%s", d)
			}
		})
	}
	t.Run("guest", func(t *testing.T) {
		b := newTestbed(t, false)
		b.Guest.Bridge("eth0")
		if err := b.ensureGuest(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "eth0") {
			t.Errorf("%v, want FailedPrecondition that names eth0", err)
		}
	})
}

func strangersVXLAN(name string) *netlink.Vxlan {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return &netlink.Vxlan{LinkAttrs: a, VxlanId: testVNI, Port: testPort, Group: net.IPv4(10, 20, 0, 2), SrcAddr: net.IPv4(10, 20, 0, 1)}
}

// TestGone: errors for what is missing before Ensure; none for what is missing before
// Remove, and the filter's element goes all the same.
func TestGone(t *testing.T) {
	b := newTestbed(t, false)
	before := b.Node.Snapshot()
	bad := *b
	bad.node.NetNS = "/nowhere/ns"
	if _, err := bad.ensureNode(); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/nowhere/ns") {
		t.Errorf("missing namespace: %v, want NotFound that names it", err)
	}
	bad = *b
	bad.node.PodInterface = "eth7"
	if _, err := bad.ensureNode(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "eth7") {
		t.Errorf("missing pod interface: %v, want FailedPrecondition that names it", err)
	}
	b.up()
	if err := netns.Remove(b.Pod.Path); err != nil {
		t.Fatal(err)
	}
	if err := b.removeNode(); err != nil {
		t.Fatal(err)
	}
	// The unmounted file, too, as ip netns delete leaves it for a moment.
	if err := os.WriteFile(b.Pod.Path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := b.removeNode(); err != nil {
		t.Fatal(err)
	}
	// The port of the CNI's bridge goes with the pod's end of it, which the test still
	// holds; the rest must be as it was.
	if d := cmp.Diff(before, b.Node.Snapshot()); d != "" {
		t.Errorf("node (-before +after):\n%s", d)
	}
}

// TestConcurrent: tunnels come and go side by side and share the source filter.
func TestConcurrent(t *testing.T) {
	const tunnels = 6
	b := newTestbed(t, false)
	all := make([]*testbed, tunnels)
	for i := range all {
		one := *b
		pod := nstest.New(t, fmt.Sprintf("pod%d", i))
		b.Node.Plug("cni0", pod, "eth0")
		pod.Addr("eth0", fmt.Sprintf("10.30.0.%d/24", 100+i))
		one.node.NetNS, one.node.Device, one.node.VNI = pod.Path, fmt.Sprintf("ppvx%d", i), uint32(100+i)
		one.node.PodHWAddr = pod.Link("eth0").Attrs().HardwareAddr
		all[i] = &one
	}
	before := b.Node.Snapshot()
	each := func(f func(*testbed) error) {
		t.Helper()
		var wg sync.WaitGroup
		for _, one := range all {
			wg.Go(func() {
				if err := f(one); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	each(func(one *testbed) error {
		for range 3 {
			if _, err := one.ensureNode(); err != nil {
				return err
			}
			if err := one.removeNode(); err != nil {
				return err
			}
		}
		_, err := one.ensureNode()
		return err
	})
	var got []Source
	b.Node.Do(func() (err error) {
		got, err = ListNode(t.Context())
		return err
	})
	if len(got) != tunnels {
		t.Errorf("%d sources are allowed, want %d", len(got), tunnels)
	}
	each((*testbed).removeNode)
	if d := cmp.Diff(before, b.Node.Snapshot()); d != "" {
		t.Errorf("left behind on the node:\n%s", d)
	}
}

// TestGuestAgain: the guest end, too, is made once and repaired.
func TestGuestAgain(t *testing.T) {
	b := newTestbed(t, false)
	b.up()
	b.Guest.Settle()
	before := b.Guest.Snapshot()
	if err := b.ensureGuest(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, b.Guest.Snapshot()); d != "" {
		t.Errorf("second EnsureGuest (-before +after):\n%s", d)
	}
	// Cut short before the rename.
	l := b.Guest.Link("eth0")
	if err := errors.Join(b.Guest.Handle.LinkSetDown(l), b.Guest.Handle.LinkSetName(l, "vxlan0")); err != nil {
		t.Fatal(err)
	}
	if err := b.ensureGuest(); err != nil {
		t.Fatal(err)
	}
	if err := ping(t, b.Node, nstest.PodAddr4); err != nil {
		t.Error(err)
	}
	if err := ping(t, b.Node, nstest.PodAddr6); err != nil {
		t.Error(err)
	}
	bad := *b
	bad.guest.Remote = addrOf("192.0.2.1")
	if err := bad.ensureGuest(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "192.0.2.1") {
		t.Errorf("no route to the worker: %v, want Unavailable that names it", err)
	}
}

func openPlaceIn(b *testbed) (p *place, err error) {
	err = b.Node.Try(func() error {
		p, err = openPlace(b.Pod.Path)
		return err
	})
	return p, err
}

func dropQdisc(ns *nstest.NS, dev string) error {
	return ns.Handle.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ns.Link(dev).Attrs().Index,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}})
}

func flushTables() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.FlushRuleset()
	return c.Flush()
}
