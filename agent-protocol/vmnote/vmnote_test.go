// SPDX-License-Identifier: Apache-2.0

package vmnote

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestReadWhatWasWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "note")
	if _, err := Read(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no note: %v", err)
	}
	want := Note{Sandbox: "s", Socket: "/run/a.sock"}
	if err := want.Write(path); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	if got, err := Read(path); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for _, text := range []string{"", "{", `{"version":2,"sandbox":"s","socket":"x"}`, `{"version":1,"socket":"x"}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(path); err == nil {
			t.Errorf("%q was read", text)
		}
	}
}

func TestDeliver(t *testing.T) {
	d := t.TempDir()
	socket, other := filepath.Join(d, "a.sock"), filepath.Join(d, "b.sock")
	for _, n := range []Note{{"one", socket}, {"two", socket}, {"two", socket}, {"three", other}} {
		if err := n.Leave(); err != nil {
			t.Fatal(err)
		}
	}
	broken := filepath.Join(d, "stop", "broken.json")
	if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	stopped := map[string]int{}
	refuse := errors.New("not now")
	err := Deliver(t.Context(), socket, func(_ context.Context, id string) error {
		stopped[id]++
		if id == "two" && stopped[id] == 1 {
			return refuse
		}
		return nil
	})
	if !errors.Is(err, refuse) {
		t.Errorf("error = %v, want the refusal in it", err)
	}
	if err := Deliver(t.Context(), socket, func(_ context.Context, id string) error { stopped[id]++; return nil }); err == nil {
		t.Error("a broken note was passed over in silence")
	}
	if len(stopped) != 2 || stopped["one"] != 1 || stopped["two"] != 2 {
		t.Errorf("stopped %v, want one once, two again after it was refused, and three not at all", stopped)
	}
	left, _ := filepath.Glob(filepath.Join(d, "stop", "*"))
	if len(left) != 2 { // three's, and the broken one
		t.Errorf("left: %q", left)
	}
}
