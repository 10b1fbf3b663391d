// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// ContainerState is where a container is in its life.
type ContainerState int

const (
	// StateCreating: the id is taken; nothing else is promised.
	StateCreating ContainerState = iota
	// StateCreated: namespaces, mounts and cgroup exist; the first process is set
	// up and waits to become the user's command.
	StateCreated
	// StateRunning: the user's command runs.
	StateRunning
	// StatePaused: every process is frozen.
	StatePaused
	// StateStopped: the first process is gone and with it all others; its status
	// and its output are kept.
	StateStopped
	// StateRemoved: nothing of the container is left.
	StateRemoved
)

var containerStateNames = []string{"Creating", "Created", "Running", "Paused", "Stopped", "Removed"}

// String returns the state's name as the drawing in the package comment has it.
func (s ContainerState) String() string { return containerStateNames[s] }

// containerTransitions is every step a container may take.
var containerTransitions = map[ContainerState][]ContainerState{
	StateCreating: {StateCreated, StateRemoved},
	StateCreated:  {StateRunning, StateStopped},
	StateRunning:  {StatePaused, StateStopped},
	StatePaused:   {StateRunning, StateStopped},
	StateStopped:  {StateRemoved},
	StateRemoved:  nil,
}

// ProcessState is where a process of a container is in its life.
type ProcessState int

const (
	// ProcessStarting: the exec id is taken; there may be no process yet. A
	// container's first process is in it until StartContainer.
	ProcessStarting ProcessState = iota
	// ProcessRunning: the user's command runs.
	ProcessRunning
	// ProcessExited: the status is known and kept.
	ProcessExited
)

var processStateNames = []string{"Starting", "Running", "Exited"}

// String returns the state's name as the drawing in the package comment has it.
func (s ProcessState) String() string { return processStateNames[s] }

// processTransitions is every step a process may take.
var processTransitions = map[ProcessState][]ProcessState{
	ProcessStarting: {ProcessRunning, ProcessExited},
	ProcessRunning:  {ProcessExited},
	ProcessExited:   nil,
}

// step checks that a transition is in its table. FailedPrecondition names both
// states where it is not.
func step[S interface {
	comparable
	fmt.Stringer
}](what string, table map[S][]S, from, to S) error {
	if slices.Contains(table[from], to) {
		return nil
	}
	return fmt.Errorf("%s is %s and cannot become %s: %w", what, from, to, errdefs.ErrFailedPrecondition)
}
