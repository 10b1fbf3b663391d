// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// Stock is an Agent with the habits of the kata-agent (kata-containers 4.1,
// src/agent/src/rpc.rs) that surprise whoever stands before it:
//
//   - CreateSandbox removes the directory of its own socket, so that nobody can
//     connect any more; it accepts a second sandbox;
//   - the first answer to WaitProcess removes the process and its streams: who reads
//     or waits later gets NOT_FOUND;
//   - a root file system is one that it has pulled itself (storage image_guest_pull),
//     and for the pod's sandbox container the one of its own image;
//   - it ends after DestroySandbox: there is one sandbox in its life.
//
// Agent.Features must be empty.
type Stock struct {
	*Agent
	// Dir stands for /run/kata-containers.
	Dir string

	mu        sync.Mutex
	conns     []net.Conn // accepted so far; guarded by mu
	destroyed bool       // the next answer is that to DestroySandbox; guarded by mu
	end       func()     // ends Serve; guarded by mu
}

// shutdownTimeout is for replies on their way when the agent ends.
const shutdownTimeout = time.Second

// Socket is where it listens until CreateSandbox.
func (s *Stock) Socket() string { return filepath.Join(s.Dir, "agent.sock") }

// Connections is how many clients have connected so far.
func (s *Stock) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Serve makes the directory, listens, and answers until ctx ends or the sandbox is
// destroyed.
func (s *Stock) Serve(ctx context.Context) error {
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return err
	}
	l, err := net.Listen("unix", s.Socket())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(func(ctx context.Context, um ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
		if err := s.enter(ctx, path.Base(info.FullMethod)); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		return m(ctx, um)
	}))
	if err != nil {
		return err
	}
	s.Agent.mu.Lock()
	s.Agent.init()
	s.Agent.mu.Unlock()
	s.mu.Lock()
	s.end = cancel
	s.mu.Unlock()
	svc := &stockService{service: service{s.Agent}, stock: s}
	agentpb.RegisterAgentServiceService(srv, svc)
	agentpb.RegisterHealthService(srv, svc)
	calls, stopCalls := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCalls()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-ctx.Done()
		// Calls that wait for ever end with their connections, as they do when a
		// process ends.
		idle, stop := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer stop()
		if srv.Shutdown(idle) != nil {
			s.mu.Lock()
			for _, c := range s.conns {
				c.Close()
			}
			s.mu.Unlock()
			stopCalls()
			srv.Close()
		}
	}()
	err = srv.Serve(calls, counted{l, s})
	cancel()
	<-ended
	if errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}

// counted remembers the connections it accepts.
type counted struct {
	net.Listener
	stock *Stock
}

func (c counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c.stock.mu.Lock()
	defer c.stock.mu.Unlock()
	c.stock.conns = append(c.stock.conns, conn)
	return lastWords{conn, c.stock}, nil
}

// lastWords ends the agent when the answer to DestroySandbox is sent, and not before:
// the shutdown of a ttrpc server takes answers away that wait to be written.
type lastWords struct {
	net.Conn
	stock *Stock
}

func (l lastWords) Write(b []byte) (int, error) {
	n, err := l.Conn.Write(b)
	l.stock.mu.Lock()
	defer l.stock.mu.Unlock()
	if l.stock.destroyed {
		l.stock.end()
	}
	return n, err
}

type stockService struct {
	service
	stock *Stock
}

func (s *stockService) CreateSandbox(_ context.Context, r *agentpb.CreateSandboxRequest) (*emptypb.Empty, error) {
	if err := os.RemoveAll(s.stock.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.stock.Dir, 0o755); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sandbox = r
	return empty, nil
}

func (s *stockService) DestroySandbox(ctx context.Context, r *agentpb.DestroySandboxRequest) (*emptypb.Empty, error) {
	resp, err := s.service.DestroySandbox(ctx, r)
	s.stock.mu.Lock()
	defer s.stock.mu.Unlock()
	s.stock.destroyed = true
	return resp, err
}

const guestPull = "image_guest_pull"

func (s *stockService) CreateContainer(ctx context.Context, r *agentpb.CreateContainerRequest) (*emptypb.Empty, error) {
	i := slices.IndexFunc(r.Storages, func(st *agentpb.Storage) bool {
		return st.Driver == guestPull && st.MountPoint == r.GetOCI().GetRoot().GetPath()
	})
	if i < 0 {
		return nil, errgrpc.ToGRPC(fmt.Errorf("mount rootfs %q: ENOENT: No such file or directory: %w", r.GetOCI().GetRoot().GetPath(), errdefs.ErrInternal))
	}
	if _, err := s.service.CreateContainer(ctx, r); err != nil || !strings.Contains(strings.Join(r.Storages[i].DriverOptions, ""), `"sandbox"`) {
		return empty, err
	}
	// The guest's own pause runs, whatever the node has asked for.
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[r.ContainerId].procs[""] = newProcess(r.OCI.Process, pause)
	return empty, nil
}

func (s *stockService) WaitProcess(ctx context.Context, r *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
	resp, err := s.service.WaitProcess(ctx, r)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[r.ContainerId]; c != nil {
		exec := r.ExecId
		if exec == r.ContainerId {
			exec = ""
		}
		delete(c.procs, exec)
	}
	return resp, nil
}
