// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Stages of a program that isolates itself, carried in the environment.
const (
	stageVar  = "PEERPOD_TESTBED_STAGE"
	stageInit = "init" // process 1 of the new namespaces
	stageMain = "main" // the program itself, inside
	keepVar   = "PEERPOD_TESTBED_KEEP"
)

// keepFD is where the inside tells the outside that it stays.
const keepFD = 3

// Isolation says how a program is taken apart from its machine.
type Isolation struct {
	// PIDFile receives the process id, as the machine sees it, of process 1 inside,
	// for Stop. What an earlier run of the same file left running is stopped first.
	// Empty: not written. It is removed when the inside has ended.
	PIDFile string
	// MayKeep lets the inside outlive the outside (see Keep). Without it the
	// inside is killed when the outside dies, however that happens.
	MayKeep bool
}

// Isolate runs the program again inside a mount, network, process, host name, IPC
// and cgroup namespace of its own, with a /run and a cgroup tree of its own, so that
// what it does to its node is done to no other. All of it ends with process 1
// inside: there is no clean-up to forget, and nothing is killed by name.
//
// In the program that was started, done is true and code is the inside's exit
// status. Inside, done is false and the program goes on. It needs root.
func Isolate(opt Isolation) (code int, done bool) {
	switch os.Getenv(stageVar) {
	case stageMain:
		return 0, false
	case stageInit:
		runtime.LockOSThread()
		code, err := runInit()
		if err != nil {
			fmt.Fprintln(os.Stderr, "testbed:", err)
			return 1, true
		}
		return code, true
	}
	code, err := runOutside(opt)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testbed:", err)
		return 1, true
	}
	return code, true
}

// runOutside starts process 1 and waits for it.
func runOutside(opt Isolation) (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("namespaces and virtual network devices need root: run it as root")
	}
	if opt.PIDFile != "" {
		if err := Stop(opt.PIDFile); err != nil {
			return 0, fmt.Errorf("stop the earlier run: %w", err)
		}
	}
	runtime.LockOSThread() // Pdeathsig follows the thread that forked (prctl(2))
	groups, err := newCgroups()
	if err != nil {
		return 0, err
	}
	cmd, kept, err := startInit(opt, groups)
	if err != nil {
		groups.Remove()
		return 0, err
	}
	defer kept.Close()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	status := make([]byte, 1)
	if n, _ := kept.Read(status); n == 1 {
		return int(status[0]), nil // it stays, and so do its groups and its PID file
	}
	err = cmd.Wait()
	groups.Remove()
	if opt.PIDFile != "" {
		os.Remove(opt.PIDFile)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && s.Signaled() {
		return 128 + int(s.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

// startInit starts process 1 inside the groups. kept ends when the inside has, or
// carries the exit status that Keep was given.
func startInit(opt Isolation, groups Cgroups) (cmd *exec.Cmd, kept *os.File, err error) {
	kept, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer w.Close()
	cmd = exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageVar+"="+stageInit)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWCGROUP,
	}
	if opt.MayKeep {
		cmd.Env = append(cmd.Env, keepVar+"=1")
	} else {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	// A cgroup namespace takes its creator's group as its root: enter for the fork.
	err = groups.Enter()
	if err == nil {
		err = cmd.Start()
	}
	err = errors.Join(err, groups.Leave())
	if err == nil && opt.PIDFile != "" {
		err = os.WriteFile(opt.PIDFile, []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o644)
	}
	if err != nil {
		if cmd.Process != nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		kept.Close()
		return nil, nil, err
	}
	return cmd, kept, nil
}

// Keep ends the program that was started, with the given exit status, while the
// inside goes on until Stop. It returns an error where Isolation.MayKeep was not
// set. The terminal is let go.
func Keep(code int) error {
	if os.Getenv(keepVar) == "" {
		return errors.New("this program was not started to be kept")
	}
	if err := dropTerminal(); err != nil {
		return err
	}
	_, err := unix.Write(keepFD, []byte{byte(code)})
	return err
}

// dropTerminal lets go of whatever this process was started at.
func dropTerminal() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup2(int(null.Fd()), fd); err != nil {
			return err
		}
	}
	return nil
}

// Stop ends what Keep left running, by the PID file of its Isolation. Nothing
// running there is not an error.
func Stop(pidFile string) error {
	b, err := os.ReadFile(pidFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("%s: %w", pidFile, err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err == nil {
		defer unix.Close(fd)
		// The number may be another process's by now: ours says so in its environment.
		env, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
		if err == nil && strings.Contains(string(env), stageVar+"="+stageInit) {
			if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
				return err
			}
			for {
				_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000)
				if err != unix.EINTR {
					break
				}
			}
		}
	}
	removeStaleCgroups()
	return os.Remove(pidFile)
}

// runInit is process 1 inside: it makes the node, starts the program and reaps
// whoever is left to it.
func runInit() (int, error) {
	unix.CloseOnExec(keepFD)
	if err := makeNode(); err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	files := []uintptr{0, 1, 2, keepFD}
	os.Setenv(stageVar, stageMain)
	pid, err := syscall.ForkExec(self, os.Args, &syscall.ProcAttr{Env: os.Environ(), Files: files})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", self, err)
	}
	unix.Close(keepFD)
	if err := dropTerminal(); err != nil { // or who waits for its end would wait for ours
		return 0, err
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for s := range signals {
			syscall.Kill(pid, s.(syscall.Signal))
		}
	}()
	for {
		var ws syscall.WaitStatus
		p, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, err
		case p != pid:
		case ws.Signaled():
			return 128 + int(ws.Signal()), nil
		case ws.Exited():
			return ws.ExitStatus(), nil
		}
	}
}

// nodeDirs are paths that the programs of a node have compiled in. Inside, each is
// an empty tmpfs. overlaid are their parents: inside, they have a layer of their own,
// in which those of nodeDirs that this machine lacks are made. Making and removing
// them on the machine would be no good: the removal of a folder takes away what
// others, in their namespaces, have mounted on it.
var nodeDirs = []string{"/var/lib/cni", "/var/lib/kubelet", "/var/lib/peerpod", "/etc/cni", "/var/log/pods", "/etc/kata-containers"}

var overlaid = []string{"/etc", "/var/lib", "/var/log"}

func mount(fstype, target, data string) error {
	if err := unix.Mount(fstype, target, fstype, 0, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, target, err)
	}
	return nil
}

// makeNode gives the namespaces what a worker node has.
func makeNode() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	err := errors.Join(
		mount("proc", "/proc", ""),
		mount("sysfs", "/sys", ""),
		mount("tmpfs", "/sys/fs/cgroup", "mode=755"),
		mount("tmpfs", "/run", "mode=755"))
	for _, dir := range overlaid {
		layer := filepath.Join("/run/testbed-layers", strings.ReplaceAll(dir[1:], "/", "-"))
		upper, work := filepath.Join(layer, "upper"), filepath.Join(layer, "work")
		err = errors.Join(err, os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755),
			mount("overlay", dir, "lowerdir="+dir+",upperdir="+upper+",workdir="+work))
	}
	for _, dir := range nodeDirs {
		err = errors.Join(err, os.MkdirAll(dir, 0o755), mount("tmpfs", dir, "mode=755"))
	}
	if err != nil {
		return err
	}
	if err := MountCgroups(); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	if err := unix.Sethostname([]byte("testbed")); err != nil {
		return err
	}
	for _, dir := range []string{"/run/netns", "/run/lock"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/"+name, []byte("1"), 0); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
