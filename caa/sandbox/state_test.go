// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"go/parser"
	"go/token"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/caa/store"
)

func TestTransitionsAreSound(t *testing.T) {
	reachable := map[store.State]bool{StateGone: true}
	for range States {
		for _, tr := range transitions {
			if !slices.Contains(States, tr.from) || !slices.Contains(States, tr.to) {
				t.Errorf("%v: state not in States", tr)
			}
			if reachable[tr.from] {
				reachable[tr.to] = true
			}
		}
	}
	for _, s := range States {
		if !reachable[s] {
			t.Errorf("no way leads to %s", s)
		}
		if s != StateGone {
			if to, err := next(s, eventUndo); err != nil || to != StateDeleting {
				t.Errorf("%s cannot be undone: %v", s, err)
			}
		}
	}
	seen := map[string]bool{}
	for _, tr := range transitions {
		key := string(tr.from) + "/" + string(tr.on)
		if seen[key] {
			t.Errorf("%s on %q leads to two states", tr.from, tr.on)
		}
		seen[key] = true
	}
}

func TestWrongStateNamesBoth(t *testing.T) {
	_, err := next(StateDeleting, eventStart)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "deleting") || !strings.Contains(err.Error(), "StartVM") {
		t.Errorf("StartVM while deleting: %v", err)
	}
}

// TestDrawingNamesTheStates holds the drawing in the package comment to the table.
func TestDrawingNamesTheStates(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "manager.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	var drawing []string
	for line := range strings.SplitSeq(f.Doc.Text(), "\n") {
		if strings.HasPrefix(line, "\t") {
			drawing = append(drawing, line)
		}
	}
	text := strings.Join(drawing, "\n")
	words := strings.FieldsFunc(text, func(r rune) bool { return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') })
	for _, s := range States {
		if n := count(words, s.String()); n != 1 {
			t.Errorf("state %s is in the drawing %d times, want once", s, n)
		}
	}
	for _, tr := range transitions {
		if tr.from == tr.to {
			continue
		}
		if !strings.Contains(text, string(tr.on)) {
			t.Errorf("the drawing does not show %q", tr.on)
		}
	}
}

func count(words []string, w string) (n int) {
	for _, x := range words {
		if x == w {
			n++
		}
	}
	return n
}

func TestStepNamesAgree(t *testing.T) {
	m := New(Config{VNIBase: 1})
	defer m.Close()
	var names []string
	for _, s := range m.steps {
		names = append(names, s.name)
	}
	if !slices.Equal(names, Steps) {
		t.Errorf("steps %v, Steps %v", names, Steps)
	}
}
