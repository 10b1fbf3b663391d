// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/netns/nstest"
	"github.com/kata-remote/kata-remote/podvm/image"
	"github.com/kdomanski/iso9660"
	"golang.org/x/sys/unix"
)

const (
	// patience is for what takes a few seconds on an idle machine and must not fail
	// on a busy one.
	patience = 5 * time.Minute
	poll     = 20 * time.Millisecond

	nodeAddr  = "192.168.213.1/24"
	guestAddr = "192.168.213.5"
	podAddr   = "10.244.1.21"
	guestMAC  = "52:54:00:12:34:56"
)

// binDir is the directory of the programs that the tests build; TestMain's.
var binDir string

// podvmd builds the program once, as the image has it.
var podvmd = sync.OnceValues(func() (string, error) {
	path := filepath.Join(binDir, "podvmd")
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "netgo,osusergo,seccomp", "-ldflags", "-s -w -extldflags -static", "-o", path,
		"github.com/kata-remote/kata-remote/podvm/cmd/podvmd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build podvmd: %w\n%s", err, out)
	}
	return path, nil
})

func podvmdPath(t *testing.T) string {
	t.Helper()
	path, err := podvmd()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// fetch returns the directory of a package that the image is made of, which the script
// caches.
func fetch(t *testing.T, what string) string {
	t.Helper()
	cmd := exec.Command("../image/fetch.sh", what)
	var log strings.Builder
	cmd.Stderr = &log
	tree, err := cmd.Output()
	if err != nil {
		t.Fatalf("fetch the %s: %v\n%s", what, err, log.String())
	}
	return strings.TrimSpace(string(tree))
}

// imageConfig says how the image is built from Debian's kernel.
func imageConfig(t *testing.T) image.Config {
	t.Helper()
	return image.Config{KernelTree: fetch(t, "kernel"), Podvmd: podvmdPath(t), Out: t.TempDir(), Format: image.FormatELF}
}

// podImage builds the image.
func podImage(t *testing.T) *image.Manifest {
	t.Helper()
	cfg := imageConfig(t)
	out := cfg.Out
	m, err := image.Build(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.ReadManifest(out); err != nil {
		t.Error(err)
	}
	return m
}

// credentials are a self-signed server and the one client that it admits.
type credentials struct {
	serverPEM, serverKey, clientPEM string
	client                          tls.Certificate
	roots                           *x509.CertPool
}

func newCredentials(t *testing.T) credentials {
	t.Helper()
	self := func(name string, usage x509.ExtKeyUsage) (certPEM, keyPEM []byte) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{usage},
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		k, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})
	}
	server, serverKey := self("podvm", x509.ExtKeyUsageServerAuth)
	client, clientKey := self("adaptor", x509.ExtKeyUsageClientAuth)
	pair, err := tls.X509KeyPair(client, clientKey)
	if err != nil {
		t.Fatal(err)
	}
	c := credentials{serverPEM: string(server), serverKey: string(serverKey), clientPEM: string(client), client: pair, roots: x509.NewCertPool()}
	c.roots.AppendCertsFromPEM(server)
	return c
}

// tlsConfig is a client's; certs may be empty.
func (c credentials) tlsConfig(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{ServerName: "podvm", RootCAs: c.roots, Certificates: certs}
}

func (c credentials) config() *podvmconfig.Config {
	return &podvmconfig.Config{
		PodName: "test", PodNamespace: "default", SandboxID: "sandbox-of-the-test",
		TLSServerKey: podvmconfig.Secret(c.serverKey), TLSServerCert: c.serverPEM, TLSClientCA: c.clientPEM,
		PodNetwork: &podvmconfig.PodNetwork{
			PodIP: netip.MustParsePrefix(podAddr + "/24"), PodHWAddr: "32:b9:59:6b:f0:d5", Interface: "eth0",
			WorkerNodeIP: netip.MustParsePrefix(nodeAddr), TunnelType: podvmconfig.TunnelVXLAN,
			MTU: 1450, VXLANPort: 9000, VXLANID: 555002,
			Routes: []podvmconfig.Route{{Dst: "0.0.0.0/0", GW: "10.244.1.1", Dev: "eth0", Protocol: "boot", Scope: "universe"}},
		},
	}
}

