// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
	"github.com/kata-remote/kata-remote/cloud/userdata"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// bridge joins the node with the instances.
const bridge = "sim0"

func makeBridge() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridge
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make bridge %s: %w", bridge, err)
	}
	link, err := netlink.LinkByName(bridge)
	if err != nil {
		return err
	}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ipNet(nodeAddr)}); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// launcher starts instances. It is a sim.Launcher.
type launcher struct {
	podvmd, dir string
	delay       time.Duration

	mu   sync.Mutex // also held while this process is in an instance's cgroups
	last byte       // guarded by mu; of the addresses given out
}

// order is what an instance is told on its standard input.
type order struct {
	Name   string
	Addr   netip.Prefix
	Podvmd string
	Delay  time.Duration
	Files  []userdata.File
}

// Launch implements sim.Launcher.
func (l *launcher) Launch(_ context.Context, id cloud.InstanceID, req cloud.CreateRequest) (sim.Machine, error) {
	files, err := userdata.Parse(req.UserData)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last++; l.last == 255 {
		return nil, errors.New("the network has no address left")
	}
	addr := netip.AddrFrom4([4]byte{192, 168, 215, l.last + 1})
	o := order{Name: string(id), Addr: netip.PrefixFrom(addr, nodeAddr.Bits()), Podvmd: l.podvmd, Delay: l.delay, Files: files}
	m := &machine{addr: addr, done: make(chan struct{})}
	if m.groups, err = testbed.NewCgroups(fmt.Sprintf("%d-%s", os.Getpid(), id)); err != nil {
		return nil, err
	}
	if err := m.start(o, filepath.Join(l.dir, string(id)+".log")); err != nil {
		m.groups.Remove()
		return nil, err
	}
	return m, nil
}

// machine is an instance. It is a sim.Machine.
type machine struct {
	addr   netip.Addr
	groups testbed.Cgroups
	cmd    *exec.Cmd
	done   chan struct{}
}

// start starts the instance's process 1 and tells it what it is.
func (m *machine) start(o order, log string) error {
	out, err := os.Create(log)
	if err != nil {
		return err
	}
	defer out.Close()
	m.cmd = exec.Command("/proc/self/exe")
	m.cmd.Args = []string{machineName}
	m.cmd.Stdout, m.cmd.Stderr = out, out
	stdin, err := m.cmd.StdinPipe()
	if err != nil {
		return err
	}
	m.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWCGROUP,
		Pdeathsig:  syscall.SIGKILL,
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Pdeathsig follows the thread that forked (prctl(2))
		err := m.groups.Enter()
		if err == nil {
			err = m.cmd.Start()
		}
		started <- errors.Join(err, m.groups.Leave())
		if m.cmd.Process != nil {
			_ = m.cmd.Wait()
			m.groups.Remove()
		}
		close(m.done)
	}()
	err = <-started
	if err == nil {
		err = connect(m.cmd.Process.Pid, o.Addr.Addr())
	}
	if err == nil {
		err = json.NewEncoder(stdin).Encode(o)
	}
	if err = errors.Join(err, stdin.Close()); err != nil && m.cmd.Process != nil {
		m.Stop()
	}
	return err
}

// connect gives the instance its interface.
func connect(pid int, addr netip.Addr) error {
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = fmt.Sprintf("sim%d", addr.As4()[3]), br.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsPid(pid)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make the interface: %w", err)
	}
	return netlink.LinkSetUp(veth)
}

// Addrs implements sim.Machine.
func (m *machine) Addrs() []netip.Addr { return []netip.Addr{m.addr} }

// Done implements sim.Machine.
func (m *machine) Done() <-chan struct{} { return m.done }

// Stop implements sim.Machine. Its interface ends with its network namespace.
func (m *machine) Stop() {
	_ = m.cmd.Process.Kill()
	<-m.done
}
