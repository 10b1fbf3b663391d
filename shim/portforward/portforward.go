// SPDX-License-Identifier: Apache-2.0

// Package portforward is the node's end of `kubectl port-forward`. containerd connects
// to the pod's loopback interface in the pod's network namespace on the node, where
// nothing of the pod runs. The adaptor redirects such connections to one port; this
// package listens there and has the agent carry each to where it was meant to go
// (agent-protocol/forward).
package portforward

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/forward"
	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// Listener accepts the connections of one pod.
type Listener struct {
	l      *net.TCPListener
	target func(*net.TCPConn) (uint16, error)
}

// Listen listens inside the network namespace at path.
func Listen(path string) (*Listener, error) {
	type result struct {
		l   net.Listener
		err error
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, since it must not run
		// others in a foreign namespace.
		runtime.LockOSThread()
		l, err := listen(path)
		done <- result{l, err}
	}()
	r := <-done
	if r.err != nil {
		return nil, fmt.Errorf("listen for port-forward in %s: %w", path, r.err)
	}
	return &Listener{r.l.(*net.TCPListener), originalPort}, nil
}

// listen changes the calling thread's network namespace.
func listen(path string) (net.Listener, error) {
	ns, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, os.NewSyscallError("setns", err)
	}
	return net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), forward.Port)))
}

// Serve carries connections to the guest until ctx is done, and returns when the last
// one has ended. It closes the listener.
func (l *Listener) Serve(ctx context.Context, conn *guest.Conn) {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { l.l.Close() })
	defer stop()
	for {
		c, err := l.l.AcceptTCP()
		if err != nil {
			if ctx.Err() == nil {
				log.G(ctx).WithError(err).Error("port-forward ended")
				l.l.Close()
			}
			return
		}
		wg.Go(func() {
			if err := l.carry(ctx, conn, c); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).WithField(logkey.Error, err.Error()).Warn("port-forward")
			}
		})
	}
}

// carry forwards one connection and closes it. It is not tried again when the guest's
// connection breaks: what was sent is unknown, as with any TCP connection that ends.
func (l *Listener) carry(ctx context.Context, conn *guest.Conn, c *net.TCPConn) error {
	port, err := l.target(c)
	if err != nil {
		return errors.Join(err, c.Close())
	}
	ctx, cancel := context.WithCancel(ctx) // ends the stream
	defer cancel()
	var failed error
	err = conn.Call(ctx, func(ctx context.Context, client *ttrpc.Client, retried bool) error {
		if failed = relay(ctx, podvmpb.NewPodVMClient(client), c, port); failed != nil {
			failed = fmt.Errorf("connection to port %d of the pod: %w", port, failed)
		}
		return nil
	})
	return errors.Join(err, failed, closed(c))
}

// closed closes c, which may be closed.
func closed(c *net.TCPConn) error {
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func relay(ctx context.Context, vm podvmpb.PodVMClient, c *net.TCPConn, port uint16) error {
	s, err := vm.Forward(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&podvmpb.ForwardFrame{Port: uint32(port), Window: forward.Window}); err != nil {
		return err
	}
	first, err := s.Recv()
	if err != nil {
		return err
	}
	return forward.Relay(ctx, c, s, first.Window)
}

// originalPort is where a connection was meant to go before it was redirected
// (SO_ORIGINAL_DST, linux/netfilter_ipv4.h); without a redirect it is the port it
// came to.
func originalPort(c *net.TCPConn) (port uint16, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	const soOriginalDst = 80
	cerr := raw.Control(func(fd uintptr) {
		// The option's value is a sockaddr_in of 16 bytes; this is the call of the
		// package that reads as many: family, port, address.
		var v *unix.IPv6Mreq
		if v, err = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, soOriginalDst); err == nil {
			port = binary.BigEndian.Uint16(v.Multiaddr[2:4])
		}
	})
	if cerr != nil {
		return 0, cerr
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOPROTOOPT) { // connection tracking does not know it, or is off
		return uint16(c.LocalAddr().(*net.TCPAddr).Port), nil
	}
	if err != nil {
		return 0, os.NewSyscallError("getsockopt SO_ORIGINAL_DST", err)
	}
	return port, nil
}
