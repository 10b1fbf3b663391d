// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"testing"
	"time"
)

// TestLife takes an instance from its launch to its end, by the clock.
func TestLife(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now, StartTime: 5 * time.Second, StopTime: 20 * time.Second})
	c := newClient(t, s)
	id := c.run("ClientToken", "one")
	for _, step := range []struct {
		after time.Duration
		do    string
		want  string
	}{
		{0, "", pending},
		{5 * time.Second, "", running},
		{0, "StopInstances", stopping},
		{20 * time.Second, "", stopped},
		{0, "StartInstances", pending},
		{5 * time.Second, "", running},
		{0, "TerminateInstances", shuttingDown},
		{0, "TerminateInstances", shuttingDown},
		{20 * time.Second, "", terminated},
		{0, "TerminateInstances", terminated},
	} {
		now.add(step.after)
		if step.do != "" {
			c.do(step.do, "InstanceId.1", id)
		}
		if got := c.state(id); got != step.want {
			t.Fatalf("after %v and %q: %s, want %s", step.after, step.do, got, step.want)
		}
	}
	c.fails("IncorrectInstanceState", "StartInstances", "InstanceId.1", id)
	if l := s.Leaks(map[string]string{"owner": "test"}); len(l) != 0 {
		t.Errorf("a terminated instance left %v", l)
	}
	now.add(time.Hour)
	c.fails("InvalidInstanceID.NotFound", "DescribeInstances", "InstanceId.1", id)
}
