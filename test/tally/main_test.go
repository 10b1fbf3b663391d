// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
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
		code := newTally(&out).run("x", strings.NewReader(tc.in), nil)
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if code != tc.code || lines[len(lines)-1] != tc.last || !strings.Contains(out.String(), tc.has) {
			t.Errorf("%s: exit %d, output:\n%s", name, code, out.String())
		}
	}
}

// TestAgain: what failed runs once more, and counts by what it says then.
func TestAgain(t *testing.T) {
	const failed = `{"Action":"pass","Package":"p","Test":"A/one"}
{"Action":"fail","Package":"p","Test":"A/two"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"B"}
{"Action":"fail","Package":"p"}
`
	const passes = `{"Action":"pass","Package":"p","Test":"A/one"}
{"Action":"pass","Package":"p","Test":"A/two"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}
`
	for name, tc := range map[string]struct {
		first, second string
		want          string
		args          string // of the second run; "": there is none
	}{
		"passes":       {failed, passes, "in a second run, alone: A of p\nx: 4 passed, 0 failed", "-run ^A$ -count 1 p"},
		"fails":        {failed, failed, "x: 2 passed, 2 failed", "-run ^A$ -count 1 p"},
		"runs nothing": {failed, "", "x: 2 passed, 2 failed", "-run ^A$ -count 1 p"},
		"whole package": {`{"Action":"pass","Package":"p","Test":"B"}
{"Action":"fail","Package":"p"}
`, passes + `{"Action":"pass","Package":"p","Test":"B"}`, "in a second run, alone: p\nx: 4 passed, 0 failed", "-count 1 p"},
		"a panic ends the package": {`{"Action":"output","Package":"p","Test":"A","Output":"panic: no"}
` + failed, passes, "in a second run, alone: p\nx: 3 passed, 0 failed", "-count 1 p"},
		"does not build": {failed + `{"Action":"fail","Package":"q","FailedBuild":"q"}`, passes, "x: 2 passed, 3 failed", ""},
		"a data race": {`{"Action":"output","Package":"p","Test":"A","Output":"WARNING: DATA RACE\n"}
` + failed, passes, "x: 2 passed, 2 failed", ""},
		"too many": {failed + strings.ReplaceAll(failed, `"p"`, `"q"`) + strings.ReplaceAll(failed, `"p"`, `"r"`) + strings.ReplaceAll(failed, `"p"`, `"s"`),
			passes, "x: 8 passed, 8 failed", ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			answer, args, script := filepath.Join(dir, "answer"), filepath.Join(dir, "args"), filepath.Join(dir, "again")
			for file, text := range map[string]string{answer: tc.second, script: "#!/bin/sh\nshift\necho \"$*\" >>" + args + "\ncat " + answer + "\n"} {
				if err := os.WriteFile(file, []byte(text), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			var out strings.Builder
			code := newTally(&out).run("x", strings.NewReader(tc.first), []string{script, "-json"})
			if !strings.HasSuffix(out.String(), tc.want+"\n") || (code == 0) != strings.Contains(tc.want, " 0 failed") {
				t.Errorf("exit %d, output:\n%s\nwant the end\n%s", code, out.String(), tc.want)
			}
			if got, err := os.ReadFile(args); strings.TrimSpace(string(got)) != tc.args || (err != nil) != (tc.args == "") {
				t.Errorf("the second run was %q, %v; want %q", got, err, tc.args)
			}
		})
	}
}
