// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// memory prints the proportional set size of shim and adaptor with one pod that runs
// one container.
func (b *bench) memory(ctx context.Context) error {
	if err := b.in(ctx, inVM); err != nil {
		return err
	}
	bed := b.bed
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
func pss(pid int) (int, error) { return procKiB(pid, "smaps_rollup", "Pss:") }

// peak reads a process's largest resident set in KiB (proc(5), status).
func peak(pid int) (int, error) { return procKiB(pid, "status", "VmHWM:") }

// procKiB reads a field of one of a process's files in /proc whose lines are a name and
// a number of KiB.
func procKiB(pid int, file, field string) (int, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), field); ok {
			return strconv.Atoi(strings.Fields(v)[0])
		}
	}
	return 0, fmt.Errorf("process %d has no %s", pid, strings.TrimSuffix(field, ":"))
}
