// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// Networks of the node: eth0 is a port of a bridge, with IPv4 and IPv6; eth1 is a macvlan
// on lan0, at whose other end the machine LAN is.
const (
	dualStackNetwork = `{
  "cniVersion": "0.4.0", "name": "dual",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "` + testbed.CNISubnet + `"}], [{"subnet": "fd88::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}
  ]
}
`
	macvlanNetwork = `{
  "cniVersion": "0.4.0", "name": "lan",
  "plugins": [
    {"type": "macvlan", "master": "lan0", "mode": "bridge",
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24", "rangeStart": "10.99.0.10"}], [{"subnet": "fd99::/64", "rangeStart": "fd99::10"}]]}}
  ]
}
`
	gateway6 = "fd88::1"
	lan4     = "10.99.0.1"
	lan6     = "fd99::1"
)

// networkBed is a node with these networks, and the machine on its LAN.
func networkBed(ctx context.Context, t *testing.T, name string, env ...string) (*testbed.Bed, *nstest.NS) {
	t.Helper()
	bed := newBed(t, name)
	bed.Networks = []string{dualStackNetwork, macvlanNetwork}
	bed.AdaptorEnv = env
	lan, node := nstest.New(t, "lan"), nstest.Open(t, "/proc/self/ns/net")
	node.Veth("lan0", lan, "u0")
	t.Cleanup(func() {
		// A namespace's end takes its interfaces later, and the next test wants the name.
		if err := node.Handle.LinkDel(node.Link("lan0")); err != nil {
			t.Error(err)
		}
	})
	lan.Addr("u0", lan4+"/24", lan6+"/64")
	lan.Settle()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	return bed, lan
}

// networkPod is a pod with a web server.
func networkPod(ctx context.Context, t *testing.T, bed *testbed.Bed, name, handler string) (*Pod, *Container) {
	t.Helper()
	p, err := RunPod(ctx, bed, name, handler, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Run(ctx, "app", "sh", "-c", "httpd -f -p '[::]:80' -h /www")
	if err != nil {
		t.Fatal(err)
	}
	return p, c
}

// addresses are a container's, by interface, without link-local ones.
func addresses(ctx context.Context, t *testing.T, c *Container) map[string][]netip.Addr {
	t.Helper()
	out, err := c.Exec(ctx, "ip", "-o", "addr")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out, "tentative") || strings.Contains(out, "dadfailed") {
		t.Errorf("addresses are not usable: %s", out)
	}
	found := map[string][]netip.Addr{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if p, err := netip.ParsePrefix(f[3]); err == nil && !p.Addr().IsLinkLocalUnicast() && !p.Addr().IsLoopback() {
			found[f[1]] = append(found[f[1]], p.Addr())
		}
	}
	return found
}

