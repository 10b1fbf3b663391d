// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestKeepConsoles ends a bed whose adaptor ran with two state folders, and looks at
// what is kept of its machines' consoles.
func TestKeepConsoles(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	b := &Bed{Out: t.TempDir(), made: time.Now().Add(-time.Second)}
	b.noteState([]string{"STATE_DIR=/nowhere", "STATE_DIR=" + one})
	b.noteState([]string{"STATE_DIR=" + two})
	write := func(path, text string) string {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write(filepath.Join(one, "local/logs/podvm-a-i1.log"), "ended")
	write(filepath.Join(two, "local/instances/i2/serial.log"), "running")
	old := write(filepath.Join(two, "local/logs/podvm-b-i0.log"), "of another bed")
	if err := os.Chtimes(old, time.Time{}, b.made.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a bed may be stopped twice
		if err := b.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	files, err := filepath.Glob(filepath.Join(b.Out, "logs/podvm/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, filepath.Base(f)+" "+string(text))
	}
	if want := []string{"i2.log running", "podvm-a-i1.log ended"}; !slices.Equal(got, want) {
		t.Errorf("kept %q, want %q", got, want)
	}
}
