// SPDX-License-Identifier: Apache-2.0

package process

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestTransitions walks every state and event: those in the table lead where it
// says, all others are FailedPrecondition and name both.
func TestTransitions(t *testing.T) {
	var events []event
	for _, tr := range transitions {
		events = append(events, tr.on)
	}
	reached := map[State]bool{0: true}
	for s := range stateNames {
		for _, e := range events {
			from := State(s)
			got, err := from.next(e)
			i := slices.IndexFunc(transitions, func(tr struct {
				from State
				on   event
				to   State
			}) bool {
				return tr.from == from && tr.on == e
			})
			switch {
			case i >= 0 && (err != nil || got != transitions[i].to):
				t.Errorf("%s on %s: got %s, %v", from, e, got, err)
			case i < 0 && (!errdefs.IsFailedPrecondition(err) || got != from || !strings.Contains(err.Error(), from.String()) || !strings.Contains(err.Error(), string(e))):
				t.Errorf("%s on %s: got %s, %v, want FailedPrecondition", from, e, got, err)
			}
			reached[got] = true
		}
	}
	if len(reached) != len(stateNames) {
		t.Errorf("reached %v of %v", reached, stateNames)
	}
}

// TestDrawing checks that the package comment draws the states and events there are.
func TestDrawing(t *testing.T) {
	src, err := os.ReadFile("process.go")
	if err != nil {
		t.Fatal(err)
	}
	comment, _, _ := strings.Cut(string(src), "\npackage ")
	var drawing strings.Builder
	for line := range strings.Lines(comment) {
		if strings.HasPrefix(line, "//\t") {
			drawing.WriteString(line)
		}
	}
	want := map[string]bool{}
	for _, n := range stateNames {
		want[n] = true
	}
	for _, tr := range transitions {
		want[string(tr.on)] = true
	}
	drawn := map[string]bool{}
	for _, w := range regexp.MustCompile("[a-z]+").FindAllString(drawing.String(), -1) {
		drawn[w] = true
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
