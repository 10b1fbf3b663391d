// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const (
	// probeTimeout is how long the test boot under KVM may take. On hardware it
	// takes 0.3 to 0.6 s; full emulation needs 2 s on an idle node. KVM that is
	// slower than twice that is of no use even where it works.
	probeTimeout = 5 * time.Second
	// probeMemoryMiB carries the kernel alone; there is no initramfs in a test boot.
	probeMemoryMiB = 256
	// probeMarker is what a kernel says that came to the end of its start without
	// a root file system: memory, timers, interrupts and scheduler all worked.
	probeMarker = panicMark + ": VFS"
)

// accelRecord is the answer of a probe, valid for one boot of the node, one QEMU
// and one kernel.
type accelRecord struct {
	Key    string `json:"key"`
	Accel  Accel  `json:"accel"`
	Reason string `json:"reason"`
}

// Accel tells how VMs run on this node, and why, for a log. The first call of a
// node's boot may take as long as the test boot does (probeTimeout at most); the
// answer is kept in StateDir/accel.json until node, QEMU, kernel or machine type change.
// Remove that file to test again. Callers at once wait for one probe.
func (p *Provider) Accel(ctx context.Context) (Accel, string, error) {
	if p.cfg.Accel != "" {
		return p.cfg.Accel, "set by the configuration", nil
	}
	kvm, err := os.OpenFile(p.kvm, os.O_RDWR, 0)
	if err != nil {
		return AccelTCG, fmt.Sprintf("software emulation, slow: %v", err), nil
	}
	if err := kvm.Close(); err != nil {
		return "", "", err
	}
	qemu, err := p.findQEMU()
	if err != nil {
		return "", "", err
	}
	key, err := p.probeKey(qemu)
	if err != nil {
		return "", "", fmt.Errorf("probe of KVM: %w", err)
	}
	if r := p.loadAccel(key); r != nil {
		return r.Accel, r.Reason, nil
	}
	if err := os.MkdirAll(p.cfg.StateDir, 0o700); err != nil {
		return "", "", fmt.Errorf("state directory: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(p.cfg.StateDir, "accel.lock"), os.O_CREATE)
	if err != nil {
		return "", "", fmt.Errorf("probe of KVM: %w", err)
	}
	defer unlock()
	if r := p.loadAccel(key); r != nil { // another caller has probed meanwhile
		return r.Accel, r.Reason, nil
	}
	r := accelRecord{Key: key}
	if r.Accel, r.Reason, err = p.probe(ctx, qemu); err != nil {
		return "", "", fmt.Errorf("probe of KVM: %w", err)
	}
	b, err := json.Marshal(r)
	if err == nil {
		err = writeFile(p.accelPath(), b)
	}
	if err != nil {
		return "", "", fmt.Errorf("probe of KVM: remember the answer: %w", err)
	}
	return r.Accel, r.Reason, nil
}

func (p *Provider) accelPath() string { return filepath.Join(p.cfg.StateDir, "accel.json") }

// loadAccel returns nil when there is no answer that still holds. A damaged file
// is as good as none: the probe writes it anew.
func (p *Provider) loadAccel(key string) *accelRecord {
	b, err := os.ReadFile(p.accelPath())
	if err != nil {
		return nil
	}
	r := &accelRecord{}
	if json.Unmarshal(b, r) != nil || r.Key != key || (r.Accel != AccelKVM && r.Accel != AccelTCG) {
		return nil
	}
	return r
}

// probeKey changes whenever the answer might.
func (p *Provider) probeKey(qemu string) (string, error) {
	boot, err := bootID()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintln(h, boot, p.cfg.Machine)
	for _, path := range []string{qemu, p.cfg.Kernel} {
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, path, info.Size(), info.ModTime().UnixNano())
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// probe boots the configured kernel under KVM. An error means that there is no
// answer: the context ended, or QEMU could not be run at all.
func (p *Provider) probe(ctx context.Context, qemu string) (Accel, string, error) {
	dir := filepath.Join(p.cfg.StateDir, "probe")
	if err := os.RemoveAll(dir); err != nil { // of a probe that was killed
		return "", "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", "", err
	}
	defer os.RemoveAll(dir)
	serial := filepath.Join(dir, serialName)
	args := append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"}, machineArgs(p.cfg.Machine, AccelKVM)...)
	args = append(args, "-smp", "1", "-m", fmt.Sprint(probeMemoryMiB), "-kernel", p.cfg.Kernel, "-append", p.kernelArgs(),
		"-chardev", "file,id=serial,path="+value(serial), "-serial", "chardev:serial")

	bootCtx, cancel := context.WithTimeout(ctx, p.probeTimeout)
	defer cancel()
	// A probe must not outlive us: nobody would find it. The signal comes when the
	// thread that started it ends, hence the lock.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(bootCtx, qemu, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	began := time.Now()
	out, err := cmd.CombinedOutput()
	took := time.Since(began).Round(10 * time.Millisecond)
	if ctx.Err() != nil {
		return "", "", ctx.Err()
	}
	console, readErr := tail(serial, tailBytes)
	switch {
	case readErr == nil && strings.Contains(string(console), probeMarker):
		return AccelKVM, fmt.Sprintf("a test boot under KVM took %v", took), nil
	case bootCtx.Err() != nil:
		return AccelTCG, fmt.Sprintf("software emulation, slow: %s exists, but a test boot of %s under it did not end within %v", p.kvm, p.cfg.Kernel, p.probeTimeout), nil
	default:
		why := orText(strings.TrimSpace(string(out)), orText(lastLine(serial), fmt.Sprint(err)))
		return AccelTCG, fmt.Sprintf("software emulation, slow: %s exists, but a test boot under it failed: %s", p.kvm, why), nil
	}
}
