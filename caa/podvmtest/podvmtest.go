// SPDX-License-Identifier: Apache-2.0

// Package podvmtest stands in for pod VMs in tests of the adaptor: for each instance
// of a simulated cloud it starts what a pod VM is to the adaptor, an agent behind
// mutual TLS on an address of its own, set up from the user data and nothing else.
package podvmtest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/ttrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
	"github.com/kata-remote/kata-remote/cloud/userdata"
)

// VMs is a sim.Launcher. Safe for concurrent use; Hold is set before it is used.
type VMs struct {
	// Port is where every VM's forwarder listens, each on an address of its own in
	// 127.1.0.0/16.
	Port uint16
	// Mute makes VMs that get an address and never answer.
	Mute atomic.Bool
	// Hold, when not nil, keeps VMs from getting an address until it is closed.
	Hold chan struct{}

	next atomic.Int32

	mu      sync.Mutex
	configs []*podvmconfig.Config // guarded by mu
}

// New makes a launcher with a port that is free on all addresses of this machine's
// loopback, as far as can be told.
func New(t testing.TB) *VMs {
	t.Helper()
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return &VMs{Port: uint16(l.Addr().(*net.TCPAddr).Port)}
}

// Configs are the documents the VMs were given, in the order of their starts.
func (s *VMs) Configs() []*podvmconfig.Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.configs)
}

// Launch implements sim.Launcher.
func (s *VMs) Launch(ctx context.Context, _ cloud.InstanceID, req cloud.CreateRequest) (sim.Machine, error) {
	if s.Hold != nil {
		select {
		case <-s.Hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	cfg, err := read(req.UserData)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.configs = append(s.configs, cfg)
	s.mu.Unlock()
	n := s.next.Add(1)
	v := &vm{addr: netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n)}), done: make(chan struct{})}
	if s.Mute.Load() {
		return v, nil
	}
	if err := v.serve(cfg, s.Port); err != nil {
		return nil, err
	}
	return v, nil
}

func read(doc []byte) (*podvmconfig.Config, error) {
	files, err := userdata.Parse(doc)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 || files[0].Path != podvmconfig.Path {
		return nil, fmt.Errorf("user data has %d files, want %s alone", len(files), podvmconfig.Path)
	}
	return podvmconfig.Parse(files[0].Content)
}

type vm struct {
	addr netip.Addr
	srv  *ttrpc.Server // nil: mute
	done chan struct{}
	stop sync.Once
}

func (v *vm) serve(cfg *podvmconfig.Config, port uint16) error {
	cert, err := tls.X509KeyPair([]byte(cfg.TLSServerCert), []byte(cfg.TLSServerKey))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(cfg.TLSClientCA)) {
		return errors.New("no authority for clients")
	}
	l, err := tls.Listen("tcp", netip.AddrPortFrom(v.addr, port).String(), &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	})
	if err != nil {
		return err
	}
	if v.srv, err = ttrpc.NewServer(); err != nil {
		return errors.Join(err, l.Close())
	}
	agentpb.RegisterHealthService(v.srv, health{})
	go func() {
		defer close(v.done)
		v.srv.Serve(context.Background(), l)
	}()
	return nil
}

func (v *vm) Addrs() []netip.Addr   { return []netip.Addr{v.addr} }
func (v *vm) Done() <-chan struct{} { return v.done }

func (v *vm) Stop() {
	v.stop.Do(func() {
		if v.srv == nil {
			close(v.done)
			return
		}
		v.srv.Close()
	})
	<-v.done
}

type health struct{}

func (health) Check(context.Context, *agentpb.CheckRequest) (*agentpb.HealthCheckResponse, error) {
	return &agentpb.HealthCheckResponse{Status: agentpb.HealthCheckResponse_SERVING}, nil
}

func (health) Version(context.Context, *agentpb.CheckRequest) (*agentpb.VersionCheckResponse, error) {
	return &agentpb.VersionCheckResponse{}, nil
}
