// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/apparmor"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/configs/validate"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
)

// placement is what the pod adds to the spec of one of its containers.
type placement struct {
	ipc, uts string // namespaces of the sandbox
	net      string // the pod's network namespace; empty: the agent's
	pid      string // pid namespace to share; empty: a new one
	cgroup   string // absolute cgroup path
	hostname bool   // the sandbox's hostname is set and the spec's must not replace it
}

// libConfig checks a spec and turns it into libcontainer's configuration.
// InvalidArgument: something the spec's author can change; FailedPrecondition: a
// seccomp profile where this build has no seccomp.
func libConfig(spec *specs.Spec, in placement) (*configs.Config, error) {
	switch {
	case spec.Root == nil || spec.Root.Path == "":
		return nil, fmt.Errorf("OCI.Root.Path is empty, and only the pod's sandbox container, as its annotations say, runs without a root file system: %w", errdefs.ErrInvalidArgument)
	case !filepath.IsAbs(spec.Root.Path):
		return nil, fmt.Errorf("OCI.Root.Path %q is not an absolute path: %w", spec.Root.Path, errdefs.ErrInvalidArgument)
	case spec.Process == nil || len(spec.Process.Args) == 0:
		return nil, fmt.Errorf("the spec's process.args is empty: %w", errdefs.ErrInvalidArgument)
	case spec.Linux != nil && spec.Linux.Seccomp != nil && !seccomp.Enabled:
		return nil, fmt.Errorf("the spec has a seccomp profile and this agent is built without seccomp; leave linux.seccomp out: %w", errdefs.ErrFailedPrecondition)
	}
	if err := checkSeccomp(spec.Linux); err != nil {
		return nil, err
	}
	if st, err := os.Stat(spec.Root.Path); err != nil || !st.IsDir() {
		return nil, fmt.Errorf("the guest has no root file system at %s (root.path); import it first: %w", spec.Root.Path, errdefs.ErrInvalidArgument)
	}
	if spec.Linux == nil {
		spec.Linux = &specs.Linux{}
	}
	place(spec, in)
	// Profiles and labels belong to the node: a guest that does not have the module
	// cannot apply them, and the machine around the pod does more than they would.
	if !apparmor.IsEnabled() {
		spec.Process.ApparmorProfile = ""
	}
	if !selinux.GetEnabled() {
		spec.Process.SelinuxLabel, spec.Linux.MountLabel = "", ""
	}
	cfg, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{Spec: spec, NoNewKeyring: true})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if cfg.Rlimits, err = rlimits(spec.Process.Rlimits); err != nil {
		return nil, err
	}
	cfg.AppArmorProfile = spec.Process.ApparmorProfile
	if cfg.Umask == nil {
		// What libcontainer gives a first process; so that one added has the same.
		mask := uint32(defaultUmask)
		cfg.Umask = &mask
	}
	if adj, err := ownOOMScoreAdj(); cfg.OomScoreAdj == nil && err == nil && adj != 0 {
		// The protocol has no presence: 0 is what was asked for, and not inherited.
		zero := 0
		cfg.OomScoreAdj = &zero
	}
	// libcontainer does this too, where its errors are no longer told from others.
	if err := validate.Validate(cfg); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return cfg, nil
}

const defaultUmask = 0o022

// ownOOMScoreAdj is what the agent was given: by systemd, say, that it be spared.
func ownOOMScoreAdj() (int, error) {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// checkSeccomp refuses a profile that wants a program of the node to decide.
func checkSeccomp(l *specs.Linux) error {
	if l == nil || l.Seccomp == nil {
		return nil
	}
	notify := l.Seccomp.DefaultAction == specs.ActNotify
	for _, s := range l.Seccomp.Syscalls {
		notify = notify || s.Action == specs.ActNotify
	}
	if notify {
		return fmt.Errorf("the seccomp profile has the action %s, which asks a program of the node, and that cannot look into a pod VM: use %s instead: %w", specs.ActNotify, specs.ActErrno, errdefs.ErrInvalidArgument)
	}
	return nil
}

// place puts the container into its namespaces and its cgroup.
func place(spec *specs.Spec, in placement) {
	// With one cgroup hierarchy a container sees the limits that are its own at the
	// root, where programs look for them.
	cgroupNS, userNS := cgroups.IsCgroup2UnifiedMode(), false
	for _, ns := range spec.Linux.Namespaces {
		cgroupNS = cgroupNS || ns.Type == specs.CgroupNamespace
		userNS = userNS || ns.Type == specs.UserNamespace && len(spec.Linux.UIDMappings) > 0
	}
	// Paths in the spec are the node's. Network and time namespaces are the pod's
	// affair; the others are always there.
	spec.Linux.Namespaces = []specs.LinuxNamespace{
		{Type: specs.MountNamespace},
		{Type: specs.PIDNamespace, Path: in.pid},
		{Type: specs.IPCNamespace, Path: in.ipc},
		{Type: specs.UTSNamespace, Path: in.uts},
	}
	if in.net != "" {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: in.net})
	}
	if cgroupNS {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	if userNS {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	}
	spec.Linux.CgroupsPath = in.cgroup
	if in.hostname {
		spec.Hostname = ""
	}
}

// rlimitTypes are the names of setrlimit(2).
var rlimitTypes = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

func rlimits(in []specs.POSIXRlimit) ([]configs.Rlimit, error) {
	var out []configs.Rlimit
	for _, r := range in {
		t, ok := rlimitTypes[r.Type]
		if !ok {
			return nil, fmt.Errorf("process.rlimits has the unknown type %q: %w", r.Type, errdefs.ErrInvalidArgument)
		}
		out = append(out, configs.Rlimit{Type: t, Hard: r.Hard, Soft: r.Soft})
	}
	return out, nil
}
