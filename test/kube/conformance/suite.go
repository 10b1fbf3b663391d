// SPDX-License-Identifier: Apache-2.0

// Package conformance runs a part of Kubernetes' own test suite, e2e.test, and
// compares what it says of pods on runc with what it says of pods in machines of their
// own. The suite decides: nothing of it is changed here, and nothing is left out but
// what test/kube/excluded.md lists.
package conformance

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
	"slices"
	"strings"
	"syscall"
	"time"
)

// Focus are the groups of the suite that are run, as its text names them: those that
// are about what a pod's containers have, see and live through.
const Focus = `\[sig-(node|storage)\] (Pods|RuntimeClass|ConfigMap|Secrets|Downward API|Downward API volume|EmptyDir volumes|Probing container|Container Lifecycle Hook|Sysctls|Projected (configMap|secret|downwardAPI|combined))\b`

// IsPatient tells whether a test waits for minutes by design: several at once cost
// little.
func IsPatient(name string) bool { return strings.Contains(name, "Probing container") }

// labels leaves out what is no NodeConformance, what wants a node for itself, and
// what is not yet Kubernetes' default. slow are two tests of half an hour together.
const (
	labels = `NodeConformance && !Serial && !Disruptive && !Flaky && !/^Feature:.+/`
	slow   = `Slow`
)

// Suite is e2e.test on a running cluster.
type Suite struct {
	Ginkgo     string // the program that runs the suite in several processes
	Program    string // e2e.test
	Kubectl    string // a program that is kubectl
	Kubeconfig string
	Dir        string // folder for logs and reports
	Slow       bool   // also the tests that Kubernetes calls slow
}

// State is the end of a test.
type State string

// States of a test, as the suite reports them.
const (
	StatePassed  State = "passed"
	StateFailed  State = "failed"
	StateSkipped State = "skipped" // the suite found that it cannot run here
)

// Result is what the suite says of one test.
type Result struct {
	Name    string
	State   State
	Took    time.Duration
	Message string // why it failed or was skipped
	Again   bool   // it failed, and was run once more, alone
}

// report is of ginkgo's JSON report (go doc ginkgo/v2/types.Report) what is needed.
type report []struct {
	SpecReports []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   string
		RunTime                 time.Duration
		Failure                 struct{ Message string }
	}
}

// args are the suite's own arguments. It runs on any cluster, and gathers no logs: the
// node's are here.
func (s *Suite) args() []string {
	return []string{"--kubeconfig=" + s.Kubeconfig, "--kubectl-path=" + s.Kubectl, "--provider=skeleton", "--num-nodes=1",
		"--disable-log-dump=true", "--node-os-distro=debian"}
}

func (s *Suite) filter() string {
	if s.Slow {
		return labels
	}
	return labels + " && !" + slow
}

// List names the tests that match.
func (s *Suite) List(ctx context.Context, focus string) ([]string, error) {
	file := filepath.Join(s.Dir, "list.json")
	cmd := exec.CommandContext(ctx, s.Program, append([]string{"--ginkgo.dry-run", "--ginkgo.no-color", "--ginkgo.focus=" + focus,
		"--ginkgo.label-filter=" + s.filter(), "--ginkgo.json-report=" + file}, s.args()...)...)
	cmd.Dir = s.Dir
	remove, err := s.temporary(cmd)
	if err != nil {
		return nil, err
	}
	defer remove()
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("list the tests: %w: %s", err, out)
	}
	results, err := read(file)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range results {
		if r.State == StatePassed { // a dry run passes what it would run
			names = append(names, r.Name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("no test matches %q", focus)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// temporary gives a command a folder for temporary files: the suite leaves some behind,
// even when it only lists its tests.
func (s *Suite) temporary(cmd *exec.Cmd) (remove func(), err error) {
	dir, err := os.MkdirTemp(s.Dir, "tmp")
	if err != nil {
		return nil, err
	}
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	return func() { os.RemoveAll(dir) }, nil
}

// only is a focus that matches these tests and no other.
func only(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = regexp.QuoteMeta(n)
	}
	return "(" + strings.Join(quoted, "|") + ")$"
}

// suiteTimeout bounds one run: ten times what it takes on two processors of their
// own.
const suiteTimeout = 2 * time.Hour

// Run runs the tests of these names, in procs processes, and tells of each as it ends.
// The log is in Dir under the run's name. That tests fail is no error.
func (s *Suite) Run(ctx context.Context, name string, tests []string, procs int, ended func(Result)) ([]Result, error) {
	log, err := os.Create(filepath.Join(s.Dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	file := name + ".json"
	args := []string{fmt.Sprintf("--procs=%d", procs), "--no-color", "-v", "--timeout=" + suiteTimeout.String(), "--label-filter=" + s.filter(),
		"--focus=" + only(tests), "--json-report=" + file, "--output-dir=" + s.Dir, "--keep-going"}
	args = append(append(args, s.Program, "--"), s.args()...)
	cmd := exec.CommandContext(ctx, s.Ginkgo, args...)
	cmd.Dir = s.Dir
	remove, err := s.temporary(cmd)
	if err != nil {
		return nil, err
	}
	defer remove()
	cmd.Stderr = log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if err := follow(io.TeeReader(out, log), ended); err != nil {
		return nil, errors.Join(err, cmd.Wait())
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		return nil, fmt.Errorf("ginkgo: %w (log: %s)", err, log.Name())
	}
	results, err := read(filepath.Join(s.Dir, file))
	if err != nil {
		return nil, fmt.Errorf("ginkgo left no report: %w (log: %s)", err, log.Name())
	}
	return results, nil
}

// endLine begins what ginkgo shows of a test that ended; the test's name follows on
// the next line.
var endLine = regexp.MustCompile(`^[•SP] (?:\[([A-Z ]+)\] )?\[([0-9.]+) seconds\]`)

// follow tells of the tests as ginkgo's output does.
func follow(out io.Reader, ended func(Result)) error {
	s := bufio.NewScanner(out)
	s.Buffer(nil, 16<<20)
	var r *Result
	for s.Scan() {
		if r != nil {
			r.Name, _, _ = strings.Cut(s.Text(), " [sig-node, ")
			r.Name, _, _ = strings.Cut(r.Name, " [sig-storage, ")
			ended(*r)
			r = nil
			continue
		}
		m := endLine.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		r = &Result{State: StatePassed}
		switch {
		case strings.HasPrefix(m[1], "SKIP"):
			r.State = StateSkipped
		case m[1] != "":
			r.State = StateFailed
		}
		seconds, err := time.ParseDuration(m[2] + "s")
		if err != nil {
			return err
		}
		r.Took = seconds
	}
	return s.Err()
}

// read reads a report: the tests that ran, and those that skipped themselves.
func read(file string) ([]Result, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var rep report
	if err := json.Unmarshal(b, &rep); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var out []Result
	for _, suite := range rep {
		for _, s := range suite.SpecReports {
			name := strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")
			switch {
			case s.LeafNodeType != "It" && s.State != "passed":
				return nil, fmt.Errorf("%s: the suite's own %s %s: %s", file, s.LeafNodeType, s.State, s.Failure.Message)
			case s.LeafNodeType != "It", s.State == "skipped" && s.Failure.Message == "", s.State == "pending":
				continue // not asked for
			}
			r := Result{Name: name, Took: s.RunTime, Message: s.Failure.Message, State: StateFailed}
			if s.State == string(StatePassed) || s.State == string(StateSkipped) {
				r.State = State(s.State)
			}
			out = append(out, r)
		}
	}
	return out, nil
}
