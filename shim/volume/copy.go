// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// A volume is copied with the CopyFile calls of the kata-agent protocol, entry by
// entry: directories, regular files in pieces, and symbolic links with their target
// as data, which keeps the kubelet's "..data" indirection as it is. Sockets, pipes
// and devices inside a volume are left out; the kubelet's writer makes none.

// dirMode is what kata's runtime sends for parents that do not exist yet.
const dirMode = unix.S_IFDIR | 0o750

// copyTree copies source, a file or a directory, to path in the guest.
func copyTree(ctx context.Context, conn *guest.Conn, source, path string) error {
	// The source may be a link itself, as a subPath is; what it points to counts.
	root, err := filepath.EvalSymlinks(source)
	if err != nil {
		return err
	}
	return filepath.WalkDir(root, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		return copyEntry(ctx, conn, name, filepath.Join(path, rel))
	})
}

func copyEntry(ctx context.Context, conn *guest.Conn, name, path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return fmt.Errorf("stat %s: %w", name, err)
	}
	req := &agentpb.CopyFileRequest{Path: path, FileMode: st.Mode, DirMode: dirMode, Uid: int32(st.Uid), Gid: int32(st.Gid)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return copyData(ctx, conn, name, req)
	case unix.S_IFLNK:
		target, err := os.Readlink(name)
		if err != nil {
			return err
		}
		req.Data = []byte(target)
	case unix.S_IFDIR:
	default:
		return nil
	}
	return send(ctx, conn, req)
}

// copyData sends a file in pieces. The size said first is the size sent, even of a
// file that changes meanwhile: the agent takes the file as complete at that size.
func copyData(ctx context.Context, conn *guest.Conn, name string, req *agentpb.CopyFileRequest) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	req.FileSize = fi.Size()
	buf := make([]byte, min(req.FileSize, extension.MaxData))
	for {
		n, err := io.ReadFull(f, buf[:min(int64(len(buf)), req.FileSize-req.Offset)])
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("%s became shorter while it was copied: %w", name, err)
		}
		req.Data = buf[:n]
		if err := send(ctx, conn, req); err != nil {
			return err
		}
		if req.Offset += int64(n); req.Offset >= req.FileSize {
			return nil
		}
	}
}

func send(ctx context.Context, conn *guest.Conn, req *agentpb.CopyFileRequest) error {
	_, err := guest.Agent(ctx, conn, agentpb.AgentServiceService.CopyFile, req)
	return err
}
