// SPDX-License-Identifier: Apache-2.0

package cloud

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// InstanceType is one size of machine that a cloud sells.
type InstanceType struct {
	Name      string
	VCPUs     int
	MemoryMiB int
	GPUs      int
}

// Catalog is the list of types that may be used.
type Catalog struct {
	Types   []InstanceType
	Default string // for a size that asks for nothing; "" means the smallest
	Key     string // configuration key that holds the list, for error texts
}

// Choose returns the type to use for size: the named one; else the default when
// nothing is asked for; else the smallest that carries all that is asked for
// (fewest GPUs, then least memory, then fewest CPUs, then first in the list).
// InvalidArgument: the named type is not in the list or too small, or no type is
// large enough. The list need not be sorted.
func (c Catalog) Choose(size Size) (InstanceType, error) {
	if len(c.Types) == 0 {
		return InstanceType{}, fmt.Errorf("there is no instance type to choose from; set %s: %w", c.key(), errdefs.ErrInvalidArgument)
	}
	if size.VCPUs < 0 || size.MemoryMiB < 0 || size.GPUs < 0 {
		return InstanceType{}, fmt.Errorf("a size below zero was asked for (%s): %w", size.Ask(), errdefs.ErrInvalidArgument)
	}
	name := size.Type
	if name == "" && size.VCPUs == 0 && size.MemoryMiB == 0 && size.GPUs == 0 {
		name = c.Default
	}
	if name != "" {
		return c.named(name, size)
	}
	best := -1
	for i, t := range c.Types {
		if t.carries(size) && (best < 0 || t.smaller(c.Types[best])) {
			best = i
		}
	}
	if best < 0 {
		return InstanceType{}, fmt.Errorf("no instance type found for the given vcpus (%d) and memory (%d): asked for %s, the largest of %s is %s; ask for less or add a larger type to %s: %w",
			size.VCPUs, size.MemoryMiB, size.Ask(), c.key(), c.largest(), c.key(), errdefs.ErrInvalidArgument)
	}
	return c.Types[best], nil
}

func (c Catalog) named(name string, size Size) (InstanceType, error) {
	names := make([]string, 0, len(c.Types))
	for _, t := range c.Types {
		if t.Name == name {
			if !t.carries(size) {
				return InstanceType{}, fmt.Errorf("instance type %s is too small: asked for %s; ask for less or name a larger type: %w", t, size.Ask(), errdefs.ErrInvalidArgument)
			}
			return t, nil
		}
		names = append(names, t.Name)
	}
	return InstanceType{}, fmt.Errorf("requested instance type (%q) is not part of supported instance types list: %s; name one of these or add it to %s: %w",
		name, strings.Join(names, ", "), c.key(), errdefs.ErrInvalidArgument)
}

func (c Catalog) key() string {
	if c.Key == "" {
		return "the list of instance types"
	}
	return c.Key
}

func (c Catalog) largest() InstanceType {
	l := c.Types[0]
	for _, t := range c.Types[1:] {
		if l.smaller(t) {
			l = t
		}
	}
	return l
}

func (t InstanceType) carries(s Size) bool {
	return t.VCPUs >= s.VCPUs && t.MemoryMiB >= s.MemoryMiB && t.GPUs >= s.GPUs
}

func (t InstanceType) smaller(o InstanceType) bool {
	if t.GPUs != o.GPUs {
		return t.GPUs < o.GPUs
	}
	if t.MemoryMiB != o.MemoryMiB {
		return t.MemoryMiB < o.MemoryMiB
	}
	return t.VCPUs < o.VCPUs
}

// String names the type and its size.
func (t InstanceType) String() string {
	return fmt.Sprintf("%s (%s)", t.Name, Size{VCPUs: t.VCPUs, MemoryMiB: t.MemoryMiB, GPUs: t.GPUs}.Ask())
}

// Ask says in words what the size asks for.
func (s Size) Ask() string {
	var p []string
	if s.Type != "" {
		p = append(p, "type "+s.Type)
	}
	if s.VCPUs != 0 {
		p = append(p, fmt.Sprintf("%d vCPUs", s.VCPUs))
	}
	if s.MemoryMiB != 0 {
		p = append(p, fmt.Sprintf("%d MiB memory", s.MemoryMiB))
	}
	if s.GPUs != 0 {
		p = append(p, fmt.Sprintf("%d GPUs", s.GPUs))
	}
	if len(p) == 0 {
		return "nothing in particular"
	}
	return strings.Join(p, ", ")
}
