// SPDX-License-Identifier: Apache-2.0

// Command bench measures what users feel: how long a pod takes to start, against a
// bare virtual machine started in the same run, and what a pod costs the node in
// memory. Every figure is printed with how it was made; docs/performance.md holds
// the results. It is what `make bench` runs.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

func main() {
	bin := flag.String("bin", "_output/bin", "folder of the built programs")
	podvm := flag.String("podvm", "_output/podvm", "folder of the pod VM image")
	out := flag.String("out", "_output/bench", "folder for logs and state")
	runs := flag.Int("n", 5, "cold starts to measure")
	flag.Parse()
	if code, done := testbed.Isolate(testbed.Isolation{}); done {
		os.Exit(code)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, *bin, *podvm, *out, *runs); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, bin, podvm, out string, runs int) (err error) {
	bed, err := testbed.New(bin, podvm, out)
	if err != nil {
		return err
	}
	defer bed.Stop()
	if err := bed.StartContainerd(ctx); err != nil {
		return err
	}
	if err := bed.StartAdaptor(ctx); err != nil {
		return err
	}
	// The first pod of a node waits for the provider's look at KVM: not counted.
	if _, err := start(ctx, bed, "warm-up", func(*e2e.Pod) error { return nil }); err != nil {
		return err
	}
	if err := starts(ctx, bed, runs); err != nil {
		return err
	}
	return memory(ctx, bed)
}

// start runs a pod, calls f with it and removes it. It returns how long the pod took
// to be ready.
func start(ctx context.Context, bed *testbed.Bed, name string, f func(*e2e.Pod) error) (time.Duration, error) {
	p, err := e2e.RunPod(ctx, bed, name, testbed.Handler, nil)
	if err != nil {
		return 0, err
	}
	if err := f(p); err != nil {
		return 0, err
	}
	if err := p.Remove(ctx); err != nil {
		return 0, err
	}
	return p.Took, idle(ctx)
}

// idle waits until no virtual machine is left, so that one start is not measured
// beside another's end.
func idle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return testbed.Poll(ctx, func(context.Context) error {
		left, err := filepath.Glob("/var/lib/peerpod/local/instances/*")
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("machines are left: %q", left)
		}
		return err
	})
}

func starts(ctx context.Context, bed *testbed.Bed, runs int) error {
	var bare, pod, app, ratio []float64
	fmt.Printf("cold starts, bare machine and pod in turn, %d of each\n", runs)
	for i := range runs {
		b, err := e2e.BareBoot(ctx, bed)
		if err != nil {
			return err
		}
		var first time.Duration
		p, err := start(ctx, bed, fmt.Sprintf("start-%d", i), func(p *e2e.Pod) error {
			begin := time.Now()
			_, err := p.Run(ctx, "app", "sleep", "1000")
			first = time.Since(begin)
			return err
		})
		if err != nil {
			return err
		}
		bare, pod, app = append(bare, b.Seconds()), append(pod, p.Seconds()), append(app, first.Seconds())
		ratio = append(ratio, p.Seconds()/b.Seconds())
		fmt.Printf("  %d: bare machine %.2f s, pod ready %.2f s, ratio %.2f, first container %.2f s\n", i+1, b.Seconds(), p.Seconds(), p.Seconds()/b.Seconds(), first.Seconds())
	}
	for _, r := range []struct {
		name   string
		values []float64
	}{{"bare machine to userspace, s", bare}, {"pod ready (crictl runp), s", pod}, {"first container (crictl create, start), s", app}, {"pod ready / bare machine", ratio}} {
		slices.Sort(r.values)
		fmt.Printf("%-44s median %.2f (%.2f to %.2f)\n", r.name, r.values[len(r.values)/2], r.values[0], r.values[len(r.values)-1])
	}
	return nil
}

// memory prints the proportional set size of shim and adaptor with one pod that runs
// one container.
func memory(ctx context.Context, bed *testbed.Bed) error {
	_, err := start(ctx, bed, "memory", func(p *e2e.Pod) error {
		if _, err := p.Run(ctx, "app", "sleep", "1000"); err != nil {
			return err
		}
		shim, err := testbed.FindProcess("containerd-shim-kata")
		if err != nil {
			return err
		}
		for _, of := range []struct {
			name string
			pid  int
		}{{"shim, one pod with one container", shim}, {"adaptor, one pod", bed.Adaptor.PID()}} {
			kib, err := pss(of.pid)
			if err != nil {
				return err
			}
			fmt.Printf("%-44s %.1f MiB PSS\n", of.name, float64(kib)/1024)
		}
		return nil
	})
	return err
}

// pss reads a process's proportional set size in KiB (proc(5), smaps_rollup).
func pss(pid int) (int, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "Pss:"); ok {
			return strconv.Atoi(strings.Fields(v)[0])
		}
	}
	return 0, fmt.Errorf("process %d has no Pss", pid)
}
