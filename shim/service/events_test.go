// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

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
	// The answer to the one before may have been lost with the old containerd; then
	// the new one gets it too.
	got := sink.Events()
	var m events.TaskOOM
	if err := proto.Unmarshal(got[len(got)-1].Event.Value, &m); err != nil || m.ContainerID != "last" || len(got) > n+2 {
		t.Errorf("%d events, the last is of %s, %v", len(got), m.ContainerID, err)
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
