// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"golang.org/x/sys/unix"
)

// mountLines prints the mounts of the container below a directory: where, file system,
// options of the mount and, of the optional fields, how it propagates.
func mountLines(below string) string {
	return "busybox grep ' " + below + "' /proc/self/mountinfo | while read id parent dev root at opts rest; do " +
		"case $rest in shared*) p=shared;; master*) p=slave;; *) p=private;; esac; set -- ${rest#*- }; echo $at $1 $opts $p; done"
}

// Mounts of every kind, as mountinfo in the container has them.
func TestMountKinds(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	source := filepath.Join(g.dir, "source")
	for _, dir := range []string{source + "/sub", source + "/only-rbind"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(g.dir, "file")
	for _, err := range []error{os.WriteFile(file, []byte("one file\n"), 0o644), unix.Mount("inner", source+"/only-rbind", "tmpfs", 0, "size=1m")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(source+"/only-rbind", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	spec := g.spec(mountLines("/") + "; cat /m/file; busybox df -k /m/tmpfs | busybox tail -n 1 | busybox awk '{print $2}'; busybox stat -c %a /m/tmpfs; ls -d /m/bind/only-rbind /m/rbind/only-rbind; cat /sys/kernel/notes >/dev/null && ls /m/mqueue | busybox wc -l")
	for _, m := range []*agentpb.Mount{
		{Destination: "/sys", Source: "sysfs", Type: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Source: "cgroup", Type: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/m/tmpfs", Source: "tmpfs", Type: "tmpfs", Options: []string{"noexec", "size=2m", "mode=1750"}},
		{Destination: "/m/mqueue", Source: "mqueue", Type: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/m/file", Source: file, Type: "bind", Options: []string{"bind", "ro"}},
		{Destination: "/m/bind", Source: source, Type: "bind", Options: []string{"bind", "rprivate", "rw"}},
		{Destination: "/m/rbind", Source: source, Type: "bind", Options: []string{"rbind", "rslave", "ro"}},
		{Destination: "/m/shared", Source: source, Type: "bind", Options: []string{"rbind", "rshared", "nodev", "noatime"}},
		{Destination: "/m/rro", Source: source, Type: "bind", Options: []string{"rbind", "rro"}},
	} {
		spec.Mounts = append(spec.Mounts, m)
	}
	out := g.say("main", spec)
	have := map[string]string{} // place to file system, options and propagation
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 4 {
			have[f[0]] = strings.Join(f[1:], " ")
		}
	}
	for at, want := range map[string][]string{ // what is in the line
		"/proc": {"proc", "nosuid", "nodev", "noexec"}, "/dev": {"tmpfs", "nosuid"}, "/dev/pts": {"devpts", "noexec"},
		"/sys": {"sysfs", "ro"}, "/m/tmpfs": {"tmpfs", "noexec"}, "/m/mqueue": {"mqueue", "nodev"}, "/m/file": {"ro"},
		"/m/bind": {"rw", "private"}, "/m/rbind": {"ro"}, "/m/rbind/only-rbind": {"tmpfs", "rw"},
		"/m/shared": {"nodev", "noatime", "shared"}, "/m/rro/only-rbind": {"tmpfs", "ro"},
	} {
		for _, w := range want {
			if !strings.Contains(" "+strings.ReplaceAll(have[at], ",", " ")+" ", " "+w+" ") {
				t.Errorf("%s is %q, without %q", at, have[at], w)
			}
		}
	}
	if _, ok := have["/m/bind/only-rbind"]; ok {
		t.Error("a bind took what is mounted below with it")
	}
	if !strings.Contains(out, "one file\n2048\n1750\n/m/bind/only-rbind\n/m/rbind/only-rbind\n") {
		t.Errorf("output %q", out)
	}
	if cg := have["/sys/fs/cgroup"]; cg == "" {
		t.Error("/sys/fs/cgroup is not mounted")
	}
}

// A mount into the source shows in a container that propagates it, while it runs.
func TestMountPropagation(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	source := filepath.Join(g.dir, "shared")
	if err := os.MkdirAll(source+"/late", 0o755); err != nil {
		t.Fatal(err)
	}
	// What is shared must be a mount of its own.
	for _, err := range []error{unix.Mount(source, source, "", unix.MS_BIND, ""), unix.Mount("", source, "", unix.MS_SHARED, "")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(source, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	spec := g.spec("busybox tail -f /dev/null")
	spec.Mounts = append(spec.Mounts,
		&agentpb.Mount{Destination: "/m/slave", Source: source, Type: "bind", Options: []string{"rbind", "rslave"}},
		&agentpb.Mount{Destination: "/m/private", Source: source, Type: "bind", Options: []string{"rbind", "rprivate"}},
	)
	spec.Linux.RootfsPropagation = "rslave"
	g.create("main", spec)
	g.start("main")
	if err := unix.Mount("late", source+"/late", "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(source+"/late", unix.MNT_DETACH) })
	out, _ := g.output("main", "exec1", "busybox grep -c ' /m/slave/late ' /proc/self/mountinfo; busybox grep -c ' /m/private/late ' /proc/self/mountinfo")
	if out != "1\n0\n" {
		t.Errorf("mounts seen by slave and private: %q", out)
	}
}

// A mount that cannot be is named.
func TestMountRefusals(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	for says, m := range map[string]*agentpb.Mount{
		"/nowhere/at/all": {Destination: "/m", Source: "/nowhere/at/all", Type: "bind", Options: []string{"rbind"}},
		"/m/none":         {Destination: "/m/none", Source: "none", Type: "nosuchfs"},
		"/proc":           {Destination: "/proc/sys", Source: g.dir, Type: "bind", Options: []string{"bind"}},
	} {
		spec := g.spec("true")
		spec.Mounts = append(spec.Mounts, m)
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "refused", OCI: spec})
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v: %v does not say %q", m, err, says)
		}
	}
}

func TestReadOnlyRootAndPaths(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.put("etc/masked", "secret\n")
	g.put("hidden/file", "secret\n")
	spec := g.spec("touch /f 2>/dev/null || echo root; touch /vol/f 2>/dev/null || echo vol; touch /tmp/f && echo writable; cat /etc/masked; ls /hidden; echo 1 > /proc/sys/kernel/shm_rmid_forced 2>/dev/null || echo sys; ls /absent 2>/dev/null || echo absent")
	spec.Root.Readonly = true
	spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: "/tmp", Source: "tmpfs", Type: "tmpfs"})
	spec.Linux.MaskedPaths = []string{"/etc/masked", "/hidden", "/absent"}
	spec.Linux.ReadonlyPaths = []string{"/proc/sys", "/absent"}
	if got := g.say("main", spec); got != "root\nvol\nwritable\nsys\nabsent\n" {
		t.Errorf("output %q", got)
	}
}

// Devices of the spec are made, those every container has are there, and the rules
// hold: what is not allowed cannot be opened, though it can be made.
func TestDevicesAndRules(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec("for d in null zero full random urandom tty; do busybox test -c /dev/$d || echo no $d; done; busybox stat -c '%F %t:%T %a %u:%g' /dev/mine /dev/pipe; " +
		"head -c 4 /dev/zero | busybox od -An -tx1; busybox mknod /tmp/kmsg c 1 11; cat /tmp/kmsg 2>&1 | head -n 1; head -c 1 /dev/mine | busybox wc -c")
	spec.Process.Capabilities.Bounding = append(spec.Process.Capabilities.Bounding, "CAP_MKNOD")
	spec.Process.Capabilities.Effective = append(spec.Process.Capabilities.Effective, "CAP_MKNOD")
	spec.Process.Capabilities.Permitted = append(spec.Process.Capabilities.Permitted, "CAP_MKNOD")
	spec.Linux.Devices = []*agentpb.LinuxDevice{
		{Path: "/dev/mine", Type: "c", Major: 1, Minor: 5, FileMode: 0o640, UID: 7, GID: 8},
		{Path: "/dev/pipe", Type: "p", FileMode: 0o600},
	}
	spec.Linux.Resources = &agentpb.LinuxResources{Devices: []*agentpb.LinuxDeviceCgroup{
		{Type: "a", Major: -1, Minor: -1, Access: "rwm"}, // none
		{Allow: true, Type: "c", Major: 1, Minor: 5, Access: "rw"},
	}}
	spec.Process.User = &agentpb.User{UID: 0, AdditionalGids: []uint32{8}}
	spec.Process.Capabilities.Effective = append(spec.Process.Capabilities.Effective, "CAP_DAC_OVERRIDE")
	spec.Process.Capabilities.Permitted = append(spec.Process.Capabilities.Permitted, "CAP_DAC_OVERRIDE")
	spec.Process.Capabilities.Bounding = append(spec.Process.Capabilities.Bounding, "CAP_DAC_OVERRIDE")
	want := "character special file 1:5 640 7:8\nfifo 0:0 600 0:0\n 00 00 00 00\ncat: can't open '/tmp/kmsg': Operation not permitted\n1\n"
	if diff := cmp.Diff(want, g.say("main", spec)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "gpu", OCI: g.spec("true"), Devices: []*agentpb.Device{{Id: "gpu0", Type: "vfio-pci", ContainerPath: "/dev/gpu"}}})
	wantClass(t, "a device of the request", err, errdefs.ErrInvalidArgument)
	if err == nil || !strings.Contains(err.Error(), "/dev/gpu") {
		t.Errorf("%v does not name the device", err)
	}
}

// A container sees what another one mounts into, under a path of its own.
func TestSharedMounts(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	spec := g.spec("echo of the first > /data/f; mkdir /other; echo up; busybox tail -f /dev/null")
	spec.Annotations = map[string]string{annotation.ContainerName: "writer"}
	spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: "/data", Source: "tmpfs", Type: "tmpfs"})
	g.create("first", spec)
	g.start("first")
	if got := must[*agentpb.ReadStreamResponse](t)(g.ReadStdout(g.ctx(), &agentpb.ReadStreamRequest{ContainerId: "first", Len: 100})); string(got.Data) != "up\n" {
		t.Fatalf("output %q", got.Data)
	}
	second := g.spec("cat /shared/deep/f /link/f; echo of the second > /shared/deep/g")
	if err := os.Symlink("/vol", filepath.Join(g.rootfs(), "link")); err != nil { // within the container
		t.Fatal(err)
	}
	must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "second", OCI: second, SharedMounts: []*agentpb.SharedMount{
		{Name: "by-name", SrcCtr: "writer", SrcPath: "/data", DstCtr: "reader", DstPath: "/shared/deep"},
		{Name: "by-id", SrcCtr: "first", SrcPath: "/data", DstPath: "/link"},
	}}))
	g.start("second")
	if got := g.readAll("second", ""); got != "of the first\nof the first\n" {
		t.Errorf("second: %q", got)
	}
	if out, _ := g.output("first", "exec1", "cat /data/g"); out != "of the second\n" {
		t.Errorf("first: %q", out)
	}
	for says, m := range map[string]*agentpb.SharedMount{
		"nobody":   {Name: "m", SrcCtr: "nobody", SrcPath: "/data", DstPath: "/shared"},
		"/missing": {Name: "m", SrcCtr: "first", SrcPath: "/missing", DstPath: "/shared"},
		// Out of the container, by way of the kernel's own links.
		"/proc/1/root": {Name: "m", SrcCtr: "first", SrcPath: "/proc/1/root/etc", DstPath: "/shared"},
	} {
		_, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "third", OCI: g.spec("true"), SharedMounts: []*agentpb.SharedMount{m}})
		wantClass(t, says, err, errdefs.ErrInvalidArgument)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
}

