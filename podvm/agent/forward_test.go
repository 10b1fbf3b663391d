// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"io"
	"net"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/forward"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// TestForward: a connection is carried to a listener that is only on the loopback, of
// either IP version; what cannot be is refused.
func TestForward(t *testing.T) {
	g := newGuest(t)
	open := func(first *podvmpb.ForwardFrame) (podvmpb.PodVM_ForwardClient, error) {
		s, err := g.client.podvm.Forward(g.ctx())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(first); err != nil {
			t.Fatal(err)
		}
		_, err = s.Recv()
		return s, err
	}
	var port uint32
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		port = uint32(l.Addr().(*net.TCPAddr).Port)
		echoed := make(chan error, 1)
		go func() {
			c, err := l.Accept()
			if err == nil {
				_, err = io.Copy(c, c)
				err = errors.Join(err, c.Close())
			}
			echoed <- err
		}()
		s, err := open(&podvmpb.ForwardFrame{Port: port, Window: forward.Window})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&podvmpb.ForwardFrame{Data: []byte("hello"), Eof: true}); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for {
			f, err := s.Recv()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Errorf("%s: %v", addr, err)
				}
				break
			}
			got = append(got, f.Data...)
		}
		if string(got) != "hello" {
			t.Errorf("%s: got %q", addr, got)
		}
		if err := <-echoed; err != nil {
			t.Error(err)
		}
		l.Close()
	}
	_, err := open(&podvmpb.ForwardFrame{Port: port, Window: 1}) // nobody listens there any more
	wantClass(t, "nobody listens", err, errdefs.ErrUnavailable)
	for name, first := range map[string]*podvmpb.ForwardFrame{
		"no port": {Window: 1}, "no such port": {Port: 1 << 16, Window: 1}, "data first": {Port: port, Window: 1, Data: []byte("x")},
	} {
		_, err := open(first)
		wantClass(t, name, err, errdefs.ErrInvalidArgument)
	}
}
