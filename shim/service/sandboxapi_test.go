// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/config"
	"github.com/kata-remote/kata-remote/shim/sandboxpb"
	"github.com/kata-remote/kata-remote/shim/shimtest"
	"github.com/kata-remote/kata-remote/shim/stdio"
)

// TestSandboxMessages holds our messages to containerd's: a field that both have, has
// the same number, kind and name.
func TestSandboxMessages(t *testing.T) {
	for ours, theirs := range map[proto.Message][]proto.Message{
		&sandboxpb.ID{}: {
			&sandboxapi.StartSandboxRequest{}, &sandboxapi.PlatformRequest{}, &sandboxapi.WaitSandboxRequest{}, &sandboxapi.PingRequest{},
			&sandboxapi.ShutdownSandboxRequest{}, &sandboxapi.SandboxMetricsRequest{},
		},
		&sandboxpb.Nothing{}:                {&sandboxapi.CreateSandboxResponse{}, &sandboxapi.StopSandboxResponse{}, &sandboxapi.PingResponse{}, &sandboxapi.ShutdownSandboxResponse{}},
		&sandboxpb.CreateSandboxRequest{}:   {&sandboxapi.CreateSandboxRequest{}},
		&sandboxpb.StartSandboxResponse{}:   {&sandboxapi.StartSandboxResponse{}},
		&sandboxpb.PlatformResponse{}:       {&sandboxapi.PlatformResponse{}},
		&sandboxpb.StopSandboxRequest{}:     {&sandboxapi.StopSandboxRequest{}},
		&sandboxpb.WaitSandboxResponse{}:    {&sandboxapi.WaitSandboxResponse{}},
		&sandboxpb.SandboxStatusRequest{}:   {&sandboxapi.SandboxStatusRequest{}},
		&sandboxpb.SandboxStatusResponse{}:  {&sandboxapi.SandboxStatusResponse{}},
		&sandboxpb.SandboxMetricsResponse{}: {&sandboxapi.SandboxMetricsResponse{}},
	} {
		for _, their := range theirs {
			sameFields(t, ours.ProtoReflect().Descriptor(), their.ProtoReflect().Descriptor())
		}
	}
}

func sameFields(t *testing.T, ours, theirs protoreflect.MessageDescriptor) {
	for i := range ours.Fields().Len() {
		f := ours.Fields().Get(i)
		g := theirs.Fields().ByNumber(f.Number())
		if g == nil || g.Kind() != f.Kind() || g.Cardinality() != f.Cardinality() || !strings.EqualFold(string(g.Name()), string(f.Name())) {
			t.Errorf("%s: containerd has %v in %s", f.FullName(), g, theirs.FullName())
		} else if f.Message() != nil && strings.HasPrefix(string(f.Message().FullName()), "peerpod.") {
			sameFields(t, f.Message(), g.Message())
		}
	}
}

// podEnv is an env whose pod is made through the Sandbox API, by containerd's client.
type podEnv struct {
	*env
	api    sandboxapi.TTRPCSandboxService
	bundle string
}

func newPodEnv(t *testing.T, features []extension.Feature) *podEnv {
	e := &podEnv{env: newEnv(t, features), bundle: t.TempDir()}
	server, err := ttrpc.NewServer()
	e.must(err)
	e.svc.Register(server)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	e.must(err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(context.Background(), l)
	}()
	conn, err := net.Dial("unix", l.Addr().String())
	e.must(err)
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() {
		client.Close()
		server.Close()
		<-served
	})
	e.api = sandboxapi.NewTTRPCSandboxClient(client)
	e.must(config.WriteOptions(e.bundle, e.options))
	return e
}

func (e *podEnv) createSandbox(c *sandboxpb.PodSandboxConfig) error {
	b, err := proto.Marshal(c)
	e.must(err)
	_, err = e.api.CreateSandbox(e.ctx, &sandboxapi.CreateSandboxRequest{
		SandboxID: "pod", BundlePath: e.bundle, NetnsPath: e.netns,
		Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: b},
	})
	return errgrpc.ToNative(err)
}

