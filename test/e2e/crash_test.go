// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// TestCrashes kills what holds a pod up, one thing at a time. Whatever dies, the
// pod's removal leaves the node as it was: no machine, no tunnel, no process.
func TestCrashes(t *testing.T) {
	bed := newBed(t, "e2e-crash")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	plain, err := RunPod(ctx, bed, "plain", "", nil) // the CNI's bridge stays
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Remove(context.WithoutCancel(ctx))
	before, err := TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	clean := func(t *testing.T) {
		t.Helper()
		if err := within(ctx, func(context.Context) error { return leftBehind(before) }); err != nil {
			t.Error(err)
		}
	}
	for _, victim := range []string{"containerd-shim-kata", "qemu-system"} {
		t.Run(victim+" of a running pod", func(t *testing.T) {
			p, err := RunPod(ctx, bed, "crash", testbed.Handler, nil)
			if err != nil {
				t.Fatal(err)
			}
			c, err := p.Run(ctx, "app", "sleep", "1000")
			if err != nil {
				t.Fatal(err)
			}
			if err := killOne(victim); err != nil {
				t.Fatal(err)
			}
			if code, err := c.Wait(ctx); err != nil || code == 0 {
				t.Errorf("the container ended with %d, %v", code, err)
			}
			if err := p.Remove(ctx); err != nil {
				t.Error(err)
			}
			clean(t)
		})
	}
	// The start of a pod is killed at moments spread over it: the machine is asked
	// for within 0.1 s and answers after some seconds.
	for _, after := range []time.Duration{20, 60, 150, 400, 1200, 2500} {
		t.Run(fmt.Sprintf("adaptor %d ms into a start", after), func(t *testing.T) {
			result := make(chan error, 1)
			go func() {
				p, err := RunPod(ctx, bed, "crash", testbed.Handler, nil)
				if err == nil { // it was ready before the blow fell
					err = p.Remove(ctx)
				}
				result <- err
			}()
			time.Sleep(after * time.Millisecond)
			bed.Adaptor.Kill()
			if err := bed.StartAdaptor(ctx); err != nil {
				t.Fatal(err)
			}
			t.Log("the pod's start ended with:", <-result)
			clean(t)
			p, err := RunPod(ctx, bed, "after", testbed.Handler, nil)
			if err != nil {
				t.Fatalf("the next pod: %v", err)
			}
			if err := p.Remove(ctx); err != nil {
				t.Error(err)
			}
			clean(t)
		})
	}
}

// killOne kills the one process of this node whose program has a word in its name.
func killOne(word string) error {
	pid, err := testbed.FindProcess(word)
	if err != nil {
		return err
	}
	return syscall.Kill(pid, syscall.SIGKILL)
}

// killShim kills the shim of a pod.
func killShim(id string) error {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it ended meanwhile
		}
		args := strings.Split(string(b), "\x00")
		if strings.Contains(args[0], "containerd-shim-kata") && slices.Contains(args, id) {
			pid, err := strconv.Atoi(strings.Split(f, "/")[2])
			if err != nil {
				return err
			}
			return syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return fmt.Errorf("no shim of %s", id)
}
