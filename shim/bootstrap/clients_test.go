// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
)

// TestClients: the end waits for a client that is there, for as long as it may, and not
// for one that has left.
func TestClients(t *testing.T) {
	served := newClients()
	server, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(served))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.Serve(context.Background(), l)
	}()
	defer func() {
		server.Close()
		<-ended
	}()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client.Call(ctx, "none", "None", nil, nil) // answered with an error: the server has it
	over, leave := context.WithCancel(ctx)
	leave()
	waited := make(chan struct{})
	served.wait(over) // somebody is there, but the time is over
	go func() {
		defer close(waited)
		served.wait(ctx)
	}()
	select {
	case <-waited:
		t.Error("the end did not wait for a client that is there")
	default:
	}
	client.Close()
	<-waited
	if ctx.Err() != nil {
		t.Error("the end did not notice that the client left")
	}
}
