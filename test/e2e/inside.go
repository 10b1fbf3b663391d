// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/test/testbed"
)

func kernelRelease() string {
	var u unix.Utsname
	unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:])
}

const bootIDFile = "/proc/sys/kernel/random/boot_id"

func (s *Scenario) insideChecks() []Check {
	return []Check{
		{"the kernel's release differs from the node's", func(ctx context.Context) (string, error) {
			return s.differs(ctx, kernelRelease(), "uname", "-r")
		}},
		{"the boot id differs from the node's", func(ctx context.Context) (string, error) {
			b, err := os.ReadFile(bootIDFile)
			if err != nil {
				return "", err
			}
			return s.differs(ctx, strings.TrimSpace(string(b)), "cat", bootIDFile)
		}},
		{"the container's log arrives", func(ctx context.Context) (string, error) {
			var log string
			err := within(ctx, func(ctx context.Context) (err error) {
				if log, err = s.app.Log("stdout"); err == nil && !strings.HasPrefix(log, "hello from the pod\n") {
					err = fmt.Errorf("log is %q", log)
				}
				return err
			})
			return strings.ReplaceAll(strings.TrimSpace(log), "\n", " / "), err
		}},
		{"a container's exit code, standard output and standard error arrive, apart", s.checkExit},
		{"8 MB of output, written at full speed, arrive byte for byte", s.checkLargeOutput},
		{"exec returns output and exit code", func(ctx context.Context) (string, error) {
			out, err := s.app.Exec(ctx, "sh", "-c", "echo to stdout; exit 3")
			code, err := exitStatus(err)
			if err == nil && (out != "to stdout" || code != 3) {
				err = fmt.Errorf("output %q, exit code %d", out, code)
			}
			return fmt.Sprintf("output %q, exit code %d", out, code), err
		}},
		{"exec carries standard input", s.checkExecInput},
		{"exec with a terminal has one, of the caller's size", s.checkTerminal},
		{"exec of a command that does not exist says so", func(ctx context.Context) (string, error) {
			_, err := s.app.Exec(ctx, "no-such-command")
			if err == nil || !strings.Contains(err.Error(), "no-such-command") {
				return "", fmt.Errorf("error is %v", err)
			}
			return "", nil
		}},
		{"the container has process, mount, IPC and host name namespaces of its own", s.checkNamespaces},
		{"its root is writable, and bounded", s.checkRoot},
	}
}

// within polls f for as long as a person would wait for something to show.
func within(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return testbed.Poll(ctx, f)
}

func (s *Scenario) differs(ctx context.Context, node string, command ...string) (string, error) {
	out, err := s.app.Exec(ctx, command...)
	if err == nil && (out == node || out == "") {
		err = fmt.Errorf("pod has %q and the node %q", out, node)
	}
	return fmt.Sprintf("pod %s, node %s", out, node), err
}

func (s *Scenario) checkExit(ctx context.Context) (string, error) {
	c, err := s.pod.Run(ctx, "exits", "sh", "-c", "echo out; echo err >&2; exit 7")
	if err != nil {
		return "", err
	}
	code, err := c.Wait(ctx)
	if err != nil {
		return "", err
	}
	var stdout, stderr string
	if stdout, err = c.Log("stdout"); err != nil {
		return "", err
	}
	if stderr, err = c.Log("stderr"); err != nil {
		return "", err
	}
	seen := fmt.Sprintf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	if code != 7 || stdout != "out\n" || stderr != "err\n" {
		return "", fmt.Errorf("%s", seen)
	}
	return seen, nil
}

// The large output: numbered lines, so that a failure can say where, written faster
// than anybody reads, so that every buffer on the way is full when the process ends.
const (
	largeFirst  = 1_000_000
	largeLast   = 1_099_999
	largeRounds = 10
)

