// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"golang.org/x/sys/unix"
)

// copied is a guest that files are copied to, always as user 12 and group 34.
type copied struct {
	*guest
	dir string
}

func newCopied(t *testing.T) copied {
	g := newGuest(t)
	return copied{g, g.agent.files.dir}
}

func (c copied) send(req *agentpb.CopyFileRequest) {
	c.t.Helper()
	must[any](c.t)(c.CopyFile(c.ctx(), req))
}

func (c copied) file(name, data string, mode uint32) {
	c.t.Helper()
	c.send(&agentpb.CopyFileRequest{Path: filepath.Join(c.dir, name), FileSize: int64(len(data)), FileMode: mode, DirMode: unix.S_IFDIR | 0o750, Uid: 12, Gid: 34, Data: []byte(data)})
}

func (c copied) stat(name string) (st unix.Stat_t) {
	c.t.Helper()
	if err := unix.Stat(filepath.Join(c.dir, name), &st); err != nil {
		c.t.Fatal(err)
	}
	return st
}

func (c copied) check(name, want string, mode uint32) {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, name))
	st := c.stat(name)
	if err != nil || string(b) != want || st.Mode != mode || st.Uid != 12 || st.Gid != 34 {
		c.t.Errorf("%s: %q, mode %o, %d:%d, %v", name, b, st.Mode, st.Uid, st.Gid, err)
	}
}

func TestCopyFile(t *testing.T) {
	c := newCopied(t)
	c.file("vol/..1/tls.crt", "certificate", unix.S_IFREG|0o640)
	c.file("vol/..1/tls.key", "key", unix.S_IFREG|0o4600)
	c.file("vol/empty", "", unix.S_IFREG|0o644)
	c.check("vol/..1/tls.crt", "certificate", unix.S_IFREG|0o640)
	c.check("vol/..1/tls.key", "key", unix.S_IFREG|0o4600)
	c.check("vol/empty", "", unix.S_IFREG|0o644)
	if st := c.stat("vol/..1"); st.Mode != unix.S_IFDIR|0o750 || st.Uid != 12 {
		t.Errorf("the parent: mode %o, owner %d", st.Mode, st.Uid)
	}
}

// A link is swapped, a file and a link stand where the other was, and a directory is
// kept with its content while it gets mode and owner.
func TestCopyFileReplaces(t *testing.T) {
	c := newCopied(t)
	for _, target := range []string{"..1", "..2"} {
		c.send(&agentpb.CopyFileRequest{Path: c.dir + "/vol/..data", FileMode: unix.S_IFLNK | 0o777, Data: []byte(target), Uid: 12, Gid: 34})
		if got, err := os.Readlink(c.dir + "/vol/..data"); err != nil || got != target {
			t.Errorf("link to %q, %v", got, err)
		}
	}
	c.file("vol/..data", "now a file", unix.S_IFREG|0o644)
	c.check("vol/..data", "now a file", unix.S_IFREG|0o644)
	c.send(&agentpb.CopyFileRequest{Path: c.dir + "/vol", FileMode: unix.S_IFDIR | 0o3775, Uid: 5, Gid: 6})
	if st := c.stat("vol"); st.Mode != unix.S_IFDIR|0o3775 || st.Uid != 5 || st.Gid != 6 {
		t.Errorf("the directory: mode %o, %d:%d", st.Mode, st.Uid, st.Gid)
	}
	c.check("vol/..data", "now a file", unix.S_IFREG|0o644)
}

// In parts, one of them twice; the old content stands until the last part came.
func TestCopyFileInParts(t *testing.T) {
	c := newCopied(t)
	c.file("vol/..data", "now a file", unix.S_IFREG|0o644)
	parts := bytes.Repeat([]byte("0123456789"), 1000)
	for _, at := range []int{0, 4000, 4000, 8000} {
		c.check("vol/..data", "now a file", unix.S_IFREG|0o644)
		end := min(at+4000, len(parts))
		c.send(&agentpb.CopyFileRequest{Path: c.dir + "/vol/..data", FileSize: int64(len(parts)), FileMode: unix.S_IFREG | 0o600, Uid: 12, Gid: 34, Offset: int64(at), Data: parts[at:end]})
	}
	c.check("vol/..data", string(parts), unix.S_IFREG|0o600)
}

