// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// There are two ways into the guest. Our agent takes a volume as one archive
// (extension.Volumes) and switches to it. A stock agent takes it entry by entry with
// CopyFile: "..data" moves after what it names is there, which is the best that can be
// had; names and revisions that are gone cannot be removed, only made to lead nowhere.

// dirMode is what kata's runtime sends for parents that do not exist yet.
const dirMode = unix.S_IFDIR | 0o750

// sender brings revisions of one volume into the guest.
type sender interface {
	send(ctx context.Context, number uint64, archive []byte) error
}

func newSender(conn *guest.Conn, put bool, path string) sender {
	if put {
		return &putSender{conn, path}
	}
	return &copySender{conn: conn, path: path}
}

// putSender is for our agent.
type putSender struct {
	conn *guest.Conn
	path string
}

// send begins again at the first piece when the connection broke: the agent skips
// what it has, and a revision that is in place stays.
func (p *putSender) send(ctx context.Context, number uint64, archive []byte) error {
	return p.conn.PodVM(ctx, func(ctx context.Context, vm podvmpb.PodVMClient) error {
		for at := 0; ; {
			end := min(at+extension.MaxData, len(archive))
			r, err := vm.PutVolume(ctx, &podvmpb.PutVolumeRequest{Path: p.path, Revision: number, Offset: uint64(at), Data: archive[at:end], Eof: end == len(archive)})
			if err != nil {
				return err
			}
			if r.Done {
				return nil
			}
			if at = end; at == len(archive) {
				return fmt.Errorf("the agent has all of %s and did not switch to it", p.path)
			}
		}
	})
}

// copySender is for a stock agent.
type copySender struct {
	conn *guest.Conn
	path string
	last string // the revision that was sent before
}

func (c *copySender) send(ctx context.Context, _ uint64, archive []byte) error {
	var data string
	var names []string
	err := copyArchive(ctx, c.conn, archive, c.path, func(h *tar.Header) {
		if h.Name == "..data" {
			data = h.Linkname
		} else if dir, name, ok := strings.Cut(h.Name, "/"); ok && strings.HasPrefix(dir, "..") && name != "" && !strings.Contains(strings.TrimSuffix(name, "/"), "/") {
			names = append(names, strings.TrimSuffix(name, "/"))
		}
	})
	if err != nil || data == "" {
		return err
	}
	for _, name := range names {
		target := "..data/" + name
		if err := copyOne(ctx, c.conn, &agentpb.CopyFileRequest{Path: filepath.Join(c.path, name), FileMode: unix.S_IFLNK | 0o777, Data: []byte(target)}); err != nil {
			return err
		}
	}
	if before := c.last; before != "" && before != data {
		// There is no call to remove it; an empty file in its place takes no room. An
		// agent that refuses keeps the directory, and nothing depends on it.
		_ = copyOne(ctx, c.conn, &agentpb.CopyFileRequest{Path: filepath.Join(c.path, before), FileMode: unix.S_IFREG})
	}
	c.last = data
	return nil
}

// copyArchive sends an archive's entries with CopyFile, in their order. seen, which
// may be nil, is told of each.
func copyArchive(ctx context.Context, conn *guest.Conn, archive []byte, path string, seen func(*tar.Header)) error {
	in := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		req := &agentpb.CopyFileRequest{Path: filepath.Join(path, h.Name), FileMode: uint32(h.Mode), Uid: int32(h.Uid), Gid: int32(h.Gid)}
		switch h.Typeflag {
		case tar.TypeDir:
			req.FileMode |= unix.S_IFDIR
		case tar.TypeSymlink:
			req.FileMode |= unix.S_IFLNK
			req.Data = []byte(h.Linkname)
		default:
			req.FileMode |= unix.S_IFREG
			req.FileSize = h.Size
		}
		if err := copyData(ctx, conn, req, in); err != nil {
			return err
		}
		if seen != nil {
			seen(h)
		}
	}
}

// copyData sends one entry, a file in pieces.
func copyData(ctx context.Context, conn *guest.Conn, req *agentpb.CopyFileRequest, data io.Reader) error {
	if req.FileSize == 0 {
		return copyOne(ctx, conn, req)
	}
	buf := make([]byte, min(req.FileSize, extension.MaxData))
	for req.Offset < req.FileSize {
		n, err := io.ReadFull(data, buf[:min(int64(len(buf)), req.FileSize-req.Offset)])
		if err != nil {
			return err
		}
		req.Data = buf[:n]
		if err := copyOne(ctx, conn, req); err != nil {
			return err
		}
		req.Offset += int64(n)
	}
	return nil
}

func copyOne(ctx context.Context, conn *guest.Conn, req *agentpb.CopyFileRequest) error {
	req.DirMode = dirMode
	_, err := guest.Agent(ctx, conn, agentpb.AgentServiceService.CopyFile, req)
	return err
}

// bringTree copies a directory once.
func bringTree(ctx context.Context, conn *guest.Conn, put bool, source, path string) error {
	b, err := readTree(ctx, source)
	if err != nil {
		return err
	}
	if put {
		return (&putSender{conn, path}).send(ctx, 1, b)
	}
	return copyArchive(ctx, conn, b, path, nil)
}

// files is the task that copies the container's single files: to our agent all of
// them in one archive. Nil: it has none.
func (p *Plan) files(ctx context.Context, conn *guest.Conn) func() error {
	var list []Volume
	for _, v := range p.Volumes {
		if v.Kind == KindFile {
			list = append(list, v)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return func() error {
		a := newArchive()
		// The directory that holds them is seen by nobody.
		if err := a.header(&tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}); err != nil {
			return err
		}
		for _, v := range list {
			source, err := filepath.EvalSymlinks(v.Mount.Source)
			if err == nil {
				err = a.add(source, filepath.Base(v.GuestPath))
			}
			if err != nil {
				return v.explain(func() error { return err })()
			}
		}
		b, err := a.finish()
		if err != nil {
			return err
		}
		dir := filepath.Dir(list[0].GuestPath)
		if p.put() {
			err = (&putSender{conn, dir}).send(ctx, 1, b)
		} else {
			err = copyArchive(ctx, conn, b, dir, nil)
		}
		if err != nil {
			return fmt.Errorf("bring the files of container %s (%s) to the pod VM: %w", p.container, names(list), err)
		}
		return nil
	}
}

func names(list []Volume) string {
	var out []string
	for _, v := range list {
		out = append(out, v.Mount.Destination)
	}
	return strings.Join(out, ", ")
}
