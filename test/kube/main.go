// SPDX-License-Identifier: Apache-2.0

// Command kube brings up a Kubernetes cluster whose one node is a testbed and judges
// the product by it: what users do with kubectl, and what Kubernetes' own suite tests,
// with every pod in a machine of its own, measured against runc on the same node. It
// is what `make e2e-k8s` runs.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kata-remote/kata-remote/test/kube/conformance"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// options are the command line.
type options struct {
	bin, podvm, kube, out, containerd string
	page, excluded                    string
	focus                             string
	scenario, slow, keep              bool
	procs, patient                    int
}

// whole tells whether all of the list is run, so that the page may say so.
func (o options) whole() bool { return o.focus == conformance.Focus && o.scenario }

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "_output/bin", "folder of the built programs")
	flag.StringVar(&o.podvm, "podvm", "_output/podvm", "folder of the pod VM image")
	flag.StringVar(&o.kube, "kube", "_output/kube", "folder of Kubernetes' programs")
	flag.StringVar(&o.out, "out", "_output/e2e-k8s", "folder for logs and state")
	flag.StringVar(&o.containerd, "containerd", "2", "generation of containerd: 1.6, 1.7 or 2")
	flag.StringVar(&o.page, "page", "", "page that a whole run writes its table into; empty: none")
	flag.StringVar(&o.excluded, "excluded", "test/kube/excluded.md", "tests that cannot pass, with reasons")
	flag.StringVar(&o.focus, "focus", conformance.Focus, "tests of Kubernetes' suite to run, a regular expression; none: \"\"")
	flag.BoolVar(&o.scenario, "scenario", true, "run our own checks, too")
	flag.BoolVar(&o.slow, "slow", false, "run what Kubernetes calls slow, too")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster running")
	flag.IntVar(&o.procs, "procs", 3, "how many tests run at the same time")
	flag.IntVar(&o.patient, "patient-procs", 5, "how many of those that wait for minutes run beside them")
	stop := flag.Bool("stop", false, "stop what -keep left running")
	flag.Parse()
	pidFile := o.out + ".pid"
	if *stop {
		if err := testbed.Stop(pidFile); err != nil {
			fmt.Fprintln(os.Stderr, "e2e-k8s:", err)
			os.Exit(1)
		}
		return
	}
	if code, done := testbed.Isolate(testbed.Isolation{PIDFile: pidFile, MayKeep: o.keep}); done {
		os.Exit(code)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, o)
	if o.keep {
		if err := testbed.Keep(code); err != nil {
			fmt.Fprintln(os.Stderr, "e2e-k8s:", err)
			os.Exit(1)
		}
		<-ctx.Done() // until testbed.Stop ends process 1 of these namespaces
	}
	cancel()
	os.Exit(code)
}

// run runs everything and closes with the line that counts it.
func run(ctx context.Context, o options) int {
	b := &bench{options: o}
	err := b.run(ctx)
	if err != nil {
		b.failed++
		fmt.Fprintln(os.Stderr, "e2e-k8s:", err)
	}
	if b.cluster != nil && !o.keep {
		if err := b.cluster.Stop(); err != nil {
			b.failed++
			fmt.Fprintln(os.Stderr, "e2e-k8s:", err)
		}
	}
	if b.failed > 0 {
		out, _ := filepath.Abs(o.out)
		fmt.Printf("\ne2e-k8s: logs are in %s\n", filepath.Join(out, "logs"))
	}
	if o.keep && b.cluster != nil {
		out, _ := filepath.Abs(o.out)
		fmt.Printf("\nThe cluster keeps running, in namespaces of its own. To look inside:\n\n  nsenter -t $(head -n 1 %s.pid) -a %s\n\nTo stop it: make e2e-k8s-stop\n\n",
			out, b.cluster.Program+" "+strings.Join(b.cluster.KubectlArgs("get", "pods", "-A"), " "))
	}
	fmt.Printf("e2e-k8s: %d passed, %d failed, %d skipped\n", b.passed, b.failed, b.skipped)
	if b.failed > 0 || b.passed == 0 {
		return 1
	}
	return 0
}
