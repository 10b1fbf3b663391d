// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/shimtest"
	"github.com/kata-remote/kata-remote/shim/stdio"
)

// TestTaken: the cloud announces that it takes the pod VM back. Containers are told to end,
// their termination messages say why, no other is made in their place, and when the last
// has ended the sandbox does, so that the pod is made again elsewhere.
func TestTaken(t *testing.T) {
	e := newEnv(t, append([]extension.Feature{extension.Notice}, ours...))
	told := make(chan struct{}, 1)
	e.agent.Programs = maps.Clone(programs)
	e.agent.Programs["stubborn"] = func(ctx context.Context, p *agenttest.Proc) int {
		for {
			select {
			case <-p.Signals:
				told <- struct{}{}
			case <-ctx.Done():
				return 0
			}
		}
	}
	e.must(e.create("pod", "pod", stdio.Config{}, "pause"))
	e.start("pod", "")
	logs := map[string]string{}
	create := func(id, program string) error {
		// As the kubelet's: /var/lib/kubelet/pods/UID/containers/NAME/ID.
		logs[id] = filepath.Join(t.TempDir(), "pods", "uid", "containers", id, "0f3a")
		e.must(os.MkdirAll(filepath.Dir(logs[id]), 0o755))
		e.must(os.WriteFile(logs[id], nil, 0o666))
		spc := shimtest.Spec(e.netns, map[string]string{annotation.ContainerType: annotation.ContainerTypeContainer, annotation.SandboxID: "pod"}, program)
		spc.Mounts = append(spc.Mounts, specs.Mount{Type: "bind", Source: logs[id], Destination: "/dev/termination-log", Options: []string{"rbind", "rw"}})
		return e.createFrom(id, spc)
	}
	for id, program := range map[string]string{"app": "pause", "side": "stubborn", "next": "pause"} {
		e.must(create(id, program))
	}
	e.start("app", "")
	e.start("side", "")

	e.agent.Announce(&podvmpb.Notice{Id: "1", Kind: podvmpb.NoticeKind_NOTICE_KIND_AT_RISK, Reason: "rebalance recommendation"})
	e.agent.Announce(&podvmpb.Notice{
		Id: "2", Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, Reason: "spot interruption",
		DeadlineUnixMs: time.Now().Add(time.Hour).Truncate(24 * time.Hour).Add(36*time.Hour + 5*time.Second).UnixMilli(),
	})
	<-told
	if status := e.wait("app", ""); status != 128+uint32(syscall.SIGTERM) {
		t.Errorf("status %d", status)
	}
	const why = "the cloud takes this pod VM back at 12:00:05 UTC (spot interruption)"
	says := func(id string) {
		t.Helper()
		if b, err := os.ReadFile(logs[id]); err != nil || string(b) != why {
			t.Errorf("the termination message of %s is %q, %v", id, b, err)
		}
	}
	says("app")
	if err := create("again", "pause"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), why) {
		t.Errorf("another container: %v", err)
	}
	if _, err := e.svc.Start(e.ctx, &taskapi.StartRequest{ID: "next"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start of one that was made before: %v", err)
	}
	if n := e.adaptor.Stops(); len(n) != 0 {
		t.Errorf("the sandbox is stopped while a container runs: %v", n)
	}
	e.kill("side", "", syscall.SIGKILL)
	e.wait("side", "")
	says("side")
	e.wait("pod", "")
	e.until("the pod VM is given back", func() bool { return slices.Equal(e.adaptor.Stops(), []string{"pod"}) })
}

// TestTakenAtOnce: there is no time left. What runs ends with the sandbox, and its message
// still says why.
func TestTakenAtOnce(t *testing.T) {
	e := newEnv(t, append([]extension.Feature{extension.Notice}, ours...))
	e.pod()
	e.agent.Announce(&podvmpb.Notice{Id: "1", Kind: podvmpb.NoticeKind_NOTICE_KIND_TAKEN, DeadlineUnixMs: 1, Reason: "spot interruption"})
	if status := e.wait("app", ""); status != 128+uint32(syscall.SIGKILL) {
		t.Errorf("status %d", status)
	}
	e.wait("pod", "")
	e.until("the pod VM is given back", func() bool { return slices.Equal(e.adaptor.Stops(), []string{"pod"}) })
}
