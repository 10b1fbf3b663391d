// SPDX-License-Identifier: Apache-2.0

// Command critest runs Kubernetes' own test suite for container runtimes on pods of
// kata-remote and on pods of runc, under each containerd, and compares: what runc
// passes kata-remote must pass, but for the specs of excluded.md. It is what `make
// critest` runs.
//
//	registry in memory ──▶ containerd 1.6 ──▶ critest with runc, then with kata-remote
//	(stand-in images)      containerd 2   ──▶ the same
//	                                          └▶ judge by spec name, excluded.md
//
// All of it happens in namespaces of its own (test/testbed), and what the pods leave
// behind is looked for at the end. The result also goes into docs/compatibility.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// options are the command line.
type options struct {
	bin, podvm, tools, out string
	excluded, page         string
	focus, containerd      string
	nodes                  int
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "_output/bin", "folder of the built programs")
	flag.StringVar(&o.podvm, "podvm", "_output/podvm", "folder of the pod VM image")
	flag.StringVar(&o.tools, "tools", "_output/critest-tools", "folder of critest.test, ginkgo and the images' programs")
	flag.StringVar(&o.out, "out", "_output/critest", "folder for logs and state")
	flag.StringVar(&o.excluded, "excluded", "test/critest/excluded.md", "specs that a pod in another machine cannot pass, with the reasons")
	flag.StringVar(&o.page, "page", "", "page that the result is written into (docs/compatibility.md); empty: none")
	flag.StringVar(&o.focus, "focus", "", "regular expression: run these specs only, and write no page")
	flag.StringVar(&o.containerd, "containerd", "", `run under this containerd only ("containerd 2"), and write no page`)
	flag.IntVar(&o.nodes, "nodes", 3, "how many specs run at once")
	flag.Parse()
	if code, done := testbed.Isolate(testbed.Isolation{PIDFile: o.out + ".pid"}); done {
		os.Exit(code)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	os.Exit(run(ctx, o))
}

// generations are the containerds that the suite is run under, in this order.
var generations = []string{"containerd 1.6", "containerd 2"}

// outcome is what one containerd showed.
type outcome struct {
	Name     string // of the generation
	Version  string
	Runc     string // its version
	Specs    results
	Verdict  verdict
	Problems []string // what failed besides specs
	Logs     string
}

func run(ctx context.Context, o options) int {
	start := time.Now()
	ex, err := readExcluded(o.excluded)
	if err != nil {
		return broken(err)
	}
	var all []outcome
	for _, name := range generations {
		if o.containerd != "" && o.containerd != name {
			continue
		}
		r, err := one(ctx, o, name, ex)
		if err != nil {
			return broken(fmt.Errorf("%s: %w (logs: %s)", name, err, filepath.Join(o.out, slug(name), "logs")))
		}
		all = append(all, r)
	}
	if len(all) == 0 {
		return broken(fmt.Errorf("no containerd is called %q: %q", o.containerd, generations))
	}
	whole := o.focus == "" && o.containerd == ""
	s := summarize(ex, all, whole)
	fmt.Printf("\n%s\n", s.table)
	for _, f := range s.failures {
		fmt.Println("FAIL", f)
	}
	if whole && o.page != "" {
		if err := writePage(o.page, ex, all); err != nil {
			return broken(err)
		}
	}
	if len(s.failures) > 0 {
		fmt.Printf("critest: logs are in %s\n", o.out)
	}
	fmt.Printf("critest: %v\n", time.Since(start).Round(time.Second))
	fmt.Println(s.line)
	if len(s.failures) > 0 || s.passed == 0 {
		return 1
	}
	return 0
}

// broken reports what kept the comparison from being made.
func broken(err error) int {
	fmt.Fprintln(os.Stderr, "critest:", err)
	fmt.Println("critest: 0 passed, 1 failed, 0 skipped")
	return 1
}

