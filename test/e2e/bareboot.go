// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/local"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// bareMark is what the bare machine's only program prints.
const bareMark = "userspace reached"

// bareSource is that program. It is Go, as podvmd is.
const bareSource = `package main

import (
	"os"
	"syscall"
)

func main() {
	os.Stdout.WriteString("` + bareMark + `\n")
	for {
		syscall.Pause() // the end of process 1 is a kernel panic
	}
}
`

// BareBoot starts a virtual machine as the embedded provider makes them, with the
// pod VM's kernel and nothing but one small program in it, and returns how long it
// took from the request to that program's first word. It is what a pod's start is
// measured against.
func BareBoot(ctx context.Context, bed *testbed.Bed) (took time.Duration, err error) {
	initrd := filepath.Join(bed.Out, "bare.img")
	if err := bareInitrd(ctx, bed.Out, initrd); err != nil {
		return 0, err
	}
	// The look at KVM is a node's affair, not a machine's: it is over before the
	// clock starts.
	how, err := accel(ctx, bed)
	if err != nil {
		return 0, err
	}
	stateDir := filepath.Join(bed.Out, "bare")
	p, err := local.New(local.Config{
		Kernel: bed.Image.Kernel.Path, Initrd: initrd, StateDir: stateDir,
		KernelArgs: bed.Image.CommandLine, Accel: how,
		Bridge: "bare0", Subnet: netip.MustParsePrefix("192.168.214.0/24"),
	})
	if err != nil {
		return 0, err
	}
	plan, err := p.Plan(ctx, cloud.Size{})
	if err != nil {
		return 0, err
	}
	start := time.Now()
	inst, err := p.Create(ctx, cloud.CreateRequest{
		Token: fmt.Sprintf("bare-%d", start.UnixNano()), Name: "bare", SandboxID: "bare", Plan: plan,
		Owner: cloud.Owner{Cluster: "bench", Node: "testbed"}, UserData: []byte("#cloud-config\n"),
	})
	if err != nil {
		return 0, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		err = errors.Join(err, testbed.Poll(ctx, func(ctx context.Context) error {
			err := p.Delete(ctx, inst.ID)
			if errdefs.IsNotFound(err) {
				return nil
			}
			return errors.Join(err, errors.New("the bare machine is still there"))
		}), os.RemoveAll(stateDir))
	}()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	log := filepath.Join(stateDir, "instances", string(inst.ID), "serial.log")
	err = testbed.Poll(ctx, func(context.Context) error {
		b, err := os.ReadFile(log)
		if err == nil && !bytes.Contains(b, []byte(bareMark)) {
			err = fmt.Errorf("%s says %q", log, b)
		}
		return err
	})
	return time.Since(start), err
}

// localState is where the provider local keeps what it knows of this node.
const localState = "/var/lib/peerpod/local"

// accel is how the embedded provider runs machines here, so that all others are run the
// same way. Its look at KVM, which takes seconds, is remembered where it looks itself.
func accel(ctx context.Context, bed *testbed.Bed) (local.Accel, error) {
	for _, v := range bed.AdaptorConfig() {
		if a, ok := strings.CutPrefix(v, "LOCAL_ACCEL="); ok && a != "auto" {
			return local.Accel(a), nil
		}
	}
	p, err := local.New(local.Config{Kernel: bed.Image.Kernel.Path, Initrd: bed.Image.Initrd.Path, StateDir: localState})
	if err != nil {
		return "", err
	}
	a, _, err := p.Accel(ctx)
	return a, err
}

func bareInitrd(ctx context.Context, dir, out string) error {
	src, bin := filepath.Join(dir, "bare", "main.go"), filepath.Join(dir, "bare-init")
	if err := os.MkdirAll(filepath.Dir(src), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(src, []byte(bareSource), 0o644); err != nil {
		return err
	}
	if _, err := testbed.Run(ctx, "env", "CGO_ENABLED=0", "go", "build", "-ldflags=-s -w", "-o", bin, src); err != nil {
		return err
	}
	init, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	w := cpio.NewWriter(f)
	// The console that is its standard output comes with the kernel's own, built-in
	// initramfs (usr/default_cpio_list).
	if err := w.WriteHeader(&cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Size: int64(len(init))}); err != nil {
		return err
	}
	if _, err := w.Write(init); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return f.Close()
}
