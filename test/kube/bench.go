// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/kube/cluster"
	"github.com/kata-remote/kata-remote/test/kube/conformance"
	"github.com/kata-remote/kata-remote/test/kube/images"
	"github.com/kata-remote/kata-remote/test/kube/scenario"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// suiteHandler is the handler that the suite's RuntimeClass tests expect a node to
// have.
const suiteHandler = "test-handler"

// bench is one run.
type bench struct {
	options
	cluster                 *cluster.Cluster
	scenario                *scenario.Scenario
	narrator                e2e.Narrator
	passed, failed, skipped int
}

func (b *bench) run(ctx context.Context) error {
	if !b.check(ctx, b.startChecks()) {
		return nil
	}
	b.scenario = &scenario.Scenario{Cluster: b.cluster}
	chapters := b.scenario.Chapters()
	if !b.options.scenario {
		chapters = chapters[:1] // the plain pod is what the node is compared with at the end
		chapters[0].Checks = chapters[0].Checks[:1]
	}
	if !b.check(ctx, chapters...) {
		return nil
	}
	if b.focus == "" {
		return nil
	}
	if err := b.conformance(ctx); err != nil {
		return err
	}
	b.check(ctx, e2e.Chapter{Title: "After the tests", Checks: []e2e.Check{
		{Name: "nothing of them is left", Run: b.scenario.CheckLeftovers},
	}})
	return nil
}

// check runs chapters of checks, counts them, and tells whether one that the rest
// needs has failed.
func (b *bench) check(ctx context.Context, chapters ...e2e.Chapter) bool {
	for _, ch := range chapters {
		passed, failed := e2e.Run(ctx, []e2e.Chapter{ch}, b.narrator.Chapter, b.narrator.Begin, b.narrator.Report)
		b.passed += passed
		b.failed += failed
		if failed > 0 && ch.Needed || ctx.Err() != nil {
			return false
		}
	}
	return true
}

func (b *bench) startChecks() e2e.Chapter {
	return e2e.Chapter{Title: "A cluster of one node: containerd " + b.containerd, Needed: true, Checks: []e2e.Check{
		{Name: "etcd, API server, controller manager, scheduler, kubelet, kube-proxy, containerd and the adaptor are up", Run: b.start},
		{Name: "the images that Kubernetes' tests name are made", Run: func(ctx context.Context) (string, error) {
			all, err := images.All(ctx, b.cluster.Bed, b.programs())
			if err != nil {
				return "", err
			}
			return fmt.Sprintf("%d images", len(all)), b.cluster.Bed.Import(ctx, all...)
		}},
	}}
}

// programs is the folder of Kubernetes' programs. The runs change their folder.
func (b *bench) programs() string {
	dir, err := filepath.Abs(b.kube)
	if err != nil {
		return b.kube
	}
	return dir
}

func (b *bench) start(ctx context.Context) (string, error) {
	bed, err := testbed.New(b.bin, b.podvm, b.out)
	if err != nil {
		return "", err
	}
	g, ok := testbed.Generations(bed.Bin)["containerd "+b.containerd]
	if !ok {
		return "", errors.New("no such generation of containerd: " + b.containerd)
	}
	bed.Generation = g
	// One processor each: the overhead of the runtime class counts on it.
	bed.AdaptorEnv = []string{"LOCAL_VCPUS=1", "LOCAL_MEMORY=1024"}
	c, err := cluster.New(bed, filepath.Join(b.programs(), "kube-all"))
	if err != nil {
		return "", err
	}
	b.cluster = c
	if err := c.Start(ctx); err != nil {
		return "", err
	}
	kubernetes, containerd, err := c.Versions(ctx)
	return fmt.Sprintf("Kubernetes %s, containerd %s", kubernetes, containerd), err
}

// handle makes suiteHandler mean a runtime.
func (b *bench) handle(ctx context.Context, runtimeType string) error {
	bed := b.cluster.Bed
	bed.Handlers = map[string]string{suiteHandler: runtimeType}
	if err := bed.Containerd.Stop(); err != nil {
		return err
	}
	if err := bed.RestartContainerd(ctx); err != nil {
		return err
	}
	return b.cluster.AwaitNode(ctx)
}

// runcShare is how many of the tests must pass on runc, 9 of 10, for what does not to
// be the node's nature and no fault of the bench.
var runcShare = [2]int{9, 10}

func passes(rs []conformance.Result) (n int) {
	for _, r := range rs {
		if r.State == conformance.StatePassed {
			n++
		}
	}
	return n
}

