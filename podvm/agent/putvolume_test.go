// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"golang.org/x/sys/unix"
)

// configMap is a revision of a volume with one key.
func configMap(t *testing.T, dir, key, value string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: dir + "/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: dir + "/" + key, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(value))},
		{Name: "..data", Typeflag: tar.TypeSymlink, Linkname: dir},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(value)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestPutVolume: a running container sees the revisions of its volume, one after the
// other, and a volume ends with the sandbox.
func TestPutVolume(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	path := filepath.Join(g.agent.cfg.StateDir, "sandbox", "volumes", "cfg")
	put := func(revision uint64, archive []byte) {
		t.Helper()
		half := len(archive) / 2
		r := must[*podvmpb.PutVolumeResponse](t)(g.podvm.PutVolume(g.ctx(), &podvmpb.PutVolumeRequest{Path: path, Revision: revision, Data: archive[:half]}))
		if r.Done || r.Offset != uint64(half) {
			t.Errorf("after half of it: %v", r)
		}
		r = must[*podvmpb.PutVolumeResponse](t)(g.podvm.PutVolume(g.ctx(), &podvmpb.PutVolumeRequest{Path: path, Revision: revision, Offset: r.Offset, Data: archive[half:], Eof: true}))
		if !r.Done {
			t.Errorf("after all of it: %v", r)
		}
	}
	put(1, configMap(t, "..1", "colour", "blue"))
	spec := g.spec("cat")
	spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: "/vol/cfg", Source: path, Type: "bind", Options: []string{"rbind", "ro"}})
	must[any](t)(g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: "main", OCI: spec}))
	g.start("main")
	if out, _ := g.output("main", "look", "cat /vol/cfg/colour; touch /vol/cfg/x || echo read-only"); !strings.HasPrefix(out, "blue") || !strings.Contains(out, "read-only") {
		t.Errorf("first: %q", out)
	}
	put(2, configMap(t, "..2", "size", "large"))
	if out, _ := g.output("main", "again", "cd /vol/cfg; cat size; echo; ls -A"); out != "large\n..2\n..data\nsize\n" {
		t.Errorf("second: %q", out)
	}
	_, err := g.podvm.PutVolume(g.ctx(), &podvmpb.PutVolumeRequest{Path: path, Revision: 1, Data: configMap(t, "..1", "a", "b"), Eof: true})
	wantClass(t, "an old revision", err, errdefs.ErrFailedPrecondition)
	_, err = g.podvm.PutVolume(g.ctx(), &podvmpb.PutVolumeRequest{Path: path, Revision: 3, Data: make([]byte, extension.MaxData+1), Eof: true})
	wantClass(t, "a large piece", err, errdefs.ErrInvalidArgument)
	_, err = g.podvm.PutVolume(g.ctx(), &podvmpb.PutVolumeRequest{Path: "/etc", Revision: 1, Eof: true})
	wantClass(t, "another directory", err, errdefs.ErrInvalidArgument)
	g.remove("main")
	must[any](t)(g.podvm.RemoveVolume(g.ctx(), &podvmpb.RemoveVolumeRequest{Path: path}))
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("removed: %v", err)
	}
	put(1, configMap(t, "..1", "colour", "red")) // ends with the sandbox
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the sandbox is gone: %v", err)
	}
}

// TestSubPath: containers see parts of an emptyDir, directories and files, which they
// share with those that see all of it; a link that leads out of it is refused.
func TestSubPath(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	state := g.agent.cfg.StateDir
	all := filepath.Join(state, "shared/containers/sandbox/rootfs/local/data")
	local := &agentpb.Storage{Driver: "local", Source: "local", Fstype: "local", MountPoint: all, Options: []string{"mode=0777"}}
	part := func(path string, options ...string) *agentpb.Storage {
		return &agentpb.Storage{Driver: extension.SubPathDriver, Source: all, DriverOptions: []string{"path=" + path}, MountPoint: filepath.Join(state, "sandbox/subpaths/p"), Options: options}
	}
	run := func(id, command string, s *agentpb.Storage) (string, error) {
		t.Helper()
		spec := g.spec(command)
		// The root is one for all: what a file is mounted on is no directory.
		for dest, source := range map[string]string{"/vol/all": all, "/vol/" + id: s.MountPoint} {
			spec.Mounts = append(spec.Mounts, &agentpb.Mount{Destination: dest, Source: source, Type: "bind", Options: []string{"rbind"}})
		}
		if _, err := g.CreateContainer(g.ctx(), &agentpb.CreateContainerRequest{ContainerId: id, OCI: spec, Storages: []*agentpb.Storage{local, s}}); err != nil {
			return "", err
		}
		g.start(id)
		out := g.readAll(id, "")
		g.wait(id, "")
		g.remove(id)
		if _, err := os.Lstat(s.MountPoint); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the bind is still there: %v", id, err)
		}
		return out, nil
	}
	for _, tc := range []struct {
		id, command string
		storage     *agentpb.Storage
		want        string
	}{
		{"made", "echo hi > /vol/made/f; cat /vol/all/a/b/f; stat -c '%a %u:%g' /vol/made /vol/all/a", part("a/b", "mode=2777", "fsgid=34", "uid=12"), "hi\n2777 12:34\n755 0:0\n"},
		{"there", "cat /vol/there/b/f; stat -c %a /vol/there; ln -s b /vol/there/inside; ln -s /etc /vol/there/out; ln -s ../../.. /vol/there/up", part("a", "mode=700"), "hi\n755\n"},
		{"file", "cat /vol/file; echo more >> /vol/file; cat /vol/all/a/b/f", part("a/b/f"), "hi\nhi\nmore\n"},
		{"link", "ls /vol/link", part("a/inside"), "f\n"},
	} {
		if out, err := run(tc.id, tc.command, tc.storage); err != nil || out != tc.want {
			t.Errorf("%s: %q, %v", tc.id, out, err)
		}
	}
	for _, path := range []string{"a/out", "a/up", "a/up/etc", "a/out/passwd", "../x", "/etc", ""} {
		if _, err := run("wrong", "true", part(path)); err == nil {
			t.Errorf("path %q is bound", path)
		}
		if _, err := os.Lstat(filepath.Join(state, "sandbox/subpaths/p")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("path %q leaves something: %v", path, err)
		}
	}
	stray := part("a")
	stray.Source = filepath.Join(g.dir, "elsewhere")
	_, err := run("stray", "true", stray)
	wantClass(t, "a source that is no storage", err, errdefs.ErrInvalidArgument)
	_, err = run("option", "true", part("fresh", "size=1"))
	wantClass(t, "an option of another driver", err, errdefs.ErrInvalidArgument)
	var st unix.Stat_t
	if err := unix.Stat("/etc", &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("/etc: %v", err)
	}
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
}
