// SPDX-License-Identifier: Apache-2.0

// Command tally reads the output of `go test -json`, shows each package as it ends
// and the whole output of what failed, and closes with one line:
//
//	test: 123 passed, 0 failed
//
// Skipped tests are added to it, with the reason of each shown. It exits non-zero
// unless something passed and nothing failed.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// event is one line of `go test -json` (go doc test2json).
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	Elapsed     float64 // seconds
	FailedBuild string
	ImportPath  string
}

type tally struct {
	out                     io.Writer
	passed, failed, skipped int
	output                  map[string][]string // by package and test
	broken                  map[string]bool     // packages with a failed test
}

func main() {
	name := flag.String("name", "test", "word that the closing line begins with")
	flag.Parse()
	t := &tally{out: os.Stdout, output: map[string][]string{}, broken: map[string]bool{}}
	os.Exit(t.run(*name, os.Stdin))
}

func (t *tally) run(name string, in io.Reader) int {
	s := bufio.NewScanner(in)
	s.Buffer(nil, 16<<20)
	for s.Scan() {
		var e event
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			fmt.Fprintln(t.out, s.Text()) // not from go test: show it
			continue
		}
		t.add(e)
	}
	if err := s.Err(); err != nil {
		fmt.Fprintf(t.out, "%s: reading the tests' output: %v\n", name, err)
		t.failed++
	}
	line := fmt.Sprintf("%s: %d passed, %d failed", name, t.passed, t.failed)
	if t.skipped > 0 {
		line += fmt.Sprintf(", %d skipped", t.skipped)
	}
	fmt.Fprintln(t.out, line)
	if t.failed > 0 || t.passed == 0 {
		return 1
	}
	return 0
}

func (t *tally) add(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		t.output[key] = append(t.output[key], e.Output)
	case "build-output":
		fmt.Fprint(t.out, e.Output)
	case "pass":
		if e.Test != "" {
			t.passed++
		} else {
			fmt.Fprintf(t.out, "ok    %6.1fs  %s\n", e.Elapsed, e.Package)
		}
		delete(t.output, key)
	case "skip":
		if e.Test == "" {
			break // a package without tests
		}
		t.skipped++
		fmt.Fprintf(t.out, "skip  %s %s\n%s", e.Package, e.Test, strings.Join(t.output[key], ""))
	case "fail":
		t.fail(e, key)
	}
}

func (t *tally) fail(e event, key string) {
	switch {
	case e.Test != "":
		t.failed++
		t.broken[e.Package] = true
		fmt.Fprintf(t.out, "FAIL  %6.1fs  %s %s\n%s", e.Elapsed, e.Package, e.Test, strings.Join(t.output[key], ""))
	case !t.broken[e.Package]: // did not build, panicked, or failed outside of a test
		t.failed++
		fmt.Fprintf(t.out, "FAIL  %6.1fs  %s\n%s", e.Elapsed, e.Package, strings.Join(t.output[key], ""))
		// What a test printed before the process died belongs to no ended test.
		for k, lines := range t.output {
			if k != key && strings.HasPrefix(k, e.Package+" ") {
				fmt.Fprint(t.out, strings.Join(lines, ""))
			}
		}
	default:
		fmt.Fprintf(t.out, "FAIL  %6.1fs  %s\n%s", e.Elapsed, e.Package, strings.Join(t.output[key], ""))
	}
}
