// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// kubeletPatience is what the kubelet gives to one call of the CRI
// (runtimeRequestTimeout), and all that this test says about time.
const kubeletPatience = 2 * time.Minute

// TestHungGuest stops the machine of one of two pods as a hang would: it is there, its
// connections are, and nothing answers. The other pod does not notice, and the hung one
// can be removed, also after its shim died.
func TestHungGuest(t *testing.T) {
	bed := newBed(t, "e2e-hung")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	well, err := RunPod(ctx, bed, "well", testbed.Handler, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer well.Remove(context.WithoutCancel(ctx))
	app, err := well.Run(ctx, "app", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	before, err := TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	for _, shimDies := range []bool{false, true} {
		t.Run(fmt.Sprintf("shim dies %v", shimDies), func(t *testing.T) {
			hung, err := RunPod(ctx, bed, "hung", testbed.Handler, nil)
			if err != nil {
				t.Fatal(err)
			}
			victim, err := hung.Run(ctx, "victim", "sleep", "1000")
			if err != nil {
				t.Fatal(err)
			}
			machine, err := newMachine(before)
			if err != nil {
				t.Fatal(err)
			}
			if err := machine.stop(ctx); err != nil {
				t.Fatal(err)
			}
			if !shimDies {
				goesOn(ctx, t, bed, app, victim)
			} else if err := killShim(hung.ID); err != nil {
				t.Fatal(err)
			}
			for _, call := range []string{"stopp", "rmp"} {
				within, cancel := context.WithTimeout(ctx, kubeletPatience)
				if _, err := bed.Crictl(within, call, hung.ID); err != nil {
					t.Errorf("%s: %v", call, err)
				}
				cancel()
			}
			if err := within(ctx, func(context.Context) error { return leftBehind(before) }); err != nil {
				t.Error(err)
			}
		})
	}
}

// goesOn uses the pod that is well, and what containerd tells of all pods, while the
// other one hangs.
func goesOn(ctx context.Context, t *testing.T, bed *testbed.Bed, app, victim *Container) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, kubeletPatience)
	defer cancel()
	for range 2 { // at first nobody knows that it hangs
		if out, err := bed.Crictl(ctx, "ps", "-q"); err != nil || !strings.Contains(out, app.ID) || !strings.Contains(out, victim.ID) {
			t.Errorf("list: %q, %v", out, err)
		}
		if s, err := app.status(ctx); err != nil || s.State != "CONTAINER_RUNNING" {
			t.Errorf("status: %v, %v", s, err)
		}
		if s, err := victim.status(ctx); err != nil || s.State != "CONTAINER_RUNNING" {
			t.Errorf("status of the hung one: %v, %v", s, err)
		}
		if out, err := bed.Crictl(ctx, "stats", "-o", "json"); err != nil || !strings.Contains(out, app.ID) {
			t.Errorf("figures of all: %q, %v", out, err)
		}
		if out, err := app.Exec(ctx, "echo", "well"); err != nil || out != "well" {
			t.Errorf("exec: %q, %v", out, err)
		}
	}
	other, err := app.pod.Run(ctx, "other", "sh", "-c", "exit 5")
	if err != nil {
		t.Fatalf("a further container: %v", err)
	}
	if code, err := other.Wait(ctx); err != nil || code != 5 {
		t.Errorf("it ended with %d, %v", code, err)
	}
	if _, err := bed.Crictl(ctx, "rm", other.ID); err != nil {
		t.Error(err)
	}
}

// machine is the control socket of a machine that was made by the provider local.
type machine string

// instances is where the provider keeps its machines (package cloud/local).
const instances = "/var/lib/peerpod/local/instances/"

// newMachine finds the one machine that was not there before.
func newMachine(before Snapshot) (machine, error) {
	sockets, err := filepath.Glob(instances + "*/qmp")
	if err != nil {
		return "", err
	}
	known := strings.Join(before, "\n")
	for _, s := range sockets {
		if !strings.Contains(known, filepath.Base(filepath.Dir(s))) {
			return machine(s), nil
		}
	}
	return "", fmt.Errorf("no new machine among %v", sockets)
}

// stop stops its CPUs (QEMU Machine Protocol, docs/interop/qmp-spec.txt of QEMU).
func (m machine) stop(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", string(m))
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	var answer struct {
		QMP, Return, Error json.RawMessage
		Event              string
	}
	if err := in.Decode(&answer); err != nil {
		return err
	}
	for _, command := range []string{"qmp_capabilities", "stop"} {
		if err := out.Encode(map[string]string{"execute": command}); err != nil {
			return err
		}
		for {
			answer.Return, answer.Error = nil, nil
			if err := in.Decode(&answer); err != nil {
				return err
			}
			if answer.Error != nil {
				return errors.New(string(answer.Error))
			}
			if answer.Return != nil {
				break // what comes between are events
			}
		}
	}
	return nil
}
