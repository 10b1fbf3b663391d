// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

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
