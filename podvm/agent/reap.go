// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// reapInterval is the pause between two looks for orphans. They cost a process table
// entry and nothing else; a look costs a read of each process's stat.
const reapInterval = 5 * time.Second

// reapOrphans waits for the children of PID 1 that nobody waits for: processes whose
// parents died. Children that somebody waits for, those of libcontainer and os/exec,
// are zombies for a moment only; so one that is found dead twice is an orphan.
func reapOrphans(ctx context.Context, log *slog.Logger) {
	before := map[int]uint64{}
	tick := time.NewTicker(reapInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := zombies(os.Getpid())
		for pid, born := range now {
			if was, ok := before[pid]; !ok || was != born {
				continue
			}
			if got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); err == nil && got == pid {
				log.Debug("reaped an orphan", "pid", pid)
			}
			delete(now, pid)
		}
		before = now
	}
}

// zombies returns the dead children of parent that were not waited for, with their
// start times, which tell a process from a later one of the same number.
func zombies(parent int) map[int]uint64 {
	found := map[int]uint64{}
	proc, err := os.Open("/proc")
	if err != nil {
		return found
	}
	defer proc.Close()
	names, _ := proc.Readdirnames(-1)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		// proc_pid_stat(5): "pid (comm) state ppid ..."; comm may hold anything, the
		// last parenthesis ends it. Field 22 is the start time.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) < 20 || string(fields[0]) != "Z" || string(fields[1]) != strconv.Itoa(parent) {
			continue
		}
		born, err := strconv.ParseUint(string(fields[19]), 10, 64)
		if err == nil {
			found[pid] = born
		}
	}
	return found
}
