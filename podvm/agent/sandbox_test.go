// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func TestNamespaces(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	own := func(ns string) string {
		l, err := os.Readlink("/proc/thread-self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	const list = "for n in mnt pid ipc uts; do readlink /proc/self/ns/$n; done; hostname"
	ns := func(id, pidns string) []string {
		spec := g.spec(list + "; read x")
		must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: spec, SandboxPidns: pidns == "shared"}))
		g.start(id)
		var text string
		for strings.Count(text, "\n") < 5 {
			r := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: id, Len: 4096}))
			if len(r.Data) == 0 {
				t.Fatalf("%s said only %q", id, text)
			}
			text += string(r.Data)
		}
		return strings.Fields(text)
	}
	first, second, third := ns("first", "shared"), ns("second", "own"), ns("third", "shared")
	for i, name := range []string{"mnt", "pid", "ipc", "uts"} {
		if first[i] == own(name) {
			t.Errorf("%s namespace is the agent's", name)
		}
		if same := first[i] == second[i]; same != (name == "ipc" || name == "uts") {
			t.Errorf("%s namespace: first %s, second %s", name, first[i], second[i])
		}
		if same := first[i] == third[i]; same != (name != "mnt") {
			t.Errorf("%s namespace: first %s, third, which shares pids, %s", name, first[i], third[i])
		}
	}
	if first[4] != "pod-host" || second[4] != "pod-host" {
		t.Errorf("hostnames %s, %s", first[4], second[4])
	}
	// In a shared pid namespace a container's processes end with it all the same.
	g.exec("third", "left", "sleep 1000 & sleep 1000", false)
	must[any](t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: "third", Signal: 9}))
	if got := g.wait("third", ""); got != 137 {
		t.Errorf("status %d", got)
	}
	if got := g.wait("third", "left"); got != 137 {
		t.Errorf("status of what was left: %d", got)
	}
}

// podNetNS makes a network namespace with a link in it, bound to a file.
func podNetNS(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "podns")
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends in the namespace
		made <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := os.WriteFile(path, nil, 0o444); err != nil {
				return err
			}
			return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		}()
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	at := netlink.NewLinkAttrs()
	at.Name = "eth0"
	link := &netlink.Veth{LinkAttrs: at, PeerName: "peer0"}
	addr, _ := netlink.ParseAddr("10.99.0.2/24")
	if err := errors.Join(h.LinkAdd(link), h.AddrAdd(link, addr), h.LinkSetUp(link)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPodNetwork(t *testing.T) {
	path := podNetNS(t)
	g := newGuest(t, func(c *Config) { c.PodNetNS = path })
	g.sandbox()
	g.run("main", "ls /proc/sys/net/ipv4/conf; sleep 1000")
	read := must[*agentpb.ReadStreamResponse](t)
	var text string
	for !strings.Contains(text, "lo\n") {
		text += string(read(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "main", Len: 4096})).Data)
	}
	if !strings.Contains(text, "eth0") {
		t.Errorf("the container's network: %q", text)
	}
	st := must[*agentpb.StatsContainerResponse](t)(g.StatsContainer(g.ctx(), &agentpb.StatsContainerRequest{ContainerId: "main"}))
	var names []string
	for _, n := range st.NetworkStats {
		names = append(names, n.Name)
	}
	if !slices.Contains(names, "eth0") || slices.Contains(names, "lo") {
		t.Errorf("network statistics: %v", st.NetworkStats)
	}
	ifs := must[*agentpb.Interfaces](t)(g.ListInterfaces(g.ctx(), &agentpb.ListInterfacesRequest{}))
	found := false
	for _, i := range ifs.Interfaces {
		for _, a := range i.IPAddresses {
			found = found || i.Name == "eth0" && a.Address == "10.99.0.2" && a.Mask == "24"
		}
	}
	if !found {
		t.Errorf("interfaces: %v", ifs)
	}
	routes := must[*agentpb.Routes](t)(g.ListRoutes(g.ctx(), &agentpb.ListRoutesRequest{}))
	found = false
	for _, r := range routes.Routes {
		found = found || r.Dest == "10.99.0.0/24" && r.Device == "eth0" && r.Source == "10.99.0.2"
	}
	if !found {
		t.Errorf("routes: %v", routes)
	}
}

