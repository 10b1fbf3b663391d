// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// logBytes is what the measured program writes.
const logBytes = 2 << 30

// logs measures how fast output comes from a process to the FIFO that containerd
// names. containerd's own log writer, which cuts output into lines, is left out: ctr
// reads the FIFO and what it reads is thrown away.
func (b *bench) logs(ctx context.Context) error {
	fmt.Printf("output of a process, %d MiB, from its pipe to the reader of the FIFO\n", logBytes>>20)
	if err := benchNetNS(ctx); err != nil {
		return err
	}
	defer testbed.Run(context.WithoutCancel(ctx), "ip", "netns", "delete", logNetNS)
	for _, p := range []place{onNode, inProcess, farAway} {
		if err := b.in(ctx, p); err != nil {
			return err
		}
		d, cpu, err := b.outputTime(ctx, p)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Printf("  %-30s %.0f MB/s%s\n", p.name, rate(logBytes, d), cpu)
	}
	return nil
}

const logNetNS = "bench-log"

// benchNetNS makes a network namespace such as a CNI would.
func benchNetNS(ctx context.Context) error {
	for _, command := range []string{
		"netns add " + logNetNS, "link add log0 type veth peer name eth0 netns " + logNetNS, "addr add 10.77.0.1/24 dev log0", "link set log0 up",
		"-n " + logNetNS + " addr add 10.77.0.2/24 dev eth0", "-n " + logNetNS + " link set eth0 up", "-n " + logNetNS + " route add default via 10.77.0.1",
	} {
		if _, err := testbed.Run(ctx, "ip", strings.Fields(command)...); err != nil {
			return err
		}
	}
	return nil
}

// outputTime returns how long an exec takes that writes logBytes, less one that
// writes nothing, and what it costs our programs in processor time: on few
// processors, that is what bounds the first.
func (b *bench) outputTime(ctx context.Context, p place) (_ time.Duration, cpu string, err error) {
	const name = "bench-log"
	ctr := func(args ...string) []string {
		return append([]string{"-a", testbed.ContainerdSocket, "-n", "k8s.io"}, args...)
	}
	runtime := "io.containerd.runc.v2"
	if p.handler != "" {
		runtime = "io.containerd.kata-remote.v2"
	}
	if _, err := testbed.Run(ctx, "ctr", ctr("run", "-d", "--runtime", runtime, "--with-ns", "network:/run/netns/"+logNetNS, testbed.BusyboxImage, name, "sleep", "1000")...); err != nil {
		return 0, "", err
	}
	defer func() {
		_, kill := testbed.Run(context.WithoutCancel(ctx), "ctr", ctr("task", "rm", "-f", name)...)
		_, remove := testbed.Run(context.WithoutCancel(ctx), "ctr", ctr("container", "rm", name)...)
		for _, e := range []error{kill, remove} {
			if err == nil {
				err = e
			}
		}
	}()
	var took [2]time.Duration
	ours := map[string]int{}
	if p != onNode {
		for _, name := range []string{"podvmd", "simadaptor", "containerd-shim-kata"} {
			if ours[name], err = testbed.FindProcess(name); err != nil {
				return 0, "", err
			}
		}
	}
	used := map[string]time.Duration{}
	for i, want := range []int64{0, logBytes} {
		for name, pid := range ours {
			if used[name], err = cpuTime(pid); err != nil {
				return 0, "", err
			}
		}
		begin := time.Now()
		n, err := count(ctx, "ctr", ctr("task", "exec", "--exec-id", fmt.Sprintf("e%d", i), name,
			"dd", "if=/dev/zero", "bs=1M", fmt.Sprintf("count=%d", want>>20))...)
		if err != nil {
			return 0, "", err
		}
		took[i] = time.Since(begin)
		if n != want {
			return 0, "", fmt.Errorf("%d bytes of %d arrived", n, want)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		now, err := cpuTime(ours[name])
		if err != nil {
			return 0, "", err
		}
		cpu += fmt.Sprintf("; %s %.2f s of a processor per GB", name, (now-used[name]).Seconds()*1e9/logBytes)
	}
	return took[1] - took[0], cpu, nil
}

// cpuTime is what a process has used of processors (proc(5), stat).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The fields after the name, which may hold anything, begin with the third.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	var ticks [2]int
	for i, at := range []int{14, 15} {
		if ticks[i], err = strconv.Atoi(f[at-3]); err != nil {
			return 0, err
		}
	}
	return time.Duration(ticks[0]+ticks[1]) * 10 * time.Millisecond, nil // USER_HZ is 100
}

// count runs a command and counts its standard output, in bytes.
func count(ctx context.Context, name string, args ...string) (int64, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, out, make([]byte, 1<<20))
	if err := cmd.Wait(); err != nil {
		return n, fmt.Errorf("%s: %w: %s", name, err, stderr.String())
	}
	return n, err
}
