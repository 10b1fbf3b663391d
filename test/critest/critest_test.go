// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestExcluded: the page of this folder is well-formed, and each of its classes is
// one that a pod can ask for.
func TestExcluded(t *testing.T) {
	ex, err := readExcluded("excluded.md")
	if err != nil {
		t.Fatal(err)
	}
	asked := map[string]bool{}
	for _, c := range ex {
		if _, ok := attempts[c.Name]; !ok && !c.NotRun {
			t.Errorf("nothing asks for class %q", c.Name)
		}
		asked[c.Name] = true
	}
	for name := range attempts {
		if !asked[name] {
			t.Errorf("excluded.md has no class %q", name)
		}
	}
}

func TestParseExcluded(t *testing.T) {
	ex, err := parseExcluded("# Title\nintroduction\n\n## one\nWhy: because\n  of this\n\nError: `say\n  so`\n\n- a b\n- c\n\n## two\nNot run.\nWhy: x\n- d\n")
	if err != nil {
		t.Fatal(err)
	}
	want := exclusions{
		{Name: "one", Why: "because of this", Error: "say so", Specs: []string{"a b", "c"}},
		{Name: "two", Why: "x", NotRun: true, Specs: []string{"d"}},
	}
	if d := cmp.Diff(want, ex); d != "" {
		t.Error(d)
	}
	for text, want := range map[string]string{
		"## a\nError: e\n- s":                      "class a does not say why",
		"## a\nWhy: w\n- s":                        "class a does not say what error the user gets",
		"## a\nWhy: w\nError: e\nNot run.":         "class a is not run, and yet has an error",
		"## a\nWhy: w\n\nstray":                    `line 4: "stray" is neither a reason (Why:), an error (Error:) nor a spec (- name)`,
		"## a\nWhy: w\nError: e\n- s\n## b\n- s\n": `line 6: "s" is in class a already`,
	} {
		if _, err := parseExcluded(text); err == nil || err.Error() != want {
			t.Errorf("%q: error %v, want %s", text, err, want)
		}
	}
}

func TestJudge(t *testing.T) {
	ex := exclusions{{Name: "host", Specs: []string{"excluded", "stale", "unknown", "skipped"}}}
	pass, fail, skip := result{State: passed}, result{State: "failed", Seconds: 3, Message: "no\nmore", Where: "x.go:1"}, result{State: skipped}
	runc := results{"good": pass, "bad": pass, "gone": pass, "skips": pass, "excluded": pass, "stale": pass, "broken": fail, "skipped": skip}
	kata := results{"good": pass, "bad": fail, "skips": skip, "excluded": fail, "stale": pass, "broken": pass, "skipped": skip}
	v := judge(ex, runc, kata)
	want := verdict{
		ByRunc: 6, Passed: 1, Excluded: []string{"excluded"}, Skipped: 2,
		Failed: []string{
			"bad: failed after 3 s at x.go:1: no",
			"gone: was not run",
			"skips: skipped after 0 s at : ",
			`stale: passes, and is in excluded.md under "host": take it out`,
		},
	}
	if d := cmp.Diff(want, v); d != "" {
		t.Error(d)
	}
	if got := stale(ex, kata, []verdict{v}); cmp.Diff([]string{
		`excluded.md, host: "stale" takes nothing away: it passes, or runc does not pass it either`,
		`excluded.md, host: critest has no spec called "unknown"`,
		`excluded.md, host: "skipped" takes nothing away: it passes, or runc does not pass it either`,
	}, got) != "" {
		t.Errorf("stale = %q", got)
	}
	s := summarize(ex, []outcome{{Version: "1", Specs: kata, Verdict: v, Problems: []string{"left"}}}, true)
	if s.line != "critest: 1 passed, 8 failed, 3 skipped" {
		t.Error(s.line)
	}
	if !strings.Contains(s.table, "1           1       6               1         4       \n") {
		t.Errorf("table:\n%s", s.table)
	}
}

func TestReadReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.json")
	read := func(text string) (results, error) {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return readReport(path)
	}
	r, err := read(`[{"SpecReports":[
		{"LeafNodeType":"BeforeSuite","State":"passed"},
		{"LeafNodeType":"It","ContainerHierarchyTexts":["[k8s.io] A","b"],"LeafNodeText":"c","State":"failed","RunTime":1500000000,
		 "Failure":{"Message":"m","Location":{"FileName":"/x/y.go","LineNumber":7}}}]}]`)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(results{"[k8s.io] A b c": {State: "failed", Seconds: 1.5, Message: "m", Where: "y.go:7"}}, r); d != "" {
		t.Error(d)
	}
	for _, text := range []string{"", "[]", `[{"SpecReports":[{"LeafNodeType":"It","LeafNodeText":"a"},{"LeafNodeType":"It","LeafNodeText":"a"}]}]`} {
		if _, err := read(text); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
}

func TestProgress(t *testing.T) {
	var got []string
	s := &suite{say: func(line string) { got = append(got, line) }}
	s.progress(strings.NewReader("noise\n------\n• [1.5 seconds]\nspec one\n/file\n------\nS [SKIPPED] [0.1 seconds]\nspec two\n• [FAILED] [2.0 seconds]\nspec three\n"))
	if d := cmp.Diff([]string{"  1 ok      spec one (1.5 s)", "  2 failed  spec three (2.0 s)"}, got); d != "" {
		t.Error(d)
	}
}
