// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-remote/kata-remote/shim/sandboxpb"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

// startSandboxAPI runs start in a bundle without an OCI spec and returns the bundle and
// a connection to the shim that answers with version 3.
func (c *containerd) startSandboxAPI(stdin []byte) (string, *ttrpc.Client) {
	c.t.Helper()
	bundle := c.t.TempDir()
	answer := c.start(bundle, "pod", bytes.NewReader(stdin))
	var r struct {
		Version           int
		Address, Protocol string
	}
	if err := json.Unmarshal([]byte(answer), &r); err != nil || r.Version != 3 || r.Protocol != "ttrpc" {
		c.t.Fatalf("answer %q: %v", answer, err)
	}
	return bundle, c.dial(r.Address)
}

func (c *containerd) createSandbox(api sandboxapi.TTRPCSandboxService, bundle string) error {
	b, err := proto.Marshal(&sandboxpb.PodSandboxConfig{Metadata: &sandboxpb.PodSandboxMetadata{Name: "web", Namespace: "shop"}, Hostname: "web"})
	if err != nil {
		return err
	}
	_, err = api.CreateSandbox(c.ctx, &sandboxapi.CreateSandboxRequest{
		SandboxID: "pod", BundlePath: bundle, NetnsPath: c.netns, Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: b},
	})
	return err
}

// TestSandboxAPI drives the real shim with containerd's own client of the Sandbox
// API. The options of the runtime handler, which only start is given, lead to the
// adaptor: from a containerd before 2.3 and from one after.
func TestSandboxAPI(t *testing.T) {
	for _, before := range []bool{true, false} {
		c := newContainerd(t)
		stdin, err := proto.Marshal(c.options())
		if !before {
			stdin, err = proto.Marshal(&bootapi.BootstrapParams{InstanceID: "pod", Extensions: []*bootapi.Extension{{Value: c.options()}}})
		}
		if err != nil {
			t.Fatal(err)
		}
		bundle, client := c.startSandboxAPI(stdin)
		api := sandboxapi.NewTTRPCSandboxClient(client)
		if err := c.createSandbox(api, bundle); err != nil {
			t.Fatal(err)
		}
		if _, err := api.StartSandbox(c.ctx, &sandboxapi.StartSandboxRequest{SandboxID: "pod"}); err != nil {
			t.Fatal(err)
		}
		if r, err := api.SandboxStatus(c.ctx, &sandboxapi.SandboxStatusRequest{SandboxID: "pod", Verbose: true}); err != nil || r.State != "SANDBOX_READY" || int(r.Pid) != shimPid(t, bundle) || r.Info["info"] == "" || r.CreatedAt.AsTime().IsZero() {
			t.Errorf("status: %v, %v", r, err)
		}
		member := shimtest.Bundle(t, shimtest.Spec(c.netns, podAnnotations("container", "pod"), "echo", "hello"))
		const v3 = "containerd.task.v3.Task"
		for _, call := range []struct {
			method string
			req    proto.Message
			resp   proto.Message
		}{
			{"Create", &taskapi.CreateTaskRequest{ID: "app", Bundle: member}, &taskapi.CreateTaskResponse{}},
			{"Start", &taskapi.StartRequest{ID: "app"}, &taskapi.StartResponse{}},
			{"Wait", &taskapi.WaitRequest{ID: "app"}, &taskapi.WaitResponse{}},
			{"Delete", &taskapi.DeleteRequest{ID: "app"}, &taskapi.DeleteResponse{}},
			{"Shutdown", &taskapi.ShutdownRequest{ID: "app"}, &emptypb.Empty{}}, // containerd does, after each
		} {
			if err := client.Call(c.ctx, v3, call.method, call.req, call.resp); err != nil {
				t.Fatalf("%s: %v", call.method, err)
			}
		}
		if r, warn := c.deleteBinary(member, "app"); r.ExitStatus != 137 || warn != "" {
			t.Errorf("delete of a member: %v, %s", r, warn)
		}
		if _, err := api.PingSandbox(c.ctx, &sandboxapi.PingRequest{SandboxID: "pod"}); err != nil {
			t.Errorf("the pod ended with its container: %v", err)
		}
		if _, err := api.StopSandbox(c.ctx, &sandboxapi.StopSandboxRequest{SandboxID: "pod"}); err != nil {
			t.Error(err)
		}
		if r, err := api.WaitSandbox(c.ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "pod"}); err != nil || r.ExitStatus != 0 {
			t.Errorf("wait: %v, %v", r, err)
		}
		if _, err := api.ShutdownSandbox(c.ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"}); err != nil {
			t.Errorf("the answer to the last call: %v", err)
		}
		c.waitGone(shimPid(t, bundle))
		if _, warn := c.deleteBinary(bundle, "pod"); warn != "" {
			t.Errorf("delete: %s", warn)
		}
		if got := c.adaptor.Stops(); !cmp.Equal(got, []string{"pod"}) {
			t.Errorf("StopVM of %v", got)
		}
	}
}

// TestSandboxAPICrash kills the shim of such a pod: delete gives the pod VM back.
func TestSandboxAPICrash(t *testing.T) {
	c := newContainerd(t)
	stdin, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "pod", Extensions: []*bootapi.Extension{{Value: c.options()}}})
	if err != nil {
		t.Fatal(err)
	}
	bundle, client := c.startSandboxAPI(stdin)
	api := sandboxapi.NewTTRPCSandboxClient(client)
	if err := c.createSandbox(api, bundle); err != nil {
		t.Fatal(err)
	}
	if _, err := api.StartSandbox(c.ctx, &sandboxapi.StartSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Fatal(err)
	}
	pid := shimPid(t, bundle)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.waitGone(pid)
	for range 2 {
		if r, warn := c.deleteBinary(bundle, "pod"); r.ExitStatus != 137 || warn != "" {
			t.Errorf("delete: %v, %s", r, warn)
		}
	}
	if got := c.adaptor.Stops(); !cmp.Equal(got, []string{"pod"}) {
		t.Errorf("StopVM of %v", got)
	}
	if _, err := os.Stat(filepath.Join(bundle, "peerpod.json")); err == nil {
		t.Error("the record is left")
	}
}
