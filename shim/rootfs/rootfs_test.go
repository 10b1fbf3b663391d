// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/guest"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// capability is a security.capability value: cap_net_raw=ep, revision 2.
var capability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// tree makes a root file system with one of each kind of entry and returns it with
// the content of its large file.
func tree(t *testing.T) (string, []byte) {
	t.Helper()
	dir := t.TempDir()
	big := make([]byte, 3<<20)
	rand.Read(big)
	p := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.MkdirAll(p("etc/deep"), 0o750),
		os.WriteFile(p("etc/file"), []byte("content"), 0o640),
		os.Chown(p("etc/file"), 5, 6),
		os.Chmod(p("etc/file"), 0o640|os.ModeSetuid), // a change of owner clears the bit
		os.WriteFile(p("etc/empty"), nil, 0o600),
		os.Link(p("etc/file"), p("hard")),
		os.Symlink("../etc/file", p("etc/deep/link")),
		os.WriteFile(p("big"), big, 0o644),
		unix.Mkfifo(p("pipe"), 0o600),
		unix.Mknod(p("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Lsetxattr(p("big"), "security.capability", capability, 0),
		os.WriteFile(p(strings.Repeat("long-name-", 15)), []byte("x"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	cwd, _ := os.Getwd()
	if err := errors.Join(os.Chdir(dir), unix.Bind(fd, &unix.SockaddrUnix{Name: "sock"}), os.Chdir(cwd)); err != nil {
		t.Fatal(err)
	}
	return dir, big
}

func conn(t *testing.T, agent *agenttest.Agent) (*guest.Conn, *shimtest.Adaptor) {
	t.Helper()
	a := shimtest.NewAdaptor(t, agent)
	c := guest.New(guest.Config{Socket: a.AgentSocket})
	t.Cleanup(c.Close)
	return c, a
}

var features = []extension.Feature{extension.Rootfs}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func checkArchive(t *testing.T, archive, big []byte) {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	got := map[string]*tar.Header{}
	var order []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = h
		order = append(order, h.Name)
		if h.Name == "big" {
			if b, err := io.ReadAll(r); err != nil || !bytes.Equal(b, big) {
				t.Errorf("big: %d bytes, %v", len(b), err)
			}
		}
	}
	want := []string{"./", "big", "etc/", "etc/deep/", "etc/deep/link", "etc/empty", "etc/file", "hard", strings.Repeat("long-name-", 15), "null", "pipe"}
	if d := cmp.Diff(want, order); d != "" {
		t.Fatalf("entries (-want +got):\n%s", d)
	}
	if h := got["etc/file"]; h.Mode != 0o4640 || h.Uid != 5 || h.Gid != 6 || h.Size != 7 {
		t.Errorf("file: %+v", h)
	}
	if h := got["hard"]; h.Typeflag != tar.TypeLink || h.Linkname != "etc/file" {
		t.Errorf("hard link: %+v", h)
	}
	if h := got["etc/deep/link"]; h.Typeflag != tar.TypeSymlink || h.Linkname != "../etc/file" {
		t.Errorf("link: %+v", h)
	}
	if h := got["null"]; h.Typeflag != tar.TypeChar || h.Devmajor != 1 || h.Devminor != 3 {
		t.Errorf("device: %+v", h)
	}
	if v := got["big"].PAXRecords["SCHILY.xattr.security.capability"]; v != string(capability) {
		t.Errorf("capability: %q", v)
	}
}

// TestFromNode streams a tree that the shim mounts itself, and leaves no mount.
func TestFromNode(t *testing.T) {
	dir, big := tree(t)
	bundle := t.TempDir()
	agent := &agenttest.Agent{Features: features}
	c, _ := conn(t, agent)
	r := Request{Container: "c", Bundle: bundle, Root: "rootfs", Mounts: []*types.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "ro"}}}}
	source, err := Choose(c, extension.Set{string(extension.Rootfs)}, r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := source.Prepare(testContext(t), r)
	if err != nil || got.Path != "/run/kata-containers/c/rootfs" {
		t.Fatalf("%+v, %v", got, err)
	}
	checkArchive(t, agent.Rootfs("c"), big)
	if left, err := os.ReadDir(filepath.Join(bundle, "rootfs")); err != nil || len(left) > 0 {
		t.Errorf("still mounted: %v, %v", left, err)
	}
}

// TestBrokenImport has the connection break in the middle: the import begins again.
func TestBrokenImport(t *testing.T) {
	dir, big := tree(t)
	var tries atomic.Int32
	var a *shimtest.Adaptor
	agent := &agenttest.Agent{Features: features, Fault: func(_ context.Context, method string) error {
		if method == "ImportRootfs" && tries.Add(1) <= 2 {
			a.Cut()
		}
		return nil
	}}
	var c *guest.Conn
	c, a = conn(t, agent)
	if _, err := (&FromNode{conn: c}).Prepare(testContext(t), Request{Container: "c", Root: dir}); err != nil {
		t.Fatal(err)
	}
	checkArchive(t, agent.Rootfs("c"), big)
	if n := tries.Load(); n != 3 {
		t.Errorf("%d attempts, want 3", n)
	}
}

func TestRefused(t *testing.T) {
	dir, _ := tree(t)
	agent := &agenttest.Agent{Features: features, Fault: func(_ context.Context, method string) error {
		if method == "ImportRootfs" {
			return fmt.Errorf("the root file system is larger than its limit: %w", errdefs.ErrResourceExhausted)
		}
		return nil
	}}
	c, _ := conn(t, agent)
	if _, err := (&FromNode{conn: c}).Prepare(testContext(t), Request{Container: "c", Root: dir}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("agent refuses: %v", err)
	}
	if _, err := (&FromNode{conn: c}).Prepare(testContext(t), Request{Container: "c", Root: "/nonesuch"}); err == nil || !strings.Contains(err.Error(), "/nonesuch") {
		t.Errorf("missing tree: %v", err)
	}
	bad := []*types.Mount{{Type: "bind", Source: "/nonesuch", Options: []string{"rbind"}}}
	if _, err := (&FromNode{conn: c}).Prepare(testContext(t), Request{Container: "c", Bundle: t.TempDir(), Mounts: bad}); err == nil || !strings.Contains(err.Error(), "mount the root file system") {
		t.Errorf("bad mount: %v", err)
	}
	both := extension.Set{string(extension.Rootfs), string(extension.Pause)}
	for _, tc := range []struct {
		sandbox  bool
		features extension.Set
		own      bool
	}{{true, both, true}, {false, both, false}, {true, both[:1], false}} {
		source, err := Choose(c, tc.features, Request{Sandbox: tc.sandbox})
		if _, own := source.(AgentsOwn); err != nil || own != tc.own {
			t.Errorf("sandbox container %v, features %v: %T, %v", tc.sandbox, tc.features, source, err)
		}
	}
	if _, err := Choose(c, nil, Request{}); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), string(extension.Rootfs)) {
		t.Errorf("stock agent: %v", err)
	}
	if slices.Contains(agent.Calls(), "CreateContainer") {
		t.Error("a container was made")
	}
}
