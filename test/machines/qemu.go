// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/cloud/emulation"
	"github.com/kata-remote/kata-remote/cloud/local"
	"github.com/kata-remote/kata-remote/podvm/image"
)

const qemuProgram = "qemu-system-x86_64"

// startTimeout is how long QEMU may take until its monitor answers: 0.1 s, and much
// longer where others have the processors.
const startTimeout = time.Minute

// consoleTail is what Console returns of a console, bytes.
const consoleTail = 64 << 10

// Debian's package ovmf: UEFI for machines that start from a disk.
const (
	uefiCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	uefiVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// qboot starts a kernel and does nothing else; it comes with QEMU's data files.
const qboot = "/usr/share/qemu/qboot.rom"

// guest is a machine and its QEMU.
type guest struct {
	host *Host
	m    emulation.Machine
	tap  string
	done chan struct{} // closed when it has ended and nothing of it is left

	mu      sync.Mutex
	process *os.Process // nil before it has started and after it has ended; guarded by mu
	asked   bool        // to end; guarded by mu
}

func newGuest(h *Host, m emulation.Machine, tap string) *guest {
	return &guest{host: h, m: m, tap: tap, done: make(chan struct{})}
}

// path is that of a file which the machine needs while it runs.
func (g *guest) path(ending string) string {
	return filepath.Join(g.host.cfg.Dir, g.m.ID+ending)
}

// stop asks for the end. It does not wait.
func (g *guest) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = true
	if g.process != nil {
		_ = g.process.Kill() // or it has just ended by itself
	}
}

// start runs QEMU and returns when its monitor answers, or nothing is left.
func (g *guest) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ready := make(chan error, 1)
	go g.run(ready)
	var err error
	select {
	case err = <-ready:
	case <-ctx.Done():
		err = fmt.Errorf("QEMU does not answer: %w", ctx.Err())
	}
	if err != nil {
		g.stop()
		<-g.done
	}
	return err
}

