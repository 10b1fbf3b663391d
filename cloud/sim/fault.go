// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// Op names a call of the provider.
type Op string

// The calls that reach the cloud.
const (
	OpCreate Op = "create"
	OpGet    Op = "get"
	OpList   Op = "list"
	OpDelete Op = "delete"
	OpCheck  Op = "check"
)

// Fault makes calls fail.
type Fault struct {
	Op    Op    // "" is every call
	Err   error // what the call returns, wrapped; a class of errdefs, or any error for unknown
	Count int   // how many calls; 0 is one, below 0 all until Heal
	// Committed lets the call take effect first: the reply is lost.
	Committed bool
}

// Inject adds a fault. Faults apply in the order they were added, one per call.
func (w *World) Inject(f Fault) {
	if f.Count == 0 {
		f.Count = 1
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = append(w.faults, &f)
}

// Heal removes all faults.
func (w *World) Heal() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = nil
}

// Calls tells how many calls of op were made, failed ones included.
func (w *World) Calls(op Op) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls[op]
}

// admit counts the call and returns the error that it must end with before it has
// an effect (before), or after it (after). It needs mu.
func (w *World) admit(op Op) (before, after error) {
	w.calls[op]++
	if err := w.throttle(op); err != nil {
		return err, nil
	}
	for n, f := range w.faults {
		if f.Op != "" && f.Op != op {
			continue
		}
		if f.Count > 0 {
			if f.Count--; f.Count == 0 {
				w.faults = append(w.faults[:n:n], w.faults[n+1:]...)
			}
		}
		err := fmt.Errorf("simulated cloud, %s: %w", op, f.Err)
		if f.Committed {
			return nil, err
		}
		return err, nil
	}
	return nil, nil
}

// throttle needs mu.
func (w *World) throttle(op Op) error {
	if w.cfg.Rate <= 0 {
		return nil
	}
	now := time.Now()
	w.bucket = min(max(w.cfg.Burst, 1), w.bucket+now.Sub(w.filled).Seconds()*w.cfg.Rate)
	w.filled = now
	if w.bucket < 1 {
		return fmt.Errorf("simulated cloud, %s: request limit exceeded (%g per second): %w", op, w.cfg.Rate, errdefs.ErrUnavailable)
	}
	w.bucket--
	return nil
}
