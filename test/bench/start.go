// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

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
		left, err := filepath.Glob("/var/lib/peerpod/*/local/instances/*")
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("machines are left: %q", left)
		}
		return err
	})
}

// starts measures how long a pod takes to be ready, beside a bare virtual machine.
func (b *bench) starts(ctx context.Context) error {
	if err := b.in(ctx, inVM); err != nil {
		return err
	}
	bed, runs := b.bed, b.runs
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
