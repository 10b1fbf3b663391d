// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// metadataServer answers at the address of metadata services, each machine by its own
// handler.
type metadataServer struct {
	server *http.Server
	served chan error
}

// headerTimeout bounds how long a connection may wait for its request's header. It is a
// guest that asks, and may be anybody.
const headerTimeout = 30 * time.Second

func serveMetadata(n *network, at netip.Addr) (*metadataServer, error) {
	// One hop and no further, both ways: whoever is behind the machine, such as a
	// container with a network of its own, gets no answer (EC2's hop limit of 1).
	lc := net.ListenConfig{Control: onDevice(n.cfg.Bridge, [2]int{unix.IP_TTL, 1}, [2]int{unix.SO_REUSEADDR, 1})}
	l, err := lc.Listen(context.Background(), "tcp4", netip.AddrPortFrom(at, 80).String())
	if err != nil {
		return nil, fmt.Errorf("metadata service at %v on %s: %w", at, n.cfg.Bridge, err)
	}
	s := &metadataServer{served: make(chan error, 1), server: &http.Server{
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          log.New(io.Discard, "", 0), // what guests do wrong is theirs to say
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := n.handler(r.RemoteAddr)
			if h == nil {
				panic(http.ErrAbortHandler) // its machine went while it asked
			}
			h.ServeHTTP(w, r)
		}),
	}}
	go func() { s.served <- s.server.Serve(knownOnly{l, n}) }()
	return s, nil
}

// handler is that of the machine which has an address and port, or nil.
func (n *network) handler(remote string) http.Handler {
	from, err := netip.ParseAddrPort(remote)
	if err != nil {
		return nil
	}
	if m := n.at(from.Addr()); m != nil {
		return m.Metadata
	}
	return nil
}

// knownOnly closes the connections of whoever is no machine with metadata, unheard.
type knownOnly struct {
	net.Listener
	network *network
}

func (k knownOnly) Accept() (net.Conn, error) {
	for {
		c, err := k.Listener.Accept()
		if err != nil || k.network.handler(c.RemoteAddr().String()) != nil {
			return c, err
		}
		_ = c.Close()
	}
}

// close ends the service and its connections.
func (s *metadataServer) close() error {
	err := s.server.Close()
	<-s.served
	return err
}