// TestSecondInterface: a pod with a bridge's port and a macvlan has both in its VM, with
// IPv4 and IPv6, over an underlay smaller than the CNI's; also after the adaptor was
// killed. Removal leaves nothing.
func TestSecondInterface(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	bed, lan := networkBed(ctx, t, "e2e-networks", "LOCAL_MTU=1400")
	plain, plainApp := networkPod(ctx, t, bed, "plain", "")
	before, err := TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	pod, app := networkPod(ctx, t, bed, "first", testbed.Handler)
	own, other := addresses(ctx, t, app), addresses(ctx, t, plainApp)
	if len(own["eth0"]) != 2 || len(own["eth1"]) != 2 || len(own) != 2 {
		t.Fatalf("the pod has %v, want two addresses each at eth0 and eth1", own)
	}
	nodeEnds(ctx, t, pod, app)

	reach := func(t *testing.T) {
		for dev, addrs := range own {
			from := nstest.Open(t, "/proc/self/ns/net")
			if dev == "eth1" {
				from = lan // a macvlan does not speak with the node under it
			}
			for i, a := range addrs {
				if err := fetch(ctx, from, a); err != nil {
					t.Errorf("HTTP to %s (%s): %v", a, dev, err)
				}
				if _, err := get(ctx, plainApp, a.String(), "80"); err != nil {
					t.Errorf("HTTP from the runc pod to %s (%s): %v", a, dev, err)
				}
				if _, err := get(ctx, app, other[dev][i].String(), "80"); err != nil {
					t.Errorf("HTTP to the runc pod, %s (%s): %v", other[dev][i], dev, err)
				}
			}
		}
	}
	t.Run("every address is reached and reaches", reach)
	t.Run("IPv6 neighbours", func(t *testing.T) {
		for _, to := range []string{gateway6, lan6} {
			if out, err := app.Exec(ctx, "ping", "-6", "-c", "1", "-W", "10", to); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		}
		linkLocal(ctx, t, app)
	})
	t.Run("large transfers are whole", func(t *testing.T) {
		for where, at := range map[string]struct {
			ns   *nstest.NS
			addr string
		}{"eth0": {nstest.Open(t, "/proc/self/ns/net"), testbed.NodeAddr}, "eth0, IPv6": {nstest.Open(t, "/proc/self/ns/net"), gateway6}, "eth1": {lan, lan4}} {
			if err := transfer(ctx, app, at.ns, at.addr); err != nil {
				t.Errorf("%s: %v", where, err)
			}
		}
	})
	t.Run("after the adaptor was killed", func(t *testing.T) {
		bed.Adaptor.Kill()
		if err := bed.StartAdaptor(ctx); err != nil {
			t.Fatal(err)
		}
		reach(t)
	})
	t.Run("removal leaves nothing", func(t *testing.T) {
		if err := pod.Remove(ctx); err != nil {
			t.Fatal(err)
		}
		if err := within(ctx, func(context.Context) error { return leftBehind(before) }); err != nil {
			t.Error(err)
		}
	})
	if err := plain.Remove(ctx); err != nil {
		t.Error(err)
	}
}

// nodeEnds compares the pod's interfaces in the VM with those of its namespace on the
// node: the same MAC addresses, and MTUs that fit the underlay of 1400.
func nodeEnds(ctx context.Context, t *testing.T, pod *Pod, app *Container) {
	t.Helper()
	r, err := record(ctx, pod.ID)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Tunnels) != 2 || r.Tunnels[0].VNI == r.Tunnels[1].VNI {
		t.Fatalf("the record has tunnels %+v", r.Tunnels)
	}
	ns := nstest.Open(t, r.NetNS)
	for _, tun := range r.Tunnels {
		mac := ns.Link(tun.Pod.Interface).Attrs().HardwareAddr.String()
		out, err := app.Exec(ctx, "cat", "/sys/class/net/"+tun.Pod.Interface+"/address", "/sys/class/net/"+tun.Pod.Interface+"/mtu")
		if want := mac + "\n1350"; err != nil || out != want {
			t.Errorf("%s in the VM: %q, %v; want %q", tun.Pod.Interface, out, err, want)
		}
		if mtu := ns.Link(tun.Device).Attrs().MTU; mtu != 1350 {
			t.Errorf("%s has MTU %d, want 1350", tun.Device, mtu)
		}
	}
}

// fetch gets the page of the web server at a from a namespace.
func fetch(ctx context.Context, from *nstest.NS, a netip.Addr) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = from.Try(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}}, Timeout: time.Minute}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+netip.AddrPortFrom(a, 80).String()+"/", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && string(b) != page {
		err = fmt.Errorf("got %q", b)
	}
	return err
}

// linkLocal checks that the pod's link-local addresses follow from its MAC addresses, one
// each, and answer the node.
func linkLocal(ctx context.Context, t *testing.T, app *Container) {
	t.Helper()
	out, err := app.Exec(ctx, "ip", "-o", "-6", "addr", "show", "scope", "link")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out, "fe80:"); n != 2 {
		t.Errorf("%d link-local addresses, want one for each interface: %s", n, out)
	}
	// By number: package net remembers names' numbers for the whole process.
	zone := strconv.Itoa(nstest.Open(t, "/proc/self/ns/net").Link("cni0").Attrs().Index)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		p, err := netip.ParsePrefix(f[3])
		if err != nil || f[1] != "eth0" {
			continue
		}
		c, err := (&net.Dialer{Timeout: 20 * time.Second}).DialContext(ctx, "tcp", netip.AddrPortFrom(p.Addr().WithZone(zone), 80).String())
		if err != nil {
			t.Errorf("the node to the pod's link-local address: %v", err)
			continue
		}
		c.Close()
	}
}

