// SPDX-License-Identifier: Apache-2.0

package container

import (
	"fmt"

	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
)

// State is where a container is in its life.
type State int

const (
	// StateCreated: it exists in the guest, its first process waits to be started.
	StateCreated State = iota
	// StateRunning: its first process runs, execs may be added.
	StateRunning
	// StatePaused: its cgroup in the guest is frozen.
	StatePaused
	// StateStopped: its first process exited; its remains are still in the guest.
	StateStopped
	// StateDeleted: nothing of it is left in the guest.
	StateDeleted
)

var stateNames = [...]string{"created", "running", "paused", "stopped", "deleted"}

// String is the name that errors and the package comment use.
func (s State) String() string { return stateNames[s] }

// status is containerd's word for the state.
func (s State) status() task.Status {
	return [...]task.Status{task.Status_CREATED, task.Status_RUNNING, task.Status_PAUSED, task.Status_STOPPED, task.Status_STOPPED}[s]
}

type event string

const (
	eventStart  event = "start"
	eventPause  event = "pause"
	eventResume event = "resume"
	eventExit   event = "exit"
	eventDelete event = "delete"
)

// transitions is the drawing in the package comment, as data.
var transitions = []struct {
	from State
	on   event
	to   State
}{
	{StateCreated, eventStart, StateRunning},
	{StateCreated, eventExit, StateStopped},
	{StateCreated, eventDelete, StateDeleted},
	{StateRunning, eventPause, StatePaused},
	{StateRunning, eventExit, StateStopped},
	{StatePaused, eventResume, StateRunning},
	{StatePaused, eventExit, StateStopped},
	{StateStopped, eventDelete, StateDeleted},
}

// next is the state after an event, or FailedPrecondition.
func (s State) next(on event) (State, error) {
	for _, t := range transitions {
		if t.from == s && t.on == on {
			return t.to, nil
		}
	}
	return s, fmt.Errorf("container is %s, cannot %s it: %w", s, on, errdefs.ErrFailedPrecondition)
}
