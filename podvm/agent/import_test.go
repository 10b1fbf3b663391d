// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// fileCaps is cap_net_bind_service+ep as the kernel stores it: struct vfs_cap_data,
// revision 2.
const fileCaps = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// archiveOf writes a tar archive.
func archiveOf(t *testing.T, entries ...any) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := 0; i < len(entries); i += 2 {
		h, body := entries[i].(tar.Header), entries[i+1].(string)
		h.Size, h.Format = int64(len(body)), tar.FormatPAX
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func compress(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// send sends an archive in pieces, keeping to the window, and returns the last
// answer.
func send(ctx context.Context, c *client, first *podvmpb.ImportRootfsRequest, archive []byte, piece int) (*podvmpb.ImportRootfsResponse, error) {
	s, err := c.podvm.ImportRootfs(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.Send(first); err != nil {
		return nil, err
	}
	r, err := s.Recv()
	if err != nil {
		return nil, err
	}
	limit, sent := r.Consumed+r.Window, uint64(0)
	for {
		for n := min(uint64(piece), uint64(len(archive)), limit-sent); n > 0 || len(archive) == 0; n = min(uint64(piece), uint64(len(archive)), limit-sent) {
			req := &podvmpb.ImportRootfsRequest{Data: archive[:n], Eof: n == uint64(len(archive))}
			archive, sent = archive[n:], sent+n
			if err := s.Send(req); err != nil && !errors.Is(err, io.EOF) {
				return nil, err
			}
			if req.Eof {
				break
			}
		}
		r, err := s.Recv()
		if err != nil || r.Done {
			return r, err
		}
		limit = r.Consumed + r.Window
	}
}

func TestImportedRootRunsAContainer(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	random := strings.Repeat("incompressible? no, but long. ", 100_000)
	archive := archiveOf(t,
		tar.Header{Name: "bin/", Typeflag: tar.TypeDir}, "",
		tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg}, string(box),
		tar.Header{Name: "bin/sh", Typeflag: tar.TypeLink, Linkname: "bin/busybox"}, "",
		tar.Header{Name: "bin/cat", Typeflag: tar.TypeSymlink, Linkname: "/bin/busybox"}, "",
		tar.Header{Name: "proc/", Typeflag: tar.TypeDir}, "",
		tar.Header{Name: "dev/", Typeflag: tar.TypeDir}, "",
		tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, "",
		tar.Header{Name: "etc/owned", Typeflag: tar.TypeReg, Uid: 1234, Gid: 567, Mode: 0o4750}, "owned",
		tar.Header{Name: "etc/.wh.notawhiteout", Typeflag: tar.TypeReg}, "kept",
		tar.Header{Name: "etc/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, "",
		tar.Header{Name: "etc/pipe", Typeflag: tar.TypeFifo}, "",
		tar.Header{Name: "etc/attr", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": fileCaps}}, "x",
		tar.Header{Name: "etc/long", Typeflag: tar.TypeReg}, random,
	)
	for _, tc := range []struct {
		id    string
		comp  podvmpb.Compression
		data  []byte
		piece int
	}{
		{"plain", podvmpb.Compression_COMPRESSION_NONE, archive, 128 << 10},
		{"zstd", podvmpb.Compression_COMPRESSION_ZSTD, compress(t, archive), 100},
	} {
		done, err := send(g.ctx(), g.client, &podvmpb.ImportRootfsRequest{ContainerId: tc.id, Compression: tc.comp}, tc.data, tc.piece)
		if err != nil {
			t.Fatalf("%s: %v", tc.id, err)
		}
		if done.Consumed != uint64(len(tc.data)) {
			t.Errorf("%s: consumed %d of %d bytes", tc.id, done.Consumed, len(tc.data))
		}
		root := done.Path
		if want := filepath.Join(g.agent.cfg.StateDir, tc.id, "rootfs"); root != want {
			t.Fatalf("%s: path %s, want %s", tc.id, root, want)
		}
		checkTree(t, root, random)
		spec := g.spec("read x; cat /etc/.wh.notawhiteout; echo $x > /tmp/w && cat /tmp/w")
		spec.Root.Path = root
		g.create(tc.id, spec)
		g.start(tc.id)
		must[any](t)(g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: tc.id, Data: []byte("\n")}))
		if got := g.readAll(tc.id, ""); got != "kept\n" {
			t.Errorf("%s: the container said %q", tc.id, got)
		}
		if got := g.wait(tc.id, ""); got != 0 {
			t.Errorf("%s: status %d", tc.id, got)
		}
		_, err = send(g.ctx(), g.client, &podvmpb.ImportRootfsRequest{ContainerId: tc.id}, tc.data, 1000)
		wantClass(t, "import for a container that exists", err, errdefs.ErrAlreadyExists)
		g.remove(tc.id)
		if _, err := os.Stat(filepath.Dir(root)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the root file system is still there: %v", tc.id, err)
		}
	}
}

func checkTree(t *testing.T, root, long string) {
	t.Helper()
	var st unix.Stat_t
	stat := func(name string) *unix.Stat_t {
		t.Helper()
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatal(err)
		}
		return &st
	}
	if s := stat("etc/owned"); s.Uid != 1234 || s.Gid != 567 || s.Mode&0o7777 != 0o4750 {
		t.Errorf("etc/owned: %d:%d, %o", s.Uid, s.Gid, s.Mode)
	}
	if s := stat("bin/sh"); s.Nlink != 2 {
		t.Errorf("bin/sh has %d links", s.Nlink)
	}
	if s := stat("etc/null"); s.Mode&unix.S_IFMT != unix.S_IFCHR || s.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("etc/null: mode %o, device %x", s.Mode, s.Rdev)
	}
	if s := stat("etc/pipe"); s.Mode&unix.S_IFMT != unix.S_IFIFO {
		t.Errorf("etc/pipe: mode %o", s.Mode)
	}
	if s := stat("tmp"); s.Mode&0o7777 != 0o1777 {
		t.Errorf("tmp: mode %o", s.Mode)
	}
	if b, err := os.ReadFile(filepath.Join(root, "etc/.wh.notawhiteout")); err != nil || string(b) != "kept" {
		t.Errorf("a file that looks like a whiteout: %q, %v", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "etc/long")); err != nil || string(b) != long {
		t.Errorf("etc/long: %d bytes, %v", len(b), err)
	}
	buf := make([]byte, 64)
	if n, err := unix.Lgetxattr(filepath.Join(root, "etc/attr"), "security.capability", buf); err != nil || string(buf[:n]) != fileCaps {
		t.Errorf("extended attribute: %q, %v", buf[:max(n, 0)], err)
	}
}

