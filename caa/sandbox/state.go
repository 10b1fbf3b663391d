// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/caa/store"
)

const (
	// StateReserved: the record is on disk, with the VNI, the names and the token
	// that the start will use. Nothing outside the record exists.
	StateReserved store.State = "reserved"
	// StateStarting: steps are being done. An instance may exist from the moment
	// the record says it was asked for, the tunnel from the moment the record has
	// the instance's address.
	StateStarting store.State = "starting"
	// StateRunning: every step is done; the agent socket is served.
	StateRunning store.State = "running"
	// StateDeleting: what exists is being undone, until nothing is left.
	StateDeleting store.State = "deleting"
	// StateGone: there is nothing, and no record.
	StateGone store.State = "gone"
)

// States are all of them, in the order of a life.
var States = []store.State{StateReserved, StateStarting, StateRunning, StateDeleting, StateGone}

// event is what moves a sandbox from one state to another.
type event string

const (
	eventReserve event = "CreateVM"
	eventStart   event = "StartVM"
	eventReady   event = "all steps done"
	eventUndo    event = "undo" // StopVM, a failed step, a lease that is over, a loss found at a restart
	eventGone    event = "nothing left"
)

type transition struct {
	from store.State
	on   event
	to   store.State
}

// transitions is the whole state machine. The drawing in the package comment shows
// it; a test compares the two.
var transitions = []transition{
	{StateGone, eventReserve, StateReserved},
	{StateReserved, eventStart, StateStarting},
	{StateReserved, eventUndo, StateDeleting},
	{StateStarting, eventReady, StateRunning},
	{StateStarting, eventUndo, StateDeleting},
	{StateRunning, eventUndo, StateDeleting},
	{StateDeleting, eventUndo, StateDeleting},
	{StateDeleting, eventGone, StateGone},
}

// next is the state after e in from. FailedPrecondition, naming both, where the
// table has no such line.
func next(from store.State, e event) (store.State, error) {
	for _, t := range transitions {
		if t.from == from && t.on == e {
			return t.to, nil
		}
	}
	return "", errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf("the sandbox is %s: %q is not possible", from, e))
}
