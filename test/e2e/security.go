// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/test/testbed"
)

func (s *Scenario) securityChecks() []Check {
	return []Check{
		{"a second pod runs in a machine of its own", func(ctx context.Context) (_ string, err error) {
			s.other, err = RunPod(ctx, s.Bed, "second", testbed.Handler, nil)
			if err != nil {
				return "", err
			}
			return "address " + s.other.IP, nil
		}},
		{"the adaptor's own certificate opens it", func(ctx context.Context) (string, error) {
			r, err := record(ctx, s.pod.ID)
			if err != nil {
				return "", err
			}
			return "", health(ctx, r, &r)
		}},
		{"a client without a certificate is refused", func(ctx context.Context) (string, error) {
			return s.refused(ctx, nil)
		}},
		{"a client with the other sandbox's certificate is refused", func(ctx context.Context) (string, error) {
			if s.other == nil {
				return "", errors.New("there is no other sandbox")
			}
			r, err := record(ctx, s.other.ID)
			if err != nil {
				return "", err
			}
			return s.refused(ctx, &r)
		}},
		{"a client that speaks no TLS is refused", s.plainRefused},
	}
}

// record reads what the adaptor has on disk of a sandbox, from a copy: the file
// itself is locked.
func record(ctx context.Context, id string) (store.Record, error) {
	b, err := os.ReadFile("/var/lib/peerpod/adaptor.db")
	if err != nil {
		return store.Record{}, err
	}
	dir, err := os.MkdirTemp("", "adaptor-db-")
	if err != nil {
		return store.Record{}, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "adaptor.db"), b, 0o600); err != nil {
		return store.Record{}, err
	}
	st, err := store.Open(ctx, dir)
	if err != nil {
		return store.Record{}, err
	}
	defer st.Close()
	all, _, err := st.All()
	if err != nil {
		return store.Record{}, err
	}
	for _, r := range all {
		if r.ID == id {
			return r, nil
		}
	}
	return store.Record{}, fmt.Errorf("no record of sandbox %s among %d", id, len(all))
}

// dialForwarder connects to the forwarder of a sandbox, past the adaptor, as a client
// with the certificate of as; nil has none.
func dialForwarder(ctx context.Context, r store.Record, as *store.Record) (net.Conn, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(r.TLS.CA)) {
		return nil, errors.New("the record's CA is no certificate")
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: r.TLS.ServerName}
	if as != nil {
		cert, err := tls.X509KeyPair([]byte(as.TLS.ClientCert), []byte(as.TLS.ClientKey))
		if err != nil {
			return nil, err
		}
		// Offer it whatever authorities the server names: a client that is up to
		// no good does not hold back.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	return (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", netip.AddrPortFrom(r.Instance.Addr, ForwarderPort).String())
}

// health asks the agent of a sandbox for its health.
func health(ctx context.Context, r store.Record, as *store.Record) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := dialForwarder(ctx, r, as)
	if err != nil {
		return err
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	_, err = agentpb.NewHealthClient(c).Check(ctx, &agentpb.CheckRequest{})
	return err
}

// refused checks that a client gets no answer, and that it is TLS that turns it away.
func (s *Scenario) refused(ctx context.Context, as *store.Record) (string, error) {
	r, err := record(ctx, s.pod.ID)
	if err != nil {
		return "", err
	}
	if err := health(ctx, r, as); err == nil {
		return "", errors.New("the agent answered")
	}
	conn, err := dialForwarder(ctx, r, as)
	if err == nil {
		// With TLS 1.3 a server's refusal of the client arrives with the first read.
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	var alert tls.AlertError
	var remote *net.OpError
	if !errors.As(err, &alert) && (!errors.As(err, &remote) || remote.Op != "remote error") {
		return "", fmt.Errorf("the connection ended with %v, not with a TLS alert", err)
	}
	return err.Error(), nil
}

func (s *Scenario) plainRefused(ctx context.Context) (string, error) {
	r, err := record(ctx, s.pod.ID)
	if err != nil {
		return "", err
	}
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", netip.AddrPortFrom(r.Instance.Addr, ForwarderPort).String())
	if err != nil {
		return "", err
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if _, err = agentpb.NewHealthClient(c).Check(ctx, &agentpb.CheckRequest{}); err == nil {
		return "", errors.New("the agent answered")
	}
	if ctx.Err() != nil {
		return "", errors.New("the connection was neither served nor closed")
	}
	return err.Error(), nil
}