// run is the machine's life. ready gets one value.
func (g *guest) run(ready chan<- error) {
	// QEMU is to end with this process, however that ends, and the signal for it
	// follows the thread that forked (prctl(2), PR_SET_PDEATHSIG).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(g.done)
	started := false
	err := g.host.net.admit(&g.m)
	if err == nil {
		started, err = g.runQEMU(ready)
		g.host.net.dismiss(&g.m)
	}
	for _, ending := range []string{isoEnding, varsEnding} {
		if e := os.Remove(g.path(ending)); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	g.mu.Lock()
	asked := g.asked
	g.mu.Unlock()
	g.host.gone(g, asked || !started) // of one that never ran start tells
	if !started {
		ready <- cmp.Or(err, errors.New("QEMU ended at once"))
	}
}

const (
	isoEnding  = ".iso"
	varsEnding = ".uefi"
)

// runQEMU starts QEMU, tells ready when its monitor answers, and waits for its end.
// started tells whether it was told.
func (g *guest) runQEMU(ready chan<- error) (started bool, err error) {
	args, err := g.command()
	if err != nil {
		return false, err
	}
	tap, err := g.host.net.tap(g.tap)
	if err != nil {
		return false, err
	}
	defer tap.Close()
	ours, theirs, err := socketPair()
	if err != nil {
		return false, err
	}
	defer ours.Close()
	defer theirs.Close()
	var stderr bytes.Buffer
	cmd := exec.Command(qemuProgram, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", &stderr, &stderr
	cmd.ExtraFiles = []*os.File{theirs, tap} // 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	g.mu.Lock()
	if g.asked {
		err = context.Canceled
	} else if err = cmd.Start(); err == nil {
		g.process = cmd.Process
	}
	g.mu.Unlock()
	if err != nil {
		return false, fmt.Errorf("start %s: %w", qemuProgram, err)
	}
	// QEMU alone holds them now: with it the tap goes and the monitor's end closes.
	_, _ = theirs.Close(), tap.Close()
	if answers(ours) {
		started = true
		ready <- nil
	}
	err = cmd.Wait()
	g.mu.Lock()
	g.process = nil
	g.mu.Unlock()
	if text := strings.TrimSpace(stderr.String()); err != nil || text != "" {
		return started, fmt.Errorf("%s: %v: %s", qemuProgram, err, text)
	}
	return started, nil
}

// answers waits until QEMU carries out commands, which it does once it has made the
// machine; it greets before (docs/interop/qmp-spec.txt of QEMU). False: it has ended.
func answers(monitor *os.File) bool {
	if _, err := io.WriteString(monitor, `{"execute":"qmp_capabilities"}`+"\n"); err != nil {
		return false
	}
	lines := bufio.NewScanner(monitor)
	for lines.Scan() {
		if strings.Contains(lines.Text(), `"return"`) {
			return true
		}
	}
	return false
}

// socketPair returns two ends of which the second is for a child.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "monitor"), os.NewFile(uintptr(fds[1]), "monitor's other end"), nil
}

// kernelArgs are for a kernel that is started directly, as the provider local starts
// it (cloud/local).
const kernelArgs = "console=ttyS0 panic=-1 reboot=t no_timer_check 8250.nr_uarts=1 "

// command is QEMU's command line, with the files it names made.
func (g *guest) command() ([]string, error) {
	cfg, m := g.host.cfg, g.m
	args := []string{
		"-name", m.ID, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,smm=off,usb=off,vmport=off,sata=off,smbus=off",
		"-smp", strconv.Itoa(max(1, min(m.VCPUs, cfg.MaxVCPUs))), "-m", strconv.Itoa(max(256, min(m.MemoryMiB, cfg.MaxMemoryMiB))),
		"-chardev", "file,id=serial,path=" + value(g.host.consolePath(m.ID)), "-serial", "chardev:serial",
		"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
		"-netdev", "tap,id=net0,fd=4", "-device", "virtio-net-pci,netdev=net0,disable-legacy=on,romfile=,mac=" + m.MAC,
		"-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0,disable-legacy=on",
	}
	if cfg.Accel == local.AccelKVM {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "max,-erms") // cloud/local says why
	}
	if m.Vendor != "" || m.Product != "" {
		args = append(args, "-smbios", "type=1,manufacturer="+value(m.Vendor)+",product="+value(m.Product)+",serial="+m.ID)
	}
	if m.AssetTag != "" {
		args = append(args, "-smbios", "type=3,manufacturer="+value(m.Vendor)+",asset="+value(m.AssetTag))
	}
	boot, direct, err := g.bootArgs()
	if err != nil {
		return nil, err
	}
	args = append(args, boot...)
	if m.CDROM != nil {
		if err := os.WriteFile(g.path(isoEnding), m.CDROM, 0o600); err != nil {
			return nil, err
		}
		if direct {
			// The initramfs is for QEMU and has no drivers for SCSI.
			args = append(args, "-drive", "if=none,id=cd,format=raw,readonly=on,file="+value(g.path(isoEnding)), "-device", "virtio-blk-pci,drive=cd,disable-legacy=on")
		} else {
			args = append(args, "-device", "virtio-scsi-pci,id=scsi0,disable-legacy=on",
				"-drive", "if=none,id=cd,format=raw,media=cdrom,readonly=on,file="+value(g.path(isoEnding)), "-device", "scsi-cd,drive=cd,bus=scsi0.0")
		}
	}
	return args, nil
}

// bootArgs are for what the machine starts from, directly or by its firmware.
func (g *guest) bootArgs() (args []string, direct bool, err error) {
	info, err := os.Stat(g.m.Image)
	if err != nil {
		return nil, false, fmt.Errorf("image: %w", err)
	}
	if info.IsDir() {
		man, err := image.ReadManifest(g.m.Image)
		if err != nil {
			return nil, false, fmt.Errorf("image: %w", err)
		}
		args = []string{"-kernel", man.Kernel.Path, "-initrd", man.Initrd.Path, "-append", kernelArgs + man.CommandLine}
		if _, err := os.Stat(qboot); err == nil {
			args = append(args, "-bios", qboot)
		}
		return args, true, nil
	}
	vars, err := os.ReadFile(uefiVars)
	if err != nil {
		return nil, false, fmt.Errorf("UEFI firmware (install the package ovmf): %w", err)
	}
	if err := os.WriteFile(g.path(varsEnding), vars, 0o600); err != nil {
		return nil, false, err
	}
	disk := "virtio-blk-pci,drive=disk,disable-legacy=on"
	if g.host.cfg.NVMe {
		disk = "nvme,drive=disk,serial=" + g.m.ID
	}
	return []string{
		"-drive", "if=pflash,format=raw,readonly=on,file=" + uefiCode, "-drive", "if=pflash,format=raw,file=" + value(g.path(varsEnding)),
		// What the machine writes goes into a file without a name, and ends with it.
		"-drive", "if=none,id=disk,format=raw,snapshot=on,file=" + value(g.m.Image), "-device", disk,
	}, false, nil
}

// value writes a text as the value of a QEMU option, where a comma ends it.
func value(text string) string { return strings.ReplaceAll(text, ",", ",,") }

// tail returns the last n bytes of a file.
func tail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-n), n))
}
