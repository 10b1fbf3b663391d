// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestFiles: single files are copied, those of a container in one call, with owner
// and mode, and go with it. A stock agent gets them one by one.
func TestFiles(t *testing.T) {
	k := newKubelet(t)
	big := strings.Repeat("0123456789abcdef", 3<<16) // three pieces
	hosts, term := k.file(big, "etc-hosts"), k.file("", "containers", "app", "0f3a")
	k.must(os.Chown(hosts, 12, 34), os.Chmod(term, 0o666))
	mounts := []specs.Mount{
		{Type: "proc", Source: "proc", Destination: "/proc"},
		bind(hosts, "/etc/hosts"), bind(term, "/dev/termination-log"), bind("/nonesuch", "/dev/shm"),
	}
	for name, agent := range map[string]*agenttest.Agent{"ours": ours(), "stock": {}} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, agent)
			plan := p.bring("app", mounts...)
			if plan.TerminationSource != term || plan.TerminationPath != "/dev/termination-log" {
				t.Errorf("termination log %q at %q", plan.TerminationSource, plan.TerminationPath)
			}
			m := plan.Mounts()
			if m[0].Source != "proc" || m[3].Source != ShmPath || m[3].Type != "bind" || m[1].Source == m[2].Source {
				t.Errorf("mounts: %+v", m)
			}
			find := func(at string) agenttest.File {
				if name == "stock" {
					return agent.Files()[at]
				}
				files, _ := agent.Volume(filepath.Dir(at))
				return files[filepath.Base(at)]
			}
			if f := find(m[1].Source); string(f.Data) != big || f.UID != 12 || f.GID != 34 || f.Mode != unix.S_IFREG|0o644 {
				t.Errorf("%s: %d bytes, mode %o, %d:%d", m[1].Source, len(f.Data), f.Mode, f.UID, f.GID)
			}
			if f := find(m[2].Source); len(f.Data) > 0 || f.Mode != unix.S_IFREG|0o666 {
				t.Errorf("%s: %+v", m[2].Source, f)
			}
			p.set.Release("app")
			if name == "ours" {
				p.eventually(func() error {
					if left := agent.Volumes(); len(left) > 0 {
						return errdefs.ErrAlreadyExists
					}
					return nil
				})
			}
		})
	}
}

func TestEmptyDir(t *testing.T) {
	k := newKubelet(t)
	disk, mem := k.dir("volumes", "kubernetes.io~empty-dir", "disk"), k.dir("volumes", "kubernetes.io~empty-dir", "mem")
	k.must(unix.Mount("tmpfs", mem, "tmpfs", 0, "size=8m,mode=2770,gid=123"))
	defer unix.Unmount(mem, 0)
	k.must(os.Chmod(disk, 0o777), os.Mkdir(filepath.Join(disk, "sub"), 0o750), os.Chown(filepath.Join(disk, "sub"), 5, 6))
	p := newPod(t, ours())
	plan, err := p.set.Plan(Request{Container: "app", Features: p.features(), Annotations: map[string]string{annotation.EmptyDirSizeLimit + "disk": "100Mi"},
		Mounts: []specs.Mount{bind(disk, "/cache"), bind(mem, "/dev/shm"), bind(filepath.Join(disk, "sub"), "/sub"), bind(disk, "/again")}})
	if err != nil {
		t.Fatal(err)
	}
	got := plan.Storages()
	if len(got) != 3 {
		t.Fatalf("storages: %v", got)
	}
	if s := got[0]; s.Driver != "local" || s.MountPoint != "/run/kata-containers/shared/containers/pod/rootfs/local/disk" || !cmp.Equal(s.Options, []string{"mode=777", "size=104857600"}) {
		t.Errorf("on disk: %v", s)
	}
	if s := got[1]; s.Driver != "ephemeral" || s.Fstype != "tmpfs" || s.MountPoint != "/run/kata-containers/sandbox/ephemeral/mem" ||
		!cmp.Equal(s.Options, []string{"mode=2770", "size=8388608", "fsgid=123"}) || s.FsGroup.GetGroupId() != 123 {
		t.Errorf("in memory: %v", s)
	}
	if s := got[2]; s.Driver != extension.SubPathDriver || s.Source != got[0].MountPoint || !cmp.Equal(s.DriverOptions, []string{"path=sub"}) || !cmp.Equal(s.Options, []string{"mode=750", "uid=5", "gid=6"}) {
		t.Errorf("part: %v", s)
	}
	m := plan.Mounts()
	if m[0].Source != got[0].MountPoint || m[1].Source != got[1].MountPoint || m[2].Source != got[2].MountPoint || m[3].Source != m[0].Source {
		t.Errorf("mounts: %+v", m)
	}
	if err := plan.Bring(p.context(), p.conn); err != nil {
		t.Fatal(err)
	}
}

