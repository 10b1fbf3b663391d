// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/kata-remote/kata-remote/agent-protocol/agentpb"      // the messages
	_ "github.com/kata-remote/kata-remote/agent-protocol/hypervisorpb" // the messages
)

// World is what a conversation is played in.
type World interface {
	// Agent connects to the agent, Hypervisor to the adaptor.
	Agent() (net.Conn, error)
	Hypervisor() (net.Conn, error)
	Names() Names
	// Do is a step of the world's own, with its words. handled is false for one that
	// it does not know.
	Do(words []string) (handled bool, err error)
}

// patience bounds what has no deadline of its own.
const patience = 2 * time.Minute

var services = map[string]protoreflect.FullName{
	"agent": "grpc.AgentService", "health": "grpc.Health", "hypervisor": "hypervisor.Hypervisor",
}

// player plays one conversation.
type player struct {
	t      *testing.T
	world  World
	client *ttrpc.Client // to the agent; nil: none yet
	calls  map[string]*pendingCall
}

// pendingCall is one that was started.
type pendingCall struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when the fields below are set
	reply  proto.Message
	err    error
}

// Play plays the conversation at path in the world. The test ends at the first answer
// that is not as written.
func Play(t *testing.T, path string, w World) {
	t.Helper()
	steps, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	p := &player{t: t, world: w, calls: map[string]*pendingCall{}}
	defer p.end()
	for _, s := range steps {
		if err := p.step(s); err != nil {
			t.Fatalf("%s:%d: %s\n%v", path, s.Line, strings.Join(s.Words, " "), err)
		}
	}
	for name := range p.calls {
		t.Errorf("%s: %s was started and is neither finished nor abandoned", path, name)
	}
}

// end hangs up and waits for what is under way.
func (p *player) end() {
	for _, c := range p.calls {
		c.cancel()
	}
	p.hangUp()
	for _, c := range p.calls {
		<-c.done
	}
}

func (p *player) hangUp() {
	if p.client != nil {
		p.client.Close()
		p.client = nil
	}
}

func (p *player) step(s Step) error {
	arg := func(i int) string {
		if i < len(s.Words) {
			return s.Words[i]
		}
		return ""
	}
	switch s.Words[0] {
	case "==":
		p.t.Log(strings.Join(s.Words[1:], " "))
		return nil
	case "call":
		c, err := p.start(arg(1), s.Text, s.Words[2:])
		if err != nil {
			return err
		}
		return p.finish(c, s.Want)
	case "start":
		c, err := p.start(arg(2), s.Text, s.Words[min(3, len(s.Words)):])
		if err != nil {
			return err
		}
		if p.calls[arg(1)] != nil {
			return fmt.Errorf("%s is under way already", arg(1))
		}
		p.calls[arg(1)] = c
		return nil
	case "pending", "finish", "abandon":
		return p.started(s, arg(1))
	case "read":
		return p.read(slices.Clone(s.Words[1:]))
	case "reconnect":
		p.hangUp()
		return nil
	}
	handled, err := p.world.Do(s.Words)
	if !handled && err == nil {
		err = errors.New("this world does not know the step")
	}
	return err
}

// started is a step about a call that was started.
func (p *player) started(s Step, name string) error {
	c := p.calls[name]
	if c == nil {
		return errors.New("it was not started")
	}
	switch s.Words[0] {
	case "pending":
		select {
		case <-c.done:
			return fmt.Errorf("it has ended: %v, %v", c.reply, c.err)
		default:
			return nil
		}
	case "abandon":
		c.cancel()
	}
	delete(p.calls, name)
	return p.finish(c, s.Want)
}

// start begins a call.
func (p *player) start(method, text string, options []string) (*pendingCall, error) {
	service, name, _ := strings.Cut(method, ".")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(services[service])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	m := d.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(name))
	if m == nil {
		return nil, fmt.Errorf("%s: there is no such call", method)
	}
	req, err := message(m.Input(), p.world.Names().expand(text))
	if err != nil {
		return nil, err
	}
	reply, err := message(m.Output(), "")
	if err != nil {
		return nil, err
	}
	ctx, cancel, err := p.context(options)
	if err != nil {
		return nil, err
	}
	client, hangUp, err := p.connect(service)
	if err != nil {
		cancel()
		return nil, err
	}
	c := &pendingCall{cancel: cancel, done: make(chan struct{}), reply: reply}
	go func() {
		defer close(c.done)
		defer hangUp()
		c.err = client.Call(ctx, string(services[service]), name, req, reply)
	}()
	return c, nil
}

