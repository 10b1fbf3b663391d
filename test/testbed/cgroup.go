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

// groupPrefix begins the names of our cgroups; the process id of the program that
// made them follows, so that those of a dead one can be told.
const groupPrefix = "kata-remote-testbed-"

// cgroups are one group of ours in each hierarchy of this machine.
type cgroups []cgroup

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

// newCgroups makes the groups and removes those of dead programs.
func newCgroups() (cgroups, error) {
	removeStaleCgroups()
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var gs cgroups
	for name, home := range hs {
		g := cgroup{home, filepath.Join(home, groupPrefix+strconv.Itoa(os.Getpid()))}
		if err := os.Mkdir(g.ours, 0o755); err != nil {
			gs.remove()
			return nil, fmt.Errorf("make a cgroup in hierarchy %q: %w", name, err)
		}
		gs = append(gs, g)
		// A new cpuset group has no processors and no memory until it is given some.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(home, file)); err == nil && name == "cpuset" {
				if err := os.WriteFile(filepath.Join(g.ours, file), b, 0); err != nil {
					gs.remove()
					return nil, err
				}
			}
		}
		for file, value := range map[string]string{"cgroup.clone_children": "1", "memory.use_hierarchy": "1"} {
			if (name == "cpuset") == strings.HasPrefix(file, "cgroup.") {
				os.WriteFile(filepath.Join(g.ours, file), []byte(value), 0) // not in every kernel
			}
		}
	}
	return gs, nil
}

func (gs cgroups) enter() error { return gs.move(func(g cgroup) string { return g.ours }) }
func (gs cgroups) leave() error { return gs.move(func(g cgroup) string { return g.home }) }

func (gs cgroups) move(to func(cgroup) string) error {
	var errs []error
	for _, g := range gs {
		errs = append(errs, os.WriteFile(filepath.Join(to(g), "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0))
	}
	return errors.Join(errs...)
}

func (gs cgroups) remove() {
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

// removeStaleCgroups removes the groups of programs that were killed. A group that
// still has processes cannot be removed, so this ends nobody's work.
func removeStaleCgroups() {
	hs, err := hierarchies()
	if err != nil {
		return
	}
	for _, home := range hs {
		dirs, _ := filepath.Glob(filepath.Join(home, groupPrefix+"*"))
		for _, d := range dirs {
			removeTree(d)
		}
	}
}

// mountCgroups mounts every hierarchy again, seen from the new cgroup namespace.
func mountCgroups() error {
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