// hook makes a program of the guest that notes its name and the state it is told.
func (g *guest) hook(dir, name, more string) string {
	g.t.Helper()
	path := filepath.Join(dir, name)
	script := fmt.Sprintf("#!/bin/sh\nread state\necho \"%s $state\" >> %s/hooks\n%s\n", name, g.dir, more)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		g.t.Fatal(err)
	}
	return path
}

// ran returns the names of the hooks that ran, and how each found the container.
func (g *guest) ran() (out []string) {
	g.t.Helper()
	b, err := os.ReadFile(filepath.Join(g.dir, "hooks"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		name, state, _ := strings.Cut(line, " ")
		status := ""
		if _, rest, ok := strings.Cut(state, `"status":"`); ok {
			status, _, _ = strings.Cut(rest, `"`)
		}
		out = append(out, name+" "+status)
	}
	return out
}

// The hooks of a spec and those of the guest's image run in order and in time.
func TestHooks(t *testing.T) {
	g := newGuest(t)
	image := filepath.Join(g.dir, "image-hooks")
	g.hook(image+"/prestart", "guest-prestart", "")
	g.hook(image+"/poststart", "guest-poststart", "")
	g.hook(image+"/poststop", "guest-poststop", "exit 1") // the removal goes on
	if err := os.WriteFile(image+"/prestart/README", []byte("not a program"), 0o644); err != nil {
		t.Fatal(err)
	}
	must[any](t)(g.CreateSandbox(g.ctx(), &agentpb.CreateSandboxRequest{SandboxId: "sandbox", GuestHookPath: image}))
	spec := g.spec("busybox tail -f /dev/null")
	own := filepath.Join(g.dir, "own")
	one := func(name string) []*agentpb.Hook {
		return []*agentpb.Hook{{Path: g.hook(own, name, ""), Args: []string{name}}}
	}
	spec.Hooks = &agentpb.Hooks{Prestart: one("prestart"), CreateRuntime: one("createRuntime"), Poststart: one("poststart"), Poststop: one("poststop")}
	g.create("main", spec)
	before := []string{"prestart creating", "guest-prestart creating", "createRuntime creating"}
	if diff := cmp.Diff(before, g.ran()); diff != "" {
		t.Errorf("after create (-want +got):\n%s", diff)
	}
	g.start("main")
	started := append(before, "poststart running", "guest-poststart running")
	if diff := cmp.Diff(started, g.ran()); diff != "" {
		t.Errorf("after start (-want +got):\n%s", diff)
	}
	g.remove("main")
	if diff := cmp.Diff(append(started, "poststop stopped", "guest-poststop stopped"), g.ran()); diff != "" {
		t.Errorf("after removal (-want +got):\n%s", diff)
	}
	spec = g.spec("true")
	spec.Hooks = &agentpb.Hooks{CreateRuntime: []*agentpb.Hook{{Path: g.hook(own, "fails", "echo bad luck >&2; exit 3"), Args: []string{"fails"}}}}
	if _, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "failing", OCI: spec}); err == nil || !strings.Contains(err.Error(), "bad luck") {
		t.Errorf("a hook that fails: %v", err)
	}
	spec = g.spec("busybox tail -f /dev/null")
	spec.Hooks = &agentpb.Hooks{Poststart: []*agentpb.Hook{{Path: g.hook(own, "late", "echo too late >&2; exit 3"), Args: []string{"late"}}}}
	g.create("late", spec)
	if _, err := g.StartContainer(g.ctx(), &agentpb.StartContainerRequest{ContainerId: "late"}); err == nil || !strings.Contains(err.Error(), "too late") {
		t.Errorf("a poststart hook that fails: %v", err)
	}
	if got := g.wait("late", ""); got != 137 {
		t.Errorf("its container: status %d", got)
	}
}