// transferSize is enough for TCP to send its largest super-packets.
const transferSize = 8 << 20

// transfer sends random bytes to the pod and lets it send them back, each in one
// connection, and compares.
func transfer(ctx context.Context, app *Container, ns *nstest.NS, addr string) error {
	var l net.Listener
	if err := ns.Try(func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(addr, "0"))
		return err
	}); err != nil {
		return err
	}
	defer l.Close()
	sent := make([]byte, transferSize)
	src := rand.NewChaCha8([32]byte{1})
	src.Read(sent)
	back := make(chan []byte, 1)
	go func() {
		defer close(back)
		c, err := l.Accept()
		if err != nil {
			return
		}
		c.Write(sent)
		c.Close()
		if c, err = l.Accept(); err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		back <- b
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	script := fmt.Sprintf("nc %[1]s %[2]s < /dev/null > /tmp/t && sha256sum < /tmp/t && nc %[1]s %[2]s < /tmp/t > /dev/null", addr, port)
	out, err := app.Exec(ctx, "sh", "-c", script)
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("%x", sha256.Sum256(sent)); !strings.HasPrefix(out, want) {
		return fmt.Errorf("the pod received other bytes than the %d sent", len(sent))
	}
	select {
	case got := <-back:
		if sha256.Sum256(got) != sha256.Sum256(sent) {
			return fmt.Errorf("%d bytes came back, and not those %d", len(got), len(sent))
		}
	case <-ctx.Done():
		return fmt.Errorf("nothing came back: %w", ctx.Err())
	}
	return nil
}