func (e *podEnv) startSandbox() error {
	_, err := e.api.StartSandbox(e.ctx, &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	return errgrpc.ToNative(err)
}

// TestSandboxAPI goes through the life of a pod without a sandbox container: what it
// asks for reaches the adaptor and the guest, containers join it, get the files that
// are the pod's, and end with it.
func TestSandboxAPI(t *testing.T) {
	e := newPodEnv(t, ours)
	e.must(e.createSandbox(&sandboxpb.PodSandboxConfig{
		Metadata: &sandboxpb.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "u"}, Hostname: "web-0",
		DnsConfig:   &sandboxpb.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"shop.svc", "svc"}, Options: []string{"ndots:5"}},
		Annotations: map[string]string{annotation.MachineType: "m5.large"},
		Linux: &sandboxpb.LinuxPodSandboxConfig{
			Sysctls:   map[string]string{"kernel.shm_rmid_forced": "1"},
			Resources: &sandboxpb.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, MemoryLimitInBytes: 256 << 20},
		},
	}))
	if e.adaptor.VM("pod") != nil {
		t.Error("a machine was asked for before the start")
	}
	e.must(e.startSandbox())
	vm := e.adaptor.VM("pod")
	want := map[string]string{annotation.SandboxName: "web", annotation.SandboxNamespace: "shop", annotation.MachineType: "m5.large", annotation.DefaultVCPUs: "2", annotation.DefaultMemory: "768"}
	for k, v := range want {
		if vm.GetAnnotations()[k] != v {
			t.Errorf("CreateVM: %s is %q, want %q", k, vm.GetAnnotations()[k], v)
		}
	}
	if sb := e.agent.Sandbox(); sb.GetHostname() != "web-0" || !slices.Contains(sb.GetDns(), "nameserver 10.0.0.10") || !slices.Contains(sb.GetDns(), "options ndots:5") {
		t.Errorf("CreateSandbox: %v", sb)
	}
	holder := e.agent.Container("pod")
	if sysctl := holder.GetOCI().GetLinux().GetSysctl(); sysctl["kernel.shm_rmid_forced"] != "1" || sysctl["net.ipv4.ip_unprivileged_port_start"] != "0" {
		t.Errorf("the pod's kernel settings: %v", sysctl)
	}
	e.must(e.create("app", "pod", stdio.Config{}, "pause"))
	e.start("app", "")
	app := e.agent.Container("app")
	sources := map[string]string{}
	for _, m := range app.OCI.Mounts {
		sources[m.Destination] = m.Source
	}
	files := e.agent.Files()
	for destination, text := range map[string]string{"/etc/hostname": "web-0\n", "/etc/resolv.conf": "search shop.svc svc\nnameserver 10.0.0.10\noptions ndots:5\n"} {
		if got := string(files[sources[destination]].Data); got != text {
			t.Errorf("%s is %q, want %q", destination, got, text)
		}
	}
	if len(files[sources["/etc/hosts"]].Data) == 0 || sources["/dev/shm"] != "/run/kata-containers/sandbox/shm" {
		t.Errorf("mounts: %v", sources)
	}
	if r, err := e.api.SandboxMetrics(e.ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: "pod"}); err != nil || r.Metrics.GetID() != "pod" || memoryUsage(t, r.Metrics.GetData()) != 1<<20 {
		t.Errorf("metrics: %v, %v", r, err)
	}
	_, err := e.api.StopSandbox(e.ctx, &sandboxapi.StopSandboxRequest{SandboxID: "pod"})
	e.must(err)
	if r, err := e.api.WaitSandbox(e.ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "pod"}); err != nil || r.ExitStatus != 0 || r.ExitedAt.AsTime().IsZero() {
		t.Errorf("wait: %v, %v", r, err)
	}
	if r, err := e.api.SandboxStatus(e.ctx, &sandboxapi.SandboxStatusRequest{SandboxID: "pod"}); err != nil || r.State != "SANDBOX_NOTREADY" || r.ExitedAt == nil {
		t.Errorf("status: %v, %v", r, err)
	}
	if got := e.wait("app", ""); got != 137 {
		t.Errorf("the container ended with %d", got)
	}
	e.delete("app", "")
	e.checkTrace("app", "", "create", "start", "exit", "delete")
	e.svc.Close()
	if got := e.adaptor.Stops(); !cmp.Equal(got, []string{"pod"}) {
		t.Errorf("StopVM of %v", got)
	}
}

// memoryUsage reads either form of metrics.
func memoryUsage(t *testing.T, a *anypb.Any) uint64 {
	t.Helper()
	switch a.GetTypeUrl() {
	case "io.containerd.cgroups.v1.Metrics":
		var m v1.Metrics
		if err := proto.Unmarshal(a.Value, &m); err != nil {
			t.Fatal(err)
		}
		return m.Memory.Usage.Usage
	case "io.containerd.cgroups.v2.Metrics":
		var m v2.Metrics
		if err := proto.Unmarshal(a.Value, &m); err != nil {
			t.Fatal(err)
		}
		return m.Memory.Usage
	}
	t.Fatalf("metrics are a %s", a.GetTypeUrl())
	return 0
}

