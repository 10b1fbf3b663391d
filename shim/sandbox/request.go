// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/shim/spec"
)

// guestMiB is what a machine has beside the limits of its pod's containers, where no
// annotation says otherwise: for its kernel, the agent and the containers' root file
// systems. kata's runtime adds its configuration's default_memory in this place.
const guestMiB = 512

// initDataMax bounds what cc_init_data may unpack to.
const initDataMax = 1 << 20

// passed are kata's annotations that a pod may have and that CreateVM takes.
var passed = []string{
	annotation.MachineType, annotation.Image, annotation.DefaultVCPUs, annotation.DefaultMemory,
	annotation.DefaultGPUs, annotation.DefaultGPUModel, annotation.InitData,
}

// vmAnnotations are the nine that CreateVM carries, always all of them, as kata's
// runtime sends them (kata-containers 4.1, virtcontainers/remote.go): the pod's name and namespace, and what shapes
// the virtual machine, the sum of the containers' limits included (pkg/oci/utils.go).
func vmAnnotations(s *specs.Spec, role spec.Role, id string) (map[string]string, error) {
	in := s.Annotations
	for k := range in {
		if strings.HasPrefix(k, annotation.HypervisorPrefix) && !slices.Contains(passed, k) {
			return nil, fmt.Errorf("annotation %s is not supported by the remote hypervisor: remove it from the pod: %w", k, errdefs.ErrInvalidArgument)
		}
	}
	out := map[string]string{
		annotation.SandboxName:      first(in[annotation.SandboxName], in[annotation.CRIOSandboxName]),
		annotation.SandboxNamespace: first(in[annotation.SandboxNamespace], in[annotation.CRIOSandboxNamespace]),
	}
	if role == spec.RoleSingle { // a client that knows no pods; adaptors insist on both
		out[annotation.SandboxName] = first(out[annotation.SandboxName], id)
		out[annotation.SandboxNamespace] = first(out[annotation.SandboxNamespace], "default")
	}
	for _, k := range passed {
		out[k] = in[k]
	}
	vcpus, mib, err := size(s, role)
	if err != nil {
		return nil, err
	}
	for key, more := range map[string]uint64{annotation.DefaultVCPUs: vcpus, annotation.DefaultMemory: mib} {
		base, err := decimal(in, key)
		if err != nil {
			return nil, err
		}
		if key == annotation.DefaultMemory && in[key] == "" && more > 0 {
			base = guestMiB
		}
		out[key] = strconv.FormatUint(base+more, 10)
	}
	gpus, err := decimal(in, annotation.DefaultGPUs)
	if err != nil {
		return nil, err
	}
	out[annotation.DefaultGPUs] = strconv.FormatUint(gpus, 10)
	if v := in[annotation.InitData]; v != "" {
		if out[annotation.InitData], err = decodeInitData(v); err != nil {
			return nil, fmt.Errorf("annotation %s is not base64 of gzip: %w: %w", annotation.InitData, err, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

func first(list ...string) string {
	for _, s := range list {
		if s != "" {
			return s
		}
	}
	return ""
}

// size is what the containers may use together: of a pod by the annotations that
// containerd sums up, of a single container by its own limits. A CPU share without
// a quota counts as its request, 1024 being one CPU.
func size(s *specs.Spec, role spec.Role) (vcpus, mib uint64, err error) {
	var quota, period, shares, memory int64
	if role == spec.RoleSingle {
		if r := s.Linux.Resources; r != nil {
			if c := r.CPU; c != nil {
				quota, period = value(c.Quota), int64(value(c.Period))
			}
			if m := r.Memory; m != nil {
				memory = value(m.Limit)
			}
		}
	} else {
		for key, p := range map[string]*int64{
			annotation.SandboxCPUQuota: &quota, annotation.SandboxCPUPeriod: &period,
			annotation.SandboxCPUShares: &shares, annotation.SandboxMemory: &memory,
		} {
			v := s.Annotations[key]
			if v == "" {
				continue
			}
			if *p, err = strconv.ParseInt(v, 10, 64); err != nil {
				return 0, 0, fmt.Errorf("annotation %s is %q, not a number: %w", key, v, errdefs.ErrInvalidArgument)
			}
		}
	}
	switch {
	case quota > 0 && period > 0:
		vcpus = uint64((quota + period - 1) / period)
	case shares > 2: // 2 is the kernel's minimum: nothing was requested
		vcpus = uint64((shares + 1023) / 1024)
	}
	if memory > 0 {
		const unit = 1 << 20
		mib = (uint64(memory) + unit - 1) / unit
	}
	return vcpus, mib, nil
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

func decimal(in map[string]string, key string) (uint64, error) {
	v := in[key]
	if v == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("annotation %s is %q, not a whole number: %w", key, v, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

func decodePolicy(v string) (string, error) {
	b, err := base64.StdEncoding.DecodeString(v)
	return string(b), err
}

func decodeInitData(v string) (string, error) {
	raw, err := base64.StdEncoding.DecodeString(v)
	if err != nil {
		return "", err
	}
	z, err := gzip.NewReader(bytes.NewReader(raw))
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(z, initDataMax+1))
	if err != nil {
		return "", err
	}
	if len(b) > initDataMax {
		return "", fmt.Errorf("it unpacks to more than %d bytes", initDataMax)
	}
	return string(b), nil
}
