// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// Demand is the condition of a module that is loaded when the kernel asks for it,
	// which it does when a program wants what the module has: a bridge, a file system,
	// a device that is opened.
	Demand = "demand"
	// AliasFile lists under what other names the kernel asks for them.
	AliasFile = Dir + "/aliases"
	// RequestPath is the program the kernel runs to have a module loaded: the default
	// of /proc/sys/kernel/modprobe.
	RequestPath = "/sbin/modprobe"
)

// Alias is one more name of a module. It may have the wildcards of path.Match.
type Alias struct{ Pattern, Module string }

// WriteAliases writes them in the form that ReadAliases reads.
func WriteAliases(w io.Writer, aliases []Alias) error {
	for _, a := range aliases {
		if _, err := fmt.Fprintln(w, a.Pattern, a.Module); err != nil {
			return err
		}
	}
	return nil
}

// ReadAliases reads a list of aliases.
func ReadAliases(r io.Reader) ([]Alias, error) {
	var out []Alias
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		f := strings.Fields(s.Text())
		if len(f) != 2 {
			return nil, fmt.Errorf("list of aliases, line %d: want pattern and module", n)
		}
		if _, err := path.Match(f[0], ""); err != nil {
			return nil, fmt.Errorf("list of aliases, line %d: %q: %w", n, f[0], err)
		}
		out = append(out, Alias{f[0], f[1]})
	}
	return out, s.Err()
}

// RequestMain is the program at RequestPath: it does what the kernel asks of it and
// ends the process. It returns when the process is not that program. args are the
// process's. The kernel's command line is "modprobe -q -- NAME" (kernel/kmod.c).
func RequestMain(args []string) {
	if len(args) == 0 || filepath.Base(args[0]) != filepath.Base(RequestPath) {
		return
	}
	if err := request(args[len(args)-1], loader{dir: Dir, insert: finitModule}); err != nil {
		if k, kerr := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); kerr == nil {
			fmt.Fprintln(k, "podvmd: modprobe:", err)
			k.Close()
		}
		os.Exit(1)
	}
	os.Exit(0)
}

// errUnknown: no module is called so. Most of what the kernel asks for does not exist.
var errUnknown = errors.New("the image has no such module")

// request loads the on-demand modules of that name or alias, and what they need.
func request(name string, ld loader) error {
	list, aliases, err := Lists(ld.dir)
	if err != nil {
		return err
	}
	name = strings.ReplaceAll(name, "-", "_")
	called := asked(aliases, name)
	chosen := withDependencies(list, func(m Module) bool { return m.When == Demand && (m.Name == name || called[m.Name]) })
	if len(chosen) == 0 {
		return fmt.Errorf("%s: %w", name, errUnknown)
	}
	for _, m := range chosen {
		if err := ld.insert(filepath.Join(ld.dir, m.File), ""); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load kernel module %s: %w", m.Name, err)
		}
	}
	return nil
}

// Lists reads the list of modules in dir, and that of their aliases.
func Lists(dir string) (list []Module, aliases []Alias, err error) {
	f, err := os.Open(filepath.Join(dir, filepath.Base(ListFile)))
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if list, err = ReadList(f); err != nil {
		return nil, nil, err
	}
	a, err := os.Open(filepath.Join(dir, filepath.Base(AliasFile)))
	if err != nil {
		return nil, nil, err
	}
	defer a.Close()
	aliases, err = ReadAliases(a)
	return list, aliases, err
}
