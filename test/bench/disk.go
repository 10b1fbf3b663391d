// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/test/cloudbed"
	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// disks measures the start of the disk image under UEFI firmware beside that of kernel and
// initramfs, each told by the same emulated metadata service: from the machine being
// switched on to the forwarder's port being open. The firmware's share is what passes
// until it says that it starts what is on the disk; it is not the image's, and on a
// processor in software it is most of it.
func (b *bench) disks(ctx context.Context) error {
	if b.bed.Image.Disk == nil {
		return errors.New("the pod VM image has no disks: make podvm-image builds them")
	}
	fmt.Printf("the disk image under UEFI firmware beside kernel and initramfs, %d starts of each after one that is not counted\n", b.runs)
	initramfs, _, err := b.bootsOf(ctx, filepath.Dir(b.bed.Image.Kernel.Path))
	if err != nil {
		return err
	}
	disk, firmware, err := b.bootsOf(ctx, b.bed.Image.Disk.Raw.Path)
	if err != nil {
		return err
	}
	own := make([]float64, len(disk))
	for i := range disk {
		own[i] = disk[i] - firmware[i]
	}
	base := median(initramfs)
	for _, r := range []struct {
		name   string
		values []float64
	}{{"initramfs to port open, s", initramfs}, {"disk to port open, s", disk}, {"of which firmware, s", firmware}, {"disk from the firmware's hand-over, s", own}} {
		slices.Sort(r.values)
		fmt.Printf("%-44s median %.2f (%.2f to %.2f), %.2f of the initramfs\n", r.name, median(r.values), r.values[0], r.values[len(r.values)-1], median(r.values)/base)
	}
	return nil
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

// bootsOf starts pods on an emulated cloud with that image, and returns how long their
// machines took, and their firmware, in seconds.
func (b *bench) bootsOf(ctx context.Context, image string) (boots, firmware []float64, err error) {
	if err := b.leave(); err != nil {
		return nil, nil, err
	}
	type boot struct{ all, firmware time.Duration }
	seen := make(chan boot, 1)
	consoles := filepath.Join(b.bed.Out, "logs", "aws", "consoles")
	emulated, err := e2e.StartCloud(ctx, b.bed, cloudbed.Config{Provider: "aws", Image: image, InstanceTime: instanceTime, Started: func(m emulation.Machine) {
		go func() {
			watch, stop := context.WithCancel(ctx)
			var handedOver atomic.Int64
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				handedOver.Store(int64(untilHandOver(watch, filepath.Join(consoles, m.ID+".console"))))
			}()
			all := untilOpen(ctx, m.Addr.Addr())
			stop()
			<-ended
			seen <- boot{all, time.Duration(handedOver.Load())}
		}()
	}})
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, b.leave(), emulated.Close()) }()
	b.bed.Simulated = false
	b.bed.AdaptorEnv = append([]string{"STATE_DIR=" + filepath.Join("/var/lib/peerpod", "disk-"+filepath.Base(image))}, emulated.Env...)
	if err := b.bed.StartAdaptor(ctx); err != nil {
		return nil, nil, err
	}
	for i := range b.runs + 1 {
		p, err := e2e.RunPod(ctx, b.bed, fmt.Sprintf("disk-%d", i), testbed.Handler, nil)
		if err != nil {
			return nil, nil, err
		}
		took := <-seen
		if err := errors.Join(p.Remove(ctx), gone(ctx, emulated)); err != nil {
			return nil, nil, err
		}
		if i == 0 {
			continue // the files are read for the first time
		}
		boots, firmware = append(boots, took.all.Seconds()), append(firmware, took.firmware.Seconds())
		fmt.Printf("  %s: %.2f s, of which firmware %.2f s\n", filepath.Base(image), took.all.Seconds(), took.firmware.Seconds())
	}
	return boots, firmware, nil
}

// untilHandOver is how long it takes from now until the firmware writes on a console that
// it starts a program; 0 if it has not when ctx ends.
func untilHandOver(ctx context.Context, console string) time.Duration {
	begin := time.Now()
	err := testbed.Poll(ctx, func(context.Context) error {
		b, err := os.ReadFile(console)
		if err == nil && !bytes.Contains(b, []byte("BdsDxe: starting")) {
			err = errors.New("not yet")
		}
		return err
	})
	if err != nil {
		return 0
	}
	return time.Since(begin)
}
