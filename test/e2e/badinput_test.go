// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// wrong is a pod that cannot run: what is wrong about it or its node, and the words
// that must stand in the error containerd shows, so that its user can mend it.
type wrong struct {
	name        string
	annotations map[string]string
	adaptor     []string // settings of the adaptor for this case
	noAdaptor   bool
	before      func(t *testing.T) // what is wrong with the node
	want        []string
}

const hypervisor = "io.katacontainers.config.hypervisor."

// TestBadInput runs pods that cannot run. Each ends in one sentence in the error
// that containerd shows, and leaves the node as it was.
func TestBadInput(t *testing.T) {
	bed := newBed(t, "e2e-bad")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	silent := filepath.Join(bed.Out, "silent.img")
	if err := bareInitrd(ctx, bed.Out, silent); err != nil {
		t.Fatal(err)
	}
	// The first pod brings up the CNI's bridge, which stays.
	plain, err := RunPod(ctx, bed, "plain", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Remove(context.WithoutCancel(ctx))

	for _, tc := range []wrong{
		{name: "more memory than the node has", annotations: map[string]string{hypervisor + "default_memory": "90000000"}, want: []string{"90000000", "default_memory"}},
		{name: "more CPUs than the node has", annotations: map[string]string{hypervisor + "default_vcpus": "4000"}, want: []string{"4000", "default_vcpus"}},
		{name: "a number that is none", annotations: map[string]string{hypervisor + "default_vcpus": "many"}, want: []string{"many", "default_vcpus"}},
		{name: "an annotation nobody knows", annotations: map[string]string{hypervisor + "shiny": "yes"}, want: []string{"shiny"}},
		{name: "a machine that never answers", adaptor: []string{"LOCAL_INITRD=" + silent, "PROXY_TIMEOUT=3s"}, want: []string{"PROXY_TIMEOUT", "15150"}},
		{name: "the tunnel's port in use", before: occupyUDP, want: []string{"9000", "in use"}},
		{name: "no QEMU", adaptor: []string{"LOCAL_QEMU=/nowhere/qemu"}, want: []string{"/nowhere/qemu", "LOCAL_QEMU"}},
		{name: "no adaptor", noAdaptor: true, want: []string{testbed.HypervisorSocket}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if !tc.noAdaptor {
				bed.AdaptorEnv = tc.adaptor
				if err := bed.StartAdaptor(ctx); err != nil {
					t.Fatal(err)
				}
				defer bed.Adaptor.Stop()
			}
			before, err := TakeSnapshot()
			if err != nil {
				t.Fatal(err)
			}
			if tc.before != nil {
				tc.before(t)
			}
			p, err := RunPod(ctx, bed, "wrong", testbed.Handler, tc.annotations)
			if err == nil {
				p.Remove(ctx)
				t.Fatal("the pod runs")
			}
			t.Log(err)
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error does not say %q: %v", w, err)
				}
			}
			if err := within(ctx, func(context.Context) error { return leftBehind(before) }); err != nil {
				t.Error(err)
			}
		})
	}
}

// occupyUDP takes the tunnel's port on the node for the length of a test.
func occupyUDP(t *testing.T) {
	c, err := net.ListenPacket("udp", "0.0.0.0:9000")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
}

// TestAdaptorRefuses starts adaptors that must not run.
func TestAdaptorRefuses(t *testing.T) {
	bed := newBed(t, "e2e-refuse")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	run := func(flag string, env ...string) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(bed.Bin, "cloud-api-adaptor"))
		if flag != "" {
			cmd.Args = append(cmd.Args, flag)
		}
		cmd.Env = append(os.Environ(), append(bed.AdaptorConfig(), env...)...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	expect := func(t *testing.T, out string, err error, want ...string) {
		t.Helper()
		t.Log(out)
		if err == nil {
			t.Fatal("it ended without an error")
		}
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("it does not say %q", w)
			}
		}
		if strings.Contains(out, "goroutine ") {
			t.Error("it shows its insides")
		}
	}
	t.Run("no QEMU, asked with --check-config", func(t *testing.T) {
		out, err := run("--check-config", "LOCAL_QEMU=/nowhere/qemu")
		expect(t, out, err, "/nowhere/qemu", "LOCAL_QEMU")
	})
	t.Run("wrong settings, all at once", func(t *testing.T) {
		out, err := run("", "PROXY_TIMEOUT=soon", "VXLAN_PORT=99999", "CLOUD_PROVIDER=<provider>")
		expect(t, out, err, "PROXY_TIMEOUT", "VXLAN_PORT", "CLOUD_PROVIDER")
	})
	t.Run("corrupt database", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "adaptor.db"), []byte(strings.Repeat("garbage", 4096)), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := run("", "STATE_DIR="+dir)
		expect(t, out, err, filepath.Join(dir, "adaptor.db"))
	})
	t.Run("a second adaptor", func(t *testing.T) {
		if err := bed.StartAdaptor(ctx); err != nil {
			t.Fatal(err)
		}
		out, err := run("")
		expect(t, out, err, "another")
		if c, err := net.Dial("unix", testbed.HypervisorSocket); err != nil {
			t.Errorf("the first adaptor no longer answers: %v", err)
		} else {
			c.Close()
		}
	})
}
