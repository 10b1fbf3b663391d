// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process names a process for good: the kernel reuses a PID, but not with the same
// start time in the same boot.
type process struct {
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"` // field 22 of /proc/<pid>/stat, clock ticks since boot
}

// stat reads the state letter, the parent and the start time of a process.
func stat(pid int) (state byte, ppid int, start uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, 0, err
	}
	// The second field is the name in parentheses and may hold anything.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return 0, 0, 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(f))
	}
	ppid, err = strconv.Atoi(f[1])
	if err != nil {
		return 0, 0, 0, err
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return f[0][0], ppid, start, err
}

// identify returns the process that runs under pid now.
func identify(pid int) (process, error) {
	_, _, start, err := stat(pid)
	return process{PID: pid, Start: start}, err
}

// alive tells whether the process still runs. One that ended and is our child is
// reaped on the way.
func (p process) alive() bool {
	if p.PID == 0 {
		return false
	}
	state, ppid, start, err := stat(p.PID)
	if err != nil || start != p.Start {
		return false
	}
	if state == 'Z' || state == 'X' {
		if ppid == os.Getpid() {
			_, _ = unix.Wait4(p.PID, nil, unix.WNOHANG, nil) // someone else may have reaped it: as good
		}
		return false
	}
	return true
}

// exitPoll is how often a wait for a process looks at its context.
const exitPoll = 10 * time.Millisecond

// wait returns nil when all of the process has ended and its files are closed. It
// asks a pidfd: /proc shows a zombie as soon as the first thread is gone, while
// others may still hold the tap.
func (p process) wait(ctx context.Context) error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(exitPoll/time.Millisecond))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		}
		if n > 0 {
			p.alive() // reaps it
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// kill ends the process with SIGKILL, and no other one.
func (p process) kill() error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return nil
}

// open returns a pidfd, or -1 when there is no such process, not even a zombie. The
// check after opening makes sure that it is not of a successor under the same PID.
func (p process) open() (int, error) {
	if p.PID == 0 {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	if now, err := identify(p.PID); err != nil || now != p {
		unix.Close(fd)
		return -1, nil
	}
	return fd, nil
}

// findByArg looks for live processes with exactly this argument. It finds a QEMU
// whose starter died before it could record the PID.
func findByArg(arg string) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		id, err := identify(pid)
		if err != nil {
			continue // it has just ended
		}
		cmdline, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err != nil {
			continue
		}
		for _, a := range bytes.Split(cmdline, []byte{0}) {
			if string(a) == arg && id.alive() {
				out = append(out, id)
				break
			}
		}
	}
	return out, nil
}

// bootID of the node. A PID and a start time mean nothing after a reboot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
