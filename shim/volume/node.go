// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
)

// The kubelet's directory layout (Kubernetes, pkg/kubelet/kubelet_getters.go): its
// root may be anywhere, what is below it is fixed.
var (
	projectedRE   = regexp.MustCompile(`/pods/[^/]+/volumes/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+$`)
	emptyDirRE    = regexp.MustCompile(`^(.*/pods/[^/]+)/volumes/kubernetes\.io~empty-dir/([^/]+)(?:/(.+))?$`)
	subPathRE     = regexp.MustCompile(`^(.*/pods/[^/]+)/volume-subpaths/[^/]+/`)
	namedRE       = regexp.MustCompile(`/pods/[^/]+/volumes?/([^/]+)/([^/]+)(?:/|$)`)
	kubeletFileRE = regexp.MustCompile(`/pods/[^/]+/(etc-hosts$|containers/[^/]+/[^/]+$)`)
	terminationRE = regexp.MustCompile(`/pods/[^/]+/containers/[^/]+/[^/]+$`)
)

// criFiles are the files that containerd and CRI-O themselves bind into a container.
var criFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// kernelFS are file systems that show the node's kernel.
var kernelFS = []int64{unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC}

// node is what is known of this machine while one spec is looked at.
type node struct {
	annotations map[string]string
	mounts      []mountPoint // read when they are needed
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

func readOnly(m specs.Mount) bool {
	return slices.Contains(m.Options, "ro") || slices.Contains(m.Options, "rro")
}

// classify decides how a mount reaches the guest. InvalidArgument: in no way.
func classify(n *node, m specs.Mount, features extension.Set) (Volume, error) {
	v := Volume{Mount: m}
	if !isBind(m) {
		return v, nil
	}
	source, err := n.origin(m.Source)
	if err != nil {
		return v, err
	}
	at := emptyDirRE.FindStringSubmatch(source)
	if at == nil && m.Destination == "/dev/shm" {
		v.Kind = KindShm
		return v, nil
	}
	fi, err := os.Stat(m.Source)
	if err != nil {
		return v, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(m.UIDMappings)+len(m.GIDMappings) > 0 {
		return v, refuse(m, fi, "its owners are to be mapped for a user namespace of the node", "remove hostUsers: false from the pod; a pod VM has users of its own anyway")
	}
	if propagates(m) {
		return v, refuse(m, fi, "mount propagation needs one", "remove mountPropagation from the volume mount")
	}
	if at != nil {
		v.dir, err = n.emptyDir(at[1], at[2], at[3], fi, features)
		if err == nil {
			v.Kind = KindLocal
			if v.dir.memory {
				v.Kind = KindMemory
			}
		}
		return v, err
	}
	v.Kind, err = n.copied(m, fi)
	return v, err
}

// copied decides on what is neither the guest's own nor an emptyDir.
func (n *node) copied(m specs.Mount, fi os.FileInfo) (Kind, error) {
	var fsinfo unix.Statfs_t
	if err := unix.Statfs(m.Source, &fsinfo); err != nil {
		return 0, fmt.Errorf("stat %s: %w: %w", m.Source, err, errdefs.ErrInvalidArgument)
	}
	ro := readOnly(m)
	switch {
	case slices.Contains(kernelFS, int64(fsinfo.Type)):
		return 0, refuse(m, fi, "it shows the node's kernel, which is not the pod's", "remove it from the pod")
	case fi.IsDir() && (ro || projectedRE.MatchString(m.Source)):
		if _, err := revisionOf(m.Source); err == nil {
			return KindFollowed, nil
		}
		return KindTree, n.noWritableMounts(m, fi)
	case fi.Mode().IsRegular() && (ro || kubeletFileRE.MatchString(m.Source) || slices.Contains(criFiles, m.Destination)):
		return KindFile, nil
	}
	return 0, refuse(m, fi, "", "")
}

// noWritableMounts refuses a directory in which other file systems are mounted that
// the container could write to: a mount that is read-only, but not recursively so,
// leaves those below it as they are.
func (n *node) noWritableMounts(m specs.Mount, fi os.FileInfo) error {
	if slices.Contains(m.Options, "rro") {
		return nil
	}
	if err := n.readMounts(); err != nil {
		return err
	}
	for _, p := range n.mounts {
		if strings.HasPrefix(p.path, strings.TrimSuffix(m.Source, "/")+"/") && !p.readOnly {
			return refuse(m, fi, "in it "+p.path+" is mounted, which the pod could write to", "mount it with recursiveReadOnly, which gives the pod a copy, or name a directory without mounts")
		}
	}
	return nil
}

// refuse says what is wrong with a mount and what to do. why and fix may be empty.
func refuse(m specs.Mount, fi os.FileInfo, why, fix string) error {
	what, other := "the directory", "use an emptyDir, ConfigMap, Secret or projected volume, or network storage mounted from inside the pod; mounted read-only, a small directory is copied"
	switch mode := fi.Mode(); {
	case mode&os.ModeSocket != 0:
		what, other = "the socket", "reach the service over the network"
	case mode&os.ModeDevice != 0:
		what, other = "the device", "remove it from the pod"
	case mode.IsRegular():
		what, other = "the writable file", "mount it read-only, which gives the pod a copy"
		if readOnly(m) {
			what = "the file"
		}
	case mode&os.ModeNamedPipe != 0:
		what, other = "the pipe", "reach the other process over the network"
	}
	what += " " + m.Source
	if named := namedRE.FindStringSubmatch(m.Source); named != nil {
		what += fmt.Sprintf(" (volume %q, %s)", named[2], named[1])
	}
	if fix == "" {
		fix = other
	}
	if why != "" {
		why = " (" + why + ")"
	}
	return fmt.Errorf("%s is on the node, and a pod VM shares no file system with it%s: %s: %w", what, why, fix, errdefs.ErrInvalidArgument)
}

// revisionOf is the directory that a volume's "..data" names. It is an error unless
// the volume has the shape that the kubelet's writer gives it.
func revisionOf(volume string) (string, error) {
	name, err := os.Readlink(filepath.Join(volume, "..data"))
	if err != nil {
		return "", err
	}
	if len(name) <= 2 || !strings.HasPrefix(name, "..") || strings.Contains(name, "/") {
		return "", fmt.Errorf("%s/..data names %q, which is no revision: %w", volume, name, errdefs.ErrInvalidArgument)
	}
	return name, nil
}

// mountPoint is a line of mountinfo (proc(5)).
type mountPoint struct {
	device   string // major:minor
	root     string // of the mount within its file system
	path     string
	readOnly bool
}

func (n *node) readMounts() error {
	if n.mounts != nil {
		return nil
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	n.mounts = parseMounts(string(b))
	return nil
}

func parseMounts(info string) (out []mountPoint) {
	for line := range strings.Lines(info) {
		f := strings.Fields(line)
		if len(f) < 6 {
			continue
		}
		out = append(out, mountPoint{device: f[2], root: unescape(f[3]), path: unescape(f[4]), readOnly: slices.Contains(strings.Split(f[5], ","), "ro")})
	}
	return out
}

var octal = regexp.MustCompile(`\\[0-7]{3}`)

func unescape(s string) string {
	return octal.ReplaceAllStringFunc(s, func(e string) string {
		c, _ := strconv.ParseUint(e[1:], 8, 8)
		return string([]byte{byte(c)})
	})
}

// origin is the path in a volume that a subPath of the kubelet's was bound from. The
// kubelet binds subPaths to pods/<uid>/volume-subpaths/<volume>/<container>/<index>,
// and only the kernel knows what is behind it. Any other path is its own origin, and
// so is a subPath of anything but an emptyDir: it is copied, wherever it is.
func (n *node) origin(source string) (string, error) {
	at := subPathRE.FindStringSubmatch(source)
	if at == nil {
		return source, nil
	}
	if err := n.readMounts(); err != nil {
		return "", err
	}
	i := slices.IndexFunc(n.mounts, func(p mountPoint) bool { return p.path == source })
	if i < 0 {
		return source, nil
	}
	// The last of several mounts is the one that is seen.
	for j := i + 1; j < len(n.mounts); j++ {
		if n.mounts[j].path == source {
			i = j
		}
	}
	bound := n.mounts[i]
	for _, p := range n.mounts {
		if p.device != bound.device {
			continue
		}
		rel, err := filepath.Rel(p.root, bound.root)
		if err != nil || !filepath.IsLocal(rel) {
			continue
		}
		// Of this pod only: the same file system may be seen in other places.
		if path := filepath.Join(p.path, rel); strings.HasPrefix(path, at[1]+"/") && emptyDirRE.MatchString(path) {
			return path, nil
		}
	}
	return source, nil
}

// hasContent tells whether there is anything but directories in a directory. The
// kubelet makes directories in an emptyDir for subPaths.
func hasContent(dir string) (bool, error) {
	found := errors.New("found")
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			return found
		}
		return err
	})
	if errors.Is(err, found) {
		return true, nil
	}
	return false, err
}
