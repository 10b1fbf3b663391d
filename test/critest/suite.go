// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// Outcomes of a spec, as ginkgo's JSON report has them.
const (
	passed  = "passed"
	skipped = "skipped"
)

// result is one spec of one run of the suite.
type result struct {
	State   string
	Seconds float64
	Message string // of the failure
	Where   string // file:line of the failure
}

// results are a run's specs by full name.
type results map[string]result

// count tells how many specs ended so.
func (r results) count(state string) (n int) {
	for _, s := range r {
		if s.State == state {
			n++
		}
	}
	return n
}

// suite is one run of critest: one containerd, one runtime.
type suite struct {
	bed     *testbed.Bed
	tools   string // folder of ginkgo and critest.test
	runtime string // name for people
	handler string // of the CRI; "": containerd's default, runc
	// nodes is how many specs run at once. Much of a spec is waiting: for images,
	// for the next look at a state (4 s apart), for a machine to boot.
	nodes int
	focus string   // regular expression of the specs to run; "": all
	skip  []string // full names of specs to leave out
	say   func(string)
}

// suiteFolder begins the name of a run's folder in the bed's: report, temporary files.
const suiteFolder = "critest-"

// suiteTimeout bounds one run: ten times what it takes on two cores that are free.
const suiteTimeout = time.Hour

// seed fixes the order of the specs, which critest shuffles: two runs can be compared.
const seed = "1"

// run runs the suite and returns what became of each spec. That specs failed is not
// an error; that the suite did not come to its end is.
func (s *suite) run(ctx context.Context) (results, error) {
	dir := filepath.Join(s.bed.Out, suiteFolder+s.runtime)
	tmp := filepath.Join(dir, "tmp")
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return nil, err
	}
	socket := "unix://" + testbed.ContainerdSocket
	args := []string{"run", "--no-color", "-v", "--keep-going", "--seed", seed, "--nodes", strconv.Itoa(s.nodes),
		"--timeout", suiteTimeout.String(), "--output-dir", dir, "--json-report", "report.json"}
	if s.focus != "" {
		args = append(args, "--focus", s.focus)
	}
	for _, name := range s.skip {
		args = append(args, "--skip", regexp.QuoteMeta(name)+"$")
	}
	args = append(args, filepath.Join(s.tools, "critest.test"), "--",
		"-config", filepath.Join(dir, "none.yaml"), "-runtime-endpoint", socket, "-image-endpoint", socket, "-runtime-handler", s.handler)
	log, err := os.Create(s.bed.Log("critest-" + s.runtime))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, filepath.Join(s.tools, "ginkgo"), args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "HOME=/root")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, w := io.Pipe()
	cmd.Stdout = io.MultiWriter(log, w)
	cmd.Stderr = cmd.Stdout
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		s.progress(out)
	}()
	runErr := cmd.Run()
	w.Close()
	<-shown
	var exit *exec.ExitError
	if runErr != nil && !errors.As(runErr, &exit) {
		return nil, fmt.Errorf("run critest with %s: %w", s.runtime, runErr)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, err := readReport(filepath.Join(dir, "report.json"))
	if err != nil {
		return nil, fmt.Errorf("critest with %s did not come to its end (%w): see %s", s.runtime, err, log.Name())
	}
	return r, nil
}

// endRE is the line with which ginkgo closes a spec; the next one is its name.
var endRE = regexp.MustCompile(`^(?:•|P)!? (?:\[([A-Z ]+)\] )?\[([0-9.]+) seconds\]`)

// progress shows each spec as it ends.
func (s *suite) progress(out io.Reader) {
	sc := bufio.NewScanner(out)
	sc.Buffer(nil, 16<<20)
	var end []string
	for n := 0; sc.Scan(); {
		if end != nil {
			n++
			state := strings.ToLower(end[1])
			if state == "" {
				state = "ok"
			}
			s.say(fmt.Sprintf("%3d %-7s %s (%s s)", n, state, sc.Text(), end[2]))
		}
		end = endRE.FindStringSubmatch(sc.Text())
	}
	io.Copy(io.Discard, out) // a line too long ends the scan, and must not stop ginkgo
}

// readReport reads ginkgo's JSON report (ginkgo 2.17, types.Report).
func readReport(path string) (results, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var reports []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   string
			RunTime                 time.Duration
			Failure                 struct {
				Message  string
				Location struct {
					FileName   string
					LineNumber int
				}
			}
		}
		SpecialSuiteFailureReasons []string
	}
	if err := json.Unmarshal(b, &reports); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r := results{}
	for _, rep := range reports {
		for _, s := range rep.SpecReports {
			if s.LeafNodeType != "It" {
				continue
			}
			name := strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
			if _, twice := r[name]; twice {
				return nil, fmt.Errorf("%s: two specs are called %q", path, name)
			}
			r[name] = result{s.State, s.RunTime.Seconds(), s.Failure.Message, fmt.Sprintf("%s:%d", filepath.Base(s.Failure.Location.FileName), s.Failure.Location.LineNumber)}
		}
	}
	if len(r) == 0 {
		return nil, fmt.Errorf("%s has no spec", path)
	}
	return r, nil
}