// one runs everything under one containerd.
func one(ctx context.Context, o options, name string, ex exclusions) (out outcome, err error) {
	out.Name = name
	bed, err := testbed.New(o.bin, o.podvm, filepath.Join(o.out, slug(name)))
	if err != nil {
		return out, err
	}
	defer func() {
		err = errors.Join(err, bed.Stop())
	}()
	bed.Generation = testbed.Generations(bed.Bin)[name]
	out.Logs = filepath.Join(bed.Out, "logs")
	tools, err := filepath.Abs(o.tools)
	if err != nil {
		return out, err
	}
	registry, err := bed.StartRegistry()
	if err != nil {
		return out, err
	}
	defer registry.Stop()
	if err := pushImages(ctx, bed, registry, tools); err != nil {
		return out, err
	}
	if err := bed.StartContainerd(ctx); err != nil {
		return out, err
	}
	if err := bed.StartAdaptor(ctx); err != nil {
		return out, err
	}
	if out.Version, out.Runc, err = versions(ctx, bed); err != nil {
		return out, err
	}
	// What stays with the first pod of a node, as its bridge does, is not a pod's.
	if err := firstPod(ctx, bed); err != nil {
		return out, err
	}
	before, err := e2e.TakeSnapshot()
	if err != nil {
		return out, err
	}
	byRuntime := map[string]results{}
	for _, rt := range []struct{ name, handler string }{{"runc", ""}, {testbed.Handler, testbed.Handler}} {
		fmt.Printf("\n== critest, containerd %s, %s\n", out.Version, rt.name)
		s := &suite{bed: bed, tools: tools, runtime: rt.name, handler: rt.handler, nodes: o.nodes, focus: o.focus, skip: ex.notRun(),
			say: func(line string) { fmt.Println("  ", line) }}
		if byRuntime[rt.name], err = s.run(ctx); err != nil {
			return out, err
		}
	}
	out.Specs = byRuntime[testbed.Handler]
	out.Verdict = judge(ex, byRuntime["runc"], out.Specs)
	fmt.Printf("\n== what excluded.md excludes is refused\n")
	for _, c := range refusals(ctx, bed, ex) {
		fmt.Printf("   %-7s %s\n", c.word(), c.class)
		if c.err != nil {
			out.Problems = append(out.Problems, fmt.Sprintf("%s %v", c.class, c.err))
		}
	}
	if err := nothingLeft(ctx, bed, before); err != nil {
		out.Problems = append(out.Problems, err.Error())
	}
	return out, ctx.Err()
}

// firstPod runs and removes an ordinary pod.
func firstPod(ctx context.Context, bed *testbed.Bed) error {
	p, err := e2e.RunPod(ctx, bed, "first", "", nil)
	if err != nil {
		return fmt.Errorf("the node's first pod: %w", err)
	}
	return p.Remove(ctx)
}

// unmountBelow takes away the mounts whose path begins so. critest's specs about mounts
// make some in their temporary folders, and forget them where they fail early.
func unmountBelow(prefix string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], prefix) {
			errs = append(errs, unix.Unmount(f[4], unix.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}

// goneWithin bounds the wait for the last machines' deletion, which goes on in the
// adaptor after their pods are gone.
const goneWithin = 60 * time.Second

// nothingLeft removes the pods that failed specs left and waits until the node is as
// it was before.
func nothingLeft(ctx context.Context, bed *testbed.Bed, before e2e.Snapshot) error {
	if _, err := bed.Crictl(ctx, "rmp", "-a", "-f"); err != nil {
		return fmt.Errorf("remove what is left of the pods: %w", err)
	}
	if err := unmountBelow(filepath.Join(bed.Out, suiteFolder)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, goneWithin)
	defer cancel()
	return testbed.Poll(ctx, func(context.Context) error {
		now, err := e2e.TakeSnapshot()
		if err != nil {
			return err
		}
		if more := now.Beyond(before); len(more) > 0 {
			return fmt.Errorf("left behind: %q", more)
		}
		return nil
	})
}
