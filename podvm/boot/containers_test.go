// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/agent-protocol/typespb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// guestAgent calls the agent in a booted image, whose kernel, with one cgroup
// hierarchy and every right, is not this machine's: what podvm/agent's own tests show
// with this machine's kernel has to hold there.
type guestAgent struct {
	t *testing.T
	agentpb.AgentServiceService
	podvm podvmpb.PodVMClient
	root  string // of every container: busybox
	ids   int
}

func newGuestAgent(t *testing.T) *guestAgent {
	t.Helper()
	c := newCredentials(t)
	// One CPU: once in ten runs beside other work, both of two locked up in the kernel,
	// each waiting for the other (QEMU 7.2 without KVM, Linux 6.1, 2026-11-21).
	v := startVM(t, podImage(t), seed(t, map[string]string{
		"user-data": userData(t, c.config()), "meta-data": "instance-id: i\nlocal-hostname: podvm-test\n", "network-config": networkConfig,
	}), 1)
	conn := tls.Client(v.dial(guestAddr+":15150"), c.tlsConfig(c.client))
	rpc := ttrpc.NewClient(conn)
	t.Cleanup(func() {
		rpc.Close()
		conn.Close()
	})
	g := &guestAgent{t: t, AgentServiceService: agentpb.NewAgentServiceClient(rpc), podvm: podvmpb.NewPodVMClient(rpc)}
	v.waitFor(`"step":"cpus"`) // and soon the late modules
	must[any](t)(g.CreateSandbox(g.ctx(), &agentpb.CreateSandboxRequest{
		SandboxId: "sandbox", Hostname: "pod-host", KernelModules: []*agentpb.KernelModule{{Name: "fuse"}},
	}))
	g.root = g.importRoot()
	return g
}

func (g *guestAgent) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	g.t.Cleanup(cancel)
	return ctx
}

// must fails the test on an error.
func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// importRoot sends a root file system that containers share.
func (g *guestAgent) importRoot() string {
	g.t.Helper()
	box := must[[]byte](g.t)(os.ReadFile("/bin/busybox"))
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(h tar.Header, body []byte) {
		h.Size, h.Mode = int64(len(body)), 0o755
		must[any](g.t)(nil, w.WriteHeader(&h))
		must[int](g.t)(w.Write(body))
	}
	for _, dir := range []string{"bin", "proc", "sys", "dev", "tmp", "etc", "vol"} {
		add(tar.Header{Name: dir + "/", Typeflag: tar.TypeDir}, nil)
	}
	add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg}, box)
	for _, name := range []string{"sh", "cat", "tail", "head", "ls", "mkdir", "mknod", "date", "grep", "kill", "wc"} {
		add(tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
	}
	must[any](g.t)(nil, w.Close())
	s := must[podvmpb.PodVM_ImportRootfsClient](g.t)(g.podvm.ImportRootfs(g.ctx()))
	must[any](g.t)(nil, s.Send(&podvmpb.ImportRootfsRequest{ContainerId: "base"}))
	granted, sent := uint64(0), uint64(0)
	for data := buf.Bytes(); ; {
		r := must[*podvmpb.ImportRootfsResponse](g.t)(s.Recv())
		if r.Done {
			return r.Path
		}
		granted = r.Consumed + r.Window
		for n := min(uint64(len(data)), granted-sent, extension.ChunkSize); n > 0; n = min(uint64(len(data)), granted-sent, extension.ChunkSize) {
			must[any](g.t)(nil, s.Send(&podvmpb.ImportRootfsRequest{Data: data[:n], Eof: n == uint64(len(data))}))
			data, sent = data[n:], sent+n
		}
	}
}

// spec is an ordinary container with what Kubernetes mounts.
func (g *guestAgent) spec(command string) *agentpb.Spec {
	caps := []string{"CAP_KILL", "CAP_CHOWN", "CAP_MKNOD", "CAP_DAC_OVERRIDE"}
	return &agentpb.Spec{
		Version: "1.0.2", Root: &agentpb.Root{Path: g.root},
		Process: &agentpb.Process{
			Args: []string{"/bin/sh", "-c", command}, Cwd: "/", User: &agentpb.User{}, Env: []string{"PATH=/bin"},
			Capabilities: &agentpb.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []*agentpb.Mount{
			{Destination: "/proc", Source: "proc", Type: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Source: "tmpfs", Type: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Source: "devpts", Type: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/mqueue", Source: "mqueue", Type: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Source: "sysfs", Type: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Source: "cgroup", Type: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &agentpb.Linux{
			Namespaces: []*agentpb.LinuxNamespace{{Type: "ipc"}, {Type: "uts"}, {Type: "mount"}},
			Resources:  &agentpb.LinuxResources{Devices: []*agentpb.LinuxDeviceCgroup{{Type: "a", Major: -1, Minor: -1, Access: "rwm"}}},
		},
	}
}

// run starts a container and returns its id.
func (g *guestAgent) run(spec *agentpb.Spec) string {
	g.t.Helper()
	g.ids++
	id := fmt.Sprintf("box%d", g.ids)
	must[any](g.t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: spec}))
	must[any](g.t)(g.StartContainer(g.ctx(), &agentpb.StartContainerRequest{ContainerId: id}))
	return id
}