// TestSubPathOrigin has the kubelet's binds for subPaths: what is behind one of an
// emptyDir is part of that emptyDir, in memory too; of another volume it is a copy.
func TestSubPathOrigin(t *testing.T) {
	k := newKubelet(t)
	disk, mem := k.dir("volumes", "kubernetes.io~empty-dir", "disk"), k.dir("volumes", "kubernetes.io~empty-dir", "mem")
	mount := func(source, target, fstype string, flags uintptr) {
		t.Helper()
		k.must(unix.Mount(source, target, fstype, flags, ""))
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}
	mount("tmpfs", mem, "tmpfs", 0)
	k.must(os.MkdirAll(filepath.Join(disk, "a b/c"), 0o755), os.Mkdir(filepath.Join(mem, "sub"), 0o755))
	w := k.writer("configmap", "cfg")
	k.must(w.Write(map[string]string{"key": "value", "dir/one": "1"}, 0))
	var mounts []specs.Mount
	for i, source := range []string{filepath.Join(disk, "a b/c"), filepath.Join(mem, "sub"), filepath.Join(w.Dir, "key"), filepath.Join(w.Dir, "dir")} {
		at := k.path("volume-subpaths", "v", "app", string(rune('0'+i)))
		k.must(os.MkdirAll(filepath.Dir(at), 0o755))
		if i == 2 {
			k.must(os.WriteFile(at, nil, 0o644))
		} else {
			k.must(os.Mkdir(at, 0o755))
		}
		mount(source, at, "", unix.MS_BIND)
		m := bind(at, filepath.Base(source))
		if i >= 2 {
			m.Options = append(m.Options, "ro")
		}
		mounts = append(mounts, m)
	}
	p := newPod(t, ours())
	plan := p.bring("app", mounts...)
	var kinds []Kind
	for _, v := range plan.Volumes {
		kinds = append(kinds, v.Kind)
	}
	if !cmp.Equal(kinds, []Kind{KindLocal, KindMemory, KindFile, KindTree}) {
		t.Fatalf("kinds: %v", kinds)
	}
	if a, b := plan.Volumes[0].dir, plan.Volumes[1].dir; a.sub != "a b/c" || a.name != "disk" || b.sub != "sub" || b.name != "mem" {
		t.Errorf("%+v, %+v", a, b)
	}
	key, dir := plan.Volumes[2].GuestPath, plan.Volumes[3].GuestPath
	// What it was made with is what it keeps.
	k.must(w.Write(map[string]string{"key": "other", "dir/one": "2"}, 0))
	if files, _ := p.agent.Volume(filepath.Dir(key)); string(files[filepath.Base(key)].Data) != "value" {
		t.Errorf("file: %v", files)
	}
	if files, _ := p.agent.Volume(dir); string(files["one"].Data) != "1" {
		t.Errorf("directory: %v", files)
	}
	if len(p.set.followers) != 0 {
		t.Error("a subPath is followed")
	}
	stock := newPod(t, &agenttest.Agent{})
	if _, err := stock.plan("app", mounts[0]); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "disk") {
		t.Errorf("with a stock agent: %v", err)
	}
}

// TestSeed: what is in an emptyDir on the node is copied for the first container, and
// not again over what the containers made of it.
func TestSeed(t *testing.T) {
	k := newKubelet(t)
	k.file("seed", "volumes", "kubernetes.io~empty-dir", "disk", "sub", "f")
	disk := k.path("volumes", "kubernetes.io~empty-dir", "disk")
	p := newPod(t, ours())
	plan := p.bring("one", bind(disk, "/d"))
	if f := p.agent.Files()[plan.Volumes[0].GuestPath+"/sub/f"]; string(f.Data) != "seed" {
		t.Errorf("files: %v", p.agent.Files())
	}
	before := p.count("CopyFile")
	p.bring("two", bind(disk, "/d"))
	if n := p.count("CopyFile"); n != before {
		t.Errorf("%d files were copied for the second container", n-before)
	}
	_, err := p.set.Plan(Request{Container: "three", Mounts: []specs.Mount{bind(disk, "/d")}, Features: p.features(), Annotations: map[string]string{annotation.EmptyDirSizeLimit + "disk": "1Mi"}})
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("with a limit: %v", err)
	}
}

