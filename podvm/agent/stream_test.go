// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

const stdout, stderr = podvmpb.OutputStream_OUTPUT_STREAM_STDOUT, podvmpb.OutputStream_OUTPUT_STREAM_STDERR

// collect reads a stream with the extension service from offset on, acknowledging
// what arrives, until it has limit bytes (0: the end). It checks that no byte is
// missing or repeated.
func collect(ctx context.Context, c *client, id, exec string, which podvmpb.OutputStream, offset uint64, limit int) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.podvm.ReadOutput(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.Send(&podvmpb.ReadOutputRequest{ContainerId: id, ExecId: exec, Stream: which, Offset: offset, Window: 256 << 10, Acked: offset}); err != nil {
		return nil, err
	}
	var all []byte
	for {
		r, err := s.Recv()
		if err != nil {
			return all, err
		}
		if r.Offset != offset+uint64(len(all)) {
			return all, fmt.Errorf("a chunk at %d, %d was next", r.Offset, offset+uint64(len(all)))
		}
		all = append(all, r.Data...)
		if r.Eof || limit > 0 && len(all) >= limit {
			return all, nil
		}
		if err := s.Send(&podvmpb.ReadOutputRequest{Acked: offset + uint64(len(all))}); err != nil && !errors.Is(err, io.EOF) {
			return all, err
		}
	}
}

// counting prints numbers, so that a lost or repeated byte shows: about 5 MB.
const counting = `i=0; while [ $i -lt 70 ]; do head -c 70000 /vol/data; i=$((i+1)); done`

func (g *guest) counted(id string) []byte {
	g.t.Helper()
	var data bytes.Buffer
	for n := 0; data.Len() < 70000; n++ {
		fmt.Fprintln(&data, n)
	}
	data.Truncate(70000)
	path := g.dir + "/rootfs/vol/data"
	g.rootfs()
	if err := writeFile(path, data.Bytes()); err != nil {
		g.t.Fatal(err)
	}
	g.create(id, g.spec(counting))
	return bytes.Repeat(data.Bytes(), 70)
}

func TestOutputSurvivesBrokenConnections(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	want := g.counted("main")
	g.start("main")
	var got []byte
	for breaks := 0; len(got) < len(want); breaks++ {
		c := g.dial()
		limit := 300_000
		if breaks == 6 {
			limit = 0
		}
		part, err := collect(g.ctx(), c, "main", "", stdout, uint64(len(got)), limit)
		if err != nil {
			t.Fatalf("after %d bytes: %v", len(got), err)
		}
		got = append(got, part...)
		c.conn.Close() // in the middle of the stream, with data under way
		c.close()
	}
	if hashOf(t, got) != hashOf(t, want) {
		t.Errorf("%d bytes arrived, not the %d that were written", len(got), len(want))
	}
	if got := g.wait("main", ""); got != 0 {
		t.Errorf("status %d", got)
	}
}

func TestReadStdoutIsExact(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	want := g.counted("main")
	g.start("main")
	if got := g.readAll("main", ""); got != string(want) {
		t.Errorf("%d bytes arrived, not the %d that were written", len(got), len(want))
	}
}

func TestProcessWaitsWhenNobodyReads(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.StreamBuffer = 64 << 10 })
	g.sandbox()
	want := g.counted("main")
	g.start("main")
	c, err := g.agent.container("main", errdefs.ErrNotFound)
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.find("")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the buffer is full", func() bool { _, n := p.stdout.Bounds(); return n == 64<<10 })
	if exited, _ := p.hasExited(); exited {
		t.Fatal("the process ended although its output has no room")
	}
	got, err := collect(g.ctx(), g.client, "main", "", stdout, 0, 0)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes arrived, not %d: %v", len(got), len(want), err)
	}
}

