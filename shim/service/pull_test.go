// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

// pulledPod makes a pod whose sandbox has annotations of its own, and a container in
// it with the name of an image.
func (e *env) pulledPod(sandbox map[string]string) error {
	for _, id := range []string{"pod", "app"} {
		a := map[string]string{annotation.ContainerType: annotation.ContainerTypeContainer, annotation.SandboxID: "pod",
			annotation.SandboxName: "web", annotation.SandboxNamespace: "shop", annotation.ImageName: "registry.example/app:1"}
		if id == "pod" {
			a[annotation.ContainerType] = annotation.ContainerTypeSandbox
			delete(a, annotation.ImageName)
			for k, v := range sandbox {
				a[k] = v
			}
		}
		if err := e.createFrom(id, shimtest.Spec(e.netns, a, "pause")); err != nil {
			return err
		}
		e.start(id, "")
	}
	return nil
}

// TestGuestPull has pulls forced, by the pod or by the handler's options: nothing of
// the node is read (there is no root in the bundle), and a stock agent serves it.
func TestGuestPull(t *testing.T) {
	for name, c := range map[string]struct {
		features []extension.Feature
		options  string
		sandbox  map[string]string
	}{
		"by the pod":                   {ours, "", map[string]string{annotation.ForceGuestPull: "true"}},
		"by the handler":               {ours, "guest_pull = true\n", nil},
		"by the pod, of a stock agent": {nil, "", map[string]string{annotation.ForceGuestPull: "true"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, c.features)
			if c.options != "" {
				e.options.Value = handlerOptions(t, e, c.options)
			}
			e.must(e.pulledPod(c.sandbox))
			if e.agent.Rootfs("app") != nil {
				t.Error("the node's root was sent")
			}
			got := e.agent.Container("app")
			if len(got.Storages) == 0 || got.Storages[0].Driver != "image_guest_pull" || got.Storages[0].Source != "registry.example/app:1" || got.OCI.Root.Path != got.Storages[0].MountPoint {
				t.Errorf("%v, root %v", got.Storages, got.OCI.Root)
			}
			pause := e.agent.Container("pod")
			if own := pause.OCI.Root.Path == ""; own != (c.features != nil) {
				t.Errorf("the sandbox's root: %v", pause.OCI.Root)
			} else if !own && pause.Storages[0].Source != "pause" {
				t.Errorf("the sandbox's storage: %v", pause.Storages)
			}
		})
	}
	e := newEnv(t, ours)
	err := e.pulledPod(map[string]string{annotation.ForceGuestPull: "maybe"})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), annotation.ForceGuestPull) {
		t.Errorf("neither true nor false: %v", err)
	}
	if e.adaptor.VM("pod") != nil {
		t.Error("a machine was asked for")
	}
}

// handlerOptions is runtime options with text added to those of the test.
func handlerOptions(t *testing.T, e *env, text string) []byte {
	t.Helper()
	b, err := proto.Marshal(&runtimeoptions.Options{ConfigBody: []byte(text + "[hypervisor.remote]\nremote_hypervisor_socket = \"" + e.adaptor.Socket + "\"\n")})
	if err != nil {
		t.Fatal(err)
	}
	return b
}
