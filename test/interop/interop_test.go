// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
)

// longLease is longer than a test.
const longLease = time.Hour

// A stock shim and our agent, without anything between them.
func TestStockShimWithAgent(t *testing.T) {
	names := newRegistry(t)
	for _, name := range []string{"pod", "files", "processes", "guest-pull"} {
		t.Run(name, func(t *testing.T) {
			w := newDirect(t)
			w.named = names
			Play(t, "testdata/"+name+".txt", w)
		})
	}
}

// A stock shim, our adaptor, our forwarder and our agent.
func TestStockShimWithAdaptor(t *testing.T) {
	n := newNode(t, longLease, func(dir string) backend { return realAgent(t, dir) })
	n.named = newRegistry(t)
	for _, name := range []string{"up", "pod", "down", "up", "guest-pull", "down", "up", "restart", "down"} {
		Play(t, "testdata/"+name+".txt", n)
	}
}

// A stock shim's errors.
func TestStockShimWithAdaptorAlone(t *testing.T) {
	for name, lease := range map[string]time.Duration{"hypervisor": longLease, "lease": 100 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			a := new(agenttest.Agent)
			t.Cleanup(a.Close)
			Play(t, "testdata/"+name+".txt", newNode(t, lease, func(string) backend { return a.Serve }))
		})
	}
}

// A runtime, our adaptor, our forwarder and a stock agent.
func TestStockAgentBehindForwarder(t *testing.T) {
	a := &agenttest.Stock{Agent: &agenttest.Agent{Programs: map[string]agenttest.Program{
		"pause": func(context.Context, *agenttest.Proc) int { return 1 }, // the guest's own runs instead
		"cat": func(ctx context.Context, p *agenttest.Proc) int {
			defer context.AfterFunc(ctx, func() { p.Stdin.(io.Closer).Close() })()
			if _, err := io.Copy(p.Stdout, p.Stdin); err != nil {
				return 1
			}
			return 0
		},
		"echo": func(_ context.Context, p *agenttest.Proc) int {
			fmt.Fprintln(p.Stdout, strings.Join(p.Args[1:], " "))
			return 0
		},
	}}}
	n := newNode(t, longLease, func(dir string) backend {
		a.Dir = filepath.Join(dir, "kata")
		return stockAgent(a)
	})
	n.stock = a
	for _, name := range []string{"up", "stock-agent", "down"} {
		Play(t, "testdata/"+name+".txt", n)
	}
}
