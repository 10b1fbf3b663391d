// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// Snapshot is all of a node that a pod may touch, as lines of text.
type Snapshot []string

// TakeSnapshot looks at the node. Inside testbed.Isolate this sees nothing of the
// machine around it.
func TakeSnapshot() (Snapshot, error) {
	var s Snapshot
	var errs []error
	for _, part := range []func() ([]string, error){processes, links, mounts, files, firewall} {
		lines, err := part()
		s, errs = append(s, lines...), append(errs, err)
	}
	slices.Sort(s)
	return s, errors.Join(errs...)
}

// Beyond lists what is in s and not in before.
func (s Snapshot) Beyond(before Snapshot) []string {
	have := map[string]int{}
	for _, l := range before {
		have[l]++
	}
	var more []string
	for _, l := range s {
		if have[l]--; have[l] < 0 {
			more = append(more, l)
		}
	}
	return more
}

// leftBehind tells what the node has now that it did not have before.
func leftBehind(before Snapshot) error {
	now, err := TakeSnapshot()
	if err != nil {
		return err
	}
	if more := now.Beyond(before); len(more) > 0 {
		return fmt.Errorf("left behind: %q", more)
	}
	return nil
}

// processes lists every process by its command line. Threads of the kernel have
// none.
func processes() ([]string, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, d := range dirs {
		if _, err := strconv.Atoi(d.Name()); err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", d.Name(), "cmdline"))
		if err != nil || len(b) == 0 {
			continue // ended meanwhile, or a zombie that is being reaped
		}
		out = append(out, "process "+strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " ")))
	}
	return out, nil
}

func links() ([]string, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, l := range all {
		out = append(out, fmt.Sprintf("link %s (%s)", l.Attrs().Name, l.Type()))
	}
	return out, nil
}

func mounts() ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			out = append(out, "mount "+f[4])
		}
	}
	return out, nil
}

// roots are where the product and what it serves keep files on a node.
var roots = []string{"/run/netns", "/run/peerpod", "/run/containerd", "/run/containerd-testbed/state", "/var/lib/peerpod", "/var/lib/cni", "/run/vc", "/run/kata-containers"}

// keeps tells files that stay by design: the adaptor's own, which are not of a pod;
// the provider's answer to whether KVM works; the serial logs kept for inspection;
// host-local's note of the address it gave last.
func keeps(path string) bool {
	for _, p := range []string{"/var/lib/peerpod/adaptor.db", "/run/peerpod/hypervisor.sock", "/var/lib/peerpod/local/"} {
		if path == p || strings.HasPrefix(path, p) && strings.HasSuffix(p, "/") && !strings.Contains(path, "/instances/") {
			return true
		}
	}
	return strings.HasPrefix(filepath.Base(path), "last_reserved_ip") || filepath.Base(path) == "lock"
}

func files() ([]string, error) {
	var out []string
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case !d.IsDir() && !keeps(path):
				out = append(out, "file "+path)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// firewall lists nftables' tables; the CNI plugins' iptables rules are tables of
// their own that stay.
func firewall() ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list nftables: %w", err)
	}
	var out []string
	for _, t := range tables {
		if strings.Contains(t.Name, "peerpod") {
			out = append(out, fmt.Sprintf("nftables table %s", t.Name))
		}
	}
	return out, nil
}
