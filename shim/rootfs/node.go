// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/agent-protocol/podvmpb"
	"github.com/kata-remote/kata-remote/shim/guest"
)

// zstdWindow is how far back the compressor looks. The fastest level gains little
// from more, and this is most of what an import costs the shim in memory.
const zstdWindow = 512 << 10

// importing admits one import at a time: its buffers are the largest thing a shim
// ever holds, and two would share one connection anyway.
var importing = make(chan struct{}, 1)

// FromNode streams the root file system to the agent.
type FromNode struct{ conn *guest.Conn }

// Prepare mounts, streams and unmounts.
func (f *FromNode) Prepare(ctx context.Context, r Request) (Result, error) {
	select {
	case importing <- struct{}{}:
		defer func() { <-importing }()
	case <-ctx.Done():
		return Result{}, context.Cause(ctx)
	}
	// What the import used goes back to the system at once; a pod lives for long.
	defer debug.FreeOSMemory()
	dir, unmount, err := mountRoot(r)
	if err != nil {
		return Result{}, fmt.Errorf("mount the root file system of container %s: %w", r.Container, err)
	}
	defer func() {
		if err := unmount(); err != nil {
			log.G(ctx).WithError(err).WithField("container", r.Container).Warn("unmount the root file system")
		}
	}()
	var path string
	err = f.conn.PodVM(ctx, func(ctx context.Context, vm podvmpb.PodVMClient) (err error) {
		path, err = stream(ctx, vm, r.Container, dir)
		return err
	})
	if err != nil {
		return Result{}, fmt.Errorf("stream the root file system of container %s to the pod VM: %w", r.Container, err)
	}
	return Result{Path: path}, nil
}

// mountRoot mounts what containerd handed out and returns where it is.
func mountRoot(r Request) (dir string, unmount func() error, err error) {
	dir = r.Root
	if dir == "" {
		dir = "rootfs"
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(r.Bundle, dir)
	}
	if len(r.Mounts) == 0 {
		_, err := os.Stat(dir)
		return dir, func() error { return nil }, err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", nil, err
	}
	var mounts []mount.Mount
	for _, m := range r.Mounts {
		mounts = append(mounts, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	unmount = func() error { return mount.UnmountRecursive(dir, unix.MNT_DETACH) }
	if err := mount.All(mounts, dir); err != nil {
		return "", nil, errors.Join(err, unmount())
	}
	return dir, unmount, nil
}

// stream sends the tree at dir in one ImportRootfs.
func stream(ctx context.Context, vm podvmpb.PodVMClient, container, dir string) (string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Not ctx: an abandoned stream is drained below, see package stdio.
	st, err := vm.ImportRootfs(context.WithoutCancel(ctx))
	if err != nil {
		return "", err
	}
	w := &credit{changed: make(chan struct{}, 1), st: st}
	var path string
	done := make(chan error, 1)
	go func() {
		for {
			m, err := st.Recv()
			if err == nil && m.Done {
				path = m.Path
				done <- nil
				drain(st)
				return
			}
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = guest.Broken(fmt.Errorf("import ended early: %w", io.ErrUnexpectedEOF))
				}
				done <- err
				cancel(err)
				return
			}
			w.grant(m)
		}
	}()
	if err := st.Send(&podvmpb.ImportRootfsRequest{ContainerId: container, Compression: podvmpb.Compression_COMPRESSION_ZSTD}); err != nil {
		return "", guest.Broken(err)
	}
	err = send(ctx, w, dir)
	if err != nil {
		st.CloseSend() // the agent drops what it has and ends the stream
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return "", err
	}
	select {
	case err = <-done:
	case <-ctx.Done():
		st.CloseSend()
		return "", context.Cause(ctx)
	}
	return path, err
}

func drain(st podvmpb.PodVM_ImportRootfsClient) {
	for {
		if _, err := st.Recv(); err != nil {
			return
		}
	}
}

// send writes the archive and its end to w.
func send(ctx context.Context, w *credit, dir string) error {
	w.ctx = ctx
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(zstdWindow), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	if err := archive(ctx, z, dir); err != nil {
		z.Reset(nil)
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return w.finish()
}

// credit writes to the stream what the agent's window admits.
type credit struct {
	ctx     context.Context // of the import it belongs to
	st      podvmpb.PodVM_ImportRootfsClient
	changed chan struct{} // capacity 1
	buf     []byte        // collected, not yet sent
	sent    uint64

	mu    sync.Mutex // guards limit
	limit uint64     // bytes that may have been sent
}

func (w *credit) grant(m *podvmpb.ImportRootfsResponse) {
	w.mu.Lock()
	w.limit = max(w.limit, m.Consumed+m.Window)
	w.mu.Unlock()
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Write collects chunks of a good size, since a compressor writes small ones.
func (w *credit) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		if w.buf == nil {
			w.buf = make([]byte, 0, extension.ChunkSize)
		}
		k := min(len(b), extension.ChunkSize-len(w.buf))
		w.buf = append(w.buf, b[:k]...)
		b = b[k:]
		if len(w.buf) == extension.ChunkSize {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// flush sends what was collected as the window allows it.
func (w *credit) flush() error {
	for b := w.buf; len(b) > 0; {
		w.mu.Lock()
		room := w.limit - w.sent
		w.mu.Unlock()
		if room == 0 {
			select {
			case <-w.changed:
				continue
			case <-w.ctx.Done():
				return context.Cause(w.ctx)
			}
		}
		k := min(uint64(len(b)), room)
		if err := w.st.Send(&podvmpb.ImportRootfsRequest{Data: b[:k]}); err != nil {
			return guest.Broken(err)
		}
		w.sent += k
		b = b[k:]
	}
	w.buf = w.buf[:0]
	return nil
}

func (w *credit) finish() error {
	if err := w.flush(); err != nil {
		return err
	}
	if err := w.st.Send(&podvmpb.ImportRootfsRequest{Eof: true}); err != nil {
		return guest.Broken(err)
	}
	return nil
}