func TestStorage(t *testing.T) {
	g := newGuest(t)
	dir := g.agent.cfg.StateDir
	shm, mem, local, bound := dir+"/sandbox/shm", dir+"/sandbox/ephemeral/mem", dir+"/shared/containers/sandbox/rootfs/local/data", dir+"/bound"
	must[any](t)(g.CreateSandbox(g.ctx(), &agentpb.CreateSandboxRequest{SandboxId: "sandbox", Dns: []string{"nameserver 10.0.0.10", "search local"}, Storages: []*agentpb.Storage{
		{Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: shm, Options: []string{"noexec", "nosuid", "nodev", "mode=1777", "size=65536"}},
	}}))
	if b, err := os.ReadFile(dir + "/sandbox/resolv.conf"); err != nil || string(b) != "nameserver 10.0.0.10\nsearch local\n" {
		t.Errorf("DNS: %q, %v", b, err)
	}
	volumes := []*agentpb.Storage{
		{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: mem, Options: []string{"size=1m"}, FsGroup: &agentpb.FSGroup{GroupId: 123}},
		{Driver: "local", Source: "local", Fstype: "local", MountPoint: local, Options: []string{"mode=0777", "fsgid=77"}},
		{Driver: "bind", Source: shm, MountPoint: bound, Options: []string{"ro"}},
	}
	create := func(id, command string) {
		t.Helper()
		spec := g.spec(command)
		for _, m := range []struct{ to, from string }{{"/dev/shm", shm}, {"/vol/mem", mem}, {"/vol/local", local}, {"/vol/bound", bound}} {
			spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: m.to, Source: m.from, Type: "bind", Options: []string{"rbind"}})
		}
		must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: spec, Storages: volumes}))
		g.start(id)
	}
	create("first", "echo shared > /vol/local/f; echo mem > /vol/mem/f; echo shm > /dev/shm/f; touch /vol/bound/x || echo read-only; dd if=/dev/zero of=/vol/mem/big bs=1k count=2000 2>/dev/null || echo full")
	if got := g.readAll("first", ""); got != "read-only\nfull\n" {
		t.Errorf("first: %q", got)
	}
	g.wait("first", "")
	var st unix.Stat_t
	if err := unix.Stat(mem, &st); err != nil || st.Gid != 123 || st.Mode&unix.S_ISGID == 0 || st.Mode&0o070 != 0o070 {
		t.Errorf("fsGroup: group %d, mode %o, %v", st.Gid, st.Mode, err)
	}
	if err := unix.Stat(local, &st); err != nil || st.Gid != 77 || st.Mode&0o7777 != 0o2777 {
		t.Errorf("local: group %d, mode %o, %v", st.Gid, st.Mode, err)
	}
	// The volume stays when its only container goes; what is the container's does not.
	g.remove("first")
	if err := unix.Stat(bound, &st); !errors.Is(err, unix.ENOENT) {
		t.Errorf("the bind mount is still there: %v", err)
	}
	create("second", "cat /vol/local/f /vol/mem/f /dev/shm/f /vol/bound/f")
	if got := g.readAll("second", ""); got != "shared\nmem\nshm\nshm\n" {
		t.Errorf("second: %q", got)
	}
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
	for _, path := range []string{shm, mem, local} {
		if err := unix.Stat(path, &st); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	// And the guest could hold another sandbox.
	g.sandbox()
	g.run("third", "exit 3")
	if got := g.wait("third", ""); got != 3 {
		t.Errorf("status %d", got)
	}
}

