// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	"google.golang.org/protobuf/proto"

	"github.com/containerd/containerd/api/types"
	"github.com/kata-remote/kata-remote/shim/service"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

// TestEventsWait publishes to a containerd that is not there: nobody waits, and when
// it comes it gets all of them in order.
func TestEventsWait(t *testing.T) {
	const n = 500
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	sink := shimtest.NewSink(t)
	sink.Down()
	e := service.NewEvents(sink.Address, "ns")
	for i := range n {
		e.Publish(&events.TaskOOM{ContainerID: fmt.Sprint(i)})
	}
	sink.Up()
	list, err := sink.WaitFor(ctx, func(l []*types.Envelope) bool { return len(l) == n })
	if err != nil {
		t.Fatal(err)
	}
	for i, env := range list {
		var m events.TaskOOM
		if err := proto.Unmarshal(env.Event.Value, &m); err != nil || m.ContainerID != fmt.Sprint(i) || env.Namespace != "ns" || env.Topic != "/tasks/oom" || env.Event.TypeUrl != "containerd.events.TaskOOM" {
			t.Fatalf("event %d: %v, %v", i, env, err)
		}
	}
	sink.Down() // a restart between two events
	sink.Up()
	e.Publish(&events.TaskOOM{ContainerID: "last"})
	e.Close(ctx)
	if got := len(sink.Events()); got != n+1 {
		t.Errorf("%d events, want %d", got, n+1)
	}
}

// TestEventsClose is bounded when nobody takes them, and works without an address.
func TestEventsClose(t *testing.T) {
	for _, address := range []string{"", "/nonesuch.sock"} {
		e := service.NewEvents(address, "ns")
		e.Publish(&events.TaskOOM{ContainerID: "x"})
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		e.Close(ctx)
		cancel()
	}
}
