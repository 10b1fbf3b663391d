// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"

	"github.com/containerd/errdefs"
)

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

type event string

const (
	eventStart event = "start"
	eventReady event = "ready"
	eventStop  event = "stop"
)

// transitions is the drawing in the package comment, as data.
var transitions = []struct {
	from State
	on   event
	to   State
}{
	{StateNew, eventStart, StateStarting},
	{StateStarting, eventReady, StateReady},
	{StateStarting, eventStop, StateStopped},
	{StateReady, eventStop, StateStopped},
}

// next is the state after an event, or FailedPrecondition.
func (s State) next(on event) (State, error) {
	for _, t := range transitions {
		if t.from == s && t.on == on {
			return t.to, nil
		}
	}
	return s, fmt.Errorf("sandbox is %s, cannot %s it: %w", s, on, errdefs.ErrFailedPrecondition)
}
