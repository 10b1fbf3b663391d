// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-remote/kata-remote/shim/sandbox"
	"github.com/kata-remote/kata-remote/shim/service"
)

const (
	// releaseTimeout bounds StopVM in delete. containerd gives the whole command 5 s;
	// the adaptor answers at once or is not there.
	releaseTimeout = 1500 * time.Millisecond
	// shutdownTimeout bounds the request to a server that is still there to end.
	shutdownTimeout = 500 * time.Millisecond
	// panicMax is how much of the end of panic.log is shown.
	panicMax = 16 << 10
	// statusKilled is what a container whose shim is gone is said to have ended with.
	statusKilled = 128 + uint32(syscall.SIGKILL)
)

// Delete cleans up after a shim that is gone. containerd runs it after a graceful
// end too, and for each container of a pod: it succeeds when there is nothing to do,
// and it touches the pod VM only from the bundle of the sandbox, which has the record
// of it. The answer goes to stdout; what stderr gets is shown as a warning.
func Delete(ctx context.Context, f Flags, stdout, stderr io.Writer) error {
	bundle, err := bundleDir(f)
	if err != nil {
		return err
	}
	err = errors.Join(release(ctx, bundle), unmount(bundle))
	if err != nil {
		fmt.Fprintf(stderr, "shim cleanup of %s: %v\n", f.ID, err)
	}
	showPanic(bundle, stderr)
	b, err := proto.Marshal(&taskapi.DeleteResponse{Pid: 0, ExitStatus: statusKilled, ExitedAt: timestamppb.Now()})
	if err != nil {
		return err
	}
	_, err = stdout.Write(b)
	return err
}

// release gives the pod VM of a sandbox's bundle back and ends what is left of its
// server. When the adaptor cannot be told, word is left for it (package vmnote).
func release(ctx context.Context, bundle string) error {
	r, err := sandbox.ReadRecord(bundle)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	rctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	if err := sandbox.Release(rctx, r); err != nil {
		return err
	}
	endServer(ctx, bundle)
	return os.Remove(filepath.Join(bundle, sandbox.RecordName))
}

// endServer asks a server that outlived containerd's interest in it to end, and
// removes its socket.
func endServer(ctx context.Context, bundle string) {
	address, err := os.ReadFile(filepath.Join(bundle, "address"))
	if err != nil {
		return
	}
	path := strings.TrimPrefix(strings.TrimSpace(string(address)), "unix://")
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	var d net.Dialer
	if conn, err := d.DialContext(ctx, "unix", path); err == nil {
		client := ttrpc.NewClient(conn)
		defer client.Close()
		if client.Call(ctx, service.Names[0], "Shutdown", &taskapi.ShutdownRequest{Now: true}, &emptypb.Empty{}) == nil {
			return // it removes its socket itself
		}
	}
	os.Remove(path)
}

// unmount undoes mounts on the bundle's rootfs. The server's own are in its mount
// namespace and went with it; these are from before.
func unmount(bundle string) error {
	rootfs := filepath.Join(bundle, "rootfs")
	if _, err := os.Lstat(rootfs); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return mount.UnmountRecursive(rootfs, unix.MNT_DETACH)
}

// showPanic passes on the last words of a server that died.
func showPanic(bundle string, w io.Writer) {
	f, err := os.Open(filepath.Join(bundle, PanicLog))
	if err != nil {
		return
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > panicMax {
		f.Seek(-panicMax, io.SeekEnd)
	}
	io.Copy(w, io.LimitReader(f, panicMax))
}
