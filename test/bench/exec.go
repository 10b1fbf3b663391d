// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

const (
	// execCalls is how many execs a median and a 99th percentile are made of.
	execCalls = 200
	// execBytes is what `exec cat` carries. The file has no blocks: reading it costs
	// the container no memory.
	execBytes = 1 << 30
)

// execs measures the round trip of an exec of a program that does nothing, and what
// one carries.
func (b *bench) execs(ctx context.Context) error {
	fmt.Printf("exec through CRI, %d calls of `true` one after another; `exec cat` of %d MiB\n", execCalls, execBytes>>20)
	var base time.Duration
	for _, p := range []place{onNode, inProcess, inVM} {
		err := b.pod(ctx, p, "exec", nil, func(pod *e2e.Pod) error {
			c, err := pod.Run(ctx, "app", "sh", "-c", fmt.Sprintf("truncate -s %d /tmp/big; exec sleep 1000", execBytes))
			if err != nil {
				return err
			}
			var took []time.Duration
			for range execCalls {
				d, err := b.cri.exec(ctx, c.ID, "true")
				if err != nil {
					return err
				}
				took = append(took, d)
			}
			slices.Sort(took)
			p50, p99 := took[len(took)/2], took[len(took)*99/100]
			if p == onNode {
				base = p50
			}
			begin := time.Now()
			name, args := b.bed.CrictlCommand("exec", c.ID, "cat", "/tmp/big")
			n, err := count(ctx, name, args...)
			if err != nil {
				return err
			}
			if n != execBytes {
				return fmt.Errorf("exec cat gave %d bytes of %d", n, execBytes)
			}
			fmt.Printf("  %-20s p50 %.1f ms, p99 %.1f ms, %.2f of runc; cat %.0f MB/s\n", p.name, ms(p50), ms(p99), float64(p50)/float64(base), rate(n, time.Since(begin)))
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// containers measures Create and Start of a further container in a pod that has one.
func (b *bench) containers(ctx context.Context) error {
	const calls = 10
	fmt.Printf("a further container of a pod through CRI: create and start, image of 2 MB, %d of them\n", calls)
	var base time.Duration
	for _, p := range []place{onNode, inProcess, inVM} {
		err := b.pod(ctx, p, "containers", nil, func(pod *e2e.Pod) error {
			if _, err := pod.Run(ctx, "first", "sleep", "1000"); err != nil {
				return err
			}
			var took []time.Duration
			for i := range calls {
				_, d, err := b.cri.start(ctx, pod.ID, fmt.Sprintf("c%d", i), testbed.BusyboxImage)
				if err != nil {
					return err
				}
				took = append(took, d)
			}
			slices.Sort(took)
			median := took[len(took)/2]
			if p == onNode {
				base = median
			}
			fmt.Printf("  %-20s median %.0f ms (%.0f to %.0f), %.2f of runc\n", p.name, ms(median), ms(took[0]), ms(took[len(took)-1]), float64(median)/float64(base))
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// rate is in millions of bytes a second.
func rate(n int64, d time.Duration) float64 { return float64(n) / d.Seconds() / 1e6 }
