// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kdomanski/iso9660"

	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/podvm/image"
)

// podvmImage is the folder that make podvm-image made.
func podvmImage(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("PEERPOD_PODVM")
	if dir == "" {
		t.Fatal("PEERPOD_PODVM names the pod VM image's folder: run make test, which sets it")
	}
	return dir
}

// bootable is a machine that starts from the image, and a channel that is closed when
// it has ended by itself.
func bootable(t *testing.T, n int, metadata string) (emulation.Machine, chan struct{}) {
	m, ended := machine(n, metadata), make(chan struct{})
	m.Image = podvmImage(t)
	m.Exited = func() { close(ended) }
	return m, ended
}

// running counts the QEMUs of a host, which are this process's children.
func running(t *testing.T) (n int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), qemuProgram+"\x00") {
			n++
		}
	}
	return n
}

// TestLife starts machines that are ended before anything in them runs.
func TestLife(t *testing.T) {
	h := newTestHost(t, testConfig(t))
	m, ended := bootable(t, 4, "")
	m.CDROM = make([]byte, 2048)
	if err := h.Start(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	links := linkNames(t)
	if n := running(t); n != 1 || !strings.Contains(links, "cloud0-1") {
		t.Errorf("%d QEMUs, devices %s", n, links)
	}
	if err := h.Start(t.Context(), m); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same again: %v", err)
	}
	twin := m
	twin.ID = "twin"
	if err := h.Start(t.Context(), twin); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another with its address: %v", err)
	}
	for range 2 {
		if err := h.Stop(t.Context(), m.ID); err != nil {
			t.Fatal(err)
		}
	}
	if n := running(t); n != 0 || linkNames(t) == links {
		t.Errorf("after Stop: %d QEMUs, devices %s", n, linkNames(t))
	}
	select {
	case <-ended:
		t.Error("a machine that was stopped is told to have ended")
	default:
	}
	if _, err := h.Console(m.ID); err != nil {
		t.Error(err)
	}
	files, err := filepath.Glob(filepath.Join(h.cfg.Dir, "*"))
	if err != nil || len(files) != 1 || files[0] != h.consolePath(m.ID) {
		t.Errorf("left are %q (%v), want the console", files, err)
	}

	t.Run("one that ends by itself", func(t *testing.T) {
		if err := h.Start(t.Context(), m); err != nil { // a machine may come again
			t.Fatal(err)
		}
		h.mu.Lock()
		g := h.guests[m.ID]
		h.mu.Unlock()
		g.mu.Lock()
		err := g.process.Kill()
		g.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		<-ended
		if err := h.Start(t.Context(), twin); err != nil {
			t.Errorf("its address is not free: %v", err)
		}
	}) // and Close ends the twin
}

