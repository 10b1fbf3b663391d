// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// defaultState is the adaptor's state where its configuration names no other.
const defaultState = "/var/lib/peerpod"

// noteState notes where an adaptor of this configuration keeps its state.
func (b *Bed) noteState(env []string) {
	dir := defaultState
	for _, v := range env { // the last one counts, as for any program
		if d, ok := strings.CutPrefix(v, "STATE_DIR="); ok {
			dir = d
		}
	}
	if b.states == nil {
		b.states = map[string]bool{}
	}
	b.states[dir] = true
}

// keepConsoles puts what machines wrote to their serial ports beside the daemons' logs,
// as logs/podvm/NAME.log: those that have ended, and those that the provider local still
// has. What was written before the bed was made is another bed's.
func (b *Bed) keepConsoles() error {
	var errs []error
	for dir := range b.states {
		for _, pattern := range []string{"local/logs/*.log", "local/instances/*/serial.log"} {
			found, err := filepath.Glob(filepath.Join(dir, pattern))
			errs = append(errs, err)
			for _, path := range found {
				name := filepath.Base(path)
				if name == "serial.log" {
					name = filepath.Base(filepath.Dir(path)) + ".log"
				}
				errs = append(errs, b.keepConsole(path, name))
			}
		}
	}
	return errors.Join(errs...)
}

func (b *Bed) keepConsole(path, name string) error {
	info, err := os.Stat(path)
	if err == nil && info.ModTime().Before(b.made) {
		return nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has just gone with its machine
	}
	if err != nil {
		return err
	}
	dir := filepath.Join(b.Out, "logs", "podvm")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), text, 0o644)
}
