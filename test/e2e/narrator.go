// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"time"
)

// Narrator shows checks to a person as they happen: its methods are what Run tells of.
type Narrator struct {
	// FirstFailure is the first check that failed, and why; empty when none did.
	FirstFailure string

	stop, stopped chan struct{}
}

// Chapter shows a heading.
func (n *Narrator) Chapter(title string) { fmt.Printf("\n== %s\n", title) }

// progressEvery is how often a long check says that it is still at work.
const progressEvery = 5 * time.Second

// Begin shows that a check is at work, when it takes long.
func (n *Narrator) Begin(c Check) {
	n.stop, n.stopped = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(n.stopped)
		t := time.NewTicker(progressEvery)
		defer t.Stop()
		for start := time.Now(); ; {
			select {
			case <-n.stop:
				return
			case <-t.C:
				fmt.Printf("   ... %s: %v\n", c.Name, time.Since(start).Round(time.Second))
			}
		}
	}()
}

// Report shows a check's result.
func (n *Narrator) Report(c Check, seen string, err error, took time.Duration) {
	close(n.stop)
	<-n.stopped
	if err != nil {
		if n.FirstFailure == "" {
			n.FirstFailure = fmt.Sprintf("%s: %v", c.Name, err)
		}
		fmt.Printf("   FAIL %s (%v)\n        %v\n", c.Name, took.Round(time.Millisecond), indent(err.Error()))
		return
	}
	fmt.Printf("   ok   %s\n", c.Name)
	if seen != "" {
		fmt.Printf("        %s\n", indent(seen))
	}
}

func indent(s string) string {
	return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n        ")
}