// wait returns what a process printed, and its status.
func (g *guestAgent) wait(id, execID string) (string, int32) {
	g.t.Helper()
	var out strings.Builder
	for {
		r := must[*agentpb.ReadStreamResponse](g.t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: id, ExecId: execID, Len: 32768}))
		if len(r.Data) == 0 {
			break
		}
		out.Write(r.Data)
	}
	return out.String(), must[*agentpb.WaitProcessResponse](g.t)(g.WaitProcess(g.ctx(), &agentpb.WaitProcessRequest{ContainerId: id, ExecId: execID})).Status
}

// exec runs a command in a container and returns what it printed.
func (g *guestAgent) exec(id, command string) string {
	g.t.Helper()
	g.ids++
	execID := fmt.Sprintf("exec%d", g.ids)
	must[any](g.t)(g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: id, ExecId: execID, Process: &agentpb.Process{
		Args: []string{"/bin/sh", "-c", command}, Env: []string{"PATH=/bin"},
	}}))
	out, _ := g.wait(id, execID)
	return strings.TrimSpace(out)
}

const waits = "tail -f /dev/null"

// TestContainersInGuest boots once for all its parts.
func TestContainersInGuest(t *testing.T) {
	g := newGuestAgent(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T, *guestAgent)
	}{
		{"process", guestProcess}, {"limits", guestLimits}, {"out of memory", guestOutOfMemory}, {"devices", guestDevices},
		{"pause", guestPause}, {"network", guestNetwork}, {"clock", guestClock}, {"calls", guestCalls},
	} {
		t.Run(part.name, func(t *testing.T) {
			g.t = t
			part.run(t, g)
		})
	}
	g.t = t
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
}

// What a process is given, where raising a limit is allowed and seccomp is the image's.
func guestProcess(t *testing.T, g *guestAgent) {
	spec := g.spec("ulimit -Hn; mkdir /tmp/x 2>/dev/null || echo filtered; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/self/cgroup; ls -d /dev/mqueue; umask")
	spec.Process.Rlimits = []*agentpb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1 << 20, Hard: 1 << 20}}
	spec.Linux.Seccomp = &agentpb.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []*agentpb.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: "SCMP_ACT_ERRNO"}}}
	spec.Linux.Sysctl = map[string]string{"kernel.domainname": "example.org", "net.ipv4.ip_unprivileged_port_start": "80"}
	out, status := g.wait(g.run(spec), "")
	if want := "1048576\nfiltered\nexample.org\n80\n0::/\n/dev/mqueue\n0022\n"; out != want || status != 0 {
		t.Errorf("%q, status %d; want %q", out, status, want)
	}
}