// TestMetadataService: what answers at the VM's own interface, as a cloud's metadata
// service does, the pod does not reach, not with CAP_NET_ADMIN either. A machine on that
// network does. All the pod sends there leaves through the tunnel.
func TestMetadataService(t *testing.T) {
	const metadata = "169.254.169.254"
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	bed, _ := networkBed(ctx, t, "e2e-metadata")
	pod, err := RunPod(ctx, bed, "curious", testbed.Handler, nil)
	if err != nil {
		t.Fatal(err)
	}
	pod.linux = map[string]any{"security_context": map[string]any{
		"namespace_options": map[string]any{"pid": 1},
		"capabilities":      map[string]any{"add_capabilities": []string{"NET_ADMIN", "NET_RAW", "SYS_ADMIN"}},
	}}
	app, err := pod.Run(ctx, "app", "sleep", "1000000")
	if err != nil {
		t.Fatal(err)
	}
	node := nstest.Open(t, "/proc/self/ns/net")
	node.Addr(underlay, metadata+"/32")
	asked, port := listenAt(ctx, t, underlay)

	askBeside(ctx, t, node, net.JoinHostPort(metadata, port))
	if err := within(ctx, func(context.Context) error {
		if asked.Load() != 1 {
			return fmt.Errorf("the service was asked %d times by the machine", asked.Load())
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	capture, err := NewCapture(underlay)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(port string, addrs ...string) string {
		return fmt.Sprintf(`for a in %s; do echo GET | nc -w 2 $a %s && echo "reached $a"; done; true`, strings.Join(addrs, " "), port)
	}
	// What is not the VM's own network it reaches in just this way.
	_, open := listenAt(ctx, t, "cni0")
	if out, err := app.Exec(ctx, "sh", "-c", ask(open, testbed.NodeAddr)); err != nil || !strings.Contains(out, "reached") {
		t.Fatalf("a server on the node: %q, %v", out, err)
	}
	try := ask(port, metadata, "192.168.213.1")
	for _, script := range []string{
		try,
		// Routes of its own, a device on top of its interface, another namespace, the
		// VM's processes: there is nothing of the VM to get hold of.
		"ip route add 169.254.0.0/16 dev eth0; ip route add 192.168.213.0/24 dev eth0; " + try,
		"for k in macvlan macvtap ipvlan ipvtap; do ip link add link eth0 name x0 type $k 2>/dev/null && echo reached a device of type $k; done; " + try,
		"for f in /proc/[0-9]*/ns/net; do nsenter --net=$f sh -c '" + try + "'; done",
		"unshare -n sh -c '" + try + "'",
	} {
		out, err := app.Exec(ctx, "sh", "-c", "{ "+script+"; } 2>&1")
		t.Log(out)
		if err != nil {
			t.Errorf("%s: %v", script, err)
		}
		if strings.Contains(out, "reached") {
			t.Errorf("%s:\n%s", script, out)
		}
	}
	capture.Stop()
	if n := capture.Counts(); n.Tunnel == 0 || n.Others+n.Cloud > 0 {
		t.Errorf("%+v", n)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the service was asked %d times, want only by the machine", n)
	}
	if out, err := app.Exec(ctx, "ls", "/sys/class/net"); err != nil || strings.Join(strings.Fields(out), " ") != "eth0 eth1 lo" {
		t.Errorf("interfaces in the pod: %q, %v", out, err)
	}
	if err := pod.Remove(ctx); err != nil {
		t.Error(err)
	}
}

// askBeside connects from a machine beside the pod VM, on the same network, which is gone
// afterwards.
func askBeside(ctx context.Context, t *testing.T, node *nstest.NS, service string) {
	t.Helper()
	machine := nstest.New(t, "machine")
	node.Veth("pvm", machine, "u0")
	if err := node.Handle.LinkSetMaster(node.Link("pvm"), node.Link(underlay)); err != nil {
		t.Fatal(err)
	}
	machine.Addr("u0", "192.168.213.99/24")
	machine.Route("169.254.0.0/16", "", "u0")
	if err := machine.Try(func() error {
		c, err := (&net.Dialer{Timeout: 20 * time.Second}).DialContext(ctx, "tcp", service)
		if err == nil {
			err = c.Close()
		}
		return err
	}); err != nil {
		t.Fatalf("a machine on the VM's network: %v", err)
	}
	if err := node.Handle.LinkDel(node.Link("pvm")); err != nil {
		t.Fatal(err)
	}
}

// listenAt counts the connections that come in by a device of the node.
func listenAt(ctx context.Context, t *testing.T, device string) (*atomic.Int32, string) {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), device) })
		if err == nil {
			err = cerr
		}
		return err
	}}
	l, err := lc.Listen(ctx, "tcp4", ":0")
	if err != nil {
		t.Fatal(err)
	}
	asked := &atomic.Int32{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			asked.Add(1)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return asked, strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// TestIPv6Underlay: the VM's own network is IPv6, the pod has both.
func TestIPv6Underlay(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	bed, lan := networkBed(ctx, t, "e2e-underlay6", "LOCAL_SUBNET=fd13::/112", "LOCAL_MTU=1500")
	pod, app := networkPod(ctx, t, bed, "first", testbed.Handler)
	own := addresses(ctx, t, app)
	if len(own["eth0"]) != 2 || len(own["eth1"]) != 2 {
		t.Fatalf("the pod has %v", own)
	}
	for _, a := range own["eth0"] {
		if err := fetch(ctx, nstest.Open(t, "/proc/self/ns/net"), a); err != nil {
			t.Errorf("HTTP to %s: %v", a, err)
		}
	}
	for _, a := range own["eth1"] {
		if err := fetch(ctx, lan, a); err != nil {
			t.Errorf("HTTP to %s: %v", a, err)
		}
	}
	if mtu, err := app.Exec(ctx, "cat", "/sys/class/net/eth0/mtu"); err != nil || mtu != "1430" {
		t.Errorf("MTU %s, %v; want 1430", mtu, err)
	}
	if err := transfer(ctx, app, nstest.Open(t, "/proc/self/ns/net"), gateway6); err != nil {
		t.Error(err)
	}
	if err := pod.Remove(ctx); err != nil {
		t.Error(err)
	}
}