// Many at a time do not meet.
func TestCopyFilesAtOnce(t *testing.T) {
	g := newGuest(t)
	dir := g.agent.files.dir
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			data := bytes.Repeat([]byte{byte('a' + i)}, 3000)
			for at := 0; at < 3000; at += 1000 {
				if _, err := g.CopyFile(g.ctx(), &agentpb.CopyFileRequest{Path: fmt.Sprintf("%s/many/f.%d", dir, i), FileSize: 3000, FileMode: 0o644, Offset: int64(at), Data: data[at : at+1000]}); err != nil {
					t.Error(err)
				}
			}
			if got, err := os.ReadFile(fmt.Sprintf("%s/many/f.%d", dir, i)); err != nil || !bytes.Equal(got, data) {
				t.Errorf("file %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	wg.Wait()
}

func TestCopyFileRefusals(t *testing.T) {
	g := newGuest(t)
	dir := g.agent.files.dir
	outside := filepath.Join(g.dir, "outside")
	if err := os.MkdirAll(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, link := range []struct{ name, target string }{{"abs", outside}, {"rel", "../../../outside"}} {
		if _, err := g.CopyFile(g.ctx(), &agentpb.CopyFileRequest{Path: filepath.Join(dir, link.name), FileMode: unix.S_IFLNK, Data: []byte(link.target)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		req  *agentpb.CopyFileRequest
		want error
	}{
		{"outside", &agentpb.CopyFileRequest{Path: outside + "/f", FileSize: 1, Data: []byte("x")}, errdefs.ErrInvalidArgument},
		{"dots", &agentpb.CopyFileRequest{Path: dir + "/../../../outside/f", FileSize: 1, Data: []byte("x")}, errdefs.ErrInvalidArgument},
		{"the directory itself", &agentpb.CopyFileRequest{Path: dir, FileMode: unix.S_IFDIR | 0o777}, errdefs.ErrInvalidArgument},
		{"relative", &agentpb.CopyFileRequest{Path: "f"}, errdefs.ErrInvalidArgument},
		{"staging", &agentpb.CopyFileRequest{Path: dir + "/.staging/f"}, errdefs.ErrInvalidArgument},
		{"through an absolute link", &agentpb.CopyFileRequest{Path: dir + "/abs/f", FileSize: 1, Data: []byte("x")}, errdefs.ErrInternal},
		{"through a relative link", &agentpb.CopyFileRequest{Path: dir + "/rel/f", FileSize: 1, Data: []byte("x")}, errdefs.ErrInternal},
		{"a directory through a link", &agentpb.CopyFileRequest{Path: dir + "/rel/d/e", FileMode: unix.S_IFDIR | 0o777}, errdefs.ErrInternal},
		{"a socket", &agentpb.CopyFileRequest{Path: dir + "/s", FileMode: unix.S_IFSOCK}, errdefs.ErrInvalidArgument},
		{"too much data", &agentpb.CopyFileRequest{Path: dir + "/f", FileSize: 1, Data: []byte("xy")}, errdefs.ErrInvalidArgument},
		{"negative", &agentpb.CopyFileRequest{Path: dir + "/f", FileSize: 1, Offset: -1}, errdefs.ErrInvalidArgument},
		{"no first part", &agentpb.CopyFileRequest{Path: dir + "/f", FileSize: 10, Offset: 5, Data: []byte("x")}, errdefs.ErrFailedPrecondition},
	} {
		_, err := g.CopyFile(g.ctx(), tc.req)
		wantClass(t, tc.name, err, tc.want)
	}
	must[any](t)(g.CopyFile(g.ctx(), &agentpb.CopyFileRequest{Path: dir + "/f", FileSize: 10, Data: []byte("x")}))
	_, err := g.CopyFile(g.ctx(), &agentpb.CopyFileRequest{Path: dir + "/f", FileSize: 10, Offset: 5, Data: []byte("x")})
	wantClass(t, "a hole", err, errdefs.ErrOutOfRange)
	_, err = g.CopyFile(g.ctx(), &agentpb.CopyFileRequest{Path: dir + "/f", FileSize: 11, Offset: 1, Data: []byte("x")})
	wantClass(t, "another size", err, errdefs.ErrInvalidArgument)
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("something was written outside: %v", left)
	}
}
