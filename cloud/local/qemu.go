// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

// Names in an instance's directory.
const (
	recordName = "instance.json"
	lockName   = "lock"
	qmpName    = "qmp"
	serialName = "serial.log"
	stderrName = "qemu.log"
	seedName   = "seed.iso"
)

// Descriptors that QEMU inherits.
const (
	qmpFD = 3
	tapFD = 4
)

const (
	// startTimeout is how long QEMU may take to answer on its control socket. It
	// does in 0.1 s; a node with all CPUs taken by other VMs needs some seconds.
	startTimeout = 15 * time.Second
	// quitTimeout is how long QEMU may take to end when asked on the socket
	// (some 10 ms when idle) before it is killed.
	quitTimeout = 2 * time.Second
	// killTimeout is for the kernel to free a killed process and its memory.
	killTimeout = 10 * time.Second
)

// findQEMU resolves the configured name. FailedPrecondition: not installed.
func (p *Provider) findQEMU() (string, error) {
	path, err := exec.LookPath(p.cfg.QEMU)
	if err != nil {
		return "", fmt.Errorf("QEMU %q is not there; install the package qemu-system-x86, or set LOCAL_QEMU: %w", p.cfg.QEMU, errdefs.ErrFailedPrecondition)
	}
	return filepath.Abs(path)
}

// kernelArgs is the kernel's command line. Console on the first serial port, which
// is all that is set up (each further one costs a probe); a panic ends the VM at
// once, and "reboot=t" is the shortest way to do it. The crypto self-tests take 0.24 s
// of an emulated boot of 2.1 s and guard a certification, not a function.
// no_timer_check leaves out a test that fails on a busy node, where an emulated
// timer is late.
func (p *Provider) kernelArgs() string {
	args := "console=ttyS0 quiet panic=-1 reboot=t no_timer_check 8250.nr_uarts=1 cryptomgr.notests"
	if p.cfg.KernelArgs != "" {
		args += " " + p.cfg.KernelArgs
	}
	return args
}

// qboot is a firmware that does nothing but start a kernel. With it and without
// SMM an emulated boot takes 1.67 s of CPU time in place of 1.83 with the standard
// firmware, which is used where this file is not (it comes with QEMU's data files).
const qboot = "/usr/share/qemu/qboot.rom"

// emulatedCPU has all that QEMU emulates but the promise of a fast "rep movsb" (ERMS).
// A kernel that believes it copies with that instruction, which emulation executes
// byte by byte: a boot takes 0.2 s of 1.7 s longer (QEMU 7.2, 2026-11-21).
const emulatedCPU = "max,-erms"

// machineArgs choose machine, accelerator and CPU.
func machineArgs(machine string, accel Accel) []string {
	args := []string{"-machine", machine}
	if machine == MachineQ35 {
		args[1] += ",smm=off,usb=off,vmport=off,sata=off,smbus=off"
		if _, err := os.Stat(qboot); err == nil {
			args = append(args, "-bios", qboot)
		}
	}
	if accel == AccelKVM {
		return append(args, "-accel", "kvm", "-cpu", "host")
	}
	return append(args, "-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", codeCacheMiB), "-cpu", emulatedCPU)
}

// serialArg is also how a QEMU is found whose PID was never recorded.
func serialArg(dir string) string {
	return "file,id=serial,append=on,path=" + value(filepath.Join(dir, serialName))
}

