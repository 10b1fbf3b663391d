// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// groupPrefix begins the names of our cgroups. For those of a node the process id of
// the program that made them follows.
const groupPrefix = "kata-remote-node-"

// Cgroups are one group of ours in each hierarchy of this machine, to be the roots of
// a cgroup namespace. Not safe for concurrent use.
type Cgroups []cgroup

type cgroup struct {
	home string // where this process was
	ours string
}

// hierarchies lists this process's group in each hierarchy: controllers as in
// /proc/self/cgroup, and the folder below /sys/fs/cgroup.
func hierarchies() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			return nil, fmt.Errorf("/proc/self/cgroup: unexpected line %q", line)
		}
		switch {
		case f[1] != "":
			dir := strings.TrimPrefix(f[1], "name=")
			m[f[1]] = filepath.Join("/sys/fs/cgroup", dir, f[2])
		default:
			for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
				var fs unix.Statfs_t
				if unix.Statfs(root, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
					m[""] = filepath.Join(root, f[2])
					break
				}
			}
		}
	}
	return m, nil
}

// newCgroups makes a node's groups and removes those of dead programs.
func newCgroups() (Cgroups, error) {
	removeStaleCgroups()
	return NewCgroups(strconv.Itoa(os.Getpid()))
}

// NewCgroups makes groups below those of this process, whose names end as told.
func NewCgroups(name string) (Cgroups, error) {
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var gs Cgroups
	for hierarchy, home := range hs {
		g := cgroup{home, filepath.Join(home, groupPrefix+name)}
		if err := os.Mkdir(g.ours, 0o755); err != nil {
			gs.Remove()
			return nil, fmt.Errorf("make a cgroup in hierarchy %q: %w", hierarchy, err)
		}
		gs = append(gs, g)
		// A new cpuset group has no processors and no memory until it is given some.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(home, file)); err == nil && hierarchy == "cpuset" {
				if err := os.WriteFile(filepath.Join(g.ours, file), b, 0); err != nil {
					gs.Remove()
					return nil, err
				}
			}
		}
		for file, value := range map[string]string{"cgroup.clone_children": "1", "memory.use_hierarchy": "1"} {
			if (hierarchy == "cpuset") == strings.HasPrefix(file, "cgroup.") {
				os.WriteFile(filepath.Join(g.ours, file), []byte(value), 0) // not in every kernel
			}
		}
	}
	return gs, nil
}

// Enter moves this process into the groups, Leave back to where it was: a process
// started in between is born in them, and a cgroup namespace has them as its roots.
func (gs Cgroups) Enter() error { return gs.move(func(g cgroup) string { return g.ours }) }

// Leave undoes Enter.
func (gs Cgroups) Leave() error { return gs.move(func(g cgroup) string { return g.home }) }

func (gs Cgroups) move(to func(cgroup) string) error {
	var errs []error
	for _, g := range gs {
		errs = append(errs, os.WriteFile(filepath.Join(to(g), "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0))
	}
	return errors.Join(errs...)
}

// Remove removes the groups. One that still has processes stays.
func (gs Cgroups) Remove() {
	for _, g := range gs {
		removeTree(g.ours)
	}
}

// removeTree removes a group and those below it; a group with processes stays.
func removeTree(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	unix.Rmdir(dir)
}

// removeStaleCgroups removes the groups of programs that were killed. A tree that has
// a process anywhere stays whole: a kubelet keeps groups in it in which none runs.
func removeStaleCgroups() {
	hs, err := hierarchies()
	if err != nil {
		return
	}
	for _, home := range hs {
		dirs, _ := filepath.Glob(filepath.Join(home, groupPrefix+"*"))
		for _, d := range dirs {
			// Its maker may be about to enter it.
			maker := strings.TrimPrefix(filepath.Base(d), groupPrefix)
			if _, err := os.Stat(filepath.Join("/proc", maker)); err == nil || hasProcess(d) {
				continue
			}
			removeTree(d)
		}
	}
}

// hasProcess tells whether a process is in a group or in one below it. What cannot be
// read counts as one.
func hasProcess(dir string) bool {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil || len(b) > 0 {
		return !errors.Is(err, os.ErrNotExist)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	for _, e := range entries {
		if e.IsDir() && hasProcess(filepath.Join(dir, e.Name())) {
			return true
		}
	}
	return false
}

// MountCgroups mounts every hierarchy again below /sys/fs/cgroup, seen from the cgroup
// namespace of this process.
func MountCgroups() error {
	hs, err := hierarchies()
	if err != nil {
		return err
	}
	if _, v2only := hs[""]; v2only && len(hs) == 1 {
		return unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
	}
	for name := range hs {
		if name == "" {
			continue // the unified hierarchy beside v1 holds no controller that containers use
		}
		dir := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(name, "name="))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		data := name
		if strings.HasPrefix(name, "name=") {
			data = "none," + name
		}
		if err := unix.Mount("cgroup", dir, "cgroup", 0, data); err != nil {
			return fmt.Errorf("mount cgroup %s: %w", name, err)
		}
	}
	return nil
}
