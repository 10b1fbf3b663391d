// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// eventAttempt bounds one delivery, as in containerd's own publisher.
	eventAttempt = 5 * time.Second
	// eventAge is how long an event is tried: longer than a restart of containerd.
	// A containerd that is away for longer asks for the state of what it knows.
	eventAge = 5 * time.Minute
	// eventQueue is how many events may wait. The oldest goes when there are more.
	eventQueue = 8192

	eventBackoffMin = 50 * time.Millisecond
	eventBackoffMax = 2 * time.Second
)

// Events delivers events to containerd, in the order in which they were published,
// one at a time. Publish never waits. An event is delivered once, except that one
// whose answer was lost with a containerd that ended is told to the next one too.
// Without an address (CRI-O has none) events are only logged.
type Events struct {
	address, namespace string
	client             *ttrpc.Client // used by run only

	ready  chan struct{} // capacity 1
	cancel context.CancelFunc
	done   chan struct{} // closed when run returned

	mu      sync.Mutex // guards the fields below
	queue   []*types.Envelope
	closing bool
}

// NewEvents begins to deliver to the ttrpc socket at address, in a namespace of
// containerd's. Close ends it.
func NewEvents(address, namespace string) *Events {
	ctx, cancel := context.WithCancel(context.Background())
	e := &Events{
		address: strings.TrimPrefix(address, "unix://"), namespace: namespace,
		ready: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{}),
	}
	go e.run(ctx)
	return e
}

// Publish queues an event of containerd's.
func (e *Events) Publish(event proto.Message) {
	topic := topicOf(event)
	body, err := anyOf(event)
	if err != nil {
		log.L.WithError(err).WithField("topic", topic).Error("event cannot be encoded")
		return
	}
	if e.address == "" {
		log.L.WithField("topic", topic).Debugf("event %v", event)
		return
	}
	env := &types.Envelope{Timestamp: timestamppb.Now(), Namespace: e.namespace, Topic: topic, Event: body}
	e.mu.Lock()
	if len(e.queue) == eventQueue {
		log.L.WithField("topic", e.queue[0].Topic).Error("too many events wait for containerd, the oldest is dropped")
		e.queue = e.queue[1:]
	}
	e.queue = append(e.queue, env)
	e.mu.Unlock()
	signal(e.ready)
}

// Close delivers what is queued, for as long as ctx allows.
func (e *Events) Close(ctx context.Context) {
	e.mu.Lock()
	e.closing = true
	e.mu.Unlock()
	signal(e.ready)
	select {
	case <-e.done:
	case <-ctx.Done():
	}
	e.cancel()
	<-e.done
}

func (e *Events) run(ctx context.Context) {
	defer close(e.done)
	defer func() {
		if e.client != nil {
			e.client.Close()
			e.client.UserOnCloseWait(context.Background())
		}
	}()
	for {
		e.mu.Lock()
		var next *types.Envelope
		if len(e.queue) > 0 {
			next = e.queue[0]
			e.queue[0] = nil
			e.queue = e.queue[1:]
		}
		closing := e.closing
		e.mu.Unlock()
		if next != nil {
			e.deliver(ctx, next)
			continue
		}
		if closing {
			return
		}
		select {
		case <-e.ready:
		case <-ctx.Done():
			return
		}
	}
}

// deliver tries until it succeeds, the event is too old, or ctx ends.
func (e *Events) deliver(ctx context.Context, env *types.Envelope) {
	for wait := eventBackoffMin; ; wait = min(2*wait, eventBackoffMax) {
		err := e.forward(ctx, env)
		if err == nil {
			return
		}
		if time.Since(env.Timestamp.AsTime()) > eventAge || ctx.Err() != nil {
			log.G(ctx).WithError(err).WithField("topic", env.Topic).Error("event was not delivered")
			return
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

func (e *Events) forward(ctx context.Context, env *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, eventAttempt)
	defer cancel()
	if e.client == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", e.address)
		if err != nil {
			return err
		}
		e.client = ttrpc.NewClient(conn)
	}
	_, err := eventsapi.NewTTRPCEventsClient(e.client).Forward(ctx, &eventsapi.ForwardRequest{Envelope: env})
	if err != nil {
		e.client.Close()
		e.client = nil
	}
	return err
}

// topicOf is the topic containerd expects an event under (containerd,
// core/runtime/events.go).
func topicOf(event proto.Message) string {
	switch event.(type) {
	case *events.TaskCreate:
		return "/tasks/create"
	case *events.TaskStart:
		return "/tasks/start"
	case *events.TaskExit:
		return "/tasks/exit"
	case *events.TaskDelete:
		return "/tasks/delete"
	case *events.TaskOOM:
		return "/tasks/oom"
	case *events.TaskExecAdded:
		return "/tasks/exec-added"
	case *events.TaskExecStarted:
		return "/tasks/exec-started"
	case *events.TaskPaused:
		return "/tasks/paused"
	case *events.TaskResumed:
		return "/tasks/resumed"
	}
	panic(fmt.Sprintf("event %T has no topic", event))
}

// anyOf packs a message as containerd's typeurl does: the bare name, no host.
func anyOf(m proto.Message) (*anypb.Any, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}, nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
