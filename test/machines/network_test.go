// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"

	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/netns"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/test/testbed"
)

func TestMain(m *testing.M) {
	if code, done := testbed.Isolate(testbed.Isolation{}); done {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// patience is for what takes milliseconds where nothing else runs.
const patience = time.Minute

func testConfig(t *testing.T) Config {
	return Config{Network: netip.MustParsePrefix("10.77.0.1/24"), Dir: t.TempDir(), MTU: 9001, Uplink: true,
		Routes: []netip.Prefix{netip.MustParsePrefix("168.63.129.16/32")}, Services: []netip.Addr{wireServer}}
}

// wireServer is Azure's.
var wireServer = netip.MustParseAddr("168.63.129.16")

func newTestHost(t *testing.T, cfg Config) *Host {
	t.Helper()
	before := linkNames(t)
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		if after := linkNames(t); after != before {
			t.Errorf("devices before %s, after %s", before, after)
		}
	})
	return h
}

func linkNames(t *testing.T) string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return strings.Join(names, " ")
}

func machine(n int, metadata string) emulation.Machine {
	m := emulation.Machine{
		ID: fmt.Sprintf("i-%d", n), VCPUs: 1, MemoryMiB: 512, MAC: fmt.Sprintf("02:00:0a:4d:00:%02x", n),
		Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(n)}), 24), Gateway: netip.MustParseAddr("10.77.0.1"),
	}
	if metadata != "" {
		m.Metadata = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, metadata+" "+r.URL.Path) })
	}
	return m
}

// client is a namespace with a machine's interface: a guest without a virtual machine.
type client struct {
	*nstest.NS
	t *testing.T
}

func newClient(t *testing.T, h *Host, node *nstest.NS, mac string) client {
	t.Helper()
	c := client{nstest.New(t, "client"), t}
	name := fmt.Sprintf("c%s", strings.ReplaceAll(mac[9:], ":", ""))
	c.Veth("eth0", node, name)
	t.Cleanup(func() { node.Do(func() error { return netlink.LinkDel(node.Link(name)) }) })
	if err := h.net.plug(name); err != nil {
		t.Fatal(err)
	}
	hw, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	c.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetHardwareAddr(link, hw), netlink.LinkSetUp(link))
	})
	return c
}

// dhcp opens a client on the interface.
func (c client) dhcp(options ...nclient4.ClientOpt) *nclient4.Client {
	c.t.Helper()
	var d *nclient4.Client
	c.Do(func() (err error) {
		d, err = nclient4.New("eth0", options...)
		return err
	})
	c.t.Cleanup(func() { d.Close() })
	return d
}

// get asks the metadata service.
func (c client) get(path string) (string, error) { return c.getFrom(emulation.MetadataAddr, path) }

