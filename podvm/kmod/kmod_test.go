// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var modules = []Module{
	{Name: "virtio", File: "virtio.ko"},
	{Name: "virtio_pci", File: "virtio_pci.ko", When: "pci", Deps: []string{"virtio"}},
	{Name: "virtio_mmio", File: "virtio_mmio.ko", When: "mmio", Deps: []string{"virtio"}},
	{Name: "virtio_net", File: "virtio_net.ko", Deps: []string{"virtio"}},
}

func TestListRoundTrip(t *testing.T) {
	var b bytes.Buffer
	if err := WriteList(&b, modules); err != nil {
		t.Fatal(err)
	}
	got, err := ReadList(&b)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if len(got[i].Deps) == 0 {
			got[i].Deps = nil
		}
	}
	if d := cmp.Diff(modules, got); d != "" {
		t.Error(d)
	}
}

func TestReadListRefuses(t *testing.T) {
	for name, c := range map[string]struct{ doc, want string }{
		"short line":   {"a a.ko -\nb b.ko\n", "line 2"},
		"wrong order":  {"b b.ko - a\na a.ko -\n", "b stands before a"},
		"path":         {"a ../a.ko -\n", "not a file name"},
		"empty line":   {"\n", "line 1"},
		"needs itself": {"a a.ko - a\n", "a stands before a"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ReadList(strings.NewReader(c.doc)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

// kernel records what was loaded.
type kernel struct {
	mu     sync.Mutex
	loaded []string // guarded by mu
	fail   map[string]error
	params map[string]string
}

func (k *kernel) insert(file, params string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.fail[file]; err != nil {
		return err
	}
	k.loaded = append(k.loaded, file)
	if k.params != nil {
		k.params[file] = params
	}
	return nil
}

func TestLoadInOrder(t *testing.T) {
	k := &kernel{params: map[string]string{}}
	l := load(context.Background(), modules, nil, loader{
		dir: "/m", insert: k.insert, has: func(bus string) bool { return bus == "pci" },
		params: moduleParams("quiet virtio-net.napi_tx=0 root=/dev/vda a.b virtio_net.csum=1"),
	})
	if err := l.WaitFor("virtio_net", "built_in"); err != nil {
		t.Fatal(err)
	}
	if err := l.Wait(); err != nil {
		t.Fatal(err)
	}
	want := []string{"/m/virtio.ko", "/m/virtio_pci.ko", "/m/virtio_net.ko"}
	if d := cmp.Diff(want, k.loaded); d != "" {
		t.Errorf("loaded: %s", d)
	}
	if got := k.params["/m/virtio_net.ko"]; got != "napi_tx=0 csum=1" {
		t.Errorf("parameters %q", got)
	}
}

func TestLoadLate(t *testing.T) {
	k := &kernel{fail: map[string]error{}}
	list := append([]Module{{Name: "overlay", File: "overlay.ko", When: Late}, {Name: "fuse", File: "fuse.ko", When: Late}}, modules...)
	l := load(context.Background(), list, nil, loader{dir: "/m", insert: k.insert, has: func(bus string) bool { return bus == "pci" }})
	if err := l.Wait(); err != nil {
		t.Fatal(err)
	}
	early := []string{"/m/virtio.ko", "/m/virtio_pci.ko", "/m/virtio_net.ko"}
	if d := cmp.Diff(early, k.loaded); d != "" {
		t.Errorf("before LoadLate: %s", d)
	}
	k.fail["/m/fuse.ko"] = unix.ENOEXEC
	if err := l.LoadLate(); !errors.Is(err, unix.ENOEXEC) || !strings.Contains(err.Error(), "module fuse:") {
		t.Errorf("got %v, want ENOEXEC of fuse", err)
	}
	if d := cmp.Diff(append(early, "/m/overlay.ko"), k.loaded); d != "" {
		t.Errorf("after LoadLate: %s", d)
	}
	if err := l.WaitFor("overlay"); err != nil {
		t.Error(err)
	}
}

func TestLoadFails(t *testing.T) {
	k := &kernel{fail: map[string]error{"/m/virtio.ko": unix.ENOEXEC}}
	l := load(context.Background(), modules, nil, loader{dir: "/m", insert: k.insert, has: func(string) bool { return true }})
	for name, err := range map[string]error{"WaitFor": l.WaitFor("virtio_net"), "Wait": l.Wait()} {
		if !errors.Is(err, unix.ENOEXEC) || !strings.Contains(err.Error(), "module virtio:") {
			t.Errorf("%s: got %v, want ENOEXEC of virtio", name, err)
		}
	}
	if len(k.loaded) > 0 {
		t.Errorf("loaded %v, which need virtio", k.loaded)
	}
}

func TestLoadedAlready(t *testing.T) {
	k := &kernel{fail: map[string]error{"/m/virtio.ko": unix.EEXIST}}
	l := load(context.Background(), modules, nil, loader{dir: "/m", insert: k.insert, has: func(string) bool { return true }})
	if err := l.Wait(); err != nil {
		t.Error(err)
	}
}
