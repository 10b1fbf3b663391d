// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestBlocks: the blocks hold each number from low on once, and none below.
func TestBlocks(t *testing.T) {
	for _, low := range []int{1, 2, 577, 1241, 1281, 1391, 1411, 1431, 1451, 1500, 1501, 8952, 32768, 65535, 65536} {
		blocks := blocksFrom(low)
		if len(blocks) > 16 {
			t.Errorf("from %d: %d blocks", low, len(blocks))
		}
		for n := range uint32(0x10000) {
			hits := 0
			for _, b := range blocks {
				if n&b.mask == b.want {
					hits++
				}
			}
			want := 0
			if int(n) >= low {
				want = 1
			}
			if hits != want {
				t.Fatalf("from %d: %d is in %d blocks, want %d", low, n, hits, want)
			}
		}
	}
}

// pair makes two interfaces to redirect between.
func pair(t *testing.T) (*nstest.NS, Pair) {
	t.Helper()
	ns, far := nstest.New(t, "pod"), nstest.New(t, "far")
	ns.Veth("eth0", far, "a")
	ns.Veth("tun0", far, "b")
	return ns, Pair{Pod: "eth0", Tunnel: "tun0", MTU: 1450, IPv4: true, IPv6: true}
}

// asked is what Ensure asks the kernel for, in the kernel's order.
func asked(p Pair, ns *nstest.NS) []rule {
	rules := p.podRules(ns.Link(p.Tunnel).Attrs().Index, ns.Link(p.Pod).Attrs().HardwareAddr)
	slices.SortStableFunc(rules, func(a, b rule) int { return int(a.pref) - int(b.pref) })
	return rules
}

func ensure(t *testing.T, ns *nstest.NS, p Pair) []string {
	t.Helper()
	changes, err := Ensure(t.Context(), ns.Handle, p)
	if err != nil {
		t.Fatal(err)
	}
	return changes
}

// TestRoundTrip: what the kernel gives back is what was asked for, so that the second
// Ensure finds nothing to do.
func TestRoundTrip(t *testing.T) {
	for name, p := range map[string]Pair{
		"none": {}, "IPv4": {IPv4: true}, "IPv6": {IPv6: true}, "both": {IPv4: true, IPv6: true},
	} {
		ns, base := pair(t)
		base.IPv4, base.IPv6 = p.IPv4, p.IPv6
		if changes := ensure(t, ns, base); len(changes) < 4 {
			t.Errorf("%s: first Ensure did %q", name, changes)
		}
		got, foreign, err := rules(ns.Handle, ns.Link("eth0"))
		if err != nil || foreign {
			t.Fatal(foreign, err)
		}
		want := asked(base, ns)
		if d := cmp.Diff(want, got, cmp.AllowUnexported(rule{}, key{})); d != "" {
			t.Errorf("%s: (-want +kernel):\n%s", name, d)
		}
		if changes := ensure(t, ns, base); len(changes) != 0 {
			t.Errorf("%s: second Ensure did %q", name, changes)
		}
	}
}

// TestEnsureRepairs: another MTU, a partner made anew, an alien filter at one of our
// preferences.
func TestEnsureRepairs(t *testing.T) {
	ns, p := pair(t)
	ensure(t, ns, p)
	p.MTU = 1400
	if changes := ensure(t, ns, p); len(changes) != 2 {
		t.Errorf("new MTU: %q, want the two preferences of large packets", changes)
	}
	if err := ns.Handle.LinkDel(ns.Link("tun0")); err != nil {
		t.Fatal(err)
	}
	if _, err := Ensure(t.Context(), ns.Handle, p); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "tun0") {
		t.Errorf("without the tunnel: %v, want FailedPrecondition that names it", err)
	}
	far := nstest.New(t, "far2")
	ns.Veth("tun0", far, "b")
	if changes := ensure(t, ns, p); len(changes) == 0 {
		t.Error("a new tunnel device: no change")
	}
	got, _, err := rules(ns.Handle, ns.Link("eth0"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(asked(p, ns), got, cmp.AllowUnexported(rule{}, key{})); d != "" {
		t.Errorf("(-want +kernel):\n%s", d)
	}
	if err := ns.Handle.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: ns.Link("eth0").Attrs().Index, Parent: ingressParent, Priority: prefAll, Protocol: unix.ETH_P_ALL},
		ClassId:     classID,
	}); err != nil {
		t.Fatal(err)
	}
	ensure(t, ns, p)
	if changes := ensure(t, ns, p); len(changes) != 0 {
		t.Errorf("after the repair: %q", changes)
	}
}

// TestRemove: nothing is left of ours, everything of others.
func TestRemove(t *testing.T) {
	for _, c := range []struct {
		name      string
		prepare   func(ns *nstest.NS, eth0 netlink.Link) error
		dropQdisc bool
	}{
		{"clean", nil, true},
		{"own ingress qdisc", func(ns *nstest.NS, l netlink.Link) error {
			return ns.Handle.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index,
				Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}})
		}, false},
		{"clsact with a filter", func(ns *nstest.NS, l netlink.Link) error {
			if err := ns.Handle.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index,
				Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}); err != nil {
				return err
			}
			return foreignFilter(ns, l)
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, p := pair(t)
			if c.prepare != nil {
				if err := c.prepare(ns, ns.Link("eth0")); err != nil {
					t.Fatal(err)
				}
			}
			before := ns.Snapshot()
			had, err := HasQdisc(ns.Handle, ns.Link("eth0"))
			if err != nil || had == c.dropQdisc {
				t.Fatalf("HasQdisc: %v, %v", had, err)
			}
			ensure(t, ns, p)
			for range 2 {
				if err := Remove(ns.Handle, p, c.dropQdisc); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, ns.Snapshot()); d != "" {
					t.Errorf("(-before +after):\n%s", d)
				}
			}
		})
	}
	t.Run("a filter came later", func(t *testing.T) {
		ns, p := pair(t)
		ensure(t, ns, p)
		if err := foreignFilter(ns, ns.Link("eth0")); err != nil {
			t.Fatal(err)
		}
		if err := Remove(ns.Handle, p, true); err != nil {
			t.Fatal(err)
		}
		ours, foreign, err := rules(ns.Handle, ns.Link("eth0"))
		if err != nil || len(ours) != 0 || !foreign {
			t.Errorf("ours %v, foreign %v, %v; want the foreign one only", ours, foreign, err)
		}
	})
	t.Run("interfaces gone", func(t *testing.T) {
		ns, p := pair(t)
		ensure(t, ns, p)
		if err := ns.Handle.LinkDel(ns.Link("eth0")); err != nil {
			t.Fatal(err)
		}
		if err := Remove(ns.Handle, p, true); err != nil {
			t.Error(err)
		}
	})
}

func foreignFilter(ns *nstest.NS, l netlink.Link) error {
	return ns.Handle.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: ingressParent, Priority: 9, Protocol: unix.ETH_P_ALL},
		ClassId:     netlink.MakeHandle(1, 7),
	})
}
