// SPDX-License-Identifier: Apache-2.0

package agentproxy

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// directAgent is an agent on a unix socket, with nothing in between.
func directAgent(b *testing.B) string {
	path := filepath.Join(b.TempDir(), "agent.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		b.Fatal(err)
	}
	agentpb.RegisterHealthService(srv, &health{})
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(context.Background(), l) }()
	b.Cleanup(func() { srv.Close(); <-done })
	return path
}

func reportMedian(b *testing.B, d []time.Duration) {
	if len(d) == 0 {
		return
	}
	slices.Sort(d)
	b.ReportMetric(float64(d[len(d)/2].Nanoseconds())/1e3, "p50-µs")
}
