// SPDX-License-Identifier: Apache-2.0

// Package bootstrap is the part of the shim that containerd runs as a command: it
// starts the server that package service serves, finds it again for further
// containers of the pod, and cleans up after one that is gone.
//
// containerd's own pkg/shim is not used: from 2.3 on it refuses to be started by an
// older containerd. What differs between the versions:
//
//	            stdin of start         answer of start that it takes
//	1.6         options, or nothing    address
//	1.7 - 2.2   options, or nothing    address or JSON
//	2.3 -       BootstrapParams        address, JSON or protobuf
//
// The bare address, which means version 2 of the Task API over ttrpc, is thus an
// answer for all of them. JSON is given only to a containerd that has shown by its
// BootstrapParams that it is a new one, or by what it asks for: a bundle without an OCI
// spec is a pod's that containerd 2 makes through the Sandbox API (sandboxer = "shim"
// of the runtime handler), and the answer is version 3, without which containerd
// would not let the pod's containers join the sandbox. In every other bundle the
// version is 2, so that containerd asks for each container of a pod, and the pod is
// found by annotations.
//
// The server is a child in a session and a mount namespace of its own: what it mounts
// is seen by nobody else and goes with it.
package bootstrap

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-remote/kata-remote/shim/config"
	"github.com/kata-remote/kata-remote/shim/spec"
)

const (
	actionStart  = "start"
	actionDelete = "delete"

	// socketDir is where containerd's shims have their sockets. The name of one is
	// 64 characters, and a socket's path has at most 107.
	socketDir = "/run/containerd/s"

	// PanicLog is the file in the bundle that takes the server's standard error:
	// what the Go runtime says when it dies.
	PanicLog = "panic.log"

	// paramsTimeout bounds the wait for the writer of stdin. containerd writes at
	// once; others may pass on a pipe that nobody ever closes.
	paramsTimeout = time.Second

	// connectTimeout bounds the test whether a shim answers on a socket.
	connectTimeout = time.Second
)

// Start starts the pod's server, or finds it, and writes the answer for containerd
// to stdout: nothing else may be written by anybody.
func Start(ctx context.Context, f Flags, stdin *os.File, stdout io.Writer) error {
	bundle, err := bundleDir(f)
	if err != nil {
		return err
	}
	if f.ID == "" {
		return errors.New("flag -id is missing")
	}
	params, options := readParams(stdin, f.ID)
	dir := socketDir
	if d := params.GetSocketDir(); d != "" {
		dir = d
	}
	role, sandbox, version := spec.RoleSandbox, f.ID, 2
	if spc, err := spec.Read(bundle); errors.Is(err, fs.ErrNotExist) {
		version = 3
		if options != nil {
			if err := config.WriteOptions(bundle, options); err != nil {
				return err
			}
		}
	} else if err != nil {
		return err
	} else if role, sandbox, err = spec.Identity(spc, f.ID); err != nil {
		return err
	}
	address := socketAddress(dir, f.Address, f.Namespace, sandbox)
	switch {
	case role != spec.RoleMember:
		if err := spawn(ctx, f, bundle, address); err != nil {
			return err
		}
	case !answers(address):
		return fmt.Errorf("container %s belongs to sandbox %s, whose shim does not answer at %s", f.ID, sandbox, address)
	}
	if err := writeFile(filepath.Join(bundle, "address"), address); err != nil {
		return err
	}
	return reply(stdout, address, version, params != nil)
}

// bundleDir is the flag's, or the working directory, which containerd sets.
func bundleDir(f Flags) (string, error) {
	if f.Bundle != "" {
		return filepath.Abs(f.Bundle)
	}
	return os.Getwd()
}

// reply answers start.
func reply(w io.Writer, address string, version int, params bool) error {
	if !params && version == 2 {
		_, err := io.WriteString(w, address)
		return err
	}
	return json.NewEncoder(w).Encode(map[string]any{"version": version, "address": address, "protocol": "ttrpc"})
}