// A container finds its limits at the root of its cgroups, updates move them, and
// they hold.
func guestLimits(t *testing.T, g *guestAgent) {
	spec := g.spec(waits)
	spec.Linux.Resources.Memory = &agentpb.LinuxMemory{Limit: 64 << 20, Swap: 64 << 20}
	spec.Linux.Resources.CPU = &agentpb.LinuxCPU{Shares: 512, Quota: 50_000, Period: 100_000, Cpus: "0"}
	spec.Linux.Resources.Pids = &agentpb.LinuxPids{Limit: 25}
	id := g.run(spec)
	const look = "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max cpu.weight cpuset.cpus pids.max"
	check := func(want string) {
		t.Helper()
		if got := strings.Join(strings.Split(g.exec(id, look), "\n"), "; "); got != want {
			t.Errorf("limits %q, want %q", got, want)
		}
	}
	check("67108864; 0; 50000 100000; 59; 0; 25")
	update := func(r *agentpb.LinuxResources) {
		t.Helper()
		must[any](t)(g.UpdateContainer(g.ctx(), &agentpb.UpdateContainerRequest{ContainerId: id, Resources: r}))
	}
	update(&agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{Limit: 96 << 20}, CPU: &agentpb.LinuxCPU{Shares: 1024}})
	update(&agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Quota: -1}, Pids: &agentpb.LinuxPids{Limit: 35}})
	check("100663296; 0; max 100000; 100; 0; 35")
	out := g.exec(id, "i=0; while [ $i -lt 50 ]; do tail -f /dev/null </dev/null >/dev/null & echo $i; i=$((i+1)); done 2>/dev/null")
	if got := len(strings.Fields(out)); got != 33 { // beside the first process and the shell
		t.Errorf("with a limit of 35: %d children", got)
	}
	s := must[*agentpb.StatsContainerResponse](t)(g.StatsContainer(g.ctx(), &agentpb.StatsContainerRequest{ContainerId: id}))
	m, p := s.CgroupStats.MemoryStats, s.CgroupStats.PidsStats
	if m.Usage.Limit != 96<<20 || m.Usage.Usage == 0 || m.Usage.Usage > 96<<20 || m.Stats["anon"] == 0 || p.Limit != 35 || p.Current < 30 || s.CgroupStats.CpuStats.CpuUsage.TotalUsage == 0 {
		t.Errorf("statistics: %v, %v, %v", m.Usage, p, s.CgroupStats.CpuStats)
	}
	if len(s.NetworkStats) != 1 || s.NetworkStats[0].Name != "eth0" {
		t.Errorf("network statistics: %v", s.NetworkStats)
	}
	// However many there are, they all end with it.
	must[any](t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: id, Signal: 9}))
	if _, status := g.wait(id, ""); status != 137 {
		t.Errorf("status %d", status)
	}
	must[any](t)(g.RemoveContainer(g.ctx(), &agentpb.RemoveContainerRequest{ContainerId: id}))
}

// The event comes before the exit.
func guestOutOfMemory(t *testing.T, g *guestAgent) {
	spec := g.spec("x=0123456789abcdef; while :; do x=$x$x; done")
	spec.Linux.Resources.Memory = &agentpb.LinuxMemory{Limit: 16 << 20, Swap: 16 << 20}
	id := g.run(spec)
	if _, status := g.wait(id, ""); status != 137 {
		t.Errorf("status %d", status)
	}
	ctx, cancel := context.WithTimeout(g.ctx(), patience)
	defer cancel()
	// It is there already; nothing has to be waited for.
	if e, err := g.GetOOMEvent(ctx, &agentpb.GetOOMEventRequest{}); err != nil || e.ContainerId != id {
		t.Errorf("event %v, %v", e, err)
	}
}

// The rules for devices are a program of the kernel's.
func guestDevices(t *testing.T, g *guestAgent) {
	spec := g.spec("mknod /tmp/kmsg c 1 11; cat /tmp/kmsg 2>&1 | head -n 1; head -c 2 /dev/zero | wc -c; head -c 2 /dev/mine | wc -c")
	spec.Linux.Devices = []*agentpb.LinuxDevice{{Path: "/dev/mine", Type: "c", Major: 1, Minor: 9, FileMode: 0o666}}
	spec.Linux.Resources.Devices = append(spec.Linux.Resources.Devices, &agentpb.LinuxDeviceCgroup{Allow: true, Type: "c", Major: 1, Minor: 9, Access: "r"})
	if out, _ := g.wait(g.run(spec), ""); out != "cat: can't open '/tmp/kmsg': Operation not permitted\n2\n2\n" {
		t.Errorf("output %q", out)
	}
}

func guestPause(t *testing.T, g *guestAgent) {
	id := g.run(g.spec("i=0; while read x; do i=$((i+1)); echo $i; done"))
	for want := 1; want <= 3; want++ {
		must[any](t)(g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: id, Data: []byte("\n")}))
		out := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: id, Len: 10}))
		if string(out.Data) != strconv.Itoa(want)+"\n" {
			t.Errorf("step %q, want %d", out.Data, want)
		}
		must[any](t)(g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: id}))
		must[any](t)(g.ResumeContainer(g.ctx(), &agentpb.ResumeContainerRequest{ContainerId: id}))
	}
	must[any](t)(g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: id}))
	must[any](t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: id, Signal: 9}))
	if _, status := g.wait(id, ""); status != 137 {
		t.Errorf("killed while paused: status %d", status)
	}
}

