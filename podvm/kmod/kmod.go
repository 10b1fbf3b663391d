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
	"sync"

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
	When string   // bus without which it is of no use: "pci" or "mmio"; or Late, Demand or Hardware; empty: always
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
	list    []Module
	aliases []Alias
	done    map[string]chan struct{} // by module; closed when it is in
	ended   chan struct{}            // closed when no more will be loaded, but for Late, Demand and later Hardware
	err     error                    // why not all were; set before ended is closed
	ld      loader

	watch    newcomers // nil: the list has no Hardware modules
	problems []error   // of Hardware modules; set before ended is closed

	mu     sync.Mutex
	loaded map[string]bool // whose done is closed; guarded by mu
}

// Load starts to load a list from dir, one module after the other in the list's
// order. Side by side is slower where it matters: an emulated machine's CPUs wait for
// each other whenever kernel code is patched, which is most of a load (QEMU 7.2,
// 2 vCPUs, 2026-11-21: 270 to 350 ms in a row, 570 ms side by side).
//
// Those for hardware that is there are the first, aliases tells which.
//
// cmdline is the kernel command line, whose "module.name=value" words the kernel
// keeps for built-in modules only. Modules whose condition is Late are left to
// LoadLate, those whose condition is Demand to the kernel and Request. The caller calls
// Wait and Follow.
func Load(ctx context.Context, dir string, list []Module, aliases []Alias, cmdline string) *Loading {
	return load(ctx, list, aliases, loader{dir: dir, params: moduleParams(cmdline), insert: finitModule, has: hasBus, sys: sysPath, watch: listen})
}

// loader is what loading needs of the machine.
type loader struct {
	dir    string
	params map[string]string
	insert func(file, params string) error
	has    func(bus string) bool
	sys    string
	watch  func() (newcomers, error)
}

func load(ctx context.Context, list []Module, aliases []Alias, ld loader) *Loading {
	l := &Loading{
		list: list, aliases: aliases, ld: ld, loaded: make(map[string]bool),
		done: make(map[string]chan struct{}, len(list)), ended: make(chan struct{}),
	}
	for _, m := range list {
		l.done[m.Name] = make(chan struct{})
	}
	if slices.ContainsFunc(list, func(m Module) bool { return m.When == Hardware }) {
		// Before the first look, so that no device comes between the two.
		if l.watch, l.err = ld.watch(); l.err != nil {
			close(l.ended)
			return l
		}
	}
	go func() {
		defer close(l.ended)
		l.err = l.all(ctx)
	}()
	return l
}

// all loads what is neither Late nor on Demand.
func (l *Loading) all(ctx context.Context) error {
	problem := func(err error) {
		if err != nil {
			l.problems = append(l.problems, err)
		}
	}
	if l.watch != nil {
		problem(l.driveAll())
	}
	for _, m := range l.list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if l.watch != nil {
			problem(l.driveNew(l.watch.pending(false)))
		}
		if m.When == Late || m.When == Demand || m.When == Hardware {
			continue
		}
		if m.When != "" && !l.ld.has(m.When) { // the machine has nothing it drives
			l.is(m.Name)
			continue
		}
		if err := l.insert(m); err != nil {
			return err
		}
	}
	return nil
}

// insert loads a module, unless it is loaded.
func (l *Loading) insert(m Module) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.loaded[m.Name] {
		return nil
	}
	if err := l.ld.one(m); err != nil {
		return err
	}
	l.loaded[m.Name] = true
	close(l.done[m.Name])
	return nil
}

// is records that nobody need wait for a module any more.
func (l *Loading) is(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.loaded[name] {
		l.loaded[name] = true
		close(l.done[name])
	}
}

// one loads a module.
func (ld loader) one(m Module) error {
	err := ld.insert(filepath.Join(ld.dir, m.File), ld.params[m.Name])
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load kernel module %s: %w", m.Name, err)
	}
	return nil
}

// WaitFor waits until the named modules of the list are loaded, or the loading ended
// before that. Names that are not on the list are built into the kernel and are not
// waited for. A Hardware module without its hardware is not waited for either; one whose
// device stands behind another module's bus may come after this returns, and who needs
// the device waits for that.
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

// LoadLate waits like Wait and then loads the modules whose condition is Late.
func (l *Loading) LoadLate() error {
	if err := l.Wait(); err != nil {
		return err
	}
	for _, m := range l.list {
		if m.When != Late {
			continue
		}
		if err := l.insert(m); err != nil {
			return err
		}
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
