// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"io"
	"os"
	"testing"
)

// TestSettleWaitsForTheReader: nobody may think that output has arrived while bytes
// of it stand in the FIFO.
func TestSettleWaitsForTheReader(t *testing.T) {
	path := fifo(t)
	f, err := Open(Config{Stdout: path})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.WriteString(f.Stdout, "three bytes short"); err != nil {
		t.Fatal(err)
	}
	out := f.Stdout.(outFIFO)
	var moved progress
	settled := make(chan struct{})
	go func() {
		out.settle(t.Context(), &moved)
		close(settled)
	}()
	r, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 14)); err != nil {
		t.Fatal(err)
	}
	if n, err := out.unread(); err != nil || n != 3 {
		t.Fatalf("unread = %d, %v; want 3", n, err)
	}
	select {
	case <-settled:
		t.Error("settled with 3 bytes unread")
	default:
	}
	if _, err := io.ReadFull(r, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	<-settled
}

// TestSettleEndsWithItsContext: a reader that is gone for good holds nothing up.
func TestSettleEndsWithItsContext(t *testing.T) {
	f, err := Open(Config{Stdout: fifo(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.WriteString(f.Stdout, "unread"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var moved progress
	f.Stdout.(outFIFO).settle(ctx, &moved)
}
