// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

// BenchmarkContainer is a container's whole life, which is dominated by starting this
// binary again.
func BenchmarkContainer(b *testing.B) {
	g := newGuest(b)
	g.sandbox()
	g.rootfs()
	for i := 0; b.Loop(); i++ {
		id := fmt.Sprintf("box%d", i)
		g.run(id, "exit 0")
		g.wait(id, "")
		g.remove(id)
	}
}

// BenchmarkExec is a process added to a container, as a probe is.
func BenchmarkExec(b *testing.B) {
	g := newGuest(b)
	g.sandbox()
	g.run("main", "sleep 100000")
	for i := 0; b.Loop(); i++ {
		id := fmt.Sprintf("exec%d", i)
		g.exec("main", id, "exit 0", false)
		g.wait("main", id)
	}
}

// BenchmarkReadOutput is the way of a process's output to a client on a unix socket.
func BenchmarkReadOutput(b *testing.B) {
	g := newGuest(b)
	g.sandbox()
	g.run("main", "dd if=/dev/zero bs=1M")
	s, err := g.podvm.ReadOutput(g.ctx())
	if err != nil {
		b.Fatal(err)
	}
	if err := s.Send(&podvmpb.ReadOutputRequest{ContainerId: "main", Stream: stdout, Window: extension.Window}); err != nil {
		b.Fatal(err)
	}
	const each = 1 << 20
	b.SetBytes(each)
	var got, acked uint64
	for n := uint64(1); b.Loop(); n++ {
		for got < n*each {
			r, err := s.Recv()
			if err != nil {
				b.Fatal(err)
			}
			if got += uint64(len(r.Data)); got-acked >= extension.Window/4 {
				acked = got
				if err := s.Send(&podvmpb.ReadOutputRequest{Acked: acked}); err != nil && !errors.Is(err, io.EOF) {
					b.Fatal(err)
				}
			}
		}
	}
}