// The calls about the network see and change the pod's, not the machine's.
func guestNetwork(t *testing.T, g *guestAgent) {
	list := must[*agentpb.Interfaces](t)(g.ListInterfaces(g.ctx(), &agentpb.ListInterfacesRequest{})).Interfaces
	i := slices.IndexFunc(list, func(i *typespb.Interface) bool { return i.Name == "eth0" })
	if i < 0 || list[i].HwAddr != "32:b9:59:6b:f0:d5" || list[i].Mtu != 1450 || list[i].IPAddresses[0].Address != podAddr {
		t.Fatalf("interfaces: %v", list)
	}
	eth0 := list[i]
	eth0.IPAddresses = append(eth0.IPAddresses, &typespb.IPAddress{Address: "10.244.9.9", Mask: "24"})
	must[any](t)(g.UpdateInterface(g.ctx(), &agentpb.UpdateInterfaceRequest{Interface: eth0}))
	routes := must[*agentpb.Routes](t)(g.ListRoutes(g.ctx(), &agentpb.ListRoutesRequest{})).Routes
	routes = append(routes, &typespb.Route{Dest: "10.99.0.0/16", Gateway: "10.244.9.1", Device: "eth0"})
	must[any](t)(g.UpdateRoutes(g.ctx(), &agentpb.UpdateRoutesRequest{Routes: &agentpb.Routes{Routes: routes}}))
	must[any](t)(g.AddARPNeighbors(g.ctx(), &agentpb.AddARPNeighborsRequest{Neighbors: &agentpb.ARPNeighbors{ARPNeighbors: []*typespb.ARPNeighbor{
		{ToIPAddress: &typespb.IPAddress{Address: "10.244.9.1"}, Device: "eth0", Lladdr: "02:00:00:00:00:07"},
	}}}))
	spec := g.spec("busybox ip -4 addr show eth0; busybox ip route; busybox ip neigh")
	out, _ := g.wait(g.run(spec), "")
	for _, want := range []string{podAddr + "/24", "10.244.9.9/24", "default via 10.244.1.1", "10.99.0.0/16 via 10.244.9.1", "10.244.9.1 dev eth0 lladdr 02:00:00:00:00:07"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in:\n%s", want, out)
		}
	}
	_, err := g.GetIPTables(g.ctx(), &agentpb.GetIPTablesRequest{})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "no program iptables-save") {
		t.Errorf("GetIPTables in an image without iptables: %v", err)
	}
}

// The clock goes where it is told to.
func guestClock(t *testing.T, g *guestAgent) {
	id := g.run(g.spec(waits))
	set := func(to time.Time) {
		t.Helper()
		must[any](t)(g.SetGuestDateTime(g.ctx(), &agentpb.SetGuestDateTimeRequest{Sec: to.Unix(), Usec: int64(to.Nanosecond() / 1000)}))
	}
	now := func() time.Time {
		t.Helper()
		sec, err := strconv.ParseInt(g.exec(id, "date +%s"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Unix(sec, 0)
	}
	far := time.Now().Add(48 * time.Hour)
	set(far)
	if got := now(); got.Before(far.Truncate(time.Second)) {
		t.Errorf("set to %v, the guest says %v", far, got)
	}
	set(time.Now())
	if got := now(); got.After(far.Add(-24 * time.Hour)) {
		t.Errorf("set back, the guest says %v", got)
	}
	set(time.Now().Add(100 * time.Millisecond)) // slewed, or near enough to do nothing
}

// What else the guest's kernel has a part in.
func guestCalls(t *testing.T, g *guestAgent) {
	d := must[*agentpb.GuestDetailsResponse](t)(g.GetGuestDetails(g.ctx(), &agentpb.GuestDetailsRequest{MemBlockSize: true}))
	if !d.AgentDetails.InitDaemon || !d.AgentDetails.SupportsSeccomp {
		t.Errorf("details: %v", d)
	}
	must[any](t)(g.ReseedRandomDev(g.ctx(), &agentpb.ReseedRandomDevRequest{Data: []byte("some entropy")}))
	m := must[*agentpb.Metrics](t)(g.GetMetrics(g.ctx(), &agentpb.GetMetricsRequest{})).Metrics
	for _, want := range []string{`kata_guest_meminfo{item="memtotal"}`, `kata_guest_netdev_stat{interface="eth0",item="recv_bytes"}`} {
		if !strings.Contains(m, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	s := must[*agentpb.VolumeStatsResponse](t)(g.GetVolumeStats(g.ctx(), &agentpb.VolumeStatsRequest{VolumeGuestPath: g.root}))
	if len(s.Usage) != 2 || s.Usage[0].Used < 1<<20 {
		t.Errorf("volume statistics: %v", s)
	}
	if out, _ := g.wait(g.run(g.spec("ls -d /sys/module/fuse")), ""); out != "/sys/module/fuse\n" {
		t.Errorf("the kernel module that CreateSandbox asked for: %q", out)
	}
	_, err := g.SetPolicy(g.ctx(), &agentpb.SetPolicyRequest{Policy: "package agent_policy"})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("SetPolicy: %v", err)
	}
}