// value writes a path as the value of a QEMU option, where a comma ends it.
func value(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// command is QEMU's command line for an instance.
func (p *Provider) command(r *record) []string {
	dir := p.dir(r.ID)
	bus := "-pci"
	if p.cfg.Machine == MachineMicroVM {
		bus = "-device"
	}
	modern := ""
	if bus == "-pci" {
		modern = ",disable-legacy=on"
	}
	nic := fmt.Sprintf("virtio-net%s,netdev=net0,mac=%s,host_mtu=%d%s", bus, r.MAC, p.cfg.MTU, modern)
	if bus == "-pci" {
		nic += ",romfile=" // no boot ROM: nothing boots from it
	}
	args := append([]string{
		"-name", r.Name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		// QEMU needs no further process, privilege or scheduler change once it runs.
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}, machineArgs(p.cfg.Machine, r.Accel)...)
	return append(args,
		"-smp", strconv.Itoa(r.Plan.VCPUs), "-m", strconv.Itoa(r.Plan.MemoryMiB),
		"-kernel", p.cfg.Kernel, "-initrd", p.cfg.Initrd, "-append", p.kernelArgs(),
		"-chardev", serialArg(dir), "-serial", "chardev:serial",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", qmpFD), "-mon", "chardev=qmp,mode=control",
		"-drive", "if=none,id=seed,format=raw,readonly=on,file="+value(filepath.Join(dir, seedName)),
		"-device", "virtio-blk"+bus+",drive=seed"+modern,
		"-netdev", fmt.Sprintf("tap,id=net0,fd=%d", tapFD), "-device", nic,
		"-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng"+bus+",rng=rng0"+modern,
	)
}

// start runs QEMU with the tap and records it. It returns when QEMU answers on its
// socket. The instance's lock is held.
func (p *Provider) start(ctx context.Context, r *record, tap *os.File) error {
	qemu, err := p.findQEMU()
	if err != nil {
		return err
	}
	dir := p.dir(r.ID)
	socket, err := listenIn(dir, qmpName)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	defer socket.Close()
	if err := touch(filepath.Join(dir, serialName)); err != nil {
		return err
	}
	r.Process, err = spawn(qemu, p.command(r), filepath.Join(dir, stderrName), socket, tap)
	if err != nil {
		return fmt.Errorf("start %s: %w", qemu, err)
	}
	if r.BootID, err = bootID(); err != nil {
		return err
	}
	if err := p.store(r); err != nil {
		return fmt.Errorf("record process %d: %w", r.Process.PID, err)
	}
	// Only QEMU may hold the listening socket now: if it ends before it answers,
	// the connection that waits in the socket's queue is reset.
	if err := errors.Join(socket.Close(), tap.Close()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	q, err := dialQMP(ctx, dir)
	if err == nil {
		return q.close()
	}
	if ctx.Err() == nil || !r.Process.alive() {
		return fmt.Errorf("QEMU did not start: %s: %w", orText(lastLine(filepath.Join(dir, stderrName)), err.Error()), errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("QEMU does not answer on its control socket: %w", err)
}

// spawn starts QEMU in a session of its own, so that it outlives this process and
// gets no signal meant for it. The child is not waited for here: alive reaps it.
func spawn(qemu string, args []string, stderr string, inherit ...*os.File) (process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return process{}, err
	}
	defer null.Close()
	out, err := os.OpenFile(stderr, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return process{}, err
	}
	defer out.Close()
	child, err := os.StartProcess(qemu, append([]string{qemu}, args...), &os.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"},
		Files: append([]*os.File{null, out, out}, inherit...),
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return process{}, err
	}
	id, err := identify(child.Pid)
	return id, errors.Join(err, child.Release())
}

// listenIn makes a listening socket in dir and returns its descriptor. The path
// may be longer than a socket's name; see dialQMP.
func listenIn(dir, name string) (*os.File, error) {
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name)})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// stop ends QEMU, with its own consent if it gives it, and returns when it is
// gone. The instance's lock is held.
func (p *Provider) stop(ctx context.Context, r *record) error {
	dir := p.dir(r.ID)
	all, err := findByArg(serialArg(dir))
	if err != nil {
		return err
	}
	if r.Process.alive() {
		quitCtx, cancel := context.WithTimeout(ctx, quitTimeout)
		if q, err := dialQMP(quitCtx, dir); err == nil {
			_ = q.do(quitCtx, "quit", nil) // killed below if it does not
			_ = q.close()
			_ = r.Process.wait(quitCtx)
		}
		cancel()
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if r.BootID == boot && !slices.Contains(all, r.Process) {
		all = append(all, r.Process) // it may be half dead, without a command line
	}
	for _, proc := range all {
		if err := proc.kill(); err != nil {
			return err
		}
	}
	killCtx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for _, proc := range all {
		if err := proc.wait(killCtx); err != nil {
			return fmt.Errorf("wait for QEMU %d to end: %w", proc.PID, err)
		}
	}
	return nil
}

func touch(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func orText(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