func TestSecondReaderWins(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "echo one; read x; echo two")
	first, err := g.podvm.ReadOutput(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Send(&podvmpb.ReadOutputRequest{ContainerId: "main", Stream: stdout, Window: 1000}); err != nil {
		t.Fatal(err)
	}
	if r, err := first.Recv(); err != nil || string(r.Data) != "one\n" {
		t.Fatalf("first reader: %v, %v", r, err)
	}
	second, err := g.podvm.ReadOutput(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	// Nothing was acknowledged, so everything is still there.
	if err := second.Send(&podvmpb.ReadOutputRequest{ContainerId: "main", Stream: stdout, Window: 1000}); err != nil {
		t.Fatal(err)
	}
	if r, err := second.Recv(); err != nil || string(r.Data) != "one\n" {
		t.Fatalf("second reader: %v, %v", r, err)
	}
	_, err = first.Recv()
	wantClass(t, "the first reader", err, errdefs.ErrAborted)
	must[any](t)(g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: "main", Data: []byte("\n")}))
	if r, err := second.Recv(); err != nil || string(r.Data) != "two\n" {
		t.Fatalf("second reader: %v, %v", r, err)
	}
	for { // eof may come with the data or after it
		r, err := second.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || len(r.Data) > 0 {
			t.Fatalf("after the end: %v, %v", r, err)
		}
	}
}

func TestReadOutputRefusals(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "echo 0123456789; echo no >&2; sleep 1000")
	if got, err := collect(g.ctx(), g.client, "main", "", stderr, 0, 3); err != nil || string(got) != "no\n" {
		t.Fatalf("standard error: %q, %v", got, err)
	}
	if got, err := collect(g.ctx(), g.client, "main", "", stdout, 0, 11); err != nil || string(got) != "0123456789\n" {
		t.Fatalf("standard output: %q, %v", got, err)
	}
	for _, tc := range []struct {
		name string
		req  *podvmpb.ReadOutputRequest
		want error
	}{
		{"beyond the end", &podvmpb.ReadOutputRequest{ContainerId: "main", Stream: stdout, Offset: 12, Window: 1}, errdefs.ErrOutOfRange},
		{"no window", &podvmpb.ReadOutputRequest{ContainerId: "main", Stream: stdout}, errdefs.ErrInvalidArgument},
		{"acked what did not arrive", &podvmpb.ReadOutputRequest{ContainerId: "main", Stream: stdout, Offset: 3, Acked: 4, Window: 1}, errdefs.ErrInvalidArgument},
		{"no stream", &podvmpb.ReadOutputRequest{ContainerId: "main", Window: 1}, errdefs.ErrInvalidArgument},
		{"no container", &podvmpb.ReadOutputRequest{ContainerId: "none", Stream: stdout, Window: 1}, errdefs.ErrInvalidArgument},
		{"no exec", &podvmpb.ReadOutputRequest{ContainerId: "main", ExecId: "none", Stream: stdout, Window: 1}, errdefs.ErrNotFound},
	} {
		s, err := g.podvm.ReadOutput(g.ctx())
		if err == nil {
			err = s.Send(tc.req)
		}
		if err == nil {
			_, err = s.Recv()
		}
		wantClass(t, tc.name, err, tc.want)
	}
	// Acknowledge, and then ask for what was acknowledged.
	s, err := g.podvm.ReadOutput(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&podvmpb.ReadOutputRequest{ContainerId: "main", Stream: stdout, Offset: 5, Acked: 5, Window: 100}); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Recv(); err != nil || string(r.Data) != "56789\n" {
		t.Fatalf("%v, %v", r, err)
	}
	_, err = collect(g.ctx(), g.client, "main", "", stdout, 4, 0)
	wantClass(t, "below what was acknowledged", err, errdefs.ErrOutOfRange)
}