// userData is the cloud-config that carries a pod VM's configuration.
func userData(t *testing.T, c *podvmconfig.Config) string {
	t.Helper()
	b, err := json.MarshalIndent(c, "      ", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return "#cloud-config\nwrite_files:\n- path: " + podvmconfig.Path + "\n  content: |\n      " + string(b) + "\n"
}

const networkConfig = "version: 2\nethernets:\n  id0:\n    match:\n      macaddress: \"" + guestMAC + "\"\n    addresses: [" + guestAddr + "/24]\n"

// seed writes a NoCloud disk.
func seed(t *testing.T, files map[string]string) string {
	t.Helper()
	w, err := iso9660.NewWriter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Cleanup()
	for name, content := range files {
		if err := w.AddFile(strings.NewReader(content), name); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "seed.iso")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := w.WriteTo(f, "cidata"); err != nil {
		t.Fatal(err)
	}
	return path
}

// vm is a running QEMU.
type vm struct {
	t       *testing.T
	console string        // path of the serial log
	ended   chan struct{} // closed when QEMU has ended
	node    *nstest.NS    // the other end of its network
}

// openTap makes a tap device in the caller's network namespace. It lives as long as
// the file.
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// startVM boots the image under emulation, with its network in a fresh namespace. seed is
// a disk, or empty; more are further arguments.
func startVM(t *testing.T, m *image.Manifest, seed string, cpus int, more ...string) *vm {
	t.Helper()
	return startVMIn(t, nstest.New(t, "node"), m, seed, cpus, more...)
}

// startVMIn is startVM in a namespace that is there.
func startVMIn(t *testing.T, node *nstest.NS, m *image.Manifest, seed string, cpus int, more ...string) *vm {
	t.Helper()
	if seed != "" {
		more = append(more, "-drive", "if=none,id=seed,format=raw,readonly=on,file="+seed, "-device", "virtio-blk-pci,drive=seed,disable-legacy=on")
	}
	return launch(t, node, cpus, "", append([]string{
		"-kernel", m.Kernel.Path, "-initrd", m.Initrd.Path, "-append", "console=ttyS0 no_timer_check " + m.CommandLine,
	}, more...)...)
}

// launch starts a machine as the local provider does (cloud/local), in short. feature are
// more properties of the machine, what boots is among the arguments.
func launch(t *testing.T, node *nstest.NS, cpus int, feature string, more ...string) *vm {
	t.Helper()
	v := &vm{t: t, console: filepath.Join(t.TempDir(), "console"), ended: make(chan struct{}), node: node}
	var tap *os.File
	v.node.Do(func() (err error) {
		tap, err = openTap("tap0")
		return err
	})
	defer tap.Close()
	v.node.Up("tap0")
	v.node.Addr("tap0", nodeAddr)
	qemu := exec.Command("qemu-system-x86_64", append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,usb=off,vmport=off,sata=off,smbus=off" + feature, "-accel", "tcg,thread=multi", "-cpu", "max,-erms", "-smp", strconv.Itoa(cpus), "-m", "512",
		"-serial", "file:" + v.console,
		"-netdev", "tap,id=net0,fd=3", "-device", "virtio-net-pci,netdev=net0,mac=" + guestMAC + ",disable-legacy=on,romfile=",
	}, more...)...)
	qemu.ExtraFiles = []*os.File{tap}
	var log strings.Builder
	qemu.Stdout, qemu.Stderr = &log, &log
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = qemu.Wait() // killed below, or by the guest's own power off
		close(v.ended)
	}()
	t.Cleanup(func() {
		_ = qemu.Process.Kill()
		<-v.ended
		if t.Failed() {
			t.Logf("qemu: %s\nconsole:\n%s", log.String(), v.output())
		}
	})
	return v
}

func (v *vm) output() string {
	b, err := os.ReadFile(v.console)
	if err != nil && !os.IsNotExist(err) {
		v.t.Error(err)
	}
	return strings.ReplaceAll(string(b), "\r", "")
}

// waitFor waits until the console shows the text.
func (v *vm) waitFor(text string) {
	v.t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	// With the rest of its line: the console is written while it is read.
	whole := func() bool {
		_, after, found := strings.Cut(v.output(), text)
		return found && strings.Contains(after, "\n")
	}
	for !whole() {
		select {
		case <-tick.C:
		case <-v.ended:
			v.t.Fatalf("the guest ended without %q on its console", text)
		case <-deadline.C:
			v.t.Fatalf("no %q on the console", text)
		}
	}
}

// dial connects from the node's namespace, again and again until the guest listens.
func (v *vm) dial(address string) net.Conn {
	v.t.Helper()
	conn, err := dialFrom(v.node, address, v.ended)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { conn.Close() })
	return conn
}

func dialFrom(ns *nstest.NS, address string, ended <-chan struct{}) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		err = ns.Try(func() (err error) {
			d := net.Dialer{Timeout: time.Second}
			conn, err = d.DialContext(ctx, "tcp", address)
			return err
		})
		if err == nil {
			return conn, nil
		}
		select {
		case <-tick.C:
		case <-ended:
			return nil, fmt.Errorf("it ended before it listened: %w", err)
		case <-ctx.Done():
			return nil, err
		}
	}
}
