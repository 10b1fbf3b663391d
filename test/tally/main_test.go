// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestTally(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		last string
		code int
		has  string
	}{
		"all pass": {`{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"B"}
{"Action":"pass","Package":"p"}`, "x: 2 passed, 0 failed", 0, "ok"},
		"one fails": {`{"Action":"output","Package":"p","Test":"A","Output":"because\n"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"B"}
{"Action":"fail","Package":"p"}`, "x: 1 passed, 1 failed", 1, "because"},
		"does not build": {`{"ImportPath":"p","Action":"build-output","Output":"undefined: y\n"}
{"Action":"pass","Package":"q","Test":"B"}
{"Action":"fail","Package":"p","FailedBuild":"p"}`, "x: 1 passed, 1 failed", 1, "undefined: y"},
		"panics": {`{"Action":"output","Package":"p","Test":"A","Output":"panic: z\n"}
{"Action":"pass","Package":"q","Test":"B"}
{"Action":"fail","Package":"p"}`, "x: 1 passed, 1 failed", 1, "panic: z"},
		"skip shows its reason": {`{"Action":"output","Package":"p","Test":"A","Output":"no root\n"}
{"Action":"skip","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"B"}`, "x: 1 passed, 0 failed, 1 skipped", 0, "no root"},
		"nothing ran": {``, "x: 0 passed, 0 failed", 1, ""},
	} {
		var out strings.Builder
		ta := &tally{out: &out, output: map[string][]string{}, broken: map[string]bool{}}
		code := ta.run("x", strings.NewReader(tc.in))
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if code != tc.code || lines[len(lines)-1] != tc.last || !strings.Contains(out.String(), tc.has) {
			t.Errorf("%s: exit %d, output:\n%s", name, code, out.String())
		}
	}
}
