// SPDX-License-Identifier: Apache-2.0

// Package testbed makes a worker node for tests: real containerd, real CNI plugins,
// the adaptor and the shim as they are built, all inside namespaces of their own
// (Isolate), with images made on the spot and no registry.
//
//	machine ── Isolate ──▶ node: bridge cni0 10.88.0.0/16 (CNI)   ppbr0 (provider local)
//	                             containerd ── shims              taps ── pod VMs
//	                             cloud-api-adaptor
//
// Nothing here knows what is tested on the node: that is for e2e, demo, bench, critest
// and kube.
package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kata-remote/kata-remote/podvm/image"
)

// Bed is one worker node. Make it with New inside Isolate.
type Bed struct {
	Bin   string          // folder of the built programs
	Image *image.Manifest // the pod VM image
	Out   string          // folder for logs and containerd's content; made anew
	// Generation of containerd to run. The zero value is Debian's 1.6.
	Generation Generation
	// Handlers are further handlers of containerd, each with its runtime's type.
	Handlers map[string]string
	// Networks are CNI configurations, one for each interface of a pod: eth0, eth1 and
	// so on. Empty: one plain bridge. Set it before StartContainerd.
	Networks []string
	// AdaptorEnv is added to the adaptor's configuration.
	AdaptorEnv []string
	// Simulated pods have no virtual machine: the adaptor is simadaptor, whose
	// instances are processes. Set it before StartAdaptor.
	Simulated bool

	// Containerd and Adaptor are nil until they are started.
	Containerd *Daemon
	Adaptor    *Daemon

	made   time.Time
	states map[string]bool // the state folders of its adaptors
}

// Generation is a containerd and where its programs are.
type Generation struct {
	Dir string // folder of a built containerd; "": the one in PATH
	V2  bool   // it is containerd 2, whose configuration has version 3
}

// Generations are all that a shim must serve: by name, what bin's sibling folders
// hold (see the Makefile).
func Generations(bin string) map[string]Generation {
	out := filepath.Dir(bin)
	return map[string]Generation{
		"containerd 1.6": {},
		"containerd 1.7": {Dir: filepath.Join(out, "containerd17")},
		"containerd 2":   {Dir: filepath.Join(out, "containerd2"), V2: true},
	}
}

// Paths on the node.
const (
	ContainerdSocket = "/run/containerd-testbed/containerd.sock"
	HypervisorSocket = "/run/peerpod/hypervisor.sock"
	Handler          = "kata-remote"
	// SandboxHandler makes pods through the Sandbox API; only containerd 2 has it.
	SandboxHandler = Handler + "-sandbox"
	// HandlerType is the runtime's type of both.
	HandlerType = "io.containerd." + Handler + ".v2"
	// CNISubnet is the pods' network, its first address the node's.
	CNISubnet = "10.88.0.0/16"
	NodeAddr  = "10.88.0.1"
)

// Timeouts of the bed's own steps: how long a person would wait before looking into
// a log.
const (
	startTimeout = 60 * time.Second
	stopTimeout  = 20 * time.Second
	// pollEvery is how often readiness is looked at.
	pollEvery = 10 * time.Millisecond
)

// New prepares the folders. Whatever an earlier run left in out is removed.
func New(bin, podvm, out string) (*Bed, error) {
	for _, dir := range []*string{&bin, &podvm, &out} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return nil, err
		}
		*dir = abs
	}
	m, err := image.ReadManifest(podvm)
	if err != nil {
		return nil, fmt.Errorf("pod VM image: %w (run make podvm-image first)", err)
	}
	b := &Bed{Bin: bin, Image: m, Out: out, made: time.Now()}
	for _, f := range []string{
		filepath.Join(bin, "containerd-shim-kata-remote-v2"), filepath.Join(bin, "cloud-api-adaptor"), filepath.Join(bin, "crictl"),
		m.Kernel.Path, m.Initrd.Path,
	} {
		if _, err := os.Stat(f); err != nil {
			return nil, fmt.Errorf("%s is missing: run make build first", f)
		}
	}
	if err := errors.Join(os.RemoveAll(out), emptyDir(podLogs)); err != nil {
		return nil, err
	}
	return b, os.MkdirAll(filepath.Join(out, "logs"), 0o755)
}

