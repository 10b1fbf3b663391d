// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// TestCtr runs one-container sandboxes, as clients do that know no pods.
func TestCtr(t *testing.T) {
	bed := newBed(t, "e2e-ctr")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{
		{"netns", "add", "ctr-test"},
		{"link", "add", "ctr0", "type", "veth", "peer", "name", "eth0", "netns", "ctr-test"},
		{"addr", "add", "10.77.0.1/24", "dev", "ctr0"},
		{"link", "set", "ctr0", "up"},
		{"-n", "ctr-test", "addr", "add", "10.77.0.2/24", "dev", "eth0"},
		{"-n", "ctr-test", "link", "set", "eth0", "up"},
		{"-n", "ctr-test", "route", "add", "default", "via", "10.77.0.1"},
	} {
		if _, err := testbed.Run(ctx, "ip", command...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { testbed.Run(context.WithoutCancel(ctx), "ip", "netns", "delete", "ctr-test") })
	run := func(name string, args ...string) (string, error) {
		full := append([]string{"-a", testbed.ContainerdSocket, "-n", "k8s.io", "run", "--rm", "--runtime", "io.containerd.kata-remote.v2"}, args...)
		return testbed.Run(ctx, "ctr", append(full, testbed.BusyboxImage, name, "sh", "-c", "uname -r; ip -o -4 addr show eth0; exit 4")...)
	}
	before, err := TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("with a network namespace", func(t *testing.T) {
		out, err := run("single", "--with-ns", "network:/run/netns/ctr-test")
		if err == nil || !strings.Contains(err.Error(), "exit status 4") {
			t.Errorf("ctr ended with %v, want exit status 4", err)
		}
		if strings.HasPrefix(out, kernelRelease()) || !strings.Contains(out, "10.77.0.2/24") {
			t.Errorf("the container says %q", out)
		}
	})
	t.Run("without one it says what to do", func(t *testing.T) {
		_, err := run("nowhere")
		if err == nil || !strings.Contains(err.Error(), "--with-ns") {
			t.Errorf("error is %v, want a hint at --with-ns", err)
		}
	})
	t.Run("with one that does not exist it names it", func(t *testing.T) {
		_, err := run("gone", "--with-ns", "network:/run/netns/no-such")
		if err == nil || !strings.Contains(err.Error(), "/run/netns/no-such") {
			t.Errorf("error is %v, want the path in it", err)
		}
	})
	if err := within(ctx, func(context.Context) error { return leftBehind(before) }); err != nil {
		t.Error(err)
	}
}
