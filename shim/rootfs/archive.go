// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// xattrPrefixes are the extended attributes that belong to the tree and not to the
// node: file capabilities and what users set. Labels of the node's security module
// and overlayfs's own attributes stay behind.
var xattrPrefixes = []string{"security.capability", "user."}

// inode identifies a file with several names.
type inode struct{ dev, ino uint64 }

// archive writes the tree at root to w as a PAX tar, in the order of a walk, so
// that a directory comes before what is in it and a hard link after its target. It
// reads files as it goes: memory does not grow with the tree, except by one entry
// for each file with several names. Sockets are left out; they mean nothing without
// the process that made them.
func archive(ctx context.Context, w io.Writer, root string) error {
	tw := tar.NewWriter(w)
	links := map[inode]string{}
	buf := make([]byte, 64<<10)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		return addEntry(tw, path, rel, links, buf)
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func addEntry(tw *tar.Writer, path, rel string, links map[inode]string, buf []byte) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	h := &tar.Header{
		Name: rel, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), Format: tar.FormatPAX,
		ModTime: time.Unix(st.Mtim.Unix()),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, rel+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil // a socket
	}
	if st.Nlink > 1 && h.Typeflag != tar.TypeDir {
		key := inode{st.Dev, st.Ino}
		if first, ok := links[key]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return tw.WriteHeader(h)
		}
		links[key] = rel
	}
	if err := addXattrs(h, path, buf); err != nil {
		return err
	}
	if err := tw.WriteHeader(h); err != nil {
		return fmt.Errorf("archive %s: %w", rel, err)
	}
	if h.Typeflag == tar.TypeReg && h.Size > 0 {
		return addData(tw, path, h.Size, buf)
	}
	return nil
}

// onlyWriter hides ReadFrom, which would not use our buffer.
type onlyWriter struct{ io.Writer }

func addData(tw *tar.Writer, path string, size int64, buf []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.CopyBuffer(onlyWriter{tw}, struct{ io.Reader }{io.LimitReader(f, size)}, buf)
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("archive %s: %w", path, err)
	}
	return nil
}

func addXattrs(h *tar.Header, path string, buf []byte) error {
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list attributes of %s: %w", path, err)
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		for _, p := range xattrPrefixes {
			if name == "" || !strings.HasPrefix(name, p) {
				continue
			}
			k, err := unix.Lgetxattr(path, name, buf)
			if err != nil {
				return fmt.Errorf("read attribute %s of %s: %w", name, path, err)
			}
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+name] = string(buf[:k])
		}
	}
	return nil
}
