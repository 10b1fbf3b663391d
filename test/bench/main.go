// SPDX-License-Identifier: Apache-2.0

// Command bench measures what users feel: how long a pod takes to start, against a
// bare virtual machine started in the same run; what an exec, a log line and a further
// container cost, against runc in the same run; what a pod costs the node in memory.
// Every figure is printed with how it was made; docs/performance.md holds the results.
// It is what `make bench` runs.
//
// Pods are measured in two kinds of machine: virtual ones as the embedded provider
// makes them, and simulated ones (test/simadaptor), which are processes. Where virtual
// machines run on a processor in software, the first tell what this machine can do and
// the second what the product costs.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// section is something that can be measured.
type section struct {
	name string
	run  func(*bench, context.Context) error
}

// sections are all of them, in the order in which they are measured.
var sections = []section{
	{"start", (*bench).starts},
	{"memory", (*bench).memory},
	{"exec", (*bench).execs},
	{"container", (*bench).containers},
	{"log", (*bench).logs},
	{"rootfs", (*bench).rootfs},
	{"aws", func(b *bench, ctx context.Context) error { return b.cloud(ctx, "aws") }},
	{"azure", func(b *bench, ctx context.Context) error { return b.cloud(ctx, "azure") }},
	{"disk", (*bench).disks},
}

func main() {
	names := make([]string, len(sections))
	for i, s := range sections {
		names[i] = s.name
	}
	bin := flag.String("bin", "_output/bin", "folder of the built programs")
	podvm := flag.String("podvm", "_output/podvm", "folder of the pod VM image")
	out := flag.String("out", "_output/bench", "folder for logs and state")
	runs := flag.Int("n", 5, "cold starts to measure")
	only := flag.String("only", strings.Join(names, ","), "what to measure")
	flag.Parse()
	if code, done := testbed.Isolate(testbed.Isolation{}); done {
		os.Exit(code)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, *bin, *podvm, *out, *runs, strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is a node with containerd, and with one adaptor at a time.
type bench struct {
	bed  *testbed.Bed
	cri  *cri
	runs int
	now  place // whose adaptor runs
}

// place is where pods run.
type place struct {
	name    string
	handler string
	// simulated machines are processes; delay is added to each round trip to them.
	simulated bool
	delay     string
}

var (
	onNode    = place{name: "runc"}
	inVM      = place{name: "pod VM", handler: testbed.Handler}
	inProcess = place{name: "simulated machine", handler: testbed.Handler, simulated: true}
	farAway   = place{name: "simulated machine, 1 ms away", handler: testbed.Handler, simulated: true, delay: "1ms"}
)

func run(ctx context.Context, bin, podvm, out string, runs int, only []string) error {
	bed, err := testbed.New(bin, podvm, out)
	if err != nil {
		return err
	}
	defer bed.Stop()
	if err := bed.StartContainerd(ctx); err != nil {
		return err
	}
	b := &bench{bed: bed, runs: runs}
	if b.cri, err = dialCRI(); err != nil {
		return err
	}
	defer b.cri.Close()
	for _, name := range only {
		if !slices.ContainsFunc(sections, func(s section) bool { return s.name == name }) {
			return fmt.Errorf("-only: there is no %q", name)
		}
	}
	for _, s := range sections {
		if !slices.Contains(only, s.name) {
			continue
		}
		if err := s.run(b, ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// leave ends the adaptor that runs.
func (b *bench) leave() error {
	b.now = place{}
	if b.bed.Adaptor == nil {
		return nil
	}
	err := b.bed.Adaptor.Stop()
	b.bed.Adaptor = nil
	return err
}

// in makes p the place where pods of the handler run.
func (b *bench) in(ctx context.Context, p place) error {
	if p == b.now || p == onNode {
		return nil
	}
	if err := b.leave(); err != nil {
		return err
	}
	b.bed.Simulated = p.simulated
	b.bed.AdaptorEnv = []string{"STATE_DIR=" + filepath.Join("/var/lib/peerpod", strings.ReplaceAll(p.name, " ", "-"))}
	if p.delay != "" {
		b.bed.AdaptorEnv = append(b.bed.AdaptorEnv, "SIM_DELAY="+p.delay)
	}
	if err := b.bed.StartAdaptor(ctx); err != nil {
		return err
	}
	b.now = p
	if p.simulated {
		return nil
	}
	// The first pod of a node waits for the provider's look at KVM: not counted.
	_, err := start(ctx, b.bed, "warm-up", func(*e2e.Pod) error { return nil })
	return err
}

// pod calls f with a pod in p, and removes it.
func (b *bench) pod(ctx context.Context, p place, name string, annotations map[string]string, f func(*e2e.Pod) error) error {
	if err := b.in(ctx, p); err != nil {
		return err
	}
	pod, err := e2e.RunPod(ctx, b.bed, name, p.handler, annotations)
	if err != nil {
		return err
	}
	if err := f(pod); err != nil {
		return err
	}
	return pod.Remove(ctx)
}
