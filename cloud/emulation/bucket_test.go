// SPDX-License-Identifier: Apache-2.0

package emulation

import (
	"testing"
	"time"
)

func TestBucket(t *testing.T) {
	b := &Bucket{Max: 5, Refill: 2}
	at := time.Unix(1000, 0)
	for i, step := range []struct {
		after time.Duration
		n     float64
		ok    bool
		wait  time.Duration
	}{
		{0, 5, true, 0},
		{0, 1, false, 500 * time.Millisecond},
		{250 * time.Millisecond, 1, false, 250 * time.Millisecond},
		{250 * time.Millisecond, 1, true, 0},
		{time.Hour, 5, true, 0}, // never more than Max
		{0, 0.5, false, 250 * time.Millisecond},
		{0, 6, false, -1},
	} {
		at = at.Add(step.after)
		if ok, wait := b.Take(at, step.n); ok != step.ok || wait != step.wait {
			t.Errorf("step %d: %v, %v; want %v, %v", i, ok, wait, step.ok, step.wait)
		}
	}
	if ok, wait := new(Bucket).Take(at, 1); ok || wait != -1 {
		t.Errorf("the zero bucket: %v, %v", ok, wait)
	}
}
