// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestRequest(t *testing.T) {
	dir := t.TempDir()
	var list, aliases bytes.Buffer
	if err := errors.Join(
		WriteList(&list, []Module{
			{Name: "llc", File: "llc.ko", When: Demand}, {Name: "stp", File: "stp.ko", When: Demand, Deps: []string{"llc"}},
			{Name: "core", File: "core.ko"}, {Name: "bridge", File: "bridge.ko", When: Demand, Deps: []string{"core", "stp"}},
			{Name: "fuse", File: "fuse.ko", When: Demand},
		}),
		WriteAliases(&aliases, []Alias{{"rtnl-link-bridge", "bridge"}, {"char-major-10-229", "fuse"}, {"bus:v*d[12]*", "fuse"}}),
		os.WriteFile(filepath.Join(dir, "list"), list.Bytes(), 0o644),
		os.WriteFile(filepath.Join(dir, "aliases"), aliases.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"bridge":            {"llc.ko", "stp.ko", "core.ko", "bridge.ko"},
		"rtnl-link-bridge":  {"llc.ko", "stp.ko", "core.ko", "bridge.ko"},
		"char-major-10-229": {"fuse.ko"},
		"char_major_10_229": {"fuse.ko"},
		"bus:v0001d2":       {"fuse.ko"},
		"core":              nil, // it is there, and not on demand
		"net-pf-99":         nil,
	} {
		var got []string
		err := request(name, loader{dir: dir, insert: func(file, _ string) error {
			got = append(got, filepath.Base(file))
			return unix.EEXIST // as for one that is loaded
		}})
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if unknown := errors.Is(err, errUnknown); unknown != (want == nil) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	err := request("fuse", loader{dir: dir, insert: func(string, string) error { return unix.ENOEXEC }})
	if !errors.Is(err, unix.ENOEXEC) || !strings.Contains(err.Error(), "module fuse:") {
		t.Errorf("error %v", err)
	}
}

func TestReadAliasesRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"one\n":           "line 1: want pattern and module",
		"a b\nc d e\n":    "line 2: want pattern and module",
		"a b\n[ broken\n": `line 2: "[": syntax error in pattern`,
	} {
		if _, err := ReadAliases(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %s", text, err, want)
		}
	}
}

// TestDemandIsLeft: neither the start nor LoadLate loads what waits for the kernel.
func TestDemandIsLeft(t *testing.T) {
	var got []string
	l := load(t.Context(), []Module{{Name: "a", File: "a.ko", When: Demand}, {Name: "b", File: "b.ko"}}, nil, loader{
		insert: func(file, _ string) error { got = append(got, file); return nil },
		has:    func(string) bool { return true },
	})
	if err := errors.Join(l.LoadLate(), l.WaitFor("a", "b")); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"b.ko"}, got); d != "" {
		t.Error(d)
	}
}
