// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// rootfs measures the start of a container by the size of its image, and the most
// memory the shim and the adaptor had meanwhile.
func (b *bench) rootfs(ctx context.Context) error {
	fmt.Println("start of a container by the size of its root file system, half of which does not compress")
	for _, mib := range []int{5, 500, 2048} {
		image := fmt.Sprintf("localhost/size-%d:1", mib)
		if err := b.bed.ImportSized(ctx, image, mib); err != nil {
			return err
		}
		for _, p := range []place{onNode, inProcess, inVM} {
			if p == inVM && mib > 500 {
				continue // a processor in software unpacks for minutes
			}
			if err := b.sized(ctx, p, image, mib); err != nil {
				return fmt.Errorf("%s, %d MiB: %w", p.name, mib, err)
			}
		}
		if _, err := b.bed.Crictl(ctx, "rmi", image); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) sized(ctx context.Context, p place, image string, mib int) error {
	// Half of the machine's memory bounds a root; simulated machines have the node's.
	annotations := map[string]string{"io.katacontainers.config.hypervisor.default_memory": fmt.Sprint(2048 + 3*mib)}
	if p.simulated {
		annotations = nil
	}
	return b.pod(ctx, p, fmt.Sprintf("rootfs-%d", mib), annotations, func(pod *e2e.Pod) error {
		if _, err := pod.Run(ctx, "first", "sleep", "1000"); err != nil {
			return err
		}
		_, took, err := b.cri.start(ctx, pod.ID, "sized", image)
		if err != nil {
			return err
		}
		fmt.Printf("  %5d MiB, %-20s %.2f s", mib, p.name, took.Seconds())
		if p != onNode {
			shim, err := testbed.FindProcess("containerd-shim-kata")
			if err != nil {
				return err
			}
			shimPeak, err := peak(shim)
			if err != nil {
				return err
			}
			adaptorPeak, err := peak(b.bed.Adaptor.PID())
			if err != nil {
				return err
			}
			fmt.Printf("; at their peaks shim %.1f MiB, adaptor %.1f MiB", float64(shimPeak)/1024, float64(adaptorPeak)/1024)
		}
		fmt.Println()
		return nil
	})
}