func TestPauseUpdateStats(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec("while :; do echo tick; sleep 0.01; done")
	spec.Linux.Resources = &agentpb.LinuxResources{
		Memory: &agentpb.LinuxMemory{Limit: 64 << 20}, Pids: &agentpb.LinuxPids{Limit: 40}, CPU: &agentpb.LinuxCPU{Shares: 512, Quota: 50000, Period: 100000},
	}
	g.create("main", spec)
	g.start("main")
	stats := func() *agentpb.CgroupStats {
		return must[*agentpb.StatsContainerResponse](t)(g.StatsContainer(g.ctx(), &agentpb.StatsContainerRequest{ContainerId: "main"})).CgroupStats
	}
	s := stats()
	if s.MemoryStats.Usage.Limit != 64<<20 || s.PidsStats.Limit != 40 || s.PidsStats.Current == 0 || s.MemoryStats.Usage.Usage == 0 {
		t.Errorf("statistics: %v, %v", s.MemoryStats.Usage, s.PidsStats)
	}
	eventually(t, "processor time is counted", func() bool { return stats().CpuStats.CpuUsage.TotalUsage > s.CpuStats.CpuUsage.TotalUsage })
	must[any](t)(g.UpdateContainer(g.ctx(), &agentpb.UpdateContainerRequest{ContainerId: "main", Resources: &agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{Limit: 128 << 20}}}))
	if s := stats(); s.MemoryStats.Usage.Limit != 128<<20 || s.PidsStats.Limit != 40 {
		t.Errorf("after the update: memory %d, pids %d", s.MemoryStats.Usage.Limit, s.PidsStats.Limit)
	}
	must[any](t)(g.UpdateContainer(g.ctx(), &agentpb.UpdateContainerRequest{ContainerId: "main"}))
	g.exec("main", "later", "exit 4", false)
	if got := g.wait("main", "later"); got != 4 {
		t.Errorf("a process after the update: status %d", got)
	}

	must[any](t)(g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: "main"}))
	at := stats().CpuStats.CpuUsage.TotalUsage
	_, err := g.ExecProcess(g.ctx(), &agentpb.ExecProcessRequest{ContainerId: "main", ExecId: "ee", Process: &agentpb.Process{Args: []string{"/bin/true"}}})
	wantClass(t, "exec in a paused container", err, errdefs.ErrFailedPrecondition)
	_, err = g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: "main"})
	wantClass(t, "pause twice", err, errdefs.ErrFailedPrecondition)
	if now := stats().CpuStats.CpuUsage.TotalUsage; now != at {
		t.Errorf("a paused container used %d ns", now-at)
	}
	must[any](t)(g.ResumeContainer(g.ctx(), &agentpb.ResumeContainerRequest{ContainerId: "main"}))
	eventually(t, "it runs again", func() bool { return stats().CpuStats.CpuUsage.TotalUsage > at })
	// Paused, it can be killed and removed.
	must[any](t)(g.PauseContainer(g.ctx(), &agentpb.PauseContainerRequest{ContainerId: "main"}))
	must[any](t)(g.SignalProcess(g.ctx(), &agentpb.SignalProcessRequest{ContainerId: "main", Signal: 9}))
	if got := g.wait("main", ""); got != 137 {
		t.Errorf("status %d", got)
	}
	g.remove("main")
}

func TestOutOfMemory(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	// A poll whose caller is gone without the agent knowing does not take the event.
	stale := make(chan error, 1)
	c := g.dial()
	go func() { _, err := c.GetOOMEvent(g.ctx(), &agentpb.GetOOMEventRequest{}); stale <- err }()
	eventually(t, "the first poll waits", func() bool { g.agent.oom.mu.Lock(); defer g.agent.oom.mu.Unlock(); return g.agent.oom.poller != nil })
	event := make(chan string, 1)
	go func() {
		r, err := g.GetOOMEvent(g.ctx(), &agentpb.GetOOMEventRequest{})
		if err != nil {
			t.Error(err)
		}
		event <- r.GetContainerId()
	}()
	wantClass(t, "the stale poll", <-stale, errdefs.ErrAborted)
	c.close()
	spec := g.spec("x=0123456789abcdef; while :; do x=$x$x; done")
	spec.Linux.Resources = &agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{Limit: 48 << 20, Swap: 48 << 20}}
	g.create("hungry", spec)
	g.start("hungry")
	if got := g.wait("hungry", ""); got != 137 {
		t.Errorf("status %d", got)
	}
	if got := <-event; got != "hungry" {
		t.Errorf("event for %q", got)
	}
}

