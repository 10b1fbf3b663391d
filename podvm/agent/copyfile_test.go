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

func TestCopyFile(t *testing.T) {
	g := newGuest(t)
	dir := g.agent.files.dir
	copyFile := func(req *agentpb.CopyFileRequest) error {
		_, err := g.CopyFile(g.ctx(), req)
		return err
	}
	file := func(name, data string, mode uint32) {
		t.Helper()
		if err := copyFile(&agentpb.CopyFileRequest{Path: filepath.Join(dir, name), FileSize: int64(len(data)), FileMode: mode, DirMode: unix.S_IFDIR | 0o750, Uid: 12, Gid: 34, Data: []byte(data)}); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	check := func(name, want string, mode uint32) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, name))
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if err != nil || string(b) != want || st.Mode != mode || st.Uid != 12 || st.Gid != 34 {
			t.Errorf("%s: %q, mode %o, %d:%d, %v", name, b, st.Mode, st.Uid, st.Gid, err)
		}
	}
	file("vol/..1/tls.crt", "certificate", unix.S_IFREG|0o640)
	file("vol/..1/tls.key", "key", unix.S_IFREG|0o4600)
	file("vol/empty", "", unix.S_IFREG|0o644)
	check("vol/..1/tls.crt", "certificate", unix.S_IFREG|0o640)
	check("vol/..1/tls.key", "key", unix.S_IFREG|0o4600)
	check("vol/empty", "", unix.S_IFREG|0o644)
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "vol/..1"), &st); err != nil || st.Mode != unix.S_IFDIR|0o750 || st.Uid != 12 {
		t.Errorf("the parent: mode %o, owner %d, %v", st.Mode, st.Uid, err)
	}

	// A link is swapped, a file and a link stand where the other was.
	for _, target := range []string{"..1", "..2"} {
		if err := copyFile(&agentpb.CopyFileRequest{Path: dir + "/vol/..data", FileMode: unix.S_IFLNK | 0o777, Data: []byte(target), Uid: 12, Gid: 34}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(dir + "/vol/..data"); err != nil || got != target {
			t.Errorf("link to %q, %v", got, err)
		}
	}
	file("vol/..data", "now a file", unix.S_IFREG|0o644)
	check("vol/..data", "now a file", unix.S_IFREG|0o644)

	// A directory is kept with its content, and gets mode and owner.
	if err := copyFile(&agentpb.CopyFileRequest{Path: dir + "/vol", FileMode: unix.S_IFDIR | 0o3775, Uid: 5, Gid: 6}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(dir+"/vol", &st); err != nil || st.Mode != unix.S_IFDIR|0o3775 || st.Uid != 5 || st.Gid != 6 {
		t.Errorf("the directory: mode %o, %d:%d, %v", st.Mode, st.Uid, st.Gid, err)
	}
	check("vol/..data", "now a file", unix.S_IFREG|0o644)

	// In parts, one of them twice; the old content stands until the last part came.
	parts := bytes.Repeat([]byte("0123456789"), 1000)
	for _, at := range []int{0, 4000, 4000, 8000} {
		check("vol/..data", "now a file", unix.S_IFREG|0o644)
		end := min(at+4000, len(parts))
		if err := copyFile(&agentpb.CopyFileRequest{Path: dir + "/vol/..data", FileSize: int64(len(parts)), FileMode: unix.S_IFREG | 0o600, Uid: 12, Gid: 34, Offset: int64(at), Data: parts[at:end]}); err != nil {
			t.Fatal(err)
		}
	}
	check("vol/..data", string(parts), unix.S_IFREG|0o600)
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