func (p *player) context(options []string) (context.Context, context.CancelFunc, error) {
	timeout, cancelled := kataTimeout, false
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		switch {
		case o == "cancelled":
			cancelled = true
		case o == "timeout=none":
			timeout = 0
		case key == "timeout":
			d, err := time.ParseDuration(value)
			if err != nil {
				return nil, nil, err
			}
			timeout = d
		default:
			return nil, nil, fmt.Errorf("%q is no option of a call", o)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	if timeout > 0 {
		cancel()
		ctx, cancel = context.WithTimeout(context.Background(), timeout)
	}
	if cancelled {
		cancel()
	}
	return ctx, cancel, nil
}

// connect returns a client for the service and what ends it after the call.
func (p *player) connect(service string) (*ttrpc.Client, func(), error) {
	if service == "hypervisor" {
		conn, err := p.world.Hypervisor()
		if err != nil {
			return nil, nil, err
		}
		c := ttrpc.NewClient(conn)
		return c, func() { c.Close() }, nil
	}
	if p.client == nil {
		conn, err := p.world.Agent()
		if err != nil {
			return nil, nil, err
		}
		p.client = ttrpc.NewClient(conn)
	}
	return p.client, func() {}, nil
}

func message(d protoreflect.MessageDescriptor, text string) (proto.Message, error) {
	mt, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		return nil, err
	}
	m := mt.New().Interface()
	if err := prototext.Unmarshal([]byte(text), m); err != nil {
		return nil, fmt.Errorf("%s: %w", d.FullName(), err)
	}
	return m, nil
}

// finish waits for a call and compares its answer.
func (p *player) finish(c *pendingCall, want *Want) error {
	if want == nil {
		return errors.New("the conversation says nothing of the answer")
	}
	select {
	case <-c.done:
	case <-time.After(patience):
		return fmt.Errorf("no answer for %s", patience)
	}
	c.cancel()
	if got := class(c.err); !slices.Contains(want.Classes, got) {
		return fmt.Errorf("%s (%v), want %s", got, c.err, strings.Join(want.Classes, " or "))
	}
	if c.err != nil {
		if !strings.Contains(c.err.Error(), want.Says) {
			return fmt.Errorf("the error is %q, want %q in it", c.err, want.Says)
		}
		return nil
	}
	w, err := message(c.reply.ProtoReflect().Descriptor(), p.world.Names().expand(want.Text))
	if err != nil {
		return err
	}
	if diff := missing("", c.reply.ProtoReflect(), w.ProtoReflect()); diff != "" {
		return fmt.Errorf("%s\nthe reply is %v", diff, prototext.Format(c.reply))
	}
	return nil
}

// class is the name of what came of a call, as a ttrpc client of kata's sees it.
func class(err error) string {
	switch {
	case err == nil:
		return "OK"
	case errors.Is(err, ttrpc.ErrClosed):
		return "CLOSED"
	case errors.Is(err, context.Canceled):
		return "CANCELLED"
	case errors.Is(err, context.DeadlineExceeded):
		return "DEADLINE_EXCEEDED"
	}
	st, ok := status.FromError(err)
	if !ok {
		return "CONNECTION"
	}
	return codeNames[st.Code()]
}

var codeNames = map[codes.Code]string{
	codes.Canceled: "CANCELLED", codes.Unknown: "UNKNOWN", codes.InvalidArgument: "INVALID_ARGUMENT",
	codes.DeadlineExceeded: "DEADLINE_EXCEEDED", codes.NotFound: "NOT_FOUND", codes.AlreadyExists: "ALREADY_EXISTS",
	codes.PermissionDenied: "PERMISSION_DENIED", codes.ResourceExhausted: "RESOURCE_EXHAUSTED",
	codes.FailedPrecondition: "FAILED_PRECONDITION", codes.Aborted: "ABORTED", codes.OutOfRange: "OUT_OF_RANGE",
	codes.Unimplemented: "UNIMPLEMENTED", codes.Internal: "INTERNAL", codes.Unavailable: "UNAVAILABLE", codes.DataLoss: "DATA_LOSS",
}

// read reads an output as kata's runtime does (ReadStdout with len 32768, again and
// again) until the text has come, and to its end with "eof".
func (p *player) read(w []string) error {
	if len(w) != 5 || w[3] != "until" && w[3] != "eof" {
		return errors.New(`want: read METHOD CONTAINER EXEC until|eof TEXT`)
	}
	w[4] = p.world.Names().expand(w[4])
	var got strings.Builder
	for got.String() != w[4] || w[3] == "eof" {
		c, err := p.start(w[0], fmt.Sprintf("container_id: %q exec_id: %q len: 32768", w[1], w[2]), []string{"timeout=" + patience.String()})
		if err != nil {
			return err
		}
		if err := p.finish(c, &Want{Classes: []string{"OK"}}); err != nil {
			return fmt.Errorf("after %q: %w", got.String(), err)
		}
		f := c.reply.ProtoReflect().Descriptor().Fields().ByName("data")
		data := c.reply.ProtoReflect().Get(f).Bytes()
		got.Write(data)
		switch {
		case len(data) == 0 && w[3] == "eof" && got.String() == w[4]:
			return nil
		case len(data) == 0 || !strings.HasPrefix(w[4], got.String()):
			return fmt.Errorf("it says %s, want %s", strconv.Quote(got.String()), strconv.Quote(w[4]))
		}
	}
	return nil
}