// TestTree: a directory that is only read is copied, with what is mounted in it where
// all of it is read-only.
func TestTree(t *testing.T) {
	k := newKubelet(t)
	k.file("data", "host", "sub", "f")
	host, below := k.path("host"), k.dir("host", "tmpfs")
	k.must(os.Symlink("sub/f", filepath.Join(host, "l")))
	for name, agent := range map[string]*agenttest.Agent{"ours": ours(), "stock": {}} {
		p := newPod(t, agent)
		at := p.bring("app", bind(host, "/host", "ro")).Volumes[0].GuestPath
		files, prefix := agent.Files(), at+"/"
		if name == "ours" {
			files, _ = agent.Volume(at)
			prefix = ""
		}
		if string(files[prefix+"sub/f"].Data) != "data" || files[prefix+"l"].Target != "sub/f" {
			t.Errorf("%s: %v", name, files)
		}
	}
	k.must(unix.Mount("tmpfs", below, "tmpfs", 0, ""))
	defer unix.Unmount(below, 0)
	p := newPod(t, ours())
	if _, err := p.plan("app", bind(host, "/host", "ro")); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), below) {
		t.Errorf("a mount in it: %v", err)
	}
	p.bring("app", bind(host, "/host", "ro", "rro"))
}

// TestRefused has what is on the node and cannot be had in a pod VM: the error names
// where it was to be, and what to do.
func TestRefused(t *testing.T) {
	k := newKubelet(t)
	dir, file := k.dir("host"), k.file("x", "host", "file")
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	claim := k.dir("volumes", "kubernetes.io~csi", "claim", "mount")
	cache := k.dir("volumes", "kubernetes.io~empty-dir", "cache")
	k.file("", "volumes", "kubernetes.io~empty-dir", "full", "f")
	full := k.path("volumes", "kubernetes.io~empty-dir", "full")
	k.must(unix.Mount("tmpfs", full, "tmpfs", 0, ""), os.WriteFile(filepath.Join(full, "f"), nil, 0o644))
	defer unix.Unmount(full, 0)
	p := newPod(t, ours())
	for name, c := range map[string]struct {
		mount specs.Mount
		want  string
	}{
		"directory":   {bind(dir, "/host"), "volume at /host: the directory " + dir + " is on the node, and a pod VM shares no file system with it: use an emptyDir"},
		"claim":       {bind(claim, "/host"), "the directory " + claim + ` (volume "claim", kubernetes.io~csi) is on the node`},
		"socket":      {bind(filepath.Join(dir, "sock"), "/host"), "the socket"},
		"device":      {bind("/dev/null", "/host"), "the device"},
		"file":        {bind(file, "/host"), "mount it read-only"},
		"kernel":      {bind("/proc/sys", "/host", "ro"), "the node's kernel"},
		"missing":     {bind("/nonesuch", "/host"), "no such file"},
		"propagation": {bind(dir, "/host", "ro", "rslave"), "mountPropagation"},
		"shared":      {bind(cache, "/host", "rshared"), "mountPropagation"},
		"mapped ids":  {specs.Mount{Type: "bind", Source: cache, Destination: "/host", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}}, "user namespace"},
		"not empty":   {bind(full, "/host"), "has files on the node"},
	} {
		_, err := p.plan("app", c.mount)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "volume at /host: ") {
			t.Errorf("%s: %v", name, err)
		}
		p.set.Release("app")
	}
	plan, err := p.plan("app", bind(dir, "/host", "ro"))
	if err == nil {
		err = plan.Bring(p.context(), p.conn)
	}
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sock is a socket") || !strings.Contains(err.Error(), "volume at /host") {
		t.Errorf("a socket in a directory: %v", err)
	}
	for _, limit := range []string{"", "x", "0", "1Zi", "-1", "99999999Ti"} {
		if n, err := bytesOf(limit); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q is %d, %v", limit, n, err)
		}
	}
	if slices.ContainsFunc([]string{"1", "2k", "3Gi"}, func(s string) bool { _, err := bytesOf(s); return err != nil }) {
		t.Error("a size is refused")
	}
}