// podLogs is where containers' logs go on a node.
const podLogs = "/var/log/pods"

func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// Log is the path of a daemon's log.
func (b *Bed) Log(name string) string { return filepath.Join(b.Out, "logs", name+".log") }

// Stop ends what the bed started, last first, and keeps the consoles of its machines
// beside the other logs: they would go with these namespaces.
func (b *Bed) Stop() error {
	var errs []error
	for _, d := range []*Daemon{b.Containerd, b.Adaptor} {
		if d != nil {
			errs = append(errs, d.Stop())
		}
	}
	return errors.Join(append(errs, b.keepConsoles())...)
}

// Daemon is a program the bed started.
type Daemon struct {
	Name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done
}

// Start runs a program in the background, its output appended to the log of that
// name, and waits until ready returns nil. The error tells the log's last line.
func (b *Bed) Start(ctx context.Context, name string, cmd *exec.Cmd, ready func(context.Context) error) (*Daemon, error) {
	log, err := os.OpenFile(b.Log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	d := &Daemon{Name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	err = Poll(ctx, func(ctx context.Context) error {
		select {
		case <-d.done:
			return fmt.Errorf("%s ended (%v): %s: %w", name, d.err, lastLine(b.Log(name)), errEnded)
		default:
			return ready(ctx)
		}
	})
	if err != nil {
		d.Kill()
		return nil, fmt.Errorf("%s did not start: %w (log: %s)", name, err, b.Log(name))
	}
	return d, nil
}

var errEnded = errors.New("it will not become ready")

// Poll calls f until it returns nil, the program it waits for has ended, or ctx is
// done; then it returns f's last error.
func Poll(ctx context.Context, f func(context.Context) error) error {
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for {
		err := f(ctx)
		if err == nil || errors.Is(err, errEnded) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (gave up: %w)", err, context.Cause(ctx))
		case <-t.C:
		}
	}
}

// PID of the daemon.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Kill ends it at once, as a crash would.
func (d *Daemon) Kill() {
	d.cmd.Process.Kill()
	<-d.done
}

// Stop asks it to end and waits.
func (d *Daemon) Stop() error {
	select {
	case <-d.done:
		return nil
	default:
	}
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
		return nil
	case <-time.After(stopTimeout):
		d.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM and was killed", d.Name, stopTimeout)
	}
}

// Run runs a command to its end and returns its standard output. The error has what
// it wrote to standard error.
func Run(ctx context.Context, name string, args ...string) (string, error) {
	return RunIn(ctx, nil, name, args...)
}

// RunIn is Run with standard input.
func RunIn(ctx context.Context, stdin io.Reader, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), &RunError{Command: filepath.Base(name) + " " + strings.Join(args, " "), Stderr: strings.TrimSpace(stderr.String()), Err: err}
	}
	return stdout.String(), nil
}

// RunError is a command that failed.
type RunError struct {
	Command string
	Stderr  string
	Err     error
}

func (e *RunError) Error() string { return fmt.Sprintf("%s: %v: %s", e.Command, e.Err, e.Stderr) }

// Unwrap returns the error of package os/exec.
func (e *RunError) Unwrap() error { return e.Err }

// FindProcess returns a process of this node whose program has a word in its name.
func FindProcess(word string) (pid int, err error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		program, _, _ := strings.Cut(string(b), "\x00")
		if err == nil && strings.Contains(program, word) {
			return strconv.Atoi(strings.Split(f, "/")[2])
		}
	}
	return 0, fmt.Errorf("no process %s", word)
}

// lastLine returns the last line of a file that says something.
func lastLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}
