// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fakeQEMU writes a program that behaves as a QEMU under KVM might. $serial is the
// path of the serial log, $runs a file that grows by a line with each run.
func fakeQEMU(t *testing.T, body string) (program string, runs func() int) {
	t.Helper()
	dir := t.TempDir()
	program = filepath.Join(dir, "qemu")
	count := filepath.Join(dir, "runs")
	script := "#!/bin/sh\nruns=" + count + "\necho run >>$runs\nfor a; do case $a in file,id=serial,path=*) serial=${a#*path=};; esac; done\n" + body
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return program, func() int {
		b, err := os.ReadFile(count)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return strings.Count(string(b), "\n")
	}
}

func TestAccel(t *testing.T) {
	kvm := filepath.Join(t.TempDir(), "kvm")
	if err := touch(kvm); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, qemu, kvm string
		want            Accel
		reason          string
		runs            int
	}{
		{"boots", `echo "[ 0.3] ` + probeMarker + `: Unable to mount root fs" >$serial`, kvm, AccelKVM, "a test boot under KVM took", 1},
		{"hangs", `echo "Linux version" >$serial; exec sleep 60`, kvm, AccelTCG, "did not end within", 1},
		{"refuses", `echo "could not access KVM kernel module: Permission denied" >&2; exit 1`, kvm, AccelTCG, "could not access KVM kernel module", 1},
		{"dies without a word", `exit 3`, kvm, AccelTCG, "exit status 3", 1},
		{"stops half way", `echo "Booting" >$serial; echo "Kernel panic - not syncing: IO-APIC" >>$serial`, kvm, AccelTCG, "IO-APIC", 1},
		{"no device", `exit 3`, "/no/kvm", AccelTCG, "open /no/kvm", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			program, runs := fakeQEMU(t, tc.qemu)
			provider := func() *Provider {
				p := newProvider(t, dir, func(c *Config) { c.Accel, c.QEMU = "", program })
				p.kvm, p.probeTimeout = tc.kvm, time.Minute
				if tc.name == "hangs" {
					p.probeTimeout = 2 * time.Second // and a shell has started by then, on a busy machine too
				}
				return p
			}
			for range 2 { // the second is a restart: it must know
				got, reason, err := provider().Accel(t.Context())
				if err != nil || got != tc.want || !strings.Contains(reason, tc.reason) {
					t.Errorf("Accel: %q, %q, %v; want %q, %q", got, reason, err, tc.want, tc.reason)
				}
			}
			if n := runs(); n != tc.runs {
				t.Errorf("%d test boots, want %d", n, tc.runs)
			}
			p := provider()
			if p.cfg.Machine = MachineMicroVM; tc.runs == 1 { // another machine is another question
				if _, _, err := p.Accel(t.Context()); err != nil {
					t.Error(err)
				}
				if n := runs(); n != 2 {
					t.Errorf("%d test boots after a change of the machine, want 2", n)
				}
			}
			noLeaks(t, dir)
		})
	}
}

func TestAccelCanceled(t *testing.T) {
	kvm := filepath.Join(t.TempDir(), "kvm")
	if err := touch(kvm); err != nil {
		t.Fatal(err)
	}
	program, runs := fakeQEMU(t, "exec sleep 60")
	p := newProvider(t, t.TempDir(), func(c *Config) { c.Accel, c.QEMU = "", program })
	p.kvm = kvm
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := p.Accel(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Accel: %v, want the context's error", err)
	}
	if p.probeTimeout = 100 * time.Millisecond; runs() > 1 {
		t.Errorf("%d runs", runs())
	}
	if a, _, err := p.Accel(t.Context()); err != nil || a != AccelTCG {
		t.Errorf("after an abandoned probe: %v, %v; nothing may have been remembered", a, err)
	}
}

func TestAccelConfigured(t *testing.T) {
	program, runs := fakeQEMU(t, "exit 1")
	p := newProvider(t, t.TempDir(), func(c *Config) { c.Accel, c.QEMU = AccelKVM, program })
	if a, _, err := p.Accel(t.Context()); err != nil || a != AccelKVM || runs() != 0 {
		t.Errorf("Accel: %v, %v, %d test boots; want kvm without one", a, err, runs())
	}
}