func TestKernelModules(t *testing.T) {
	g := newGuest(t)
	was := moduleLoaders
	t.Cleanup(func() { moduleLoaders = was })
	loader := filepath.Join(g.dir, "modprobe")
	moduleLoaders = []string{g.dir + "/absent", loader}
	create := func(m ...*agentpb.KernelModule) error {
		_, err := g.CreateSandbox(g.ctx(), &agentpb.CreateSandboxRequest{SandboxId: "sandbox", KernelModules: m})
		return err
	}
	wantClass(t, "no modprobe", create(&agentpb.KernelModule{Name: "no-such-module"}), errdefs.ErrFailedPrecondition)
	wantClass(t, "an option", create(&agentpb.KernelModule{Name: "--remove"}), errdefs.ErrInvalidArgument)
	script := "#!/bin/sh\necho \"$@\" >> " + g.dir + "/loaded\n[ $2 != bad ] || { echo not found >&2; exit 1; }\n"
	if err := os.WriteFile(loader, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	err := create(&agentpb.KernelModule{Name: "good", Parameters: []string{"a=1", "b=2"}}, &agentpb.KernelModule{Name: "bad"})
	wantClass(t, "one that is not found", err, errdefs.ErrFailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "bad") || !strings.Contains(err.Error(), "not found") {
		t.Errorf("%v", err)
	}
	// "kernel" stands for parameters that every kernel has; nothing is to be loaded.
	if err := create(&agentpb.KernelModule{Name: "good"}, &agentpb.KernelModule{Name: "kernel"}); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(g.dir + "/loaded"); string(b) != "-- good a=1 b=2\n-- bad\n-- good\n" {
		t.Errorf("loaded: %q", b)
	}
}
