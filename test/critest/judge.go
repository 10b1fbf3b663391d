// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// verdict is what one containerd's two runs say.
type verdict struct {
	ByRunc   int      // specs that runc passed
	Passed   int      // of these, passed by kata-remote
	Excluded []string // of these, in excluded.md, and not passed
	Failed   []string // of these, all others: the spec and what happened
	Skipped  int      // specs that runc did not pass either
}

// judge compares the runs by name.
func judge(ex exclusions, runc, kata results) verdict {
	var v verdict
	for _, spec := range slices.Sorted(maps.Keys(runc)) {
		if runc[spec].State != passed {
			v.Skipped++
			continue
		}
		v.ByRunc++
		got, ran := kata[spec]
		c, excluded := ex.find(spec)
		switch {
		case !ran:
			v.Failed = append(v.Failed, spec+": was not run")
		case excluded && got.State == passed:
			v.Failed = append(v.Failed, fmt.Sprintf("%s: passes, and is in excluded.md under %q: take it out", spec, c.Name))
		case excluded:
			v.Excluded = append(v.Excluded, spec)
		case got.State == passed:
			v.Passed++
		default:
			first, _, _ := strings.Cut(got.Message, "\n")
			v.Failed = append(v.Failed, fmt.Sprintf("%s: %s after %.0f s at %s: %s", spec, got.State, got.Seconds, got.Where, first))
		}
	}
	return v
}

// stale lists the entries of excluded.md that took nothing away in any of the runs:
// the spec is called otherwise, or runc does not pass it either. all has the verdict
// and the specs of each containerd.
func stale(ex exclusions, specs results, all []verdict) []string {
	used := map[string]bool{}
	for _, v := range all {
		for _, s := range v.Excluded {
			used[s] = true
		}
	}
	var out []string
	for _, c := range ex {
		for _, s := range c.Specs {
			_, known := specs[s]
			switch {
			case !known:
				out = append(out, fmt.Sprintf("excluded.md, %s: critest has no spec called %q", c.Name, s))
			case !c.NotRun && !used[s]:
				out = append(out, fmt.Sprintf("excluded.md, %s: %q takes nothing away: it passes, or runc does not pass it either", c.Name, s))
			}
		}
	}
	return out
}
