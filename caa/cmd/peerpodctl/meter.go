// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

// meter shows how far a publication is: on a terminal one line that changes, else a
// line for each step, and for an upload one every meterEvery.
type meter struct {
	w        io.Writer
	terminal bool
	last     string // step
	shown    time.Time
	open     bool // the terminal's line has not ended
}

const meterEvery = 10 * time.Second

func newMeter(w io.Writer) *meter {
	m := &meter{w: w}
	if f, ok := w.(*os.File); ok {
		i, err := f.Stat()
		m.terminal = err == nil && i.Mode()&os.ModeCharDevice != 0
	}
	return m
}

var stepTexts = map[string]string{
	"verify": "verifying the image", "find": "looking for it in the cloud", "prepare": "making gallery and image definition", "upload": "uploading",
	"complete": "waiting for the cloud to take the upload over", "register": "registering",
}

func (m *meter) step(p diskimage.Progress) {
	text := stepTexts[p.Step]
	if p.Total > 0 {
		text += fmt.Sprintf(": %.1f of %.1f MiB (%d %%)", float64(p.Done)/(1<<20), float64(p.Total)/(1<<20), p.Done*100/p.Total)
		if p.Skipped > 0 {
			text += fmt.Sprintf(", %.1f of them from before", float64(p.Skipped)/(1<<20))
		}
	}
	fresh := p.Step != m.last
	m.last = p.Step
	if m.terminal {
		if fresh {
			m.end()
		}
		fmt.Fprintf(m.w, "\r%s\x1b[K", text) // to the line's end: ECMA-48, EL
		m.open = true
		return
	}
	if fresh || p.Total > 0 && p.Done == p.Total || time.Since(m.shown) >= meterEvery {
		m.shown = time.Now()
		fmt.Fprintln(m.w, text)
	}
}

// end ends the line.
func (m *meter) end() {
	if m.open {
		fmt.Fprintln(m.w)
		m.open = false
	}
}
