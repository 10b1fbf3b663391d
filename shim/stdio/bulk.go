// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"runtime/debug"
	"sync"
	"time"
)

// A shim is small and collects its garbage often, so that it stays small: most streams
// say little. One that carries a gigabyte makes a gigabyte of garbage, and to collect
// it every two megabytes costs more than to carry it.
const (
	// bulkAfter is how much a stream moves without a pause before it counts as bulk,
	// bytes.
	bulkAfter = 8 << 20
	// bulkPause is how long a stream says nothing until it pauses.
	bulkPause = time.Second
	// bulkPercent is GOGC meanwhile: with a live heap of some megabytes the shim grows
	// by about ten.
	bulkPercent = 400
)

var bulkMu sync.Mutex
var bulkStreams, usualPercent int // guarded by bulkMu

// bulk watches one stream. Its methods are called by one goroutine.
type bulk struct {
	bytes int
	on    bool
}

// moved counts n bytes.
func (b *bulk) moved(n int) {
	if b.bytes += n; b.on || b.bytes < bulkAfter {
		return
	}
	b.on = true
	bulkMu.Lock()
	defer bulkMu.Unlock()
	if bulkStreams++; bulkStreams == 1 {
		usualPercent = debug.SetGCPercent(bulkPercent)
	}
}

// pause returns a channel that tells when the stream, if it says nothing, pauses. It is
// nil while the stream has moved nothing since it last did.
func (b *bulk) pause() <-chan time.Time {
	if b.bytes == 0 {
		return nil
	}
	return time.After(bulkPause)
}

// end says that the stream pauses or has ended.
func (b *bulk) end() {
	if b.bytes = 0; !b.on {
		return
	}
	b.on = false
	bulkMu.Lock()
	defer bulkMu.Unlock()
	if bulkStreams--; bulkStreams == 0 {
		debug.SetGCPercent(usualPercent)
		debug.FreeOSMemory()
	}
}
