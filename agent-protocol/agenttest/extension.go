// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
)

type extensionService struct{ *Agent }

// rootfsWindow is small, so that a caller that ignores it is caught.
const rootfsWindow = 256 << 10

func (s extensionService) ImportRootfs(ctx context.Context, st podvmpb.PodVM_ImportRootfsServer) error {
	if err := s.enter(ctx, "ImportRootfs"); err != nil {
		return errgrpc.ToGRPC(err)
	}
	first, err := st.Recv()
	if err != nil {
		return err
	}
	id := first.ContainerId
	if id == "" || len(first.Data) > 0 {
		return errgrpc.ToGRPC(fmt.Errorf("the first request names the container and carries no data: %w", errdefs.ErrInvalidArgument))
	}
	var archive []byte
	grant := &podvmpb.ImportRootfsResponse{Window: rootfsWindow}
	if err := st.Send(grant); err != nil {
		return err
	}
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return errgrpc.ToGRPC(fmt.Errorf("the archive ended without eof: %w", errdefs.ErrAborted))
		}
		if err != nil {
			return err
		}
		if len(r.Data) > extension.MaxData || len(r.Data) > rootfsWindow {
			return errgrpc.ToGRPC(fmt.Errorf("%d bytes in one message, the window is %d: %w", len(r.Data), rootfsWindow, errdefs.ErrInvalidArgument))
		}
		archive = append(archive, r.Data...)
		if r.Eof {
			s.mu.Lock()
			s.rootfs[id] = archive
			s.mu.Unlock()
			return st.Send(&podvmpb.ImportRootfsResponse{Consumed: uint64(len(archive)), Window: rootfsWindow, Done: true, Path: "/run/kata-containers/" + id + "/rootfs"})
		}
		if err := st.Send(&podvmpb.ImportRootfsResponse{Consumed: uint64(len(archive)), Window: rootfsWindow}); err != nil {
			return err
		}
	}
}

// acks is how far a reader has acknowledged, kept by a goroutine of its own: the
// stream must be received from at all times.
type acks struct {
	mu      sync.Mutex // guards acked and err
	acked   uint64
	err     error
	changed chan struct{} // capacity 1
}

func (s extensionService) ReadOutput(ctx context.Context, st podvmpb.PodVM_ReadOutputServer) error {
	if err := s.enter(ctx, "ReadOutput"); err != nil {
		return errgrpc.ToGRPC(err)
	}
	first, err := st.Recv()
	if err != nil {
		return err
	}
	p, err := s.find(first.ContainerId, first.ExecId)
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	var o *output
	switch first.Stream {
	case podvmpb.OutputStream_OUTPUT_STREAM_STDOUT:
		o = p.stdout
	case podvmpb.OutputStream_OUTPUT_STREAM_STDERR:
		o = p.stderr
	default:
		return errgrpc.ToGRPC(fmt.Errorf("stream is not set: %w", errdefs.ErrInvalidArgument))
	}
	if err := o.check(first.Offset); err != nil {
		return errgrpc.ToGRPC(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	a := &acks{acked: first.Offset, changed: make(chan struct{}, 1)}
	err = s.work.run(func() {
		defer cancel()
		a.run(st, o)
	})
	if err != nil {
		cancel()
		return errgrpc.ToGRPC(err)
	}
	err = s.send(ctx, st, o, first.Offset, first.Window, a)
	if ctx.Err() != nil {
		return nil
	}
	return errgrpc.ToGRPC(err)
}

func (a *acks) run(st podvmpb.PodVM_ReadOutputServer, o *output) {
	for {
		r, err := st.Recv()
		a.mu.Lock()
		if err != nil {
			a.err = err
		} else {
			a.acked = max(a.acked, r.Acked)
			o.ack(r.Acked)
		}
		a.mu.Unlock()
		select {
		case a.changed <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

func (s extensionService) send(ctx context.Context, st podvmpb.PodVM_ReadOutputServer, o *output, offset, window uint64, a *acks) error {
	for {
		a.mu.Lock()
		room := a.acked + window - offset
		a.mu.Unlock()
		b, again, err := o.next(ctx, offset, min(room, extension.ChunkSize), a.changed)
		switch {
		case err != nil:
			return err
		case again:
			continue
		}
		if err := st.Send(&podvmpb.ReadOutputResponse{Offset: offset, Data: b, Eof: len(b) == 0}); err != nil {
			return err
		}
		if len(b) == 0 {
			return nil
		}
		offset += uint64(len(b))
	}
}

func (s extensionService) WriteInput(_ context.Context, r *podvmpb.WriteInputRequest) (*podvmpb.WriteInputResponse, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	n, err := p.writeInput(r.Offset, r.Data, r.Eof)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &podvmpb.WriteInputResponse{Offset: n}, nil
}
