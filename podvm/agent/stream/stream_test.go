// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return r, w
}

// Whatever the sizes of writes, reads and acknowledgements, and through every growth
// of the ring, the bytes are those that were written.
func TestBufferIsExact(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		want := make([]byte, 200_000+rnd.IntN(200_000))
		for i := range want {
			want[i] = byte(rnd.Uint32())
		}
		r, w := pipe(t)
		o := NewOutput(r, 1+rnd.IntN(100_000))
		go func() {
			for rest := want; len(rest) > 0; {
				n := min(len(rest), 1+rnd.IntN(30_000))
				_, _ = w.Write(rest[:n])
				rest = rest[n:]
			}
			w.Close()
		}()
		reader := rand.New(rand.NewPCG(seed, 2))
		var got []byte
		for {
			data, last, err := o.Next(t.Context(), uint64(len(got)), 1+reader.IntN(50_000), nil)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, data...)
			if last {
				break
			}
			if acked, _ := o.Bounds(); reader.IntN(3) == 0 || uint64(len(got))-acked > 0 {
				// Sometimes go back, as after a broken connection.
				if reader.IntN(4) == 0 {
					got = got[:acked]
					continue
				}
				if err := o.Ack(uint64(len(got))); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("seed %d: %d bytes differ from the %d that were written", seed, len(got), len(want))
		}
		if acked, _ := o.Bounds(); o.Settled() != (acked == uint64(len(want))) {
			t.Errorf("settled: %v, with %d of %d bytes acknowledged", o.Settled(), acked, len(want))
		}
		if err := o.Ack(uint64(len(want))); err != nil || !o.Settled() {
			t.Errorf("not settled: %v", err)
		}
		<-o.Done()
	}
}

func TestBufferBounds(t *testing.T) {
	r, w := pipe(t)
	o := NewOutput(r, 100)
	defer o.Close()
	if _, err := w.WriteString("0123456789"); err != nil {
		t.Fatal(err)
	}
	if data, last, err := o.Next(t.Context(), 0, 5, nil); err != nil || string(data) != "01234" || last {
		t.Fatalf("%q, %v, %v", data, last, err)
	}
	if err := o.Ack(4); err != nil {
		t.Fatal(err)
	}
	if err := o.Ack(2); err != nil { // older than the newest
		t.Errorf("an old acknowledgement: %v", err)
	}
	for _, offset := range []uint64{3, 11} {
		if _, _, err := o.Next(t.Context(), offset, 5, nil); !errdefs.IsOutOfRange(err) {
			t.Errorf("offset %d: %v", offset, err)
		}
	}
	if err := o.Ack(11); !errdefs.IsOutOfRange(err) {
		t.Errorf("acknowledging what was not produced: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := o.Next(ctx, 10, 5, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a wait whose caller left: %v", err)
	}
}

// After the exit the end is not waited for longer than the window, what is in the
// pipe then is not lost, and a full buffer delays it.
func TestOutputOfALeftOpenPipe(t *testing.T) {
	r, w := pipe(t) // w stays open
	o := NewOutput(r, 1000)
	want := bytes.Repeat([]byte("0123456789"), 2000)
	if _, err := w.Write(want); err != nil {
		t.Fatal(err)
	}
	// As Exited does, and the window has passed while the buffer was full.
	if err := r.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for {
		data, last, err := o.Next(t.Context(), uint64(len(got)), 1<<20, nil)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, data...)
		if last {
			break
		}
		if err := o.Ack(uint64(len(got))); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes", len(got), len(want))
	}
}

func TestClaimsFollowEachOther(t *testing.T) {
	r, _ := pipe(t)
	o := NewOutput(r, 100)
	defer o.Close()
	first, err := o.Claim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() {
		<-first.Context.Done()
		close(gone)
		o.Release(first)
	}()
	second, err := o.Claim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	<-gone
	if !errdefs.IsAborted(context.Cause(first.Context)) {
		t.Errorf("the first was ended by %v", context.Cause(first.Context))
	}
	// One that gives up while it waits does not break the chain.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := o.Claim(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a claim whose caller left: %v", err)
	}
	o.Release(second)
	third, err := o.Claim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o.Release(third)
}

func TestInputOrder(t *testing.T) {
	r, w := pipe(t)
	defer r.Close()
	in := NewInput(w, true)
	if n, err := in.Append(t.Context(), []byte("abc")); n != 3 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if n, err := in.Write(t.Context(), 1, []byte("bcd"), false); n != 4 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if _, err := in.Write(t.Context(), 9, []byte("x"), false); !errdefs.IsOutOfRange(err) {
		t.Errorf("a hole: %v", err)
	}
	in.Close()
	in.Close()
	if _, err := in.Append(t.Context(), []byte("x")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after the end: %v", err)
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != "abcd" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestInputOfAProcessThatIsGone(t *testing.T) {
	r, w := pipe(t)
	in := NewInput(w, true)
	r.Close()
	if _, err := in.Append(t.Context(), []byte("x")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
	in.Abort()
}
