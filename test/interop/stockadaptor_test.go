// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/kata-remote/kata-remote/agent-protocol/hypervisorpb"
)

// stockAdaptor is cloud-api-adaptor 0.22 to a shim, with one pod VM: a socket for each
// sandbox, made by StartVM; a server of its own behind it that knows the calls of
// grpc.AgentService and grpc.Health and makes each again on the one connection to the
// VM, dialled once, for ever (pkg/util/agentproto/redirector.go); StopVM of an unknown
// sandbox is an error; errors are without class.
type stockAdaptor struct {
	dir string
	// agent dials the agent in the VM.
	agent func() (net.Conn, error)

	mu        sync.Mutex
	requests  map[string]*hypervisorpb.CreateVMRequest // guarded by mu
	listeners []*ttrpc.Server                          // guarded by mu
	stops     []string                                 // guarded by mu
	wg        sync.WaitGroup

	once   sync.Once
	client *ttrpc.Client // set by once
	err    error         // set by once
}

func newStockAdaptor(t *testing.T, agent func() (net.Conn, error)) *stockAdaptor {
	t.Helper()
	a := &stockAdaptor{dir: shortDir(t), agent: agent, requests: map[string]*hypervisorpb.CreateVMRequest{}}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	hypervisorpb.RegisterHypervisorService(srv, a)
	l, err := net.Listen("unix", a.socket())
	if err != nil {
		t.Fatal(err)
	}
	a.wg.Go(func() { srv.Serve(context.Background(), l) })
	t.Cleanup(func() {
		srv.Close()
		a.mu.Lock()
		for _, s := range a.listeners {
			s.Close()
		}
		a.mu.Unlock()
		if a.client != nil {
			a.client.Close()
		}
		a.wg.Wait()
	})
	return a
}

func (a *stockAdaptor) socket() string { return filepath.Join(a.dir, "hypervisor.sock") }

func (a *stockAdaptor) agentSocket(id string) string {
	return filepath.Join(a.dir, "pods", id, "agent.ttrpc")
}

func (a *stockAdaptor) stopped() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.stops...)
}

func (a *stockAdaptor) request(id string) *hypervisorpb.CreateVMRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[id]
}

func (a *stockAdaptor) CreateVM(_ context.Context, r *hypervisorpb.CreateVMRequest) (*hypervisorpb.CreateVMResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.requests[r.Id] != nil:
		return nil, fmt.Errorf("sandbox %s already exists", r.Id)
	case r.Annotations["io.kubernetes.cri.sandbox-name"] == "" || r.Annotations["io.kubernetes.cri.sandbox-namespace"] == "":
		return nil, errors.New("pod name and namespace are required")
	}
	a.requests[r.Id] = r
	return &hypervisorpb.CreateVMResponse{AgentSocketPath: a.agentSocket(r.Id)}, os.MkdirAll(filepath.Dir(a.agentSocket(r.Id)), 0o755)
}

func (a *stockAdaptor) StartVM(_ context.Context, r *hypervisorpb.StartVMRequest) (*hypervisorpb.StartVMResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.requests[r.Id] == nil {
		return nil, fmt.Errorf("sandbox %s does not exist", r.Id)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		return nil, err
	}
	for _, service := range []protoreflect.FullName{"grpc.AgentService", "grpc.Health"} {
		if err := a.redirect(srv, service); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", a.agentSocket(r.Id))
	if err != nil {
		return nil, err
	}
	a.listeners = append(a.listeners, srv)
	a.wg.Go(func() { srv.Serve(context.Background(), l) })
	return &hypervisorpb.StartVMResponse{}, nil
}

// redirect makes each call of a service again on the connection to the VM.
func (a *stockAdaptor) redirect(srv *ttrpc.Server, service protoreflect.FullName) error {
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(service)
	if err != nil {
		return err
	}
	methods := map[string]ttrpc.Method{}
	list := d.(protoreflect.ServiceDescriptor).Methods()
	for i := range list.Len() {
		m := list.Get(i)
		methods[string(m.Name())] = func(ctx context.Context, unmarshal func(any) error) (any, error) {
			return a.call(ctx, service, m, unmarshal)
		}
	}
	srv.Register(string(service), methods)
	return nil
}

func (a *stockAdaptor) call(ctx context.Context, service protoreflect.FullName, m protoreflect.MethodDescriptor, unmarshal func(any) error) (proto.Message, error) {
	a.once.Do(func() {
		conn, err := a.agent()
		if err != nil {
			a.err = err
			return
		}
		a.client = ttrpc.NewClient(conn)
	})
	if a.err != nil {
		return nil, a.err
	}
	req, err := message(m.Input(), "")
	if err != nil {
		return nil, err
	}
	reply, err := message(m.Output(), "")
	if err != nil {
		return nil, err
	}
	if err := unmarshal(req); err != nil {
		return nil, err
	}
	return reply, a.client.Call(ctx, string(service), string(m.Name()), req, reply)
}

func (a *stockAdaptor) StopVM(_ context.Context, r *hypervisorpb.StopVMRequest) (*hypervisorpb.StopVMResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.requests[r.Id] == nil {
		return nil, fmt.Errorf("sandbox %s does not exist", r.Id)
	}
	delete(a.requests, r.Id)
	a.stops = append(a.stops, r.Id)
	return &hypervisorpb.StopVMResponse{}, nil
}

func (a *stockAdaptor) Version(context.Context, *hypervisorpb.VersionRequest) (*hypervisorpb.VersionResponse, error) {
	return &hypervisorpb.VersionResponse{Version: "0.0.0"}, nil
}