func TestTerminationMessage(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	log := filepath.Join(g.dir, "log")
	if err := os.WriteFile(log, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	spec := g.spec("i=0; while [ $i -lt 1000 ]; do echo $i; i=$((i+1)); done > /dev/termination-log")
	spec.Annotations = map[string]string{terminationAnnotation: "/dev/termination-log"}
	spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: "/dev/termination-log", Source: log, Type: "bind", Options: []string{"bind"}})
	g.create("mounted", spec)
	spec = g.spec("echo in the root > /tmp/log")
	spec.Annotations = map[string]string{terminationAnnotation: "/tmp/log"}
	g.create("rootfs", spec)
	spec = g.spec("ln -s /etc/passwd /tmp/link")
	spec.Annotations = map[string]string{terminationAnnotation: "/tmp/link"}
	g.create("link", spec)
	for _, id := range []string{"mounted", "rootfs", "link"} {
		g.start(id)
		g.wait(id, "")
	}
	get := func(id string) (string, error) {
		r, err := g.GetDiagnosticData(g.ctx(), &agentpb.GetDiagnosticDataRequest{ContainerId: id, LogType: "termination_log"})
		return r.GetData(), err
	}
	if got, err := get("mounted"); err != nil || len(got) != 3890 && len(got) != terminationLimit || !strings.HasPrefix(got, "0\n1\n2\n") {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if got, err := get("rootfs"); err != nil || got != "in the root\n" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := get("link"); !errdefs.IsNotFound(class(err)) {
		t.Errorf("through a link: %q, %v", got, err)
	}
}

// A container's processes are all gone when it is removed, and removing is not held
// up by what still runs.
func TestRemoveKills(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "sleep 1000 & sleep 1000 & trap '' TERM; echo up; while :; do sleep 1; done")
	must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "main", Len: 10}))
	g.exec("main", "busy", "while :; do :; done", false)
	c, err := g.agent.container("main", errdefs.ErrNotFound)
	if err != nil {
		t.Fatal(err)
	}
	waits := make(chan int32, 3)
	for range 3 { // waiters that are there already
		go func() { waits <- g.wait("main", "busy") }()
	}
	cg := c.cgroup
	pids, err := cg.GetAllPids()
	if err != nil || len(pids) < 4 {
		t.Fatalf("processes %v, %v", pids, err)
	}
	g.remove("main")
	for range 3 {
		if got := <-waits; got != 137 {
			t.Errorf("status %d", got)
		}
	}
	for _, pid := range pids {
		eventually(t, fmt.Sprintf("process %d is gone", pid), func() bool { return unix.Kill(pid, 0) != nil })
	}
	if cg.Exists() {
		t.Error("the cgroup is still there")
	}
	g.create("created", g.spec("true")) // never started
	g.remove("created")
}

func TestManyAtOnce(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.rootfs()
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			id := fmt.Sprintf("box%d", i)
			g.create(id, g.spec("sleep 1000"))
			g.start(id)
			var inner sync.WaitGroup
			for j := range 3 {
				inner.Go(func() {
					if out, status := g.output(id, fmt.Sprintf("exec%d", j), fmt.Sprintf("echo %d-%d; exit %d", i, j, j)); out != fmt.Sprintf("%d-%d\n", i, j) || status != int32(j) {
						t.Errorf("%s: %q, %d", id, out, status)
					}
				})
			}
			inner.Wait()
			g.remove(id)
		})
	}
	wg.Wait()
}

// However often a container is probed, the agent remembers a bounded number.
func TestOldExecsAreForgotten(t *testing.T) {
	c := &container{id: "main", agent: &Agent{}, execs: nil}
	for i := range keptExecs + 5 {
		p := &process{id: ExecID(fmt.Sprintf("e%d", i)), state: ProcessExited, exited: make(chan struct{})}
		if err := c.reserve(p); err != nil {
			t.Fatal(err)
		}
	}
	c.agent.wg.Wait()
	if len(c.execs) != keptExecs || c.execs[0].id != "e5" {
		t.Errorf("%d execs are kept, the oldest is %s", len(c.execs), c.execs[0].id)
	}
}

func TestZombiesAreFoundAndOthersNot(t *testing.T) {
	p, err := os.StartProcess("/bin/busybox", []string{"busybox", "true"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child is a zombie", func() bool { _, ok := zombies(os.Getpid())[p.Pid]; return ok })
	if _, ok := zombies(1)[p.Pid]; ok {
		t.Error("it is not a child of PID 1")
	}
	if _, err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, ok := zombies(os.Getpid())[p.Pid]; ok {
		t.Error("it was waited for")
	}
}

func TestNewRefusesRelativePaths(t *testing.T) {
	_, err := New(Config{StateDir: "a", CgroupParent: "b", PodNetNS: "c", StreamBuffer: -1})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	for _, key := range []string{"StateDir", "CgroupParent", "PodNetNS", "StreamBuffer"} {
		if !strings.Contains(err.Error(), key) {
			t.Errorf("%s is not named in: %v", key, err)
		}
	}
}
