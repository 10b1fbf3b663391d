// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// update puts new limits in force. What the request does not say stays.
func (c *container) update(ctx context.Context, r *specs.LinuxResources) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	if _, err := c.in(StateRunning, StateCreated, StatePaused); err != nil {
		return err
	}
	said, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{
		CgroupName: string(c.id), Spec: &specs.Spec{Linux: &specs.Linux{Resources: r}},
	}, nil)
	if err != nil {
		return fmt.Errorf("update container %s: %w: %w", c.id, err, errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	next := merge(*c.resources, said.Resources)
	c.mu.Unlock()
	if err := c.set(&next); err != nil {
		c.mu.Lock()
		before := *c.resources
		c.mu.Unlock()
		if back := c.set(&before); back != nil {
			return fmt.Errorf("update container %s: %w; and the limits before could not be put back: %w", c.id, err, back)
		}
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	c.mu.Lock()
	c.resources = &next
	c.mu.Unlock()
	return nil
}

// set puts limits in force and leaves the devices alone. libcontainer keeps what it was
// given as the container's, and starts no further process where that says to skip them
// (runc 1.5.2, libcontainer/container_linux.go), so it may not say so afterwards.
func (c *container) set(r *cgroups.Resources) error {
	r.SkipDevices = true
	defer func() { r.SkipDevices = false }()
	return c.cgroup.Set(r)
}

// merge returns the limits with those that were said put in. Access to devices is
// not a matter of updates.
func merge(have cgroups.Resources, said *cgroups.Resources) cgroups.Resources {
	if said.Memory != 0 && said.MemorySwap == 0 && have.MemorySwap == have.Memory {
		// The sum with swap was the same number: no swap, and so it stays.
		have.MemorySwap = said.Memory
	}
	put(&have.Memory, said.Memory)
	put(&have.MemoryReservation, said.MemoryReservation)
	put(&have.MemorySwap, said.MemorySwap)
	put(&have.MemorySwappiness, said.MemorySwappiness)
	put(&have.CpuShares, said.CpuShares)
	put(&have.CpuWeight, said.CpuWeight)
	put(&have.CpuQuota, said.CpuQuota)
	put(&have.CpuPeriod, said.CpuPeriod)
	put(&have.CpuRtRuntime, said.CpuRtRuntime)
	put(&have.CpuRtPeriod, said.CpuRtPeriod)
	put(&have.CpusetCpus, said.CpusetCpus)
	put(&have.CpusetMems, said.CpusetMems)
	put(&have.PidsLimit, said.PidsLimit)
	put(&have.BlkioWeight, said.BlkioWeight)
	put(&have.BlkioLeafWeight, said.BlkioLeafWeight)
	for dst, src := range map[*[]*cgroups.ThrottleDevice][]*cgroups.ThrottleDevice{
		&have.BlkioThrottleReadBpsDevice:   said.BlkioThrottleReadBpsDevice,
		&have.BlkioThrottleWriteBpsDevice:  said.BlkioThrottleWriteBpsDevice,
		&have.BlkioThrottleReadIOPSDevice:  said.BlkioThrottleReadIOPSDevice,
		&have.BlkioThrottleWriteIOPSDevice: said.BlkioThrottleWriteIOPSDevice,
	} {
		if len(src) > 0 {
			*dst = src
		}
	}
	if len(said.HugetlbLimit) > 0 {
		have.HugetlbLimit = said.HugetlbLimit
	}
	return have
}

// put replaces a value by one that was said.
func put[T comparable](dst *T, said T) {
	var zero T
	if said != zero {
		*dst = said
	}
}