// TestSandboxLost has the machine taken away: WaitSandbox and SandboxStatus say so.
func TestSandboxLost(t *testing.T) {
	e := newPodEnv(t, ours)
	e.must(e.createSandbox(&sandboxpb.PodSandboxConfig{}))
	e.must(e.startSandbox())
	e.must(e.create("app", "pod", stdio.Config{}, "pause"))
	e.start("app", "")
	e.adaptor.Break() // the adaptor answers, and the agent's socket is gone
	if r, err := e.api.WaitSandbox(e.ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "pod"}); err != nil || r.ExitStatus != 137 {
		t.Errorf("wait: %v, %v", r, err)
	}
	if r, err := e.api.SandboxStatus(e.ctx, &sandboxapi.SandboxStatusRequest{SandboxID: "pod"}); err != nil || r.State != "SANDBOX_NOTREADY" {
		t.Errorf("status: %v, %v", r, err)
	}
	if _, err := e.api.PingSandbox(e.ctx, &sandboxapi.PingRequest{SandboxID: "pod"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("ping: %v", err)
	}
	if got := e.wait("app", ""); got != 137 {
		t.Errorf("the container ended with %d", got)
	}
}

// TestSandboxRefused has pods that cannot be, and calls out of order.
func TestSandboxRefused(t *testing.T) {
	node := sandboxpb.NamespaceMode_NAMESPACE_MODE_NODE
	for want, o := range map[string]*sandboxpb.NamespaceOption{"hostNetwork": {Network: node}, "hostPID": {Pid: node}, "hostIPC": {Ipc: node}} {
		e := newPodEnv(t, ours)
		err := e.createSandbox(&sandboxpb.PodSandboxConfig{Linux: &sandboxpb.LinuxPodSandboxConfig{SecurityContext: &sandboxpb.LinuxSandboxSecurityContext{NamespaceOptions: o}}})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	e := newPodEnv(t, ours)
	if err := e.startSandbox(); !errdefs.IsNotFound(err) {
		t.Errorf("start of what was not created: %v", err)
	}
	e.adaptor.OnStart = func(context.Context) error {
		return fmt.Errorf("no capacity for t3.small in zone a: %w", errdefs.ErrResourceExhausted)
	}
	e.must(e.createSandbox(&sandboxpb.PodSandboxConfig{}))
	if err := e.createSandbox(&sandboxpb.PodSandboxConfig{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("created twice: %v", err)
	}
	if err := e.startSandbox(); !errdefs.IsResourceExhausted(err) {
		t.Errorf("start: %v", err)
	}
	if got := e.adaptor.Stops(); !slices.Contains(got, "pod") {
		t.Errorf("StopVM of %v", got)
	}
	if err := e.create("app", "pod", stdio.Config{}, "pause"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("container of a pod that did not start: %v", err)
	}
}

// TestSandboxOfStockAgent: an agent without a program of its own for it gets no
// container that stands for the pod.
func TestSandboxOfStockAgent(t *testing.T) {
	e := newPodEnv(t, []extension.Feature{extension.Rootfs})
	e.must(e.createSandbox(&sandboxpb.PodSandboxConfig{}))
	e.must(e.startSandbox())
	e.must(e.create("app", "pod", stdio.Config{}, "pause"))
	e.start("app", "")
	if e.agent.Container("pod") != nil {
		t.Error("a container stands for the pod")
	}
	e.kill("app", "", syscall.SIGKILL)
	e.wait("app", "")
	e.delete("app", "")
}

// TestPodFiles leaves alone what the CRI plugin has put there.
func TestPodFilesAreTheKubelets(t *testing.T) {
	e := newPodEnv(t, ours)
	e.must(e.createSandbox(&sandboxpb.PodSandboxConfig{}))
	e.must(e.startSandbox())
	hosts := filepath.Join(t.TempDir(), "etc-hosts")
	e.must(os.WriteFile(hosts, []byte("kubelet's"), 0o644))
	spc := shimtest.Spec(e.netns, map[string]string{annotation.ContainerType: annotation.ContainerTypeContainer, annotation.SandboxID: "pod"}, "pause")
	spc.Mounts = append(spc.Mounts, specs.Mount{Destination: "/etc/hosts", Source: hosts, Type: "bind", Options: []string{"rbind"}})
	e.must(e.createFrom("app", spc))
	var found []string
	for _, m := range e.agent.Container("app").OCI.Mounts {
		if m.Destination == "/etc/hosts" {
			found = append(found, string(e.agent.Files()[m.Source].Data))
		}
	}
	if !cmp.Equal(found, []string{"kubelet's"}) {
		t.Errorf("/etc/hosts: %q of %v", found, slices.Sorted(maps.Keys(e.agent.Files())))
	}
}
