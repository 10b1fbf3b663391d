// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/kata-remote/kata-remote/test/compat"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// summary is what all runs come to.
type summary struct {
	table    string
	failures []string
	passed   int
	line     string // the closing line
}

// summarize puts the runs together. whole: all specs were run under every containerd,
// so an entry of excluded.md that took nothing away is stale.
func summarize(ex exclusions, all []outcome, whole bool) summary {
	var s summary
	var rows [][]string
	var verdicts []verdict
	skippedSpecs := 0
	for _, o := range all {
		v := o.Verdict
		verdicts = append(verdicts, v)
		rows = append(rows, row(o))
		s.passed += v.Passed
		skippedSpecs += v.Skipped + len(v.Excluded)
		for _, f := range append(v.Failed, o.Problems...) {
			s.failures = append(s.failures, "containerd "+o.Version+": "+f)
		}
	}
	if whole {
		s.failures = append(s.failures, stale(ex, all[0].Specs, verdicts)...)
	}
	s.table = plain(header, rows)
	s.line = fmt.Sprintf("critest: %d passed, %d failed, %d skipped", s.passed, len(s.failures), skippedSpecs)
	return s
}

var header = []string{"containerd", "passed", "passed by runc", "excluded", "failed"}

func row(o outcome) []string {
	v := o.Verdict
	return []string{o.Version, strconv.Itoa(v.Passed), strconv.Itoa(v.ByRunc), strconv.Itoa(len(v.Excluded)), strconv.Itoa(len(v.Failed))}
}

// plain is a table for a terminal.
func plain(header []string, rows [][]string) string {
	width := make([]int, len(header))
	all := append([][]string{header}, rows...)
	for _, r := range all {
		for i, c := range r {
			width[i] = max(width[i], len(c))
		}
	}
	var b strings.Builder
	for _, r := range all {
		for i, c := range r {
			fmt.Fprintf(&b, "%-*s", width[i]+2, c)
		}
		b.WriteString("\n")
	}
	return b.String()
}

const command = "make critest"

// writePage puts the results into docs/compatibility.md.
func writePage(path string, ex exclusions, all []outcome) error {
	var versions, specs, excluded [][]string
	for _, o := range all {
		versions = append(versions, []string{o.Name, o.Version, o.Runc})
		specs = append(specs, row(o))
	}
	for _, c := range ex {
		for _, s := range c.Specs {
			told := "`" + c.Error + "`"
			if c.NotRun {
				told = "(not run, with any runtime)"
			}
			excluded = append(excluded, []string{s, c.Name, c.Why, told})
		}
	}
	return compat.Update(path,
		compat.Section{Name: "containerd", Title: "containerd", Command: command,
			Body: "The same shim serves each.\n\n" + compat.Table([]string{"generation", "version", "runc beside it"}, versions)},
		compat.Section{Name: "critest", Title: "critest", Command: command,
			Body: "cri-tools v1.30.0, `--runtime-handler " + testbed.Handler + "`, against runc on the same containerd in the same run. Passed and failed are of those that " +
				"runc passes; excluded are those of them that the next section lists.\n\n" + compat.Table(header, specs)},
		compat.Section{Name: "exclusions", Title: "What a pod in another machine cannot have", Command: command,
			Body: "From `test/critest/excluded.md`. That the error is the one a pod gets at create is part of the run.\n\n" +
				compat.Table([]string{"spec", "asks for", "why not", "error at create"}, excluded)})
}

// versions of containerd and runc as they say themselves.
func versions(ctx context.Context, bed *testbed.Bed) (containerd, runc string, err error) {
	out, err := bed.Crictl(ctx, "version")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "RuntimeVersion:"); ok {
			// What a distribution or a build adds ("~ds1", "+unknown") is no part of it.
			containerd = strings.TrimPrefix(strings.TrimSpace(v), "v")
			if i := strings.IndexAny(containerd, "~+"); i > 0 {
				containerd = containerd[:i]
			}
		}
	}
	if out, err = testbed.Run(ctx, "runc", "--version"); err != nil {
		return "", "", err
	}
	first, _, _ := strings.Cut(out, "\n")
	runc = strings.TrimPrefix(first, "runc version ")
	if i := strings.IndexAny(runc, "+~"); i > 0 {
		runc = runc[:i]
	}
	if containerd == "" || runc == "" {
		return "", "", fmt.Errorf("crictl version and runc --version do not tell the versions: %q", out)
	}
	return containerd, runc, nil
}

// slug is a name as a folder.
func slug(name string) string { return strings.ReplaceAll(name, " ", "-") }