func TestImportRefusals(t *testing.T) {
	g := newGuest(t)
	outside := filepath.Join(g.dir, "outside")
	if err := os.WriteFile(outside, []byte("safe"), 0o644); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 3<<20)
	good := archiveOf(t, tar.Header{Name: "file", Typeflag: tar.TypeReg}, big)
	for _, tc := range []struct {
		name    string
		first   *podvmpb.ImportRootfsRequest
		archive []byte
		want    error
		says    string
	}{
		{"too big", &podvmpb.ImportRootfsRequest{ContainerId: "c1", SizeLimit: 1 << 20}, good, errdefs.ErrResourceExhausted, "1048576"},
		{"garbage", &podvmpb.ImportRootfsRequest{ContainerId: "c1"}, []byte(big), errdefs.ErrInvalidArgument, "damaged"},
		{"garbage for zstd", &podvmpb.ImportRootfsRequest{ContainerId: "c1", Compression: 1}, []byte(big), errdefs.ErrInvalidArgument, "damaged"},
		{"cut short", &podvmpb.ImportRootfsRequest{ContainerId: "c1"}, good[:2<<20], errdefs.ErrInvalidArgument, "damaged"},
		{"cut short zstd", &podvmpb.ImportRootfsRequest{ContainerId: "c1", Compression: 1}, compress(t, good)[:100], errdefs.ErrInvalidArgument, "damaged"},
		{"bad id", &podvmpb.ImportRootfsRequest{ContainerId: "../c1"}, nil, errdefs.ErrInvalidArgument, "container_id"},
		{"no id", &podvmpb.ImportRootfsRequest{}, nil, errdefs.ErrInvalidArgument, "container_id"},
		{"data first", &podvmpb.ImportRootfsRequest{ContainerId: "c1", Data: good[:10]}, nil, errdefs.ErrInvalidArgument, "first"},
		{"compression", &podvmpb.ImportRootfsRequest{ContainerId: "c1", Compression: 9}, nil, errdefs.ErrNotImplemented, "compression"},
	} {
		_, err := send(g.ctx(), g.client, tc.first, tc.archive, 64<<10)
		wantClass(t, tc.name, err, tc.want)
		if err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v does not say %q", tc.name, err, tc.says)
		}
		if _, err := os.Stat(filepath.Join(g.agent.cfg.StateDir, "c1")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: something is left: %v", tc.name, err)
		}
	}
	if b, _ := os.ReadFile(outside); string(b) != "safe" {
		t.Errorf("a file outside of the tree changed: %q", b)
	}
}

