// SPDX-License-Identifier: Apache-2.0

package process

import (
	"fmt"

	"github.com/containerd/errdefs"
)

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

type event string

const (
	eventStart   event = "start"
	eventStarted event = "started"
	eventExit    event = "exit"
	eventDelete  event = "delete"
)

// transitions is the drawing in the package comment, as data.
var transitions = []struct {
	from State
	on   event
	to   State
}{
	{StateCreated, eventStart, StateStarting},
	{StateCreated, eventExit, StateExited}, // killed before it was started
	{StateCreated, eventDelete, StateDeleted},
	{StateStarting, eventStarted, StateRunning},
	{StateStarting, eventExit, StateExited}, // could not be started
	{StateRunning, eventExit, StateExited},
	{StateExited, eventDelete, StateDeleted},
}

// next is the state after an event, or FailedPrecondition.
func (s State) next(on event) (State, error) {
	for _, t := range transitions {
		if t.from == s && t.on == on {
			return t.to, nil
		}
	}
	return s, fmt.Errorf("process is %s, cannot %s it: %w", s, on, errdefs.ErrFailedPrecondition)
}
