// SPDX-License-Identifier: Apache-2.0

package forward

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// end is one end of a stream in memory. Closing gone ends both.
type end struct {
	in, out chan *podvmpb.ForwardFrame
	gone    chan struct{}
}

func stream() (a, b end) {
	x, y, gone := make(chan *podvmpb.ForwardFrame), make(chan *podvmpb.ForwardFrame), make(chan struct{})
	return end{x, y, gone}, end{y, x, gone}
}

func (e end) Send(f *podvmpb.ForwardFrame) error {
	f.Data = bytes.Clone(f.Data)
	select {
	case e.out <- f:
		return nil
	case <-e.gone:
		return io.ErrClosedPipe
	}
}

func (e end) Recv() (*podvmpb.ForwardFrame, error) {
	select {
	case f := <-e.in:
		return f, nil
	case <-e.gone:
		return nil, io.EOF
	}
}

// pair is a TCP connection.
func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close(); accepted.Close() })
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

// TestRelay sends several windows both ways at once, closes one half, and goes on in
// the other direction.
func TestRelay(t *testing.T) {
	s1, s2 := stream()
	defer close(s1.gone)
	client, c1 := pair(t)
	c2, server := pair(t)
	var g errgroup.Group
	g.Go(func() error { return Relay(t.Context(), c1, s1, Window) })
	g.Go(func() error { return Relay(t.Context(), c2, s2, 64<<10) })
	request, answer := make([]byte, 5*Window+17), make([]byte, 3*Window+5)
	rand.Read(request)
	rand.Read(answer)
	g.Go(func() error {
		_, err := client.Write(request)
		return errors.Join(err, client.CloseWrite())
	})
	g.Go(func() error { // answers only when it has the whole request
		got, err := io.ReadAll(server)
		if err == nil && !bytes.Equal(got, request) {
			err = errors.New("the request did not arrive as it was sent")
		}
		_, werr := server.Write(answer)
		return errors.Join(err, werr, server.Close())
	})
	got, err := io.ReadAll(client)
	if err != nil || !bytes.Equal(got, answer) {
		t.Errorf("%d bytes of the answer, %v", len(got), err)
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestRelayHoldsBack: while nobody reads at one end, the other sends no more than the
// window, and takes frames of the stream all the same.
func TestRelayHoldsBack(t *testing.T) {
	s1, s2 := stream()
	client, c1 := pair(t)
	ended := make(chan error, 1)
	const granted = 10_000
	go func() { ended <- Relay(t.Context(), c1, s1, granted) }()
	go client.Write(make([]byte, 10*granted)) // ends when the connection does
	received := func(atLeast int) int {
		n := 0
		for n < atLeast {
			f, err := s2.Recv()
			if err != nil {
				t.Fatal(err)
			}
			n += len(f.Data)
		}
		return n
	}
	if n := received(granted); n != granted {
		t.Errorf("%d bytes were sent into a window of %d", n, granted)
	}
	// It reads frames although it may send none; and the acknowledgement opens the window.
	if err := s2.Send(&podvmpb.ForwardFrame{Acked: 2_500}); err != nil {
		t.Fatal(err)
	}
	if n := received(2_500); n != 2_500 {
		t.Errorf("%d bytes were sent after 2500 were acknowledged", n)
	}
	close(s1.gone)
	if err := <-ended; !errdefs.IsAborted(err) {
		t.Errorf("error %v, want Aborted: the other end left in the middle", err)
	}
}

func TestRelayRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		frames []*podvmpb.ForwardFrame
		is     func(error) bool
	}{
		"beyond the window": {[]*podvmpb.ForwardFrame{{Data: make([]byte, Window)}, {Data: make([]byte, Window)}}, errdefs.IsResourceExhausted},
		"after the end":     {[]*podvmpb.ForwardFrame{{Eof: true}, {Data: []byte("x")}}, errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			s1, s2 := stream()
			_, c1 := pair(t)
			ended := make(chan error, 1)
			go func() { ended <- Relay(t.Context(), blocked{c1}, s1, Window) }()
			for _, f := range tc.frames {
				if err := s2.Send(f); err != nil {
					t.Fatal(err)
				}
			}
			if err := <-ended; !tc.is(err) {
				t.Errorf("error %v", err)
			}
			close(s1.gone)
		})
	}
	_, c1 := pair(t)
	if err := Relay(t.Context(), c1, end{}, 0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("window 0: %v", err)
	}
}

// blocked is a connection that takes nothing.
type blocked struct{ *net.TCPConn }

func (b blocked) Write(p []byte) (int, error) {
	_, err := b.TCPConn.Read(make([]byte, 1)) // until it is closed
	return 0, err
}

// TestRelayEnds: the connection goes when the caller's context does.
func TestRelayEnds(t *testing.T) {
	s1, _ := stream()
	client, c1 := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Relay(ctx, c1, s1, Window) }()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	client.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection is open: %v", err)
	}
	close(s1.gone)
}
