// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// protocolVersion is what kata-agents answer to Version as grpc_version.
const protocolVersion = "0.0.1"

// health is grpc.Health.
type health struct{ a *Agent }

var _ agentpb.HealthService = (*health)(nil)

func (h *health) Check(context.Context, *agentpb.CheckRequest) (*agentpb.HealthCheckResponse, error) {
	return &agentpb.HealthCheckResponse{Status: agentpb.HealthCheckResponse_SERVING}, nil
}

func (h *health) Version(context.Context, *agentpb.CheckRequest) (*agentpb.VersionCheckResponse, error) {
	return &agentpb.VersionCheckResponse{GrpcVersion: protocolVersion, AgentVersion: h.a.cfg.Version}, nil
}

// GetGuestDetails tells what this agent can do. Memory is not hot plugged, so it
// never says that it could be.
func (s *service) GetGuestDetails(_ context.Context, req *agentpb.GuestDetailsRequest) (*agentpb.GuestDetailsResponse, error) {
	d := &agentpb.AgentDetails{
		Version:         s.a.cfg.Version,
		InitDaemon:      os.Getpid() == 1,
		SupportsSeccomp: seccomp.Enabled,
		StorageHandlers: storageDriverNames(),
		ExtraFeatures:   []string{string(extension.Rootfs), string(extension.Streams), string(extension.Pause), string(extension.Volumes), string(extension.Forward)},
	}
	if s.a.cfg.Notices != nil {
		d.ExtraFeatures = append(d.ExtraFeatures, string(extension.Notice))
	}
	r := &agentpb.GuestDetailsResponse{AgentDetails: d}
	if req.MemBlockSize {
		var err error
		if r.MemBlockSizeBytes, err = memoryBlock(memoryBlockFile); err != nil {
			return nil, toGRPC(err)
		}
	}
	return r, nil
}

// memoryBlockFile has the size of the blocks in which memory could be plugged, in
// hexadecimal bytes (Linux, Documentation/admin-guide/mm/memory-hotplug.rst).
const memoryBlockFile = "/sys/devices/system/memory/block_size_bytes"

// memoryBlock reads it; 0: this kernel plugs no memory.
func memoryBlock(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the size of memory blocks: %w", err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 16, 64)
	if err != nil {
		return 0, fmt.Errorf("read the size of memory blocks: %s: %w", path, err)
	}
	return n, nil
}

// SetPolicy fails. This agent evaluates no policies: Rego's interpreter would double
// podvmd and delay the start of every pod for the few that have one. A runtime sends
// one where its user asked for it to be enforced, so that a pod without is worse than
// none.
func (s *service) SetPolicy(context.Context, *agentpb.SetPolicyRequest) (*emptypb.Empty, error) {
	return empty(fmt.Errorf("this guest's agent evaluates no policies and would enforce none: remove the annotation io.katacontainers.config.agent.policy from the pod, or use a pod VM image with an agent that has the feature: %w", errdefs.ErrFailedPrecondition))
}

// rndReseedCRNG is RNDRESEEDCRNG of linux/random.h: _IO('R', 0x07).
const rndReseedCRNG = 0x5207

// ReseedRandomDev mixes data into the kernel's random number generator.
func (s *service) ReseedRandomDev(_ context.Context, req *agentpb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return empty(fmt.Errorf("reseed: %w", err))
	}
	defer f.Close()
	if _, err := f.Write(req.Data); err != nil {
		return empty(fmt.Errorf("reseed: %w", err))
	}
	if err := unix.IoctlSetInt(int(f.Fd()), rndReseedCRNG, 0); err != nil {
		return empty(fmt.Errorf("reseed: %w", err))
	}
	return empty(nil)
}

// moduleLoaders are where a guest has modprobe, if it has it. That of the image which
// this repository builds knows the image's few modules, and no parameters.
var moduleLoaders = []string{"/usr/sbin/modprobe", "/sbin/modprobe"}

// loadModules makes sure that kernel modules are there, with modprobe where the guest
// has it. One that is there already, without parameters, needs nothing.
// FailedPrecondition: the guest cannot load it.
func loadModules(ctx context.Context, modules []*agentpb.KernelModule) error {
	for _, m := range modules {
		if !moduleName.MatchString(m.Name) {
			return fmt.Errorf("kernel module %q: that is no name of one: %w", m.Name, errdefs.ErrInvalidArgument)
		}
		if _, err := os.Stat("/sys/module/" + strings.ReplaceAll(m.Name, "-", "_")); err == nil && len(m.Parameters) == 0 {
			continue
		}
		i := slices.IndexFunc(moduleLoaders, func(path string) bool { _, err := os.Stat(path); return err == nil })
		if i < 0 {
			return fmt.Errorf("kernel module %s: the guest has no modprobe; take it out of kernel_modules, or use a pod VM image that has it: %w", m.Name, errdefs.ErrFailedPrecondition)
		}
		out, err := exec.CommandContext(ctx, moduleLoaders[i], append([]string{"--", m.Name}, m.Parameters...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("kernel module %s: the guest cannot load it with parameters %q: modprobe: %w: %s: %w", m.Name, m.Parameters, err, bytes.TrimSpace(out), errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// moduleName keeps an option of modprobe from passing for a module.
var moduleName = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_-]*$`)
