// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

const (
	// codeCacheMiB bounds the translated code of an emulated VM. QEMU's own bound
	// is 1 GiB, which no limit of ours would then account for. A boot of Debian's
	// kernel fills 42 MiB.
	codeCacheMiB = 128
	// qemuOverheadMiB is what a QEMU takes beyond its guest's memory: the code
	// cache, and program, heap and stacks. These are 43 MiB on 7.2 with a booted
	// guest (2026-11-21; another 32 are the kernel's file, which all VMs share).
	qemuOverheadMiB = codeCacheMiB + 64
	// reserveMiB stays free for the node: its kernel, kubelet, container runtime
	// and adaptor need room when pods grow.
	reserveMiB = 256
)

// nodeLimits are what this node can carry, in MiB and CPUs.
type nodeLimits struct {
	total  int // memory that VMs could ever have
	free   int // memory that could be had now
	source string
	cpus   int
}

// readLimits looks at the node, and at the memory cgroup of this process, since
// QEMU inherits it.
func readLimits(root string, cpus int) (nodeLimits, error) {
	info, err := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return nodeLimits{}, err
	}
	mem := map[string]int{}
	sc := bufio.NewScanner(bytes.NewReader(info))
	for sc.Scan() {
		key, rest, _ := strings.Cut(sc.Text(), ":")
		if f := strings.Fields(rest); len(f) > 0 {
			if n, err := strconv.Atoi(f[0]); err == nil {
				mem[key] = n / 1024
			}
		}
	}
	if mem["MemTotal"] == 0 {
		return nodeLimits{}, errors.New("/proc/meminfo has no MemTotal")
	}
	l := nodeLimits{total: mem["MemTotal"], free: mem["MemAvailable"], source: "the node", cpus: cpus}
	cg, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return nodeLimits{}, err
	}
	for _, dir := range memoryCgroups(root, string(cg)) {
		limit, used, ok := cgroupMemory(dir)
		if !ok {
			continue
		}
		if limit < l.total {
			l.total, l.source = limit, "the cgroup "+strings.TrimPrefix(dir, root)
		}
		if free := limit - used; free < l.free {
			l.free, l.source = free, "the cgroup "+strings.TrimPrefix(dir, root)
		}
	}
	return l, nil
}

// memoryCgroups lists the directories that may hold a memory limit of this
// process, its own group and all above it; version 1 and 2. Inside a cgroup
// namespace, or with a group of the host mounted at the root, the group's own
// directory may be missing: what exists is read.
func memoryCgroups(root, self string) []string {
	var out []string
	for line := range strings.SplitSeq(strings.TrimSpace(self), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 {
			continue
		}
		var base string
		switch {
		case f[0] == "0" && f[1] == "":
			base = filepath.Join(root, "sys/fs/cgroup")
		case strings.Contains(","+f[1]+",", ",memory,"):
			base = filepath.Join(root, "sys/fs/cgroup/memory")
		default:
			continue
		}
		for p := filepath.Clean("/" + f[2]); ; p = filepath.Dir(p) {
			out = append(out, filepath.Join(base, p))
			if p == "/" {
				break
			}
		}
	}
	return out
}

// cgroupMemory reads limit and use in MiB; page cache that the kernel can drop
// does not count as use. False: no limit here.
func cgroupMemory(dir string) (limit, used int, ok bool) {
	read := func(name string) (int, bool) {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return 0, false
		}
		n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		if err != nil || n > 1<<60 { // "max", or version 1's 2^63 less a page
			return 0, false
		}
		return int(n >> 20), true
	}
	for _, v := range [][2]string{{"memory.max", "memory.current"}, {"memory.limit_in_bytes", "memory.usage_in_bytes"}} {
		limit, okLimit := read(v[0])
		used, okUsed := read(v[1])
		if okLimit && okUsed {
			return limit, max(0, used-fileCache(dir)), true
		}
	}
	return 0, 0, false
}

func fileCache(dir string) int {
	b, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		name, value, _ := strings.Cut(line, " ")
		if name == "inactive_file" || name == "total_inactive_file" {
			if n, err := strconv.Atoi(value); err == nil {
				return n >> 20
			}
		}
	}
	return 0
}

// fits checks a plan against the bare node.
func (l nodeLimits) fits(plan cloud.Plan) error {
	if plan.VCPUs > l.cpus {
		return fmt.Errorf("%d vCPUs do not fit this node, which has %d CPUs; ask for fewer (annotation io.katacontainers.config.hypervisor.default_vcpus, or LOCAL_VCPUS): %w",
			plan.VCPUs, l.cpus, errdefs.ErrResourceExhausted)
	}
	if most := l.total - reserveMiB - qemuOverheadMiB; plan.MemoryMiB > most {
		return fmt.Errorf("%d MiB memory do not fit this node: %s has %d MiB, of which a VM can have at most %d; ask for less (annotation io.katacontainers.config.hypervisor.default_memory, or LOCAL_MEMORY): %w",
			plan.MemoryMiB, l.source, l.total, max(most, 0), errdefs.ErrResourceExhausted)
	}
	return nil
}

// admit checks a plan against what the other instances have and may still take.
func (l nodeLimits) admit(plan cloud.Plan, others []*record, overcommit int) error {
	vcpus, promised := 0, 0
	for _, r := range others {
		vcpus += r.Plan.VCPUs
		promised += max(0, r.Plan.MemoryMiB+qemuOverheadMiB-residentMiB(r.Process))
	}
	if most := l.cpus * overcommit; vcpus+plan.VCPUs > most {
		return fmt.Errorf("%d vCPUs do not fit: %d instances have %d of the %d vCPUs that this node with %d CPUs carries; delete pods or ask for fewer (annotation io.katacontainers.config.hypervisor.default_vcpus, or LOCAL_VCPUS): %w",
			plan.VCPUs, len(others), vcpus, most, l.cpus, errdefs.ErrResourceExhausted)
	}
	if free := l.free - promised - reserveMiB; plan.MemoryMiB+qemuOverheadMiB > free {
		return fmt.Errorf("%d MiB memory and %d for QEMU do not fit: %s has %d MiB available, %d instances may still take %d and %d stay reserved; delete pods, ask for less, or use a larger node: %w",
			plan.MemoryMiB, qemuOverheadMiB, l.source, l.free, len(others), promised, reserveMiB, errdefs.ErrResourceExhausted)
	}
	return nil
}

// residentMiB is what a process holds now; 0 when it does not run.
func residentMiB(p process) int {
	if !p.alive() {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.PID))
	if errors.Is(err, fs.ErrNotExist) || err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, err := strconv.Atoi(f[1])
	if err != nil {
		return 0
	}
	return pages * os.Getpagesize() >> 20
}
