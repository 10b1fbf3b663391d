// SPDX-License-Identifier: Apache-2.0

// Package statetest checks a life written with package state.
package statetest

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/shim/state"
)

// Check walks every state and event: those in the table lead where it says, all
// others are FailedPrecondition and name both; every state can be reached; and the
// package comment in file draws the states and events there are, and no others.
// names are those of the states 0 to n.
func Check[S interface {
	~int
	fmt.Stringer
}](t *testing.T, table state.Table[S], names []string, file string) {
	t.Helper()
	want := map[string]bool{} // words of the drawing
	to := map[string]S{}      // by state and event
	for _, r := range table.Rows {
		want[string(r.On)] = true
		key := r.From.String() + " " + string(r.On)
		if _, twice := to[key]; twice {
			t.Errorf("%s leads to two states", key)
		}
		to[key] = r.To
	}
	reached := map[S]bool{0: true}
	for i, name := range names {
		from := S(i)
		if from.String() != name {
			t.Errorf("state %d is %q, want %q", i, from, name)
		}
		for _, r := range table.Rows {
			got, err := table.Next(from, r.On)
			next, ok := to[name+" "+string(r.On)]
			switch {
			case ok && (err != nil || got != next):
				t.Errorf("%s on %s: got %s, %v", from, r.On, got, err)
			case !ok && (!errdefs.IsFailedPrecondition(err) || got != from || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), string(r.On))):
				t.Errorf("%s on %s: got %s, %v, want FailedPrecondition", from, r.On, got, err)
			}
			reached[got] = reached[got] || ok
		}
		want[name] = true
	}
	for i, name := range names {
		if !reached[S(i)] {
			t.Errorf("nothing leads to %s", name)
		}
	}
	compare(t, want, drawing(t, file))
}

// drawing returns the words of the indented lines of a file's package comment.
func drawing(t *testing.T, file string) map[string]bool {
	t.Helper()
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	comment, _, _ := strings.Cut(string(src), "\npackage ")
	words := map[string]bool{}
	for line := range strings.Lines(comment) {
		if strings.HasPrefix(line, "//\t") {
			for _, w := range regexp.MustCompile("[a-z]+").FindAllString(line, -1) {
				words[w] = true
			}
		}
	}
	return words
}

func compare(t *testing.T, want, drawn map[string]bool) {
	t.Helper()
	for w := range drawn {
		if !want[w] {
			t.Errorf("the drawing has %q, the table has not", w)
		}
	}
	for w := range want {
		if !drawn[w] {
			t.Errorf("the table has %q, the drawing has not", w)
		}
	}
}
