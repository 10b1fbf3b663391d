// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// capture runs the command and returns its exit code and what it printed.
func capture(t *testing.T, ctx context.Context, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	files := map[**os.File]*os.File{}
	for _, std := range []**os.File{&os.Stdout, &os.Stderr} {
		f, err := os.CreateTemp(t.TempDir(), "out")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[std] = f
		old := *std
		*std = f
		defer func() { *std = old }()
	}
	code = run(ctx, args)
	text := func(f *os.File) string {
		f.Seek(0, io.SeekStart)
		b, _ := io.ReadAll(f)
		return string(b)
	}
	return code, text(files[&os.Stdout]), text(files[&os.Stderr])
}

// settings writes a configuration that is complete.
func settings(t *testing.T, more string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"vmlinuz", "initrd", "qemu"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/false\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "conf")
	text := strings.ReplaceAll("LOCAL_KERNEL=@/vmlinuz\nLOCAL_INITRD=@/initrd\nLOCAL_ACCEL=tcg\nSTATE_DIR=@/state\n"+more+"\n", "@", dir)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVersion(t *testing.T) {
	code, out, _ := capture(t, t.Context(), "--version")
	if code != 0 || !strings.HasPrefix(out, "cloud-api-adaptor ") {
		t.Errorf("%d, %q", code, out)
	}
}

func TestUsage(t *testing.T) {
	if code, _, errs := capture(t, t.Context(), "aws"); code != 2 || !strings.Contains(errs, "CLOUD_PROVIDER") {
		t.Errorf("an argument, as cloud-api-adaptor takes it: %d, %q", code, errs)
	}
	if code, _, errs := capture(t, t.Context(), "--no-such-flag"); code != 2 || !strings.Contains(errs, "no-such-flag") {
		t.Errorf("unknown flag: %d, %q", code, errs)
	}
}

func TestCheckConfig(t *testing.T) {
	code, out, errs := capture(t, t.Context(), "--check-config", "--config", settings(t, "PROXY_TIMEOUT=5\nVXLAN_PORT=0"))
	if code != 2 || out != "" || !strings.Contains(errs, "PROXY_TIMEOUT") || !strings.Contains(errs, "VXLAN_PORT") {
		t.Errorf("two problems: %d, %q, %q", code, out, errs)
	}
	code, out, errs = capture(t, t.Context(), "--check-config", "--config", settings(t, "LOCAL_QEMU=/absent/qemu"))
	if code != 2 || out != "" || !strings.Contains(errs, "/absent/qemu") {
		t.Errorf("no QEMU: %d, %q, %q", code, out, errs)
	}
}

func TestStateDirectoryThatCannotBe(t *testing.T) {
	path := settings(t, "")
	code, _, errs := capture(t, t.Context(), "--config", path, "--state-dir", path+"/below")
	if code != 1 || !strings.Contains(errs, path) || strings.Count(strings.TrimSpace(errs), "\n") > 1 {
		t.Errorf("%d, %q", code, errs)
	}
}
