// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kata-remote/kata-remote/podvm/kmod"
)

// Kernel is an unpacked kernel package.
type Kernel struct {
	Release string // as uname -r says
	image   string // path of the bzImage
	modules map[string]string
	builtin map[string]bool
}

// Module is one kernel module of a Kernel.
type Module struct {
	Name string   // with underscores, as in /proc/modules
	Path string   // of the .ko file
	Deps []string // names of the modules that must be loaded before, built-in ones left out
	When string   // as in Want
	// Aliases are the other names under which the kernel may ask for it.
	Aliases []string
}

// OpenKernel reads what is in an unpacked kernel package: exactly one
// boot/vmlinuz-<release> and its lib/modules/<release> (or usr/lib/modules).
func OpenKernel(tree string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("kernel tree %s has %d files boot/vmlinuz-*, want 1", tree, len(images))
	}
	k := &Kernel{
		Release: strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-"),
		image:   images[0],
		modules: make(map[string]string),
		builtin: make(map[string]bool),
	}
	dir := filepath.Join(tree, "lib", "modules", k.Release)
	if _, err := os.Stat(dir); err != nil {
		dir = filepath.Join(tree, "usr", "lib", "modules", k.Release)
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("kernel tree %s: read the list of built-in modules: %w", tree, err)
	}
	for line := range strings.Lines(string(builtin)) {
		k.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(d.Name(), ".ko") {
			k.modules[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("kernel tree %s: list modules: %w", tree, err)
	}
	return k, nil
}

// moduleName is the kernel's name of the module in a file: the file may have
// dashes, the kernel has underscores.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// Resolve returns the wanted modules and all they depend on, each after what it
// depends on, in an order that depends on the input only. Built-in ones are left
// out. Dependencies are read from the modules themselves, because modules.dep is
// made by depmod at installation and not in the package.
//
// A module that only modules with the same condition need inherits it.
func (k *Kernel) Resolve(want []Want) ([]Module, error) {
	r := resolver{k: k, state: make(map[string]int)}
	for _, w := range want {
		if err := r.visit(w.Name, w.When, nil); err != nil {
			if w.Optional && r.absent(w.Name) {
				continue
			}
			return nil, err
		}
	}
	return r.out, nil
}

// Want is a module the image is to have.
type Want struct {
	Name string
	// When names the bus the module drives: "pci", "mmio", or empty; or is kmod.Late,
	// kmod.Demand or kmod.Hardware.
	When string
	// Optional modules may be missing from the package.
	Optional bool
}

type resolver struct {
	k     *Kernel
	out   []Module
	state map[string]int // index in out plus one; visiting while under way
}

const visiting = -1

func (r *resolver) absent(name string) bool {
	name = moduleName(name)
	return r.k.modules[name] == "" && !r.k.builtin[name]
}

func (r *resolver) visit(name, when string, chain []string) error {
	name = moduleName(name)
	switch at := r.state[name]; {
	case at == visiting:
		return fmt.Errorf("modules depend on each other: %s", strings.Join(append(chain, name), " → "))
	case at > 0:
		r.widen(at-1, when)
		return nil
	case r.k.builtin[name]:
		return nil
	}
	path := r.k.modules[name]
	if path == "" {
		for_ := ""
		if len(chain) > 0 {
			for_ = " (needed by " + chain[len(chain)-1] + ")"
		}
		return fmt.Errorf("kernel %s has no module %s%s", r.k.Release, name, for_)
	}
	info, err := readModinfo(path)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	r.state[name] = visiting
	m := Module{Name: name, Path: path, When: when, Aliases: info.aliases}
	for _, dep := range info.deps {
		if err := r.visit(dep, when, append(chain, name)); err != nil {
			return err
		}
		if dep = moduleName(dep); !r.k.builtin[dep] {
			m.Deps = append(m.Deps, dep)
		}
	}
	for _, dep := range info.softPre {
		// A soft dependency is wished for, not needed.
		if r.absent(dep) || r.state[moduleName(dep)] == visiting {
			continue
		}
		if err := r.visit(dep, when, append(chain, name)); err != nil {
			return err
		}
		if dep = moduleName(dep); !r.k.builtin[dep] {
			m.Deps = append(m.Deps, dep)
		}
	}
	slices.Sort(m.Deps)
	r.out = append(r.out, m)
	r.state[name] = len(r.out)
	return nil
}

// widen takes the condition off a module, and off all it depends on, that is
// wanted under another condition as well. What needs it on demand or for hardware brings
// it along then.
func (r *resolver) widen(i int, when string) {
	m := &r.out[i]
	switch {
	case m.When == "" || m.When == when || when == kmod.Demand:
		return
	case when == kmod.Hardware:
		if m.When == kmod.Demand {
			m.When = when
		}
		return
	}
	m.When = ""
	for _, dep := range m.Deps {
		r.widen(r.state[dep]-1, "")
	}
}

type modinfo struct{ deps, softPre, aliases []string }

// readModinfo reads a module's .modinfo section: NUL-terminated key=value strings.
func readModinfo(path string) (modinfo, error) {
	if !strings.HasSuffix(path, ".ko") {
		return modinfo{}, fmt.Errorf("%s is compressed: unpack the tree's modules first", path)
	}
	f, err := elf.Open(path)
	if err != nil {
		return modinfo{}, fmt.Errorf("read %s: %w", path, err)
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return modinfo{}, fmt.Errorf("%s has no .modinfo section", path)
	}
	data, err := s.Data()
	if err != nil {
		return modinfo{}, fmt.Errorf("read %s: %w", path, err)
	}
	return parseModinfo(data), nil
}

func parseModinfo(data []byte) modinfo {
	var info modinfo
	for entry := range bytes.SplitSeq(data, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch key {
		case "depends":
			info.deps = strings.FieldsFunc(value, func(r rune) bool { return r == ',' })
		case "alias":
			info.aliases = append(info.aliases, value)
		case "softdep":
			info.softPre = append(info.softPre, softPre(value)...)
		}
	}
	return info
}

// softPre reads "pre: a b post: c" and returns the modules after "pre:".
func softPre(value string) []string {
	var out []string
	pre := false
	for word := range strings.FieldsSeq(value) {
		if name, found := strings.CutSuffix(word, ":"); found {
			pre = name == "pre"
		} else if pre {
			out = append(out, word)
		}
	}
	return out
}
