// SPDX-License-Identifier: Apache-2.0

// Package kmod loads the kernel modules of the pod VM image. The image's builder
// writes the list, PID 1 reads it; both use this package.
package kmod

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// Dir holds the kernel modules in the initramfs.
	Dir = "/lib/modules"
	// ListFile is the list of them, one line each, in an order in which they can be
	// loaded: name, file, condition or "-", and names of the modules it needs.
	ListFile = Dir + "/list"
)

// Late is the condition of a module that no start waits for.
const Late = "late"

// Module is one line of the module list.
type Module struct {
	Name string   // as in /proc/modules
	File string   // below Dir
	When string   // bus without which it is of no use: "pci" or "mmio"; or Late or Demand; empty: always
	Deps []string // modules to be loaded before
}

// WriteList writes the list in the form that ReadList reads.
func WriteList(w io.Writer, list []Module) error {
	for _, m := range list {
		when := m.When
		if when == "" {
			when = "-"
		}
		if _, err := fmt.Fprintln(w, strings.Join(append([]string{m.Name, m.File, when}, m.Deps...), " ")); err != nil {
			return err
		}
	}
	return nil
}

// ReadList reads a module list and checks that every module stands after
// those it needs.
func ReadList(r io.Reader) ([]Module, error) {
	var list []Module
	seen := make(map[string]bool)
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		f := strings.Fields(s.Text())
		if len(f) < 3 {
			return nil, fmt.Errorf("module list, line %d: want name, file and condition", n)
		}
		m := Module{Name: f[0], File: f[1], When: f[2], Deps: f[3:]}
		if m.When == "-" {
			m.When = ""
		}
		if filepath.Base(m.File) != m.File {
			return nil, fmt.Errorf("module list, line %d: %q is not a file name", n, m.File)
		}
		if i := slices.IndexFunc(m.Deps, func(d string) bool { return !seen[d] }); i >= 0 {
			return nil, fmt.Errorf("module list, line %d: %s stands before %s, which it needs", n, m.Name, m.Deps[i])
		}
		seen[m.Name] = true
		list = append(list, m)
	}
	return list, s.Err()
}

// Loading is a list of modules on their way into the kernel.
type Loading struct {
	done  map[string]chan struct{} // by module; closed when it is in
	ended chan struct{}            // closed when no more will be loaded
	err   error                    // why not all were; set before ended is closed
	late  []Module
	ld    loader
}

// Load starts to load a list from dir, one module after the other in the list's
// order. Side by side is slower where it matters: an emulated machine's CPUs wait for
// each other whenever kernel code is patched, which is most of a load (QEMU 7.2,
// 2 vCPUs, 2026-11-21: 270 to 350 ms in a row, 570 ms side by side).
//
// cmdline is the kernel command line, whose "module.name=value" words the kernel
// keeps for built-in modules only. Modules whose condition is Late are left to
// LoadLate, those whose condition is Demand to the kernel. The caller calls Wait.
func Load(ctx context.Context, dir string, list []Module, cmdline string) *Loading {
	return load(ctx, list, loader{dir: dir, params: moduleParams(cmdline), insert: finitModule, has: hasBus})
}

// loader is what loading needs of the machine.
type loader struct {
	dir    string
	params map[string]string
	insert func(file, params string) error
	has    func(bus string) bool
}

func load(ctx context.Context, list []Module, ld loader) *Loading {
	l := &Loading{done: make(map[string]chan struct{}, len(list)), ended: make(chan struct{}), ld: ld}
	for _, m := range list {
		l.done[m.Name] = make(chan struct{})
		if m.When == Late {
			l.late = append(l.late, m)
		}
	}
	go func() {
		defer close(l.ended)
		for _, m := range list {
			if m.When == Late || m.When == Demand {
				continue
			}
			if l.err = ctx.Err(); l.err != nil {
				return
			}
			if l.err = ld.one(m); l.err != nil {
				return
			}
			close(l.done[m.Name])
		}
	}()
	return l
}

// one loads a module, unless the machine has nothing it drives.
func (ld loader) one(m Module) error {
	if m.When != "" && m.When != Late && !ld.has(m.When) {
		return nil
	}
	err := ld.insert(filepath.Join(ld.dir, m.File), ld.params[m.Name])
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load kernel module %s: %w", m.Name, err)
	}
	return nil
}

// WaitFor waits until the named modules of the list are loaded, or the loading ended
// before that. Names that are not on the list are built into the kernel and are not
// waited for.
func (l *Loading) WaitFor(names ...string) error {
	for _, n := range names {
		done := l.done[n]
		if done == nil {
			continue
		}
		select {
		case <-done:
		case <-l.ended:
			if l.err != nil {
				return l.err
			}
		}
	}
	return nil
}

// Wait waits until all modules but the late ones are loaded or one could not be.
func (l *Loading) Wait() error {
	<-l.ended
	return l.err
}

// LoadLate waits like Wait and then loads the modules whose condition is Late. It is
// called once.
func (l *Loading) LoadLate() error {
	if err := l.Wait(); err != nil {
		return err
	}
	for _, m := range l.late {
		if err := l.ld.one(m); err != nil {
			return err
		}
		close(l.done[m.Name])
	}
	return nil
}

// finitModule loads one module.
func finitModule(file, params string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), params, 0)
}

// moduleParams collects "module.name=value" words of a kernel command line by
// module.
func moduleParams(cmdline string) map[string]string {
	out := make(map[string]string)
	for word := range strings.FieldsSeq(cmdline) {
		key, _, _ := strings.Cut(word, "=")
		mod, _, found := strings.Cut(key, ".")
		if !found {
			continue
		}
		mod = strings.ReplaceAll(mod, "-", "_")
		out[mod] = strings.TrimSpace(out[mod] + " " + word[len(mod)+1:])
	}
	return out
}

// hasBus tells whether the machine has devices on a bus.
func hasBus(bus string) bool {
	switch bus {
	case "pci":
		found, err := filepath.Glob("/sys/bus/pci/devices/*")
		return err == nil && len(found) > 0
	case "mmio":
		// The ACPI id of virtio-mmio devices (drivers/virtio/virtio_mmio.c).
		found, err := filepath.Glob("/sys/bus/platform/devices/LNRO0005:*")
		return err == nil && len(found) > 0
	}
	return false
}
