// SPDX-License-Identifier: Apache-2.0

// Package volumetest writes volumes the way the kubelet does, for tests.
package volumetest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// Writer writes a volume as the kubelet's AtomicWriter does, step by step
// (Kubernetes, pkg/volume/util/atomic_writer.go, 1.34; the numbers are its). It is for
// one goroutine.
type Writer struct {
	// Dir is the volume's directory, which exists.
	Dir string
	// Late sets owners after the switch, as kubelets before 1.27 did for fsGroup.
	Late bool

	serial int
}

const data = "..data"

// Write replaces the volume's content; names may have slashes. All of it belongs to
// the group gid.
func (w *Writer) Write(payload map[string]string, gid int) error {
	old, err := os.Readlink(filepath.Join(w.Dir, data)) // (2)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w.serial++
	name := fmt.Sprintf("..2026_11_21_10_00_00.%d", w.serial)
	revision := filepath.Join(w.Dir, name)
	if err := writeFiles(revision, payload); err != nil { // (5), (6)
		return err
	}
	if !w.Late {
		if err := chownAll(revision, gid); err != nil { // (7)
			return err
		}
	}
	next := filepath.Join(w.Dir, data+"_tmp")
	if err := os.Symlink(name, next); err != nil { // (8)
		return err
	}
	if err := os.Rename(next, filepath.Join(w.Dir, data)); err != nil { // (9)
		return err
	}
	if err := w.show(payload); err != nil { // (10), (11)
		return err
	}
	if old != "" { // (12)
		if err := os.RemoveAll(filepath.Join(w.Dir, old)); err != nil {
			return err
		}
	}
	if w.Late {
		return chownAll(revision, gid)
	}
	return nil
}

func writeFiles(dir string, payload map[string]string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for path, content := range payload {
		at := filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(at, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// show makes the links of new names and removes those of names that are gone.
func (w *Writer) show(payload map[string]string) error {
	visible := map[string]bool{}
	for path := range payload {
		first, _, _ := strings.Cut(path, "/")
		visible[first] = true
		if err := os.Symlink(filepath.Join(data, first), filepath.Join(w.Dir, first)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	list, err := os.ReadDir(w.Dir)
	if err != nil {
		return err
	}
	for _, e := range list {
		if strings.HasPrefix(e.Name(), "..") || visible[e.Name()] {
			continue
		}
		if err := os.Remove(filepath.Join(w.Dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func chownAll(dir string, gid int) error {
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = os.Lchown(path, 0, gid)
		}
		return err
	})
}

// Numbered is the content of a revision that can be told from every other one: its
// keys come and go, and each has the number.
func Numbered(n int) map[string]string {
	v := fmt.Sprint(n)
	return map[string]string{"a": v, "b": v, "sub/c": v, "of-" + fmt.Sprint(n%3): v, "only-" + v: v}
}

// Whole tells which numbered revision was seen. It is an error unless it was that one
// and nothing else.
func Whole(seen map[string]string) (int, error) {
	var n int
	if _, err := fmt.Sscan(seen["a"], &n); err != nil {
		return 0, fmt.Errorf("%v: %w", seen, err)
	}
	if !maps.Equal(seen, Numbered(n)) {
		return n, fmt.Errorf("revision %d is %v, not %v", n, seen, Numbered(n))
	}
	return n, nil
}
