// SPDX-License-Identifier: Apache-2.0

package process

import "github.com/kata-remote/kata-remote/shim/state"

// State is where a process is in its life.
type State int

const (
	// StateCreated: registered; an exec is not known to the guest, a container's
	// first process waits there to be started.
	StateCreated State = iota
	// StateStarting: the guest was asked to start it and has not answered.
	StateStarting
	// StateRunning: it was started and its start was published.
	StateRunning
	// StateExited: its status is known, its output is with the sinks and its exit
	// was published; or it could not be started, and nothing was published.
	StateExited
	// StateDeleted: nobody may use it any more.
	StateDeleted
)

var stateNames = [...]string{"created", "starting", "running", "exited", "deleted"}

// String is the name that errors and the package comment use.
func (s State) String() string { return stateNames[s] }

const (
	eventStart   state.Event = "start"
	eventStarted state.Event = "started"
	eventExit    state.Event = "exit"
	eventDelete  state.Event = "delete"
)

// life is the drawing in the package comment, as data.
var life = state.Table[State]{What: "process", Rows: []state.Row[State]{
	{From: StateCreated, On: eventStart, To: StateStarting},
	{From: StateCreated, On: eventExit, To: StateExited}, // killed before it was started
	{From: StateCreated, On: eventDelete, To: StateDeleted},
	{From: StateStarting, On: eventStarted, To: StateRunning},
	{From: StateStarting, On: eventExit, To: StateExited}, // could not be started
	{From: StateRunning, On: eventExit, To: StateExited},
	{From: StateExited, On: eventDelete, To: StateDeleted},
}}
