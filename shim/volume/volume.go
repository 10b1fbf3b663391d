// SPDX-License-Identifier: Apache-2.0

// Package volume gives a container in the guest the volumes that containerd's spec
// binds from the node. Node and guest share no file system, so each kind of volume
// needs its own way:
//
//   - KindCopy: a ConfigMap, Secret, projected or downward volume, or a single file
//     such as /etc/hosts: copied into the guest (package comment of copy.go).
//   - KindLocal, KindMemory: an emptyDir: made in the guest, once per pod.
//   - KindShm: the pod's /dev/shm: made in the guest with the sandbox.
//   - KindNone: a mount that names nothing of the node (proc, tmpfs, ...): passed on.
//
// Everything else cannot be had in a pod VM, and a copy that looks like it would
// silently lose what is written: it is an error that names the volume.
package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// Kind is how a mount reaches the guest.
type Kind int

const (
	KindNone   Kind = iota // as it is
	KindCopy               // copied
	KindLocal              // a directory of the guest, shared by the pod's containers
	KindMemory             // a tmpfs of the guest, shared by the pod's containers
	KindShm                // the pod's shared memory
)

const (
	// sharedDir is where a kata-agent accepts files (kata-containers 4.1, virtcontainers/fs_share_linux.go).
	sharedDir = "/run/kata-containers/shared/containers"
	// ephemeralDir is where kata's runtimes put tmpfs volumes (virtcontainers/kata_agent.go).
	ephemeralDir = "/run/kata-containers/sandbox/ephemeral"
	// ShmPath is where CreateSandbox's storage puts the pod's shared memory.
	ShmPath = "/run/kata-containers/sandbox/shm"
)

// The kubelet's directory layout (Kubernetes, pkg/kubelet/kubelet_getters.go): its
// root may be anywhere, what is below it is fixed.
var (
	projectedRE   = regexp.MustCompile(`/pods/[^/]+/volumes/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+$`)
	emptyDirRE    = regexp.MustCompile(`/pods/[^/]+/volumes/kubernetes\.io~empty-dir/([^/]+)$`)
	subPathRE     = regexp.MustCompile(`/pods/[^/]+/volume-subpaths/[^/]+/`)
	kubeletFileRE = regexp.MustCompile(`/pods/[^/]+/(etc-hosts$|containers/[^/]+/[^/]+$)`)
	terminationRE = regexp.MustCompile(`/pods/[^/]+/containers/[^/]+/[^/]+$`)
)

// criFiles are the files that containerd and CRI-O themselves bind into a container.
var criFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// Volume is one mount of a spec and how it reaches the guest.
type Volume struct {
	Kind Kind
	// Mount is the spec's.
	Mount specs.Mount
	// GuestPath is what the guest binds; empty for KindNone.
	GuestPath string
}

// Plan is what becomes of a spec's mounts.
type Plan struct {
	Volumes []Volume
	// TerminationSource is the node's file that takes the termination message, and
	// TerminationPath its path in the container; empty: none.
	TerminationSource, TerminationPath string
}

