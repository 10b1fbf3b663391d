// SPDX-License-Identifier: Apache-2.0

package container

import (
	"github.com/containerd/containerd/api/types/task"

	"github.com/kata-remote/kata-remote/shim/state"
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

const (
	eventStart  state.Event = "start"
	eventPause  state.Event = "pause"
	eventResume state.Event = "resume"
	eventExit   state.Event = "exit"
	eventDelete state.Event = "delete"
)

// life is the drawing in the package comment, as data.
var life = state.Table[State]{What: "container", Rows: []state.Row[State]{
	{From: StateCreated, On: eventStart, To: StateRunning},
	{From: StateCreated, On: eventExit, To: StateStopped},
	{From: StateCreated, On: eventDelete, To: StateDeleted},
	{From: StateRunning, On: eventPause, To: StatePaused},
	{From: StateRunning, On: eventExit, To: StateStopped},
	{From: StatePaused, On: eventResume, To: StateRunning},
	{From: StatePaused, On: eventExit, To: StateStopped},
	{From: StateStopped, On: eventDelete, To: StateDeleted},
}}
