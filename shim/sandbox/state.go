// SPDX-License-Identifier: Apache-2.0

package sandbox

import "github.com/kata-remote/kata-remote/shim/state"

// State is where the pod's sandbox is in its life.
type State int

const (
	// StateNew: nothing was asked of the adaptor.
	StateNew State = iota
	// StateStarting: the record is on disk and the adaptor was asked for a pod VM.
	StateStarting
	// StateReady: the agent answers and has made the sandbox; containers may be made.
	StateReady
	// StateStopped: the pod VM was given back, or the adaptor is being asked to take
	// it. Every process has exited or is about to.
	StateStopped
)

var stateNames = [...]string{"new", "starting", "ready", "stopped"}

// String is the name that errors and the package comment use.
func (s State) String() string { return stateNames[s] }

const (
	eventStart state.Event = "start"
	eventReady state.Event = "ready"
	eventStop  state.Event = "stop"
)

// life is the drawing in the package comment, as data.
var life = state.Table[State]{What: "sandbox", Rows: []state.Row[State]{
	{From: StateNew, On: eventStart, To: StateStarting},
	{From: StateStarting, On: eventReady, To: StateReady},
	{From: StateStarting, On: eventStop, To: StateStopped},
	{From: StateReady, On: eventStop, To: StateStopped},
}}