// TestStartFails shows what cannot be started, and that nothing of it stays.
func TestStartFails(t *testing.T) {
	h := newTestHost(t, testConfig(t))
	links := linkNames(t)
	bare := t.TempDir() // its manifest names files that are not there
	manifest, err := os.ReadFile(filepath.Join(podvmImage(t), image.ManifestFile))
	if err == nil {
		err = os.WriteFile(filepath.Join(bare, image.ManifestFile), manifest, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*emulation.Machine){
		"an id that is no file name": func(m *emulation.Machine) { m.ID = "../i" },
		"an address elsewhere":       func(m *emulation.Machine) { m.Addr = netip.MustParsePrefix("10.78.0.4/24") },
		"another gateway":            func(m *emulation.Machine) { m.Gateway = m.Addr.Addr() },
		"no MAC":                     func(m *emulation.Machine) { m.MAC = "" },
		"no image":                   func(m *emulation.Machine) { m.Image = "/nonexistent" },
		"a folder without manifest":  func(m *emulation.Machine) { m.Image = t.TempDir() },
		"a MAC of eight bytes":       func(m *emulation.Machine) { m.MAC = "02:00:00:00:00:00:00:01" },
		"no kernel, says QEMU":       func(m *emulation.Machine) { m.Image = bare },
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := bootable(t, 4, "")
			change(&m)
			if err := h.Start(t.Context(), m); err == nil {
				t.Error("it started")
			} else {
				t.Log(err)
			}
			if n := running(t); n != 0 || linkNames(t) != links {
				t.Errorf("%d QEMUs, devices %s", n, linkNames(t))
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m, _ := bootable(t, 4, "")
	if err := h.Start(ctx, m); err == nil {
		t.Error("it started although nobody waits for it")
	}
	if n := running(t); n != 0 || linkNames(t) != links {
		t.Errorf("%d QEMUs, devices %s", n, linkNames(t))
	}
	if _, err := h.Console("never-seen"); !errdefs.IsNotFound(err) {
		t.Errorf("console of a machine that never was: %v", err)
	}
}

// nobody is user data that names no pod.
const nobody = "#cloud-config\nwrite_files:\n- path: /run/peerpod/auth.json\n  content: |\n      {}\n"

// await waits for a machine to end by itself: some seconds, and longer where others have
// the processors.
func await(t *testing.T, ended <-chan struct{}) {
	t.Helper()
	select {
	case <-ended:
	case <-time.After(5 * time.Minute):
		t.Fatal("a machine does not end")
	}
}

// TestGuests boots the pod VM image where EC2's metadata service is, and where Azure's
// CD is. Each is told nothing it could be, so that it says whom it asked and ends.
func TestGuests(t *testing.T) {
	h := newTestHost(t, testConfig(t))
	ec2, ec2Ended := bootable(t, 4, "")
	ec2.Vendor, ec2.Product = "Amazon EC2", "t3.small"
	var service http.ServeMux
	service.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "token") })
	service.HandleFunc("GET /latest/user-data", func(w http.ResponseWriter, r *http.Request) {
		if host, _, _ := net.SplitHostPort(r.RemoteAddr); host != ec2.Addr.Addr().String() || r.Header.Get("X-aws-ec2-metadata-token") != "token" {
			t.Errorf("asked by %s with %v", r.RemoteAddr, r.Header)
		}
		io.WriteString(w, nobody)
	})
	service.HandleFunc("GET /", http.NotFound)
	ec2.Metadata = &service

	azure, azureEnded := bootable(t, 5, "")
	azure.Vendor, azure.Product, azure.AssetTag = "Microsoft Corporation", "Virtual Machine", "7783-7084-3265-9085-8269-3286-77"
	azure.CDROM = provisioningCD(t, nobody)

	for _, m := range []emulation.Machine{ec2, azure} {
		if err := h.Start(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	await(t, ec2Ended)
	await(t, azureEnded)
	for id, source := range map[string]string{ec2.ID: "EC2 metadata service", azure.ID: "Azure provisioning CD"} {
		console, err := h.Console(id)
		if want := "user data from " + source + ": write_files has no"; err != nil || !strings.Contains(string(console), want) {
			t.Errorf("machine %s says\n%s\n(%v), want %q", id, console, err, want)
		}
	}
}

// TestDisk starts the image's disk by UEFI, as an NVMe drive: its guest asks for its
// user data and ends, and the disk is as it was.
func TestDisk(t *testing.T) {
	disk := filepath.Join(podvmImage(t), "disk.raw")
	before, err := os.Stat(disk)
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t)
	cfg.NVMe = true
	h := newTestHost(t, cfg)
	m, ended := bootable(t, 4, "")
	m.Image, m.Vendor = disk, "Amazon EC2"
	var service http.ServeMux
	var asked atomic.Int32
	service.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "token") })
	service.HandleFunc("GET /latest/user-data", func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		io.WriteString(w, nobody)
	})
	service.HandleFunc("GET /", http.NotFound)
	m.Metadata = &service
	if err := h.Start(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	await(t, ended)
	if n := asked.Load(); n != 1 {
		console, err := h.Console(m.ID)
		t.Errorf("it asked for its user data %d times; its console: %s (%v)", n, console, err)
	}
	if after, err := os.Stat(disk); err != nil || after.ModTime() != before.ModTime() {
		t.Errorf("the disk was written to (%v)", err)
	}
}

// provisioningCD is a CD as Azure puts it into a new machine's drive.
func provisioningCD(t *testing.T, userData string) []byte {
	t.Helper()
	w, err := iso9660.NewWriter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Cleanup()
	env := `<Environment xmlns="http://schemas.dmtf.org/ovf/environment/1" xmlns:wa="http://schemas.microsoft.com/windowsazure"><wa:ProvisioningSection>` +
		`<wa:LinuxProvisioningConfigurationSet><wa:HostName>podvm</wa:HostName><wa:CustomData>` + base64.StdEncoding.EncodeToString([]byte(userData)) +
		`</wa:CustomData></wa:LinuxProvisioningConfigurationSet></wa:ProvisioningSection></Environment>`
	var cd bytes.Buffer
	err = w.AddFile(strings.NewReader(env), "ovf-env.xml")
	if err == nil {
		err = w.WriteTo(&cd, "rd_rdfe")
	}
	if err != nil {
		t.Fatal(err)
	}
	return cd.Bytes()
}
