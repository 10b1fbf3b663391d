// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Hardware is the condition of a module that drives devices of some machines only. It is
// loaded when one of its aliases matches the modalias of a device: one that is there at
// the start, or one that comes later (Follow), as those behind a bus whose own driver is
// a module do, and a network card that the host takes away and gives back.
const Hardware = "hardware"

// sysPath is where the kernel shows its devices.
const sysPath = "/sys"

// modaliases are those of all devices the kernel shows now.
func modaliases(sys string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(sys, "bus", "*", "devices", "*", "modalias"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it went between the two looks, or has none (ENODEV)
		}
		if name := strings.TrimSpace(string(b)); name != "" && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out, nil
}

// asked are the modules one of whose aliases matches one of the names. The kernel takes
// "-" and "_" for the same.
func asked(aliases []Alias, names ...string) map[string]bool {
	out := make(map[string]bool)
	for _, name := range names {
		name = strings.ReplaceAll(name, "-", "_")
		for _, a := range aliases {
			if ok, _ := path.Match(strings.ReplaceAll(a.Pattern, "-", "_"), name); ok { // ReadAliases has checked the pattern
				out[a.Module] = true
			}
		}
	}
	return out
}

// withDependencies are the modules of a list that wanted chooses and all they need, in
// the list's order.
func withDependencies(list []Module, wanted func(Module) bool) []Module {
	needed := make(map[string]bool)
	for _, m := range slices.Backward(list) { // a module stands after those it needs
		if wanted(m) {
			needed[m.Name] = true
		}
		if needed[m.Name] {
			for _, d := range m.Deps {
				needed[d] = true
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(list), func(m Module) bool { return !needed[m.Name] })
}

// newcomers hears of devices that come.
type newcomers interface {
	// pending returns the modaliases of the devices that came since the last call, and
	// waits for one if wait is set. errLost: there were more.
	pending(wait bool) ([]string, error)
	// Close ends a wait, with an error.
	Close() error
}

// uevents are the kernel's messages about its devices
// (Linux Documentation/core-api/kobject.rst; lib/kobject_uevent.c).
type uevents struct{ *os.File }

// kernelEvents is the multicast group of the kernel's own events; udev has another.
const kernelEvents = 1

func listen() (newcomers, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen for devices: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelEvents}); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for devices: %w", err), unix.Close(fd))
	}
	return uevents{os.NewFile(uintptr(fd), "uevents")}, nil
}

// errLost: events came faster than they were read.
var errLost = errors.New("events of devices were lost")

func (u uevents) pending(wait bool) (out []string, err error) {
	conn, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 16<<10) // an event has at most 2 KiB (UEVENT_BUFFER_SIZE)
	read := conn.Read(func(fd uintptr) bool {
		for {
			n, from, rerr := unix.Recvfrom(int(fd), buf, 0)
			switch {
			case errors.Is(rerr, unix.EINTR):
				continue
			case errors.Is(rerr, unix.EAGAIN):
				return !wait || len(out) > 0
			case errors.Is(rerr, unix.ENOBUFS):
				err = errLost
				return true
			case rerr != nil:
				err = rerr
				return true
			}
			// Port 0 is the kernel; nobody else's word counts.
			if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
				continue
			}
			if name := addedDevice(buf[:n]); name != "" {
				out = append(out, name)
			}
		}
	})
	return out, errors.Join(err, read)
}

// addedDevice returns the modalias in an event that tells of a new device, or "".
func addedDevice(event []byte) (modalias string) {
	added := false
	for word := range bytes.SplitSeq(event, []byte{0}) {
		if string(word) == "ACTION=add" {
			added = true
		}
		if value, found := bytes.CutPrefix(word, []byte("MODALIAS=")); found {
			modalias = string(value)
		}
	}
	if !added {
		return ""
	}
	return modalias
}

// drive loads the Hardware modules for the named devices. A driver that cannot be loaded
// is no reason to end: what is missing then shows where it is needed. It returns why.
func (l *Loading) drive(names []string) error {
	if len(names) == 0 {
		return nil
	}
	want := asked(l.aliases, names...)
	var errs []error
	for _, m := range withDependencies(l.list, func(m Module) bool { return m.When == Hardware && want[m.Name] }) {
		if err := l.insert(m); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// driveAll loads the Hardware modules for all devices that are there.
func (l *Loading) driveAll() error {
	names, err := modaliases(l.ld.sys)
	if err != nil {
		return err
	}
	return l.drive(names)
}

// Follow waits like Wait and then loads modules for devices as they come, until ctx is
// done. problem is told of drivers that could not be loaded. It is called once when the
// list has Hardware modules, and returns at once when it has none.
func (l *Loading) Follow(ctx context.Context, problem func(error)) {
	if l.watch == nil {
		return
	}
	<-l.ended
	stop := context.AfterFunc(ctx, func() { _ = l.watch.Close() })
	defer l.watch.Close()
	defer stop()
	for _, err := range l.problems {
		problem(err)
	}
	for ctx.Err() == nil {
		names, err := l.watch.pending(true)
		if err != nil && !errors.Is(err, errLost) {
			if ctx.Err() == nil {
				problem(fmt.Errorf("listen for devices: %w", err))
			}
			return
		}
		if err := l.driveNew(names, err); err != nil {
			problem(err)
		}
	}
}

// driveNew loads the modules for what pending returned.
func (l *Loading) driveNew(names []string, err error) error {
	if errors.Is(err, errLost) {
		return l.driveAll()
	}
	return errors.Join(err, l.drive(names))
}

// Request loads modules whose condition is Demand or Hardware, and what they need, by
// name. Those that are not on the list are built into the kernel.
func (l *Loading) Request(names ...string) error {
	for _, m := range withDependencies(l.list, func(m Module) bool { return slices.Contains(names, m.Name) }) {
		if err := l.insert(m); err != nil {
			return err
		}
	}
	return nil
}
