// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFollow(t *testing.T) {
	const out = `Running in parallel across 3 processes
SSSSSSSS
------------------------------
• [4.121 seconds]
[sig-node] Pods should be updated [NodeConformance] [Conformance] [sig-node, NodeConformance, Conformance]
k8s.io/kubernetes@v1.34.4/test/e2e/common/node/pods.go:345
------------------------------
• [FAILED] [300.5 seconds]
[sig-storage] Secrets should be consumable [NodeConformance] [sig-storage, NodeConformance]
------------------------------
S [SKIPPED] [0.1 seconds]
[sig-node] Sysctls should support [sig-node, Environment:NotInUserNS]
[SynchronizedAfterSuite] PASSED [0.001 seconds]
`
	var got []Result
	if err := follow(strings.NewReader(out), func(r Result) { got = append(got, r) }); err != nil {
		t.Fatal(err)
	}
	want := []Result{
		{Name: "[sig-node] Pods should be updated [NodeConformance] [Conformance]", State: StatePassed, Took: 4121 * time.Millisecond},
		{Name: "[sig-storage] Secrets should be consumable [NodeConformance]", State: StateFailed, Took: 300500 * time.Millisecond},
		{Name: "[sig-node] Sysctls should support", State: StateSkipped, Took: 100 * time.Millisecond},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestRead(t *testing.T) {
	const spec = `{"ContainerHierarchyTexts":["[sig-node] Pods"],"LeafNodeType":"It","LeafNodeText":"%NAME%","State":"%STATE%","RunTime":2000000000,"Failure":{"Message":"%WHY%"}}`
	one := func(name, state, why string) string {
		return strings.NewReplacer("%NAME%", name, "%STATE%", state, "%WHY%", why).Replace(spec)
	}
	for name, tc := range map[string]struct {
		specs []string
		want  []Result
		err   string
	}{
		"each state": {
			specs: []string{one("a", "passed", ""), one("b", "failed", "no"), one("c", "timedout", "late"), one("d", "skipped", "cannot"), one("e", "skipped", "")},
			want: []Result{
				{"[sig-node] Pods a", StatePassed, 2 * time.Second, "", false},
				{"[sig-node] Pods b", StateFailed, 2 * time.Second, "no", false},
				{"[sig-node] Pods c", StateFailed, 2 * time.Second, "late", false},
				{"[sig-node] Pods d", StateSkipped, 2 * time.Second, "cannot", false},
			},
		},
		"the suite itself failed": {
			specs: []string{`{"LeafNodeType":"SynchronizedBeforeSuite","State":"failed","Failure":{"Message":"no node"}}`},
			err:   "the suite's own SynchronizedBeforeSuite failed: no node",
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "report.json")
			if err := os.WriteFile(file, []byte(`[{"SpecReports":[`+strings.Join(tc.specs, ",")+`]}]`), 0o644); err != nil {
				t.Fatal(err)
			}
			got, err := read(file)
			if tc.err != "" {
				if err == nil || !strings.HasSuffix(err.Error(), tc.err) {
					t.Fatalf("error %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestOnlyMatchesNoOther(t *testing.T) {
	re := regexp.MustCompile(only([]string{`a *b* [x]`, `c "d" e`}))
	for name, want := range map[string]bool{"suite a *b* [x]": true, `c "d" e`: true, "a *b* [x] more": false, "a b x": false} {
		if re.MatchString(name) != want {
			t.Errorf("%q: match %v, want %v", name, !want, want)
		}
	}
}

func TestCompare(t *testing.T) {
	pass, fail, skip := Result{State: StatePassed}, Result{State: StateFailed, Message: "broken"}, Result{State: StateSkipped, Message: "cannot"}
	named := func(n string, r Result) Result { r.Name = n; return r }
	names := []string{"both", "runc only", "kata only", "neither ran", "skips", "excluded"}
	runc := []Result{named("both", pass), named("runc only", pass), named("kata only", fail), named("neither ran", pass), named("skips", skip), named("excluded", pass)}
	kata := []Result{named("both", pass), named("runc only", fail), named("kata only", pass), named("skips", pass)}
	excluded := []Exclusion{{"excluded", "another machine", "an error"}, {"gone", "another machine", "an error"}}
	type verdict struct {
		Passed, Skipped bool
		Why             string
	}
	want := map[string]verdict{
		"both":        {true, false, ""},
		"runc only":   {false, false, "broken"},
		"kata only":   {false, true, "does not pass on runc on this node: broken"},
		"neither ran": {false, false, "was not run on kata-remote"},
		"skips":       {false, true, "skipped itself on runc: cannot"},
		"excluded":    {false, true, "excluded: another machine"},
		"gone":        {false, false, "is excluded, and there is no such test"},
	}
	got := map[string]verdict{}
	for _, v := range Compare(names, runc, kata, excluded) {
		got[v.Name] = verdict{v.Passed, v.Skipped, v.Why}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestExclusions(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		want []Exclusion
		err  string
	}{
		"a table": {"# Title\n\n| test | why | gets |\n|---|---|---|\n| `a [b]` | because | an error |\n",
			[]Exclusion{{"a [b]", "because", "an error"}}, ""},
		"no reason": {"| `a` | | an error |\n", nil, ":1: want | `test` | why | what the user gets |"},
		"none":      {"nothing\n", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "excluded.md")
			if err := os.WriteFile(file, []byte(tc.text), 0o644); err != nil {
				t.Fatal(err)
			}
			got, err := Exclusions(file)
			if tc.err != "" {
				if err == nil || !strings.HasSuffix(err.Error(), tc.err) {
					t.Fatalf("error %v, want one ending in %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestTheListIsReadable: what make e2e-k8s reads.
func TestTheListIsReadable(t *testing.T) {
	if _, err := Exclusions("../excluded.md"); err != nil {
		t.Error(err)
	}
}