// conformance runs Kubernetes' tests on runc, then on kata-remote.
func (b *bench) conformance(ctx context.Context) error {
	kube := b.programs()
	suite := &conformance.Suite{
		Ginkgo: filepath.Join(kube, "ginkgo"), Program: filepath.Join(kube, "e2e.test"), Kubectl: filepath.Join(kube, "kubectl"),
		Kubeconfig: b.cluster.Kubeconfig(), Dir: filepath.Join(b.cluster.Bed.Out, "logs"), Slow: b.slow,
	}
	excluded, err := conformance.Exclusions(b.excluded)
	if err != nil {
		return err
	}
	names, err := suite.List(ctx, b.focus)
	if err != nil {
		return err
	}
	fmt.Printf("\n== %d of Kubernetes' own tests, on runc\n", len(names))
	if err := b.handle(ctx, "io.containerd.runc.v2"); err != nil {
		return err
	}
	onRunc, err := b.runAll(ctx, suite, "runc", names, nil)
	if err != nil {
		return err
	}
	if n := passes(onRunc); n*runcShare[1] < len(names)*runcShare[0] {
		return fmt.Errorf("only %d of %d tests pass on runc: this node judges nothing", n, len(names))
	}
	fmt.Printf("\n== The same tests, every pod on %s\n", cluster.RuntimeClass)
	if err := errors.Join(settle(ctx, b.cluster), b.handle(ctx, testbed.HandlerType), b.cluster.DefaultToRuntimeClass(ctx)); err != nil {
		return err
	}
	w := watch(ctx, b.cluster)
	onKata, err := b.runAll(ctx, suite, testbed.Handler, names, excluded)
	seen, watchErr := w.end()
	if err != nil {
		return err
	}
	b.check(ctx, e2e.Chapter{Title: "What they ran on", Checks: []e2e.Check{
		{Name: "every pod of theirs ran on " + cluster.RuntimeClass + ", or on the class it named", Run: func(context.Context) (string, error) { return seen, watchErr }},
	}})
	verdicts := conformance.Compare(names, onRunc, onKata, excluded)
	b.judge(verdicts)
	if b.page == "" || !b.whole() {
		return nil
	}
	return b.writePage(ctx, verdicts)
}

// rerun is how many failed tests are given a second run, alone: some of the suite's
// clocks are shorter than a shared, emulated processor allows. More are no accident.
const rerun = 12

// runAll runs the tests: the patient ones beside the others, then once more, one at a
// time, what failed.
func (b *bench) runAll(ctx context.Context, suite *conformance.Suite, name string, names []string, excluded []conformance.Exclusion) ([]conformance.Result, error) {
	var skip []string
	for _, e := range excluded {
		skip = append(skip, e.Name)
	}
	p := &progress{all: len(names) - len(skip), start: time.Now()}
	var results []conformance.Result
	var errs []error
	var mu sync.Mutex // guards results and errs
	var wg sync.WaitGroup
	for run, procs := range map[string]int{"patient": b.patient, "others": b.procs} {
		var part []string
		for _, n := range names {
			if conformance.IsPatient(n) == (run == "patient") && !slices.Contains(skip, n) {
				part = append(part, n)
			}
		}
		if len(part) == 0 {
			continue
		}
		wg.Go(func() {
			rs, err := suite.Run(ctx, "conformance-"+name+"-"+run, part, procs, p.ended)
			mu.Lock()
			defer mu.Unlock()
			results, errs = append(results, rs...), append(errs, err)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	var failed []string
	for _, r := range results {
		if r.State == conformance.StateFailed {
			failed = append(failed, r.Name)
		}
	}
	if len(failed) == 0 || len(failed) > rerun {
		return results, nil
	}
	fmt.Printf("   %d failed, and run once more, alone\n", len(failed))
	p = &progress{all: len(failed), start: time.Now()}
	again, err := suite.Run(ctx, "conformance-"+name+"-again", failed, 1, p.ended)
	for i, r := range results {
		for _, a := range again {
			if a.Name == r.Name && r.State == conformance.StateFailed {
				results[i] = a
				results[i].Again = true
			}
		}
	}
	return results, err
}

// progress shows tests as they end.
type progress struct {
	mu    sync.Mutex
	n     int // guarded by mu
	all   int
	start time.Time
}

func (p *progress) ended(r conformance.Result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n++
	word := map[conformance.State]string{conformance.StatePassed: "ok  ", conformance.StateFailed: "FAIL", conformance.StateSkipped: "skip"}[r.State]
	fmt.Printf("   %s %3d/%d %5v %4.0fs  %s\n", word, p.n, p.all, time.Since(p.start).Round(time.Second), r.Took.Seconds(), r.Name)
}

// judge counts the verdicts and shows what did not pass.
func (b *bench) judge(verdicts []conformance.Verdict) {
	fmt.Printf("\n== %s beside runc\n", cluster.RuntimeClass)
	for _, v := range verdicts {
		switch {
		case v.Passed:
			b.passed++
		case v.Skipped:
			b.skipped++
			fmt.Printf("   skip %s\n        %s\n", v.Name, indent(v.Why))
		default:
			b.failed++
			fmt.Printf("   FAIL %s\n        %s\n", v.Name, indent(v.Why))
		}
	}
}

func indent(s string) string {
	return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n        ")
}