// readParams reads what a containerd from 2.3 on writes to stdin, nil for an older one,
// and the options of the runtime handler, which an older one writes there alone. A
// message of either kind decodes as the other, but only in the new one is the first
// field the container's id.
func readParams(stdin *os.File, id string) (*bootapi.BootstrapParams, *anypb.Any) {
	b := readAll(stdin)
	var p bootapi.BootstrapParams
	if len(b) > 0 && proto.Unmarshal(b, &p) == nil && p.InstanceID == id {
		for _, e := range p.Extensions {
			if config.Known(e.GetValue()) {
				return &p, e.Value
			}
		}
		return &p, nil
	}
	var a anypb.Any
	if proto.Unmarshal(b, &a) == nil && config.Known(&a) {
		return nil, &a
	}
	return nil, nil
}

// readAll reads what is written to stdin in time.
func readAll(stdin *os.File) []byte {
	var st unix.Stat_t
	if stdin == nil || unix.Fstat(int(stdin.Fd()), &st) != nil || st.Mode&unix.S_IFMT == unix.S_IFCHR {
		return nil
	}
	fd, err := unix.Dup(int(stdin.Fd()))
	if err != nil {
		return nil
	}
	if st.Mode&unix.S_IFMT == unix.S_IFIFO || st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		unix.SetNonblock(fd, true) // lets the deadline below work
	}
	in := os.NewFile(uintptr(fd), "stdin")
	defer in.Close()
	in.SetReadDeadline(time.Now().Add(paramsTimeout)) // not for a regular file, which does not wait
	b, _ := io.ReadAll(io.LimitReader(in, 4<<20))     // what came in time is what there is
	return b
}

// socketAddress is where the shim of a sandbox is found, by whoever knows the same
// things about it.
func socketAddress(dir, containerd, namespace, sandbox string) string {
	sum := sha256.Sum256([]byte(filepath.Join(containerd, namespace, sandbox)))
	return fmt.Sprintf("unix://%s/%x", dir, sum)
}

// answers tells whether somebody accepts connections at an address.
func answers(address string) bool {
	c, err := net.DialTimeout("unix", strings.TrimPrefix(address, "unix://"), connectTimeout)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// spawn starts the server with its listening socket, unless one is there already.
func spawn(ctx context.Context, f Flags, bundle, address string) error {
	l, err := listen(address)
	if errors.Is(err, errInUse) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen at %s: %w", address, err)
	}
	defer l.Close()
	cmd, err := startServer(f, bundle, address, l)
	if err != nil {
		os.Remove(strings.TrimPrefix(address, "unix://"))
		return fmt.Errorf("start the shim's server: %w", err)
	}
	adjustOOMScore(cmd.Process.Pid)
	if err := writeFile(filepath.Join(bundle, "shim.pid"), strconv.Itoa(cmd.Process.Pid)); err != nil {
		cmd.Process.Kill()
		return err
	}
	return cmd.Process.Release()
}

var errInUse = errors.New("a shim answers there")

// listen makes the socket. One that nobody answers on is left from a shim that died.
func listen(address string) (*net.UnixListener, error) {
	path := strings.TrimPrefix(address, "unix://")
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err == nil {
			l.SetUnlinkOnClose(false)
			return l, os.Chmod(path, 0o600)
		}
		if !errors.Is(err, syscall.EADDRINUSE) || attempt > 0 {
			return nil, err
		}
		if answers(address) {
			return nil, errInUse
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
}

// startServer runs this program again, with the socket as fd 3.
func startServer(f Flags, bundle, address string, l *net.UnixListener) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	lf, err := l.File()
	if err != nil {
		return nil, err
	}
	defer lf.Close()
	stderr, err := os.OpenFile(filepath.Join(bundle, PanicLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	args := []string{"-namespace", f.Namespace, "-address", f.Address, "-publish-binary", f.PublishBinary, "-id", f.ID, "-bundle", bundle, "-socket", address}
	if f.Debug {
		args = append(args, "-debug")
	}
	// What containerd got from its own parent and passed on without knowing must not
	// live as long as a pod: somebody may wait for the other end of a pipe.
	unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	cmd := exec.Command(self, args...)
	cmd.Dir = bundle
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{lf}
	// Not Unshareflags: Go would make every mount private then, and what the kubelet
	// mounts for later containers would not be seen. The server makes them slaves.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS}
	return cmd, cmd.Start()
}

// adjustOOMScore makes the server a little less protected than containerd, whose
// child it is, as containerd's own shims do. Where that is not allowed it stays as
// it is.
func adjustOOMScore(pid int) {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err == nil && n < 0 {
		os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(n+1)), 0)
	}
}

// writeFile replaces a small file of the bundle.
func writeFile(path, text string) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
