// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Environment of a process that TestKilled starts: this test binary, which then
// runs only TestVictim.
const (
	victimDir  = "PEERPOD_LOCAL_TEST_DIR"
	victimWork = "PEERPOD_LOCAL_TEST_WORK" // "create" or "delete"
	victimBoot = "PEERPOD_LOCAL_TEST_IMAGE"
)

// TestVictim does one call in a process that is about to be killed. By itself it
// checks that it has nothing to do.
func TestVictim(t *testing.T) {
	dir := os.Getenv(victimDir)
	if dir == "" {
		return
	}
	kernel, initrd, _ := strings.Cut(os.Getenv(victimBoot), "\n")
	p, err := New(Config{Kernel: kernel, Initrd: initrd, StateDir: dir, Accel: AccelTCG, DefaultMemoryMiB: 256, CPUOvercommit: 64})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("begin")
	if os.Getenv(victimWork) == "create" {
		create(t, p, request(t, p, "victim", cloud.Size{}))
	} else if err := p.Delete(t.Context(), idOf("victim")); err != nil {
		t.Fatal(err)
	}
}

// victim starts the call in another process and kills that after a while.
func victim(t *testing.T, dir, work string, after time.Duration) {
	t.Helper()
	img, err := image()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestVictim$")
	cmd.Env = append(os.Environ(), victimDir+"="+dir, victimWork+"="+work, victimBoot+"="+img[0]+"\n"+img[1])
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 5)); err != nil { // it has begun
		t.Fatal(err)
	}
	kill := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	_, _ = io.Copy(io.Discard, out) // until it ends, one way or the other
	_ = cmd.Wait()
}

// TestKilled kills processes in the middle of Create and Delete, at moments spread
// over the call, and has a new provider pick up the pieces.
func TestKilled(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, nil)
	req := request(t, p, "victim", cloud.Size{})
	left := map[string]int{}
	for n := range 24 {
		victim(t, dir, "create", time.Duration(rand.Int64N(int64(70*time.Millisecond))))
		l, err := p.List(t.Context(), req.Owner)
		if err != nil || len(l) > 1 {
			t.Fatalf("after a killed Create: %+v, %v", l, err)
		}
		if len(l) == 1 {
			left[l[0].State.String()]++
		} else {
			left["nothing"]++
		}
		if n%3 == 0 {
			if again := create(t, p, req); again.State != cloud.StateRunning || again.ID != idOf("victim") {
				t.Fatalf("the token again: %+v", again)
			}
			victim(t, dir, "delete", time.Duration(rand.Int64N(int64(100*time.Millisecond))))
		}
		if err := p.Delete(t.Context(), idOf("victim")); err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		if err := p.Delete(t.Context(), idOf("victim")); !errdefs.IsNotFound(err) {
			t.Fatalf("Delete again: %v, want NotFound", err)
		}
		if l := leaks(dir); len(l) != 0 {
			t.Fatalf("left behind: %v", l)
		}
	}
	t.Logf("killed Creates left: %v", left)
}

// TestSurvives: QEMU goes on when the process that made it is gone.
func TestSurvives(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, nil)
	victim(t, dir, "create", time.Minute) // ends by itself, long before
	inst, err := p.Get(t.Context(), idOf("victim"))
	if err != nil || inst.State != cloud.StateRunning {
		t.Fatalf("Get: %+v, %v; want running", inst, err)
	}
	if err := p.Delete(t.Context(), inst.ID); err != nil {
		t.Fatal(err)
	}
	noLeaks(t, dir)
}

// TestManyAtOnce has several providers make and remove instances at once, so that
// the bridge comes and goes under all of them.
func TestManyAtOnce(t *testing.T) {
	dir := stateDir(t)
	var wg sync.WaitGroup
	for n := range 6 {
		p := newProvider(t, dir, nil)
		req := request(t, p, fmt.Sprint("many-", n), cloud.Size{})
		wg.Go(func() {
			for range 3 {
				inst, err := p.Create(t.Context(), req)
				if err != nil || inst.State != cloud.StateRunning {
					t.Errorf("Create: %+v, %v", inst, err)
					return
				}
				if n%2 == 0 { // an impatient caller
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n)*time.Millisecond)
					if err := p.Delete(ctx, inst.ID); err != nil && !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("Delete: %v", err)
					}
					cancel()
				}
				if err := p.Delete(t.Context(), inst.ID); err != nil && !errdefs.IsNotFound(err) {
					t.Errorf("Delete: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	noLeaks(t, dir)
}
