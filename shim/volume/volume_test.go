// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kubelet is a kubelet's directory of one pod.
type kubelet struct {
	t    *testing.T
	root string
}

func (k kubelet) path(parts ...string) string {
	return filepath.Join(append([]string{k.root, "pods", "uid"}, parts...)...)
}

func (k kubelet) file(content string, parts ...string) string {
	k.t.Helper()
	p := k.path(parts...)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		k.t.Fatal(err)
	}
	return p
}

func bind(source, dest string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: dest, Options: append([]string{"rbind", "rprivate"}, options...)}
}

// configMap lays out a volume as the kubelet's atomic writer does.
func (k kubelet) configMap() string {
	k.t.Helper()
	v := k.path("volumes", "kubernetes.io~configmap", "cfg")
	k.file("blue\n", "volumes", "kubernetes.io~configmap", "cfg", "..2026_11_21", "colour")
	k.file("", "volumes", "kubernetes.io~configmap", "cfg", "..2026_11_21", "sub", "empty")
	for link, target := range map[string]string{"..data": "..2026_11_21", "colour": "..data/colour", "sub": "..data/sub"} {
		if err := os.Symlink(target, filepath.Join(v, link)); err != nil {
			k.t.Fatal(err)
		}
	}
	return v
}

func TestCopy(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	k := kubelet{t, t.TempDir()}
	cfg := k.configMap()
	if err := os.Chown(filepath.Join(cfg, "..2026_11_21", "colour"), 12, 34); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("0123456789abcdef", 3<<16) // three pieces
	hosts := k.file(big, "etc-hosts")
	term := k.file("", "containers", "app", "0f3a")
	plan, err := New([]specs.Mount{
		{Type: "proc", Source: "proc", Destination: "/proc"},
		bind(cfg, "/etc/cfg", "ro"), bind(hosts, "/etc/hosts"), bind(term, "/dev/termination-log"),
		bind("/nonesuch", "/dev/shm"),
	}, "pod", "app")
	if err != nil {
		t.Fatal(err)
	}
	if plan.TerminationSource != term || plan.TerminationPath != "/dev/termination-log" {
		t.Errorf("termination log %q at %q", plan.TerminationSource, plan.TerminationPath)
	}
	agent := &agenttest.Agent{}
	a := shimtest.NewAdaptor(t, agent)
	conn := guest.New(guest.Config{Socket: a.AgentSocket})
	defer conn.Close()
	if err := plan.Copy(ctx, conn); err != nil {
		t.Fatal(err)
	}
	files := agent.Files()
	guestCfg, guestHosts := plan.Volumes[1].GuestPath, plan.Volumes[2].GuestPath
	if !strings.HasPrefix(guestCfg, "/run/kata-containers/shared/containers/app-") || !strings.HasSuffix(guestCfg, "-cfg") {
		t.Errorf("guest path %s", guestCfg)
	}
	f := files[guestCfg+"/..2026_11_21/colour"]
	if string(f.Data) != "blue\n" || f.UID != 12 || f.GID != 34 || f.Mode != unix.S_IFREG|0o644 {
		t.Errorf("file: %+v", f)
	}
	if f, ok := files[guestCfg+"/..2026_11_21/sub/empty"]; !ok || len(f.Data) > 0 {
		t.Errorf("empty file: %+v, %v", f, ok)
	}
	for link, target := range map[string]string{"..data": "..2026_11_21", "colour": "..data/colour", "sub": "..data/sub"} {
		if f := files[guestCfg+"/"+link]; f.Target != target {
			t.Errorf("%s -> %q, want %q", link, f.Target, target)
		}
	}
	if !bytes.Equal(files[guestHosts].Data, []byte(big)) {
		t.Errorf("%d bytes of a large file", len(files[guestHosts].Data))
	}
	m := plan.Mounts()
	if m[0].Source != "proc" || m[1].Source != guestCfg || !slices.Contains(m[1].Options, "ro") || m[4].Source != ShmPath || m[4].Type != "bind" {
		t.Errorf("mounts: %+v", m)
	}
}

func TestEmptyDir(t *testing.T) {
	k := kubelet{t, t.TempDir()}
	disk, mem := k.path("volumes", "kubernetes.io~empty-dir", "disk"), k.path("volumes", "kubernetes.io~empty-dir", "mem")
	for _, d := range []string{disk, mem} {
		if err := os.MkdirAll(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", mem, "tmpfs", 0, "size=8m,mode=2770,gid=123"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(mem, 0)
	if err := os.Chmod(disk, 0o777); err != nil {
		t.Fatal(err)
	}
	plan, err := New([]specs.Mount{bind(disk, "/cache"), bind(mem, "/mem", "rshared")}, "pod", "app")
	if err != nil {
		t.Fatal(err)
	}
	got, err := plan.Storages()
	if err != nil || len(got) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	if s := got[0]; s.Driver != "local" || s.MountPoint != "/run/kata-containers/shared/containers/pod/rootfs/local/disk" || !cmp.Equal(s.Options, []string{"mode=777"}) {
		t.Errorf("on disk: %v", s)
	}
	if s := got[1]; s.Driver != "ephemeral" || s.Fstype != "tmpfs" || s.MountPoint != "/run/kata-containers/sandbox/ephemeral/mem" ||
		!cmp.Equal(s.Options, []string{"mode=2770", "size=8388608", "fsgid=123"}) || s.FsGroup.GetGroupId() != 123 {
		t.Errorf("in memory: %v", s)
	}
	if m := plan.Mounts(); m[0].Source != got[0].MountPoint || m[1].Source != got[1].MountPoint || slices.Contains(m[1].Options, "rshared") {
		t.Errorf("mounts: %+v", m)
	}
}

// TestRefused has what is on the node and cannot be had in a pod VM: the error names
// where it was to be, and what to do.
func TestRefused(t *testing.T) {
	k := kubelet{t, t.TempDir()}
	dir := k.path("host")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := k.file("x", "host", "file")
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sub := filepath.Dir(k.file("x", "volume-subpaths", "vol", "app", "0", "f"))
	for name, c := range map[string]struct {
		mount specs.Mount
		want  string
	}{
		"directory": {bind(dir, "/host"), "the directory"},
		"propagate": {bind(dir, "/host", "rslave"), "mountPropagation"},
		"socket":    {bind(filepath.Join(dir, "sock"), "/host"), "the socket"},
		"device":    {bind("/dev/null", "/host"), "the device"},
		"file":      {bind(file, "/host"), "mount it read-only"},
		"subPath":   {bind(sub, "/host"), "subPath"},
		"missing":   {bind("/nonesuch", "/host"), "no such file"},
	} {
		_, err := New([]specs.Mount{c.mount}, "pod", "app")
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "volume at /host") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if p, err := New([]specs.Mount{bind(file, "/host", "ro")}, "pod", "app"); err != nil || p.Volumes[0].Kind != KindCopy {
		t.Errorf("read-only file: %v", err)
	}
}
