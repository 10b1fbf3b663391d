// SPDX-License-Identifier: Apache-2.0

// Package state lets a life be written down as a table: the states, and which event
// leads from one to which. Sandbox, container and process each have one, in their
// state.go, drawn in their package comment; statetest holds the two together.
package state

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Event is something that ends one state and begins another. It is named so that
// "cannot <event> it" is a sentence.
type Event string

// Row is one arrow of the drawing.
type Row[S ~int] struct {
	From S
	On   Event
	To   S
}

// Table is all arrows of a life. It is not changed once it is in use, and safe for
// concurrent use.
type Table[S interface {
	~int
	fmt.Stringer
}] struct {
	// What the table is the life of, for errors.
	What string
	Rows []Row[S]
}

// Next is the state after an event. FailedPrecondition: the event is none of that
// state's; the error names both, and the state returned is from.
func (t Table[S]) Next(from S, on Event) (S, error) {
	for _, r := range t.Rows {
		if r.From == from && r.On == on {
			return r.To, nil
		}
	}
	return from, fmt.Errorf("%s is %s, cannot %s it: %w", t.What, from, on, errdefs.ErrFailedPrecondition)
}