// New looks at every mount of a container's spec. What cannot be honoured is
// InvalidArgument. sandbox and container are ids.
func New(mounts []specs.Mount, sandbox, container string) (*Plan, error) {
	p := &Plan{}
	for _, m := range mounts {
		v, err := classify(m, sandbox, container)
		if err != nil {
			return nil, fmt.Errorf("volume at %s: %w", m.Destination, err)
		}
		if v.Kind == KindCopy && terminationRE.MatchString(m.Source) {
			p.TerminationSource, p.TerminationPath = m.Source, m.Destination
		}
		p.Volumes = append(p.Volumes, v)
	}
	return p, nil
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

func classify(m specs.Mount, sandbox, container string) (Volume, error) {
	v := Volume{Mount: m}
	if !isBind(m) {
		return v, nil
	}
	if m.Destination == "/dev/shm" {
		v.Kind, v.GuestPath = KindShm, ShmPath
		return v, nil
	}
	fi, err := os.Stat(m.Source)
	if err != nil {
		return v, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if e := emptyDirRE.FindStringSubmatch(m.Source); e != nil && fi.IsDir() {
		v.Kind, v.GuestPath = KindLocal, filepath.Join(sharedDir, sandbox, "rootfs/local", e[1])
		if isTmpfs(m.Source) {
			v.Kind, v.GuestPath = KindMemory, filepath.Join(ephemeralDir, e[1])
		}
		return v, nil
	}
	switch {
	case fi.IsDir() && projectedRE.MatchString(m.Source):
	case fi.Mode().IsRegular() && (kubeletFileRE.MatchString(m.Source) || slices.Contains(criFiles, m.Destination)):
	case fi.Mode().IsRegular() && slices.Contains(m.Options, "ro"):
	default:
		return v, refuse(m, fi)
	}
	var r [8]byte
	rand.Read(r[:])
	v.Kind = KindCopy
	v.GuestPath = filepath.Join(sharedDir, container+"-"+hex.EncodeToString(r[:])+"-"+filepath.Base(m.Destination))
	return v, nil
}

// refuse says what is wrong with a mount and what to do.
func refuse(m specs.Mount, fi os.FileInfo) error {
	what, fix := "the directory", "use an emptyDir, ConfigMap, Secret or projected volume, or network storage mounted from inside the pod"
	switch mode := fi.Mode(); {
	case mode&os.ModeSocket != 0:
		what, fix = "the socket", "reach the service over the network"
	case mode&os.ModeDevice != 0:
		what, fix = "the device", "remove it from the pod"
	case mode.IsRegular():
		what, fix = "the writable file", "mount it read-only, which gives the pod a copy"
	case subPathRE.MatchString(m.Source):
		what, fix = "the subPath directory", "mount the whole volume instead of a subPath of it"
	}
	shares := "shares no file system with it"
	if propagates(m) {
		shares += ", so no mount propagates between the two (mountPropagation)"
	}
	return fmt.Errorf("%s %s is on the node, and a pod VM %s: %s: %w", what, m.Source, shares, fix, errdefs.ErrInvalidArgument)
}

// propagates tells whether the pod asked for the node's mounts to appear in it, or its
// own on the node.
func propagates(m specs.Mount) bool {
	return slices.ContainsFunc(m.Options, func(o string) bool { return slices.Contains([]string{"rslave", "slave", "rshared", "shared"}, o) })
}

func isTmpfs(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// Mounts is the spec's mount list with the guest's sources.
func (p *Plan) Mounts() []specs.Mount {
	var out []specs.Mount
	for _, v := range p.Volumes {
		m := v.Mount
		if v.GuestPath != "" {
			m.Source = v.GuestPath
			m.Options = guestOptions(m.Options)
		}
		if v.Kind == KindShm {
			m.Type = "bind"
		}
		out = append(out, m)
	}
	return out
}

// guestOptions leaves out mount propagation: there is nothing of the node to
// propagate from, and the guest's own directories are private.
func guestOptions(in []string) []string {
	return slices.DeleteFunc(slices.Clone(in), func(o string) bool {
		return slices.Contains([]string{"rslave", "slave", "rshared", "shared"}, o)
	})
}

// Storages are the emptyDirs that the agent is to make, with the group that the
// kubelet gave to the directory on the node (fsGroup) and, for memory, its size.
func (p *Plan) Storages() ([]*agentpb.Storage, error) {
	var out []*agentpb.Storage
	for _, v := range p.Volumes {
		if v.Kind != KindLocal && v.Kind != KindMemory {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(v.Mount.Source, &st); err != nil {
			return nil, fmt.Errorf("volume at %s: stat %s: %w", v.Mount.Destination, v.Mount.Source, err)
		}
		s := &agentpb.Storage{MountPoint: v.GuestPath, Options: []string{"mode=" + strconv.FormatUint(uint64(st.Mode&0o7777), 8)}}
		if v.Kind == KindLocal {
			s.Driver, s.Source, s.Fstype = "local", "local", "local"
		} else {
			s.Driver, s.Source, s.Fstype = "ephemeral", "tmpfs", "tmpfs"
			if n := tmpfsSize(v.Mount.Source); n > 0 {
				s.Options = append(s.Options, "size="+strconv.FormatUint(n, 10))
			}
		}
		if st.Gid != 0 {
			s.Options = append(s.Options, "fsgid="+strconv.FormatUint(uint64(st.Gid), 10))
			s.FsGroup = &agentpb.FSGroup{GroupId: st.Gid}
		}
		out = append(out, s)
	}
	return out, nil
}

// tmpfsSize is the size limit of the tmpfs at path in bytes.
func tmpfsSize(path string) uint64 {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return 0
	}
	return st.Blocks * uint64(st.Bsize)
}

// Copy brings every KindCopy volume into the guest.
func (p *Plan) Copy(ctx context.Context, conn *guest.Conn) error {
	for _, v := range p.Volumes {
		if v.Kind != KindCopy {
			continue
		}
		if err := copyTree(ctx, conn, v.Mount.Source, v.GuestPath); err != nil {
			return fmt.Errorf("copy volume at %s (%s) to the pod VM: %w", v.Mount.Destination, strings.TrimSuffix(v.Mount.Source, "/"), err)
		}
	}
	return nil
}
