// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// machineName is this program's name where it is process 1 of an instance.
const machineName = "sim-machine"

// behind is where podvmd listens when its connections are delayed.
const behind = "127.0.0.1:15151"

// runMachine is an instance's process 1: it makes the place, starts podvmd and reaps
// until podvmd has ended.
func runMachine() error {
	var o order
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return fmt.Errorf("read what to be: %w", err)
	}
	if err := makePlace(o); err != nil {
		return err
	}
	listen := net.JoinHostPort(o.Addr.Addr().String(), strconv.Itoa(podvmconfig.ForwarderPort))
	if o.Delay > 0 {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return err
		}
		listen = behind
		go serveDelayed(l, o.Delay/2)
	}
	// The clock is the machine's that runs the test.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_TIME, 0, 0, 0); err != nil {
		return fmt.Errorf("give up CAP_SYS_TIME: %w", err)
	}
	pid, err := syscall.ForkExec(o.Podvmd, []string{"podvmd", "--config", podvmconfig.Path, "--listen", listen}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return fmt.Errorf("start podvmd: %w", err)
	}
	for {
		var ws syscall.WaitStatus
		switch p, err := syscall.Wait4(-1, &ws, 0, nil); {
		case err == syscall.EINTR:
		case err != nil:
			return err
		case p == pid:
			return fmt.Errorf("podvmd ended: exit status %d, signal %d", ws.ExitStatus(), ws.Signal())
		}
	}
}

// makePlace gives the namespaces what a machine has.
func makePlace(o order) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, m := range []struct{ fstype, target, data string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"tmpfs", "/sys/fs/cgroup", "mode=755"}, {"tmpfs", "/run", "mode=755"},
	} {
		if err := unix.Mount(m.fstype, m.target, m.fstype, 0, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if err := testbed.MountCgroups(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(o.Name)); err != nil {
		return err
	}
	for _, f := range o.Files {
		if err := os.MkdirAll(filepath.Dir(f.Path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(f.Path, f.Content, 0o600); err != nil {
			return err
		}
	}
	for _, name := range []string{"lo", "eth0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if name == "eth0" {
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(o.Addr)}); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	return nil
}

// serveDelayed passes connections on, each byte after a delay.
func serveDelayed(l net.Listener, delay time.Duration) {
	for {
		a, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "machine: accept:", err)
			return
		}
		go func() {
			defer a.Close()
			b, err := net.Dial("tcp", behind)
			if err != nil {
				return // the adaptor tries again
			}
			defer b.Close()
			ended := make(chan struct{}, 2)
			for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
				go func() {
					_ = delayed(way[1].(*net.TCPConn), way[0], delay)
					ended <- struct{}{}
				}()
			}
			<-ended
			<-ended
		}()
	}
}

// piece is what was read at once, and when it may go on.
type piece struct {
	data []byte
	due  time.Time
}

// pieces bounds what is on its way: as much as a fast network holds at a delay of
// some milliseconds.
const pieces = 1024

// delayed copies until the end of what it reads.
func delayed(dst *net.TCPConn, src io.Reader, delay time.Duration) error {
	way := make(chan piece, pieces)
	written := make(chan error, 1)
	go func() {
		var err error
		for p := range way {
			if err != nil {
				continue // drain: the reader must see its own end
			}
			time.Sleep(time.Until(p.due))
			_, err = dst.Write(p.data)
		}
		written <- errors.Join(err, dst.CloseWrite())
	}()
	var err error
	for err == nil {
		buf := make([]byte, 64<<10)
		var n int
		n, err = src.Read(buf)
		way <- piece{buf[:n], time.Now().Add(delay)}
	}
	close(way)
	return errors.Join(err, <-written)
}
