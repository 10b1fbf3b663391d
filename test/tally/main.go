// SPDX-License-Identifier: Apache-2.0

// Command tally reads the output of `go test -json`, shows each package as it ends
// and the whole output of what failed, and closes with one line:
//
//	test: 123 passed, 0 failed
//
// Skipped tests are added to it, with the reason of each shown. It exits non-zero
// unless something passed and nothing failed.
//
// With -again, a command, the few tests that failed are run once more, one at a time:
// machines that boot under emulation beside each other on two processors can starve
// one another past any deadline. What fails twice has failed. What passes alone counts
// as passed, is named above the closing line, and its first output stays in the log:
//
//	in a second run, alone: TestCrashes of github.com/kata-remote/kata-remote/test/e2e
//
// When more than maxAgain tests fail, one does not build, or two goroutines race,
// something is broken, and none is run again.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
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

// maxAgain is how many tests are run once more at most.
const maxAgain = 3

// test is a top-level test, or a whole package (name "") that failed outside of one.
type test struct{ pkg, name string }

func (t test) String() string {
	if t.name == "" {
		return t.pkg
	}
	return t.name + " of " + t.pkg
}

// tally counts. The zero value is ready once out is set.
type tally struct {
	out                     io.Writer
	passed, failed, skipped int
	output                  map[string][]string // by package and test
	broken                  map[string]bool     // packages with a failed test
	lost                    map[test]int        // failures of each test with those inside it
	good                    map[test]int        // passes of each test with those inside it
	died                    map[string]bool     // packages whose process ended before its tests had
	hopeless                bool                // something failed that no second run can mend
}

func newTally(out io.Writer) *tally {
	return &tally{out: out, output: map[string][]string{}, broken: map[string]bool{}, lost: map[test]int{}, good: map[test]int{}, died: map[string]bool{}}
}

func main() {
	name := flag.String("name", "test", "word that the closing line begins with")
	again := flag.String("again", "", "`command`, go test -json with its flags, to run a test once more that failed")
	flag.Parse()
	t := newTally(os.Stdout)
	os.Exit(t.run(*name, os.Stdin, strings.Fields(*again)))
}

func (t *tally) run(name string, in io.Reader, again []string) int {
	t.read(name, in)
	var second []test
	t.wholePackages()
	if len(again) > 0 && !t.hopeless && len(t.lost) <= maxAgain {
		second = t.runAgain(name, again)
	}
	for _, s := range second {
		fmt.Fprintf(t.out, "in a second run, alone: %s\n", s)
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

// wholePackages replaces the lost tests of a package that died by the package: those
// that were still to come have not been seen at all.
func (t *tally) wholePackages() {
	for lost, n := range t.lost {
		if t.died[lost.pkg] && lost.name != "" {
			delete(t.lost, lost)
			t.lost[test{pkg: lost.pkg}] += n
		}
	}
}

// runAgain runs what failed once more and returns what passed.
func (t *tally) runAgain(name string, command []string) (passed []test) {
	for _, lost := range slices.SortedFunc(maps.Keys(t.lost), func(a, b test) int { return strings.Compare(a.String(), b.String()) }) {
		args := command
		if lost.name != "" {
			args = append(slices.Clip(args), "-run", "^"+lost.name+"$")
		}
		args = append(slices.Clip(args), "-count", "1", lost.pkg)
		fmt.Fprintf(t.out, "again %s\n", lost)
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stderr = t.out
		second := newTally(t.out)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			fmt.Fprintf(t.out, "%s: run a test again: %v\n", name, err)
			continue
		}
		second.read(name, out)
		err = cmd.Wait()
		if err != nil || second.failed > 0 || second.passed == 0 {
			continue
		}
		passed = append(passed, lost)
		t.failed -= t.lost[lost]
		t.passed += second.passed
		for ran, n := range t.good {
			if ran == lost || lost.name == "" && ran.pkg == lost.pkg {
				t.passed -= n // they ran again
			}
		}
	}
	return passed
}

func (t *tally) read(name string, in io.Reader) {
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
		t.hopeless = true
	}
}

func (t *tally) add(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		t.output[key] = append(t.output[key], e.Output)
		if strings.HasPrefix(e.Output, "panic: ") || strings.HasPrefix(e.Output, "fatal error: ") {
			t.died[e.Package] = true
		}
		if strings.HasPrefix(e.Output, "WARNING: DATA RACE") {
			t.hopeless = true
		}
	case "build-output":
		fmt.Fprint(t.out, e.Output)
	case "pass":
		if e.Test != "" {
			t.passed++
			t.good[topOf(e)]++
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

// topOf is the test of an event that stands in no other.
func topOf(e event) test {
	top, _, _ := strings.Cut(e.Test, "/")
	return test{e.Package, top}
}

func (t *tally) fail(e event, key string) {
	switch {
	case e.Test != "":
		t.failed++
		t.broken[e.Package] = true
		t.lost[topOf(e)]++
		fmt.Fprintf(t.out, "FAIL  %6.1fs  %s %s\n%s", e.Elapsed, e.Package, e.Test, strings.Join(t.output[key], ""))
	case !t.broken[e.Package]: // did not build, panicked, or failed outside of a test
		t.failed++
		if t.hopeless = t.hopeless || e.FailedBuild != ""; !t.hopeless {
			t.lost[test{pkg: e.Package}]++
		}
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