// What an archive says about names, it says about names in the tree.
func TestImportCannotEscape(t *testing.T) {
	g := newGuest(t)
	outside := filepath.Join(g.dir, "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, entries := range [][]any{
		{tar.Header{Name: "../../../outside/f", Typeflag: tar.TypeReg}, "x"},
		{tar.Header{Name: outside + "/f", Typeflag: tar.TypeReg}, "x"},
		{tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside}, "", tar.Header{Name: "l/f", Typeflag: tar.TypeReg}, "x"},
		{tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../../../outside"}, "", tar.Header{Name: "l/f", Typeflag: tar.TypeReg}, "x"},
		{tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside + "/f"}, "", tar.Header{Name: "l", Typeflag: tar.TypeReg}, "x"},
		{tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "../../../outside/f"}, ""},
	} {
		id := fmt.Sprintf("escape%d", i)
		_, err := send(g.ctx(), g.client, &podvmpb.ImportRootfsRequest{ContainerId: id}, archiveOf(t, entries...), 1000)
		t.Logf("archive %d: %v", i, err)
		if left, _ := os.ReadDir(outside); len(left) > 0 {
			t.Fatalf("archive %d wrote outside of the tree: %v", i, left)
		}
	}
}

func TestImportOfBrokenConnectionLeavesNothingAndCanBeRepeated(t *testing.T) {
	g := newGuest(t)
	archive := archiveOf(t, tar.Header{Name: "file", Typeflag: tar.TypeReg}, strings.Repeat("x", 900<<10))
	c := g.dial()
	s, err := c.podvm.ImportRootfs(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Send(&podvmpb.ImportRootfsRequest{ContainerId: "c1"}), s.Send(&podvmpb.ImportRootfsRequest{Data: archive[:500<<10]})); err != nil {
		t.Fatal(err)
	}
	where := filepath.Join(g.agent.cfg.StateDir, "c1", "rootfs", "file")
	eventually(t, "the import has begun", func() bool { _, err := os.Stat(where); return err == nil })
	// The second try comes before the agent noticed the end of the first.
	done, err := send(g.ctx(), g.client, &podvmpb.ImportRootfsRequest{ContainerId: "c1"}, archive, 64<<10)
	if err != nil || !done.GetDone() {
		t.Fatalf("second try: %v, %v", done, err)
	}
	c.close()
	if st, err := os.Stat(where); err != nil || st.Size() != 900<<10 {
		t.Errorf("the file: %v, %v", st, err)
	}
	// And a third, after a done that was lost.
	if done, err := send(g.ctx(), g.client, &podvmpb.ImportRootfsRequest{ContainerId: "c1"}, archive, 64<<10); err != nil || !done.GetDone() {
		t.Fatalf("third try: %v, %v", done, err)
	}
	g.remove("c1") // a tree without a container

	c = g.dial()
	if s, err = c.podvm.ImportRootfs(g.ctx()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Send(&podvmpb.ImportRootfsRequest{ContainerId: "c2"}), s.Send(&podvmpb.ImportRootfsRequest{Data: archive[:5000]})); err != nil {
		t.Fatal(err)
	}
	where = filepath.Join(g.agent.cfg.StateDir, "c2")
	eventually(t, "the import has begun", func() bool { _, err := os.Stat(where); return err == nil })
	c.close()
	eventually(t, "nothing is left", func() bool { _, err := os.Stat(where); return errors.Is(err, os.ErrNotExist) })
}

// A sender that ignores the window is told so, and holds up nobody.
func TestImportWindow(t *testing.T) {
	g := newGuest(t)
	s, err := g.podvm.ImportRootfs(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&podvmpb.ImportRootfsRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	q := newArchiveQueue(func(uint64) error { return nil })
	for sent := 0; sent <= extension.Window; sent += extension.MaxData / 2 {
		err = q.add(&podvmpb.ImportRootfsRequest{Data: make([]byte, extension.MaxData/2)})
	}
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("more than the window: %v", err)
	}
	if err := q.add(&podvmpb.ImportRootfsRequest{Data: make([]byte, extension.MaxData+1)}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a piece that is too large: %v", err)
	}
	// The import above waits for data; other calls are answered.
	must[*agentpb.HealthCheckResponse](t)(g.health.Check(g.ctx(), &agentpb.CheckRequest{}))
	if err := s.Send(&podvmpb.ImportRootfsRequest{Data: []byte("x"), Eof: true}); err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	wantClass(t, "the import", err, errdefs.ErrInvalidArgument)
}
