// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// emptyDir is an emptyDir of the pod, or a part of one.
type emptyDir struct {
	name    string
	source  string      // the whole of it on the node
	stat    unix.Stat_t // of source
	memory  bool
	size    uint64 // limit in bytes; 0: none
	content bool   // there are files in it on the node

	sub     string      // relative path of the part; empty: all of it
	subStat unix.Stat_t // of the part on the node
}

// emptyDir looks at an emptyDir of the node. pod is the pod's directory, fi what is
// mounted.
func (n *node) emptyDir(pod, name, sub string, fi os.FileInfo, features extension.Set) (*emptyDir, error) {
	d := &emptyDir{name: name, source: filepath.Join(pod, "volumes/kubernetes.io~empty-dir", name), sub: sub}
	if err := unix.Stat(d.source, &d.stat); err != nil {
		return nil, fmt.Errorf("stat %s: %w: %w", d.source, err, errdefs.ErrInvalidArgument)
	}
	if sub != "" {
		if !features.Has(extension.Volumes) {
			return nil, fmt.Errorf("it is the path %q of emptyDir %q, and the agent in the pod VM cannot show parts of an emptyDir (it lacks %s): mount all of it, or use a pod VM image made by this project: %w", sub, name, extension.Volumes, errdefs.ErrInvalidArgument)
		}
		if err := unix.Stat(filepath.Join(d.source, sub), &d.subStat); err != nil {
			return nil, fmt.Errorf("stat %s: %w: %w", filepath.Join(d.source, sub), err, errdefs.ErrInvalidArgument)
		}
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("%s is not a directory: %w", d.source, errdefs.ErrInvalidArgument)
	}
	var above unix.Stat_t
	if err := unix.Stat(filepath.Dir(d.source), &above); err != nil {
		return nil, err
	}
	// A medium is a file system of its own. What the kubelet's directory is on says
	// nothing: it may be a tmpfs itself.
	if above.Dev != d.stat.Dev {
		var fs unix.Statfs_t
		if err := unix.Statfs(d.source, &fs); err != nil {
			return nil, err
		}
		switch fs.Type {
		case unix.TMPFS_MAGIC:
			d.memory, d.size = true, fs.Blocks*uint64(fs.Bsize)
		case unix.HUGETLBFS_MAGIC:
			return nil, fmt.Errorf("emptyDir %q has medium HugePages, and a pod VM has none: use medium Memory: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	var err error
	if limit := n.annotations[annotation.EmptyDirSizeLimit+name]; limit != "" && !d.memory {
		if d.size, err = bytesOf(limit); err != nil {
			return nil, fmt.Errorf("annotation %s%s: %w", annotation.EmptyDirSizeLimit, name, err)
		}
	}
	if d.content, err = hasContent(d.source); err != nil {
		return nil, fmt.Errorf("look into emptyDir %q: %w", name, err)
	}
	if d.content && (d.memory || d.size > 0) {
		return nil, fmt.Errorf("emptyDir %q has files on the node, %s, and one of limited size begins empty in a pod VM: remove the files, or the limit: %w", name, d.source, errdefs.ErrInvalidArgument)
	}
	return d, nil
}

// bytesOf reads a quantity as Kubernetes writes sizes: 100Mi, 1G, 4096.
func bytesOf(s string) (uint64, error) {
	number := strings.TrimRight(s, "KMGTikmgt")
	unit, ok := map[string]uint64{
		"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
	}[s[len(number):]]
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || !ok || n == 0 || n > math.MaxInt64/unit {
		return 0, fmt.Errorf("%q is no size: write bytes, or a number with Ki, Mi, Gi, k, M or G: %w", s, errdefs.ErrInvalidArgument)
	}
	return n * unit, nil
}

// guestPath is where the guest has all of it.
func (d *emptyDir) guestPath(k Kind, sandbox string) string {
	if k == KindMemory {
		return filepath.Join(ephemeralDir, d.name)
	}
	return filepath.Join(sharedDir, sandbox, "rootfs/local", d.name)
}

// Storages are the emptyDirs that the agent is to make, with mode and group as the
// kubelet gave them to the directory on the node (fsGroup), and their limits; then
// the parts of them that the container mounts.
func (p *Plan) Storages() []*agentpb.Storage {
	var whole, parts []*agentpb.Storage
	listed := map[string]bool{}
	for _, v := range p.Volumes {
		if v.dir == nil {
			continue
		}
		d, at := v.dir, v.dir.guestPath(v.Kind, p.set.sandbox)
		if !listed[at] {
			listed[at] = true
			whole = append(whole, d.storage(at))
		}
		if d.sub != "" {
			st := d.subStat
			parts = append(parts, &agentpb.Storage{
				Driver: extension.SubPathDriver, Source: at, DriverOptions: []string{"path=" + d.sub}, Fstype: "bind", MountPoint: v.GuestPath,
				Options: []string{modeOption(st), "uid=" + number(st.Uid), "gid=" + number(st.Gid)},
			})
		}
	}
	return append(whole, parts...)
}

func (d *emptyDir) storage(at string) *agentpb.Storage {
	s := &agentpb.Storage{MountPoint: at, Options: []string{modeOption(d.stat)}, Driver: "local", Source: "local", Fstype: "local"}
	if d.memory {
		s.Driver, s.Source, s.Fstype = "ephemeral", "tmpfs", "tmpfs"
	}
	if d.size > 0 {
		s.Options = append(s.Options, "size="+strconv.FormatUint(d.size, 10))
	}
	if d.stat.Gid != 0 {
		s.Options = append(s.Options, "fsgid="+number(d.stat.Gid))
		s.FsGroup = &agentpb.FSGroup{GroupId: d.stat.Gid}
	}
	return s
}

func modeOption(st unix.Stat_t) string {
	return "mode=" + strconv.FormatUint(uint64(st.Mode&0o7777), 8)
}

func number(id uint32) string { return strconv.FormatUint(uint64(id), 10) }

// seed copies what is in an emptyDir on the node before its first container is made.
// Later ones find what those before them left.
func (s *Set) seed(ctx context.Context, conn *guest.Conn, v Volume) error {
	s.mu.Lock()
	done := s.seeded[v.dir.source]
	s.mu.Unlock()
	if done {
		return nil
	}
	if err := bringTree(ctx, conn, false, v.dir.source, v.dir.guestPath(v.Kind, s.sandbox)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seeded[v.dir.source] = true
	return nil
}