// getFrom asks another service.
func (c client) getFrom(service netip.Addr, path string) (string, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		err = netns.Do(ctx, c.Path, func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return conn, err
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+service.String()+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// configure takes a lease's address and its route.
func (c client) configure(ack *dhcpv4.DHCPv4) {
	c.Addr("eth0", (&net.IPNet{IP: ack.YourIPAddr, Mask: ack.SubnetMask()}).String())
	c.Route("0.0.0.0/0", ack.Router()[0].String(), "eth0")
}

// TestNetwork has clients that are no virtual machines ask for their addresses and
// their metadata.
func TestNetwork(t *testing.T) {
	h := newTestHost(t, testConfig(t))
	node := nstest.Open(t, "/proc/self/ns/net")
	one, two := machine(4, "first"), machine(5, "")
	for _, m := range []*emulation.Machine{&one, &two} {
		if err := h.net.admit(m); err != nil {
			t.Fatal(err)
		}
	}
	twin := machine(4, "")
	if err := h.net.admit(&twin); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second machine of that address: %v", err)
	}
	h.net.dismiss(&twin) // must not touch the first

	guest := newClient(t, h, node, one.MAC)
	for _, broadcast := range []bool{true, false} {
		lease, err := guest.dhcp().Request(t.Context(), dhcpv4.WithBroadcast(broadcast))
		if err != nil {
			t.Fatalf("broadcast %v: %v", broadcast, err)
		}
		ack := lease.ACK
		mtu := ack.GetOneOption(dhcpv4.OptionInterfaceMTU)
		got := fmt.Sprint(ack.YourIPAddr, ack.SubnetMask(), ack.Router(), ack.IPAddressLeaseTime(0), int(mtu[0])<<8|int(mtu[1]), ack.ClasslessStaticRoute())
		if want := "10.77.0.4 ffffff00 [10.77.0.1] 1h0m0s 9001 [route to 0.0.0.0/0 via 10.77.0.1 route to 168.63.129.16/32 via 10.77.0.1]"; got != want {
			t.Errorf("lease is %s, want %s", got, want)
		}
		if !broadcast {
			guest.configure(ack)
		}
	}
	if got, err := guest.get("/path"); err != nil || got != "first /path" {
		t.Errorf("its metadata: %q, %v", got, err)
	}
	if got, err := guest.getFrom(wireServer, "/machine"); err != nil || got != "first /machine" {
		t.Errorf("another service: %q, %v", got, err)
	}
	t.Run("another address than its own is refused", func(t *testing.T) {
		d := guest.dhcp()
		offer, err := d.DiscoverOffer(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var nak *nclient4.ErrNak
		if _, err := d.RequestFromOffer(t.Context(), offer, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 77, 0, 5)))); !errors.As(err, &nak) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a machine without metadata gets none", func(t *testing.T) {
		c := newClient(t, h, node, two.MAC)
		lease, err := c.dhcp().Request(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c.configure(lease.ACK)
		if got, err := c.get("/"); err == nil {
			t.Errorf("got %q", got)
		}
	})
	strangers(t, h, node)
	t.Run("nor does who was a machine", func(t *testing.T) {
		h.net.dismiss(&one)
		if got, err := guest.get("/"); err == nil {
			t.Errorf("got %q", got)
		}
	})
}

// strangers ask from the machines' network and from another one.
func strangers(t *testing.T, h *Host, node *nstest.NS) {
	t.Run("who is no machine gets neither", func(t *testing.T) {
		c := newClient(t, h, node, "02:00:0a:4d:00:63")
		if offer, err := c.dhcp(nclient4.WithTimeout(100*time.Millisecond), nclient4.WithRetry(1)).DiscoverOffer(t.Context()); err == nil {
			t.Errorf("got %v", offer)
		}
		c.Addr("eth0", "10.77.0.99/24")
		c.Route("0.0.0.0/0", "10.77.0.1", "eth0")
		if got, err := c.get("/"); err == nil {
			t.Errorf("got %q", got)
		}
	})
	t.Run("nor does another network of the node", func(t *testing.T) {
		c := client{nstest.New(t, "pod"), t}
		c.Veth("eth0", node, "pod0")
		t.Cleanup(func() { node.Do(func() error { return netlink.LinkDel(node.Link("pod0")) }) })
		node.Addr("pod0", "10.78.0.1/24")
		node.Up("pod0")
		c.Addr("eth0", "10.78.0.2/24")
		c.Up("eth0")
		c.Route("0.0.0.0/0", "10.78.0.1", "eth0")
		if got, err := c.get("/"); err == nil {
			t.Errorf("got %q", got)
		}
	})
}

// TestUplink asks the node's network for what the adaptor asks it for.
func TestUplink(t *testing.T) {
	newTestHost(t, testConfig(t))
	addr, mtu, err := netns.DefaultRoute(t.Context())
	if want := netip.MustParsePrefix("10.77.0.1/24"); err != nil || addr != want || mtu != 9001 {
		t.Errorf("the node is %v with MTU %d (%v), want %v with MTU 9001", addr, mtu, err, want)
	}
}

// TestNew is refused what no network can be made of.
func TestNew(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no network":    {Dir: t.TempDir()},
		"no address":    {Dir: t.TempDir(), Network: netip.MustParsePrefix("10.77.0.0/24")},
		"IPv6":          {Dir: t.TempDir(), Network: netip.MustParsePrefix("fd00::1/64")},
		"no folder":     {Network: netip.MustParsePrefix("10.77.0.1/24")},
		"a long bridge": {Dir: t.TempDir(), Network: netip.MustParsePrefix("10.77.0.1/24"), Bridge: "0123456789"},
	} {
		if h, err := New(cfg); err == nil {
			t.Errorf("%s: %v", name, errors.Join(errors.New("it was made"), h.Close()))
		}
	}
}
