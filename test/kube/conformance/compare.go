// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"fmt"
	"os"
	"strings"
)

// Exclusion is a test that cannot pass for a pod in another machine.
type Exclusion struct {
	Name    string // the test's
	Why     string
	Instead string // what the user gets at create
}

// Exclusions reads the table of a Markdown file: test in backquotes, reason, what the
// user gets instead. An entry that lacks one is an error.
func Exclusions(file string) ([]Exclusion, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var out []Exclusion
	for n, line := range strings.Split(string(b), "\n") {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		if len(cells) != 3 || strings.TrimSpace(cells[1]) == "" || strings.TrimSpace(cells[2]) == "" {
			return nil, fmt.Errorf("%s:%d: want | `test` | why | what the user gets |", file, n+1)
		}
		out = append(out, Exclusion{strings.Trim(cells[0], "` "), strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2])})
	}
	return out, nil
}

// Verdict is what both runs make of one test.
type Verdict struct {
	Name       string
	Runc, Kata Result // zero where it was not run
	Excluded   *Exclusion
	// Passed, Skipped: neither is failed. What runc does not pass on this node is
	// skipped: it says nothing of kata-remote.
	Passed, Skipped bool
	Why             string // of Skipped and of a failure
}

// Compare judges each test: it passes when it passes on kata-remote, is skipped when
// runc does not pass it or when it is excluded, and fails otherwise; so does an
// exclusion of a test that is not there.
func Compare(names []string, runc, kata []Result, excluded []Exclusion) []Verdict {
	index := func(rs []Result) map[string]Result {
		m := map[string]Result{}
		for _, r := range rs {
			m[r.Name] = r
		}
		return m
	}
	onRunc, onKata := index(runc), index(kata)
	reasons := map[string]*Exclusion{}
	for i, e := range excluded {
		reasons[e.Name] = &excluded[i]
	}
	var out []Verdict
	for _, name := range names {
		v := Verdict{Name: name, Runc: onRunc[name], Kata: onKata[name], Excluded: reasons[name]}
		delete(reasons, name)
		switch {
		case v.Excluded != nil:
			v.Skipped, v.Why = true, "excluded: "+v.Excluded.Why
		case v.Runc.State == StateSkipped:
			v.Skipped, v.Why = true, "skipped itself on runc: "+v.Runc.Message
		case v.Runc.State != StatePassed:
			v.Skipped, v.Why = true, "does not pass on runc on this node: "+v.Runc.Message
		case v.Kata.State == StatePassed:
			v.Passed = true
		case v.Kata.State == "":
			v.Why = "was not run on kata-remote"
		default:
			v.Why = v.Kata.Message
		}
		out = append(out, v)
	}
	for name := range reasons {
		out = append(out, Verdict{Name: name, Excluded: reasons[name], Why: "is excluded, and there is no such test"})
	}
	return out
}