func TestGrandchildHoldsTheOutput(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "sleep 1000")
	g.exec("main", "parent", "sleep 1000 & echo started; exit 2", false)
	if got := g.wait("main", "parent"); got != 2 {
		t.Errorf("status %d", got)
	}
	began := time.Now()
	if got := g.readAll("main", "parent"); got != "started\n" {
		t.Errorf("output %q", got)
	}
	if took := time.Since(began); took > patience/2 {
		t.Errorf("the end of the output took %v", took)
	}
	// One that never stops to write does not keep the stream open either.
	g.exec("main", "noisy", "yes & echo started; exit 2", false)
	got, err := collect(g.ctx(), g.client, "main", "noisy", stdout, 0, 0)
	if err != nil || !strings.Contains(string(got), "started\n") {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestInput(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	g.run("main", "cat; echo end")
	write := func(offset uint64, data string, eof bool) (uint64, error) {
		r, err := g.podvm.WriteInput(g.ctx(), &podvmpb.WriteInputRequest{ContainerId: "main", Offset: offset, Data: []byte(data), Eof: eof})
		return r.GetOffset(), err
	}
	for _, tc := range []struct {
		offset uint64
		data   string
		want   uint64
		err    error
	}{
		{0, "hello ", 6, nil},
		{0, "hello ", 6, nil},               // repeated whole
		{3, "lo world", 11, nil},            // repeated in part
		{20, "x", 0, errdefs.ErrOutOfRange}, // a hole
		{11, "", 11, nil},
	} {
		got, err := write(tc.offset, tc.data, false)
		if got != tc.want || class(err) != tc.err {
			t.Errorf("write %q at %d: %d, %v", tc.data, tc.offset, got, err)
		}
	}
	if _, err := write(11, "!", true); err != nil {
		t.Fatal(err)
	}
	if got, err := write(11, "!", true); err != nil || got != 12 { // the reply was lost
		t.Errorf("repeating the last write: %d, %v", got, err)
	}
	_, err := write(12, "more", false)
	wantClass(t, "write after the end", err, errdefs.ErrFailedPrecondition)
	if got := g.readAll("main", ""); got != "hello world!end\n" {
		t.Errorf("the process got %q", got)
	}
}

func TestCloseStdinKeepsPendingData(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	if err := mkfifo(g.rootfs() + "/vol/fifo"); err != nil {
		t.Fatal(err)
	}
	g.run("main", "read go </vol/fifo; cat | tail -c 9; echo; echo end")
	data := []byte(strings.Repeat("x", 300_000) + "the tail!")
	wrote := make(chan error, 1)
	go func() {
		_, err := g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: "main", Data: data})
		wrote <- err
	}()
	c, err := g.agent.container("main", errdefs.ErrNotFound)
	if err != nil {
		t.Fatal(err)
	}
	p, _ := c.find("")
	eventually(t, "the write is under way", p.stdin.Writing)
	must[any](t)(g.CloseStdin(g.ctx(), &agentpb.CloseStdinRequest{ContainerId: "main"}))
	if err := errors.Join(writeFile(g.rootfs()+"/vol/fifo", []byte("go\n")), <-wrote); err != nil {
		t.Fatal(err)
	}
	if got := g.readAll("main", ""); got != "the tail!\nend\n" {
		t.Errorf("output %q", got)
	}
	// An empty write is the other way to say the end.
	g.run("empty", "cat; echo end")
	must[any](t)(g.WriteStdin(g.ctx(), &agentpb.WriteStreamRequest{ContainerId: "empty"}))
	if got := g.readAll("empty", ""); got != "end\n" {
		t.Errorf("output %q", got)
	}
}

// A caller that goes away while the process takes no input loses its place and
// nothing else.
func TestInputSurvivesBrokenConnection(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	if err := mkfifo(g.rootfs() + "/vol/fifo"); err != nil {
		t.Fatal(err)
	}
	g.run("main", "read go </vol/fifo; cat")
	data := bytes.Repeat([]byte("0123456789"), 50_000)
	c := g.dial()
	wrote := make(chan error, 1)
	go func() {
		_, err := c.podvm.WriteInput(g.ctx(), &podvmpb.WriteInputRequest{ContainerId: "main", Data: data})
		wrote <- err
	}()
	ctr, err := g.agent.container("main", errdefs.ErrNotFound)
	if err != nil {
		t.Fatal(err)
	}
	p, _ := ctr.find("")
	eventually(t, "the write is under way", p.stdin.Writing)
	c.close()
	if err := <-wrote; err == nil {
		t.Fatal("the write was answered")
	}
	eventually(t, "the write ended", func() bool { return !p.stdin.Writing() })
	done := make(chan error, 1)
	go func() { done <- writeFile(g.dir+"/rootfs/vol/fifo", []byte("go\n")) }()
	go func() {
		_, err := g.podvm.WriteInput(g.ctx(), &podvmpb.WriteInputRequest{ContainerId: "main", Data: data, Eof: true})
		wrote <- err
	}()
	got := g.readAll("main", "")
	if err := errors.Join(<-done, <-wrote); err != nil {
		t.Fatal(err)
	}
	if got != string(data) {
		t.Errorf("the process got %d bytes, not the %d that were sent", len(got), len(data))
	}
}
