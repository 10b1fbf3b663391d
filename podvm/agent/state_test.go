// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"go/doc"
	"go/parser"
	"go/token"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// drawing returns the drawings of the package comment, one string each.
func drawings(t *testing.T) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "agent.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, block := range strings.Split(f.Doc.Text(), "\n\n") {
		if strings.HasPrefix(block, "\t") {
			out = append(out, block)
		}
	}
	if len(out) != 2 {
		t.Fatalf("%s has %d drawings, want 2", doc.Synopsis(f.Doc.Text()), len(out))
	}
	return out
}

func TestDrawingsNameTheStates(t *testing.T) {
	word := regexp.MustCompile(`[A-Z][a-z]+`)
	for i, names := range [][]string{containerStateNames, processStateNames} {
		drawn := word.FindAllString(drawings(t)[i], -1)
		slices.Sort(drawn)
		want := slices.Sorted(slices.Values(names))
		if diff := cmp.Diff(want, slices.Compact(drawn)); diff != "" {
			t.Errorf("drawing %d (-states +drawn):\n%s", i, diff)
		}
	}
}

func walk[S interface {
	comparable
	fmt.Stringer
}](t *testing.T, table map[S][]S, start, end S) {
	t.Helper()
	seen, todo := map[S]bool{}, []S{start}
	for len(todo) > 0 {
		s := todo[0]
		todo = todo[1:]
		if seen[s] {
			continue
		}
		seen[s] = true
		todo = append(todo, table[s]...)
		for to := range table {
			err := step("it", table, s, to)
			if slices.Contains(table[s], to) != (err == nil) {
				t.Errorf("%s to %s: %v", s, to, err)
			}
			if err != nil && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), s.String()) || !strings.Contains(err.Error(), to.String())) {
				t.Errorf("%s to %s: the error does not say so: %v", s, to, err)
			}
		}
	}
	if len(seen) != len(table) {
		t.Errorf("%d of %d states can be reached", len(seen), len(table))
	}
	if len(table[end]) != 0 {
		t.Errorf("%s is not the end", end)
	}
}

func TestTransitions(t *testing.T) {
	walk(t, containerTransitions, StateCreating, StateRemoved)
	walk(t, processTransitions, ProcessStarting, ProcessExited)
}
