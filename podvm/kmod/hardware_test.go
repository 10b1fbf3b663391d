// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// cloudModules are of two clouds, whose devices stand behind buses.
var cloudModules = []Module{
	{Name: "virtio", File: "virtio.ko"},
	{Name: "ena", File: "ena.ko", When: Hardware},
	{Name: "hv_vmbus", File: "hv_vmbus.ko", When: Hardware},
	{Name: "hv_netvsc", File: "hv_netvsc.ko", When: Hardware, Deps: []string{"hv_vmbus"}},
	{Name: "mlxfw", File: "mlxfw.ko", When: Hardware},
	{Name: "mlx5_core", File: "mlx5_core.ko", When: Hardware, Deps: []string{"mlxfw"}},
	{Name: "virtio_scsi", File: "virtio_scsi.ko", When: Hardware, Deps: []string{"virtio"}},
	{Name: "vxlan", File: "vxlan.ko"},
	{Name: "dm_crypt", File: "dm_crypt.ko", When: Demand},
}

var cloudAliases = []Alias{
	{"pci:v00001D0Fd0000EC20sv*sd*bc*sc*i*", "ena"},
	{"acpi*:VMBUS:*", "hv_vmbus"},
	{"vmbus:635161f8*", "hv_netvsc"},
	{"pci:v000015B3d00001016sv*sd*bc*sc*i*", "mlx5_core"},
	{"virtio:d00000008v*", "virtio_scsi"},
	{"acpi*:VMBUS:*", "dm_crypt"}, // on demand: not for hardware
}

// newDevices are told to who asks.
type newDevices struct {
	c      chan []string
	lost   bool
	closed chan struct{}
}

func (d *newDevices) pending(wait bool) ([]string, error) {
	if d.lost {
		d.lost = false
		return nil, errLost
	}
	if !wait {
		select {
		case names := <-d.c:
			return names, nil
		default:
			return nil, nil
		}
	}
	select {
	case names := <-d.c:
		return names, nil
	case <-d.closed:
		return nil, os.ErrClosed
	}
}

func (d *newDevices) Close() error {
	select {
	case <-d.closed:
	default:
		close(d.closed)
	}
	return nil
}

// sysTree is /sys with devices of these modaliases.
func sysTree(t *testing.T, modaliases ...string) string {
	t.Helper()
	sys := t.TempDir()
	for i, m := range modaliases {
		dir := filepath.Join(sys, "bus", "b", "devices", string(rune('a'+i)))
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "modalias"), []byte(m+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return sys
}

func TestHardware(t *testing.T) {
	k := &kernel{fail: map[string]error{}}
	d := &newDevices{c: make(chan []string, 1), closed: make(chan struct{})}
	l := load(t.Context(), cloudModules, cloudAliases, loader{
		insert: k.insert, has: func(string) bool { return true }, watch: func() (newcomers, error) { return d, nil },
		sys: sysTree(t, "acpi:VMBUS:", "pci:v00008086d00001237sv00001AF4sd00001100bc06sc00i00"),
	})
	if err := errors.Join(l.WaitFor("hv_netvsc", "ena"), l.Wait()); err != nil {
		t.Fatal(err)
	}
	loaded := func(want ...string) {
		t.Helper()
		k.mu.Lock()
		defer k.mu.Unlock()
		if diff := cmp.Diff(want, k.loaded); diff != "" {
			t.Error(diff)
		}
	}
	loaded("hv_vmbus.ko", "virtio.ko", "vxlan.ko")

	k.fail["mlx5_core.ko"] = unix.ENODEV
	ctx, cancel := context.WithCancel(t.Context())
	problems := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.Follow(ctx, func(err error) { problems <- err })
	}()
	d.c <- []string{"vmbus:635161f83edfc546913ff2d2f965ed0e", "virtio:d00000008v00001AF4"}
	d.c <- []string{"pci:v000015B3d00001016sv1sd2bc3sc4i5"}
	if err := <-problems; !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "module mlx5_core:") {
		t.Errorf("problem: %v", err)
	}
	loaded("hv_vmbus.ko", "virtio.ko", "vxlan.ko", "hv_netvsc.ko", "virtio_scsi.ko", "mlxfw.ko")
	if err := l.Request("dm_crypt", "built_in"); err != nil {
		t.Error(err)
	}
	cancel()
	<-ended
	loaded("hv_vmbus.ko", "virtio.ko", "vxlan.ko", "hv_netvsc.ko", "virtio_scsi.ko", "mlxfw.ko", "dm_crypt.ko")
}

// A device that came while events were lost is found by looking again.
func TestHardwareLostEvents(t *testing.T) {
	k := &kernel{}
	d := &newDevices{lost: true, closed: make(chan struct{})}
	sys := sysTree(t)
	l := load(t.Context(), cloudModules[:2], cloudAliases, loader{
		insert: func(file, params string) error {
			if file == "virtio.ko" {
				dir := filepath.Join(sys, "bus", "pci", "devices", "late")
				if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "modalias"), []byte("pci:v00001D0Fd0000EC20sv1sd2bc3sc4i5\n"), 0o644)); err != nil {
					t.Error(err)
				}
				d.lost = true
			}
			return k.insert(file, params)
		},
		has: func(string) bool { return true }, watch: func() (newcomers, error) { return d, nil }, sys: sys,
	})
	if err := l.WaitFor("ena"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"virtio.ko", "ena.ko"}, k.loaded); diff != "" {
		t.Error(diff)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l.Follow(ctx, func(err error) { t.Error(err) })
}

func TestHardwareWithoutWatch(t *testing.T) {
	l := load(t.Context(), cloudModules, cloudAliases, loader{watch: func() (newcomers, error) { return nil, unix.EPROTONOSUPPORT }})
	l.Follow(t.Context(), func(err error) { t.Error(err) })
	if err := l.Wait(); !errors.Is(err, unix.EPROTONOSUPPORT) {
		t.Error(err)
	}
}

func TestAddedDevice(t *testing.T) {
	for event, want := range map[string]string{
		"add@/devices/a\x00ACTION=add\x00DEVPATH=/devices/a\x00MODALIAS=vmbus:6351\x00SEQNUM=1\x00": "vmbus:6351",
		"remove@/devices/a\x00ACTION=remove\x00MODALIAS=vmbus:6351\x00":                             "",
		"add@/devices/a\x00ACTION=add\x00":                                                          "",
		"":                                                                                          "",
	} {
		if got := addedDevice([]byte(event)); got != want {
			t.Errorf("%q: %q, want %q", event, got, want)
		}
	}
}

// The kernel's socket opens, tells nothing that nobody said, and closes.
func TestListen(t *testing.T) {
	n, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.pending(false); err != nil {
		t.Error(err)
	}
	waited := make(chan error)
	go func() {
		for {
			if _, err := n.pending(true); err != nil {
				waited <- err
				return
			}
		}
	}()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if err := <-waited; !strings.Contains(err.Error(), "closed file") {
		t.Errorf("after the end: %v", err)
	}
}
