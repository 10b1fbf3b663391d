// SPDX-License-Identifier: Apache-2.0

package agentproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/caa/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const serverName = "podvm-test-1"

func issue(t testing.TB, name string) *pki.Bundle {
	t.Helper()
	b, err := pki.Issue(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func clientTLS(t testing.TB, b *pki.Bundle) *tls.Config {
	t.Helper()
	c, err := pki.ClientConfig(serverName, b.CA, b.ClientCert, b.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func serverTLS(t testing.TB, b *pki.Bundle) *tls.Config {
	t.Helper()
	cert, err := tls.X509KeyPair([]byte(b.ServerCert), []byte(b.ServerKey))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(b.CA))
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	}
}

// health is the part of an agent that the tests call.
type health struct{ calls atomic.Int64 }

func (h *health) Check(context.Context, *agentpb.CheckRequest) (*agentpb.HealthCheckResponse, error) {
	h.calls.Add(1)
	return &agentpb.HealthCheckResponse{Status: agentpb.HealthCheckResponse_SERVING}, nil
}

func (h *health) Version(context.Context, *agentpb.CheckRequest) (*agentpb.VersionCheckResponse, error) {
	return &agentpb.VersionCheckResponse{AgentVersion: "test"}, nil
}

// vm is a pod VM's forwarder and agent: ttrpc behind mutual TLS.
type vm struct {
	health
	addr     netip.AddrPort
	accepted atomic.Int64
	srv      *ttrpc.Server
	done     chan struct{}
}

type countingListener struct {
	net.Listener
	n *atomic.Int64
}

func (l countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}

func startVM(t testing.TB, addr string, b *pki.Bundle, more ...func(*ttrpc.Server)) *vm {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{addr: l.Addr().(*net.TCPAddr).AddrPort(), done: make(chan struct{})}
	v.srv, err = ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	agentpb.RegisterHealthService(v.srv, v)
	for _, f := range more {
		f(v.srv)
	}
	var wrapped net.Listener = countingListener{l, &v.accepted}
	if b != nil {
		wrapped = tls.NewListener(wrapped, serverTLS(t, b))
	}
	go func() {
		defer close(v.done)
		v.srv.Serve(context.Background(), wrapped)
	}()
	t.Cleanup(v.stop)
	return v
}

func (v *vm) stop() { v.srv.Close(); <-v.done }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func listen(t testing.TB, target Target, first *relay.TLSConn) (*Proxy, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pods", "x", "agent.ttrpc")
	p, err := Listen(t.Context(), Config{Path: path, Target: target, First: first, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p, path
}

func check(t testing.TB, path string) error {
	t.Helper()
	c, err := relay.Dial(t.Context(), path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(c)
	defer client.Close()
	_, err = agentpb.NewHealthClient(client).Check(t.Context(), &agentpb.CheckRequest{})
	return err
}

func TestProxyCarriesCalls(t *testing.T) {
	b := issue(t, serverName)
	v := startVM(t, "127.0.0.1:0", b)
	target := Target{Addr: v.addr, TLS: clientTLS(t, b)}
	first, err := Wait(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	p, path := listen(t, target, first)
	if p.Served() {
		t.Error("served before anybody came")
	}
	for range 3 {
		if err := check(t, path); err != nil {
			t.Fatal(err)
		}
	}
	if !p.Served() {
		t.Error("not served after three clients")
	}
	if n := v.accepted.Load(); n != 3 {
		t.Errorf("%d connections to the VM for three clients, want 3: the first is to use the one there is", n)
	}
	for path, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want mode %v", path, fi.Mode(), err, want)
		}
	}
}

func TestDeadFirstConnectionIsNotUsed(t *testing.T) {
	b := issue(t, serverName)
	v := startVM(t, "127.0.0.1:0", b)
	target := Target{Addr: v.addr, TLS: clientTLS(t, b)}
	first, err := Wait(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	v.stop()
	startVM(t, v.addr.String(), b)
	for alive(first) { // until the end of the first VM's connection is here
		if sleep(t.Context(), time.Millisecond) != nil {
			t.Fatal("the connection outlives its server")
		}
	}
	_, path := listen(t, target, first)
	if err := check(t, path); err != nil {
		t.Errorf("first client after the VM's forwarder was restarted: %v", err)
	}
}

func TestWaitOutlastsABoot(t *testing.T) {
	b := issue(t, serverName)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close() // refused from here on
	started := make(chan *vm, 1)
	timer := time.AfterFunc(150*time.Millisecond, func() { started <- startVM(t, addr, b) })
	defer timer.Stop()
	c, err := Wait(t.Context(), Target{Addr: netip.MustParseAddrPort(addr), TLS: clientTLS(t, b)})
	<-started
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestWaitEndsWithItsContext(t *testing.T) {
	b := issue(t, serverName)
	// A server that takes connections and never answers, as a stuck guest does.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	for name, addr := range map[string]string{"refused": free.Addr().String(), "silent": l.Addr().String()} {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		_, err = Wait(ctx, Target{Addr: netip.MustParseAddrPort(addr), TLS: clientTLS(t, b)})
		cancel()
		if err == nil || !strings.Contains(err.Error(), addr) {
			t.Errorf("%s: %v, want an error with the address", name, err)
		}
		if name == "refused" && !strings.Contains(err.Error(), "refused") {
			t.Errorf("%v: does not say what the last attempt met", err)
		}
	}
}

func TestForwarderOfAnotherSandboxIsRefused(t *testing.T) {
	ours := issue(t, serverName)
	for name, theirs := range map[string]*pki.Bundle{"other name": issue(t, "podvm-other-2"), "same name": issue(t, serverName)} {
		v := startVM(t, "127.0.0.1:0", theirs)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { // until it tries again
			for v.accepted.Load() < 2 && sleep(ctx, time.Millisecond) == nil {
			}
			cancel()
		}()
		_, err := Wait(ctx, Target{Addr: v.addr, TLS: clientTLS(t, ours)})
		cancel()
		var refused *tls.CertificateVerificationError
		if !errors.As(err, &refused) {
			t.Errorf("%s: %v, want a refused certificate", name, err)
		}
		if v.calls.Load() != 0 {
			t.Errorf("%s: a call came through", name)
		}
	}
}

func TestClientLearnsThatTheVMIsGone(t *testing.T) {
	b := issue(t, serverName)
	v := startVM(t, "127.0.0.1:0", b)
	_, path := listen(t, Target{Addr: v.addr, TLS: clientTLS(t, b)}, nil)
	c, err := relay.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(c)
	defer client.Close()
	health := agentpb.NewHealthClient(client)
	if _, err := health.Check(t.Context(), &agentpb.CheckRequest{}); err != nil {
		t.Fatal(err)
	}
	v.stop()
	for err == nil { // the server ends its connections a moment after it has said so
		_, err = health.Check(t.Context(), &agentpb.CheckRequest{})
	}
	startVM(t, v.addr.String(), b)
	if err := check(t, path); err != nil {
		t.Errorf("a new client after the VM came back: %v", err)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	b := issue(t, serverName)
	v := startVM(t, "127.0.0.1:0", b)
	p, path := listen(t, Target{Addr: v.addr, TLS: clientTLS(t, b)}, nil)
	c, err := relay.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("the client's connection after Close: %v", err)
	}
	if p.Connections() != 0 {
		t.Errorf("%d connections after Close", p.Connections())
	}
	// The socket stays and is taken over.
	p, err = Listen(t.Context(), Config{Path: path, Target: Target{Addr: v.addr, TLS: clientTLS(t, b)}, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := check(t, path); err != nil {
		t.Errorf("after the socket was taken over: %v", err)
	}
}

func TestListenUnixRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := ListenUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := ListenUnix(t.Context(), path); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), path) {
		t.Errorf("a socket that is answered: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(t.Context(), file); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a file that is no socket: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file was changed")
	}
	if _, err := ListenUnix(t.Context(), filepath.Join(dir, strings.Repeat("x", 200))); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a path that is too long: %v", err)
	}
}

func TestRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x", "agent.ttrpc")
	l, err := ListenUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	for range 2 {
		if err := Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
}

// output answers ReadOutput with n messages of size bytes.
type output struct {
	podvmpb.PodVMService
	size int
	n    int
}

func (o *output) ReadOutput(_ context.Context, s podvmpb.PodVM_ReadOutputServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	m := &podvmpb.ReadOutputResponse{Data: make([]byte, o.size)}
	for range o.n {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkCheck is one call to the agent: to it directly over a unix socket, and
// through the adaptor. Their difference is what the adaptor costs.
func BenchmarkCheck(b *testing.B) {
	call := func(b *testing.B, path string) {
		c, err := relay.Dial(b.Context(), path)
		if err != nil {
			b.Fatal(err)
		}
		client := ttrpc.NewClient(c)
		defer client.Close()
		h := agentpb.NewHealthClient(client)
		durations := make([]time.Duration, 0, 1<<16)
		for b.Loop() {
			begin := time.Now()
			if _, err := h.Check(b.Context(), &agentpb.CheckRequest{}); err != nil {
				b.Fatal(err)
			}
			durations = append(durations, time.Since(begin))
		}
		reportMedian(b, durations)
	}
	b.Run("direct", func(b *testing.B) { call(b, directAgent(b)) })
	b.Run("proxied", func(b *testing.B) {
		bundle := issue(b, serverName)
		v := startVM(b, "127.0.0.1:0", bundle)
		_, path := listen(b, Target{Addr: v.addr, TLS: clientTLS(b, bundle)}, nil)
		call(b, path)
	})
}

// BenchmarkStream is a server stream of 128 KiB messages through the adaptor.
func BenchmarkStream(b *testing.B) {
	bundle := issue(b, serverName)
	const size = 128 << 10
	out := &output{size: size, n: b.N}
	v := startVM(b, "127.0.0.1:0", bundle, func(s *ttrpc.Server) { podvmpb.RegisterPodVMService(s, out) })
	_, path := listen(b, Target{Addr: v.addr, TLS: clientTLS(b, bundle)}, nil)
	c, err := relay.Dial(b.Context(), path)
	if err != nil {
		b.Fatal(err)
	}
	client := ttrpc.NewClient(c)
	defer client.Close()
	b.SetBytes(size)
	b.ResetTimer()
	s, err := podvmpb.NewPodVMClient(client).ReadOutput(b.Context())
	if err == nil {
		err = s.Send(&podvmpb.ReadOutputRequest{})
	}
	if err != nil {
		b.Fatal(err)
	}
	total := 0
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			b.Fatal(err)
		}
		total += len(m.Data)
	}
	if total != size*out.n {
		b.Fatalf("%d bytes, want %d", total, size*out.n)
	}
}

// BenchmarkBytes is the path without ttrpc: bytes from the VM to a client.
func BenchmarkBytes(b *testing.B) {
	bundle := issue(b, serverName)
	l, err := tls.Listen("tcp", "127.0.0.1:0", serverTLS(b, bundle))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	buf := make([]byte, 128<<10)
	n := b.N
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for range n {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	_, path := listen(b, Target{Addr: l.Addr().(*net.TCPAddr).AddrPort(), TLS: clientTLS(b, bundle)}, nil)
	c, err := relay.Dial(b.Context(), path)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	b.SetBytes(int64(len(buf)))
	b.ResetTimer()
	if got, err := io.Copy(io.Discard, c); err != nil || got != int64(n)*int64(len(buf)) {
		b.Fatal(got, err)
	}
}