func (s *Scenario) checkLargeOutput(ctx context.Context) (string, error) {
	start := time.Now()
	c, err := s.pod.Run(ctx, "talks", "sh", "-c", fmt.Sprintf("seq %d %d > /tmp/f; i=0; while [ $i -lt %d ]; do cat /tmp/f; i=$((i+1)); done", largeFirst, largeLast, largeRounds))
	if err != nil {
		return "", err
	}
	if _, err := c.Wait(ctx); err != nil {
		return "", err
	}
	took := time.Since(start)
	out, err := c.Log("stdout")
	if err != nil {
		return "", err
	}
	const each = largeLast - largeFirst + 1
	n := 0
	for line := range strings.Lines(out) {
		if want := strconv.Itoa(largeFirst+n%each) + "\n"; line != want {
			return "", fmt.Errorf("%d bytes arrived; line %d is %q, want %q", len(out), n, line, want)
		}
		n++
	}
	if n != each*largeRounds {
		return "", fmt.Errorf("%d bytes arrived: the last %d lines are missing", len(out), each*largeRounds-n)
	}
	return fmt.Sprintf("%d bytes, %v from create to exit", len(out), took.Round(time.Millisecond)), nil
}

func (s *Scenario) checkExecInput(ctx context.Context) (string, error) {
	sent := bytes.Repeat([]byte("input "), 50_000)
	name, args := s.Bed.CrictlCommand("exec", "-i", s.app.ID, "sha256sum")
	out, err := testbed.RunIn(ctx, bytes.NewReader(sent), name, args...)
	if want := fmt.Sprintf("%x", sha256.Sum256(sent)); err == nil && !strings.HasPrefix(out, want) {
		err = fmt.Errorf("the command read other bytes than the %d sent: %q", len(sent), out)
	}
	return fmt.Sprintf("%d bytes", len(sent)), err
}

func (s *Scenario) checkTerminal(ctx context.Context) (string, error) {
	pty, path, err := console.NewPty()
	if err != nil {
		return "", err
	}
	defer pty.Close()
	if err := pty.Resize(console.WinSize{Height: 33, Width: 77}); err != nil {
		return "", err
	}
	tty, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return "", err
	}
	// The size is sent after the command has started: it waits for it. Until then the
	// terminal has none, which busybox's stty complains of.
	name, args := s.Bed.CrictlCommand("exec", "-i", "-t", s.app.ID, "sh", "-c",
		`tty; i=0; while [ "$(stty size 2>/dev/null)" != "33 77" ] && [ $i -lt 600 ]; do i=$((i+1)); sleep 0.1; done; stty size; exit 5`)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		tty.Close()
		return "", err
	}
	tty.Close()
	var out bytes.Buffer
	io.Copy(&out, pty) // ends with EIO when the last user of the terminal is gone
	err = cmd.Wait()
	text := strings.Join(strings.Fields(out.String()), " ")
	if err == nil || !strings.Contains(text, "/dev/pts/0 33 77") || !strings.Contains(text, "exit code 5") {
		return "", fmt.Errorf("terminal showed %q, and crictl ended with %v", text, err)
	}
	return "/dev/pts/0, 33 rows of 77, exit code 5", nil
}

func (s *Scenario) checkNamespaces(ctx context.Context) (string, error) {
	out, err := s.app.Exec(ctx, "sh", "-c", "hostname; ps -o comm | tail -n +2 | sort | uniq | tr '\\n' ' '")
	if err != nil {
		return "", err
	}
	host, commands, _ := strings.Cut(out, "\n")
	if host != s.pod.Name || strings.Contains(commands, "pause") || !strings.Contains(commands, "httpd") {
		return "", fmt.Errorf("host name %q, processes %q", host, commands)
	}
	return "host name " + host + ", processes " + strings.TrimSpace(commands), nil
}

func (s *Scenario) checkRoot(ctx context.Context) (string, error) {
	out, err := s.app.Exec(ctx, "sh", "-c", "echo kept > /file && cat /file && stat -f -c '%b %f %S' /")
	if err != nil {
		return "", err
	}
	var kept string
	var blocks, free, size int64
	if _, err := fmt.Sscan(out, &kept, &blocks, &free, &size); err != nil || kept != "kept" {
		return "", fmt.Errorf("writing to / and asking for its size gave %q: %v", out, err)
	}
	const mib = 1 << 20
	if all := blocks * size; all == 0 || all > 64<<30 {
		return "", fmt.Errorf("/ is said to have %d bytes", all)
	}
	return fmt.Sprintf("%d MiB in all, %d MiB used", blocks*size/mib, (blocks-free)*size/mib), nil
}
