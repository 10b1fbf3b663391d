// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
)

func TestPauseRunsWithoutARoot(t *testing.T) {
	a := testAgent()
	a.Features = append(a.Features, extension.Pause)
	ag := agentpb.NewAgentServiceClient(start(t, a)())
	ctx := t.Context()
	ok := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(ag.CreateSandbox(ctx, &agentpb.CreateSandboxRequest{SandboxId: "s"}))
	for _, tc := range []struct {
		id, key string
		signal  uint32
		want    int32
	}{
		{"term", annotation.ContainerType, 15, 0},
		{"int", annotation.CRIOContainerType, 2, 0},
		{"kill", annotation.ContainerType, 9, 137},
	} {
		oci := &agentpb.Spec{Annotations: map[string]string{tc.key: annotation.ContainerTypeSandbox}}
		ok(ag.CreateContainer(ctx, &agentpb.CreateContainerRequest{ContainerId: tc.id, OCI: oci}))
		ok(ag.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: tc.id}))
		_, err := ag.ExecProcess(ctx, &agentpb.ExecProcessRequest{ContainerId: tc.id, ExecId: "e", Process: &agentpb.Process{Args: []string{"cat"}}})
		if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
			t.Errorf("%s: exec: %v", tc.id, err)
		}
		ok(ag.SignalProcess(ctx, &agentpb.SignalProcessRequest{ContainerId: tc.id, Signal: 10})) // nothing to it
		ok(ag.SignalProcess(ctx, &agentpb.SignalProcessRequest{ContainerId: tc.id, Signal: tc.signal}))
		r, err := ag.WaitProcess(ctx, &agentpb.WaitProcessRequest{ContainerId: tc.id})
		if err != nil || r.Status != tc.want {
			t.Errorf("%s: status %d, %v, want %d", tc.id, r.GetStatus(), err, tc.want)
		}
		ok(ag.RemoveContainer(ctx, &agentpb.RemoveContainerRequest{ContainerId: tc.id}))
	}
}

func TestAnEmptyRootIsRefused(t *testing.T) {
	sandbox := map[string]string{annotation.ContainerType: annotation.ContainerTypeSandbox}
	plain := map[string]string{annotation.ContainerType: annotation.ContainerTypeContainer}
	for name, tc := range map[string]struct {
		features    []extension.Feature
		annotations map[string]string
	}{
		"an agent without the feature": {[]extension.Feature{extension.Rootfs}, sandbox},
		"not the sandbox":              {[]extension.Feature{extension.Pause}, plain},
		"no pod":                       {[]extension.Feature{extension.Pause}, nil},
	} {
		a := testAgent()
		a.Features = tc.features
		ag := agentpb.NewAgentServiceClient(start(t, a)())
		_, err := ag.CreateSandbox(t.Context(), &agentpb.CreateSandboxRequest{SandboxId: "s"})
		_, refused := ag.CreateContainer(t.Context(), &agentpb.CreateContainerRequest{
			ContainerId: "c", OCI: &agentpb.Spec{Annotations: tc.annotations, Process: &agentpb.Process{Args: []string{"cat"}}},
		})
		if err != nil || !errors.Is(errgrpc.ToNative(refused), errdefs.ErrInvalidArgument) || !strings.Contains(refused.Error(), "OCI.Root.Path") {
			t.Errorf("%s: %v, %v", name, err, refused)
		}
	}
}
