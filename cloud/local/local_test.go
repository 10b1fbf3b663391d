// SPDX-License-Identifier: Apache-2.0

package local

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/cloudtest"
)

func TestConformance(t *testing.T) {
	cloudtest.Run(t, func(t *testing.T) cloudtest.Harness {
		dir := stateDir(t)
		return cloudtest.Harness{
			New:   func(t *testing.T) cloud.Provider { return newProvider(t, dir, nil) },
			Leaks: func() []string { return leaks(dir) },
		}
	})
}

// TestBoot boots the project's kernel to userspace and the network, the way the
// probe says, and holds the guest to what the seed says.
func TestBoot(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, func(c *Config) { c.Accel = "" })
	accel, reason, err := p.Accel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s", accel, reason)
	inst := create(t, p, request(t, p, "boot", cloud.Size{}))
	if inst.State != cloud.StateRunning || len(inst.Addrs) != 1 {
		t.Fatalf("created %+v; want running with an address", inst)
	}
	r, err := p.load(inst.ID)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("id=%s secret=sekret-boot mac=%s mtu=9000", inst.ID, r.MAC)
	if got := ask(t, p, inst); got != want {
		t.Errorf("the guest says %q, want %q", got, want)
	}
	if err := p.Delete(t.Context(), inst.ID); err != nil {
		t.Fatal(err)
	}
	noLeaks(t, dir)
	logs, err := filepath.Glob(filepath.Join(dir, "logs", "podvm-boot-"+string(inst.ID)+".log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("serial logs kept: %v, %v; want one", logs, err)
	}
	if b, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(b), "READY") {
		t.Errorf("the kept log, %v:\n%s", err, b)
	}
}

// TestMicroVM: refused without KVM, but QEMU takes the command line.
func TestMicroVM(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, func(c *Config) { c.Machine = MachineMicroVM })
	req := request(t, p, "a", cloud.Size{})
	if _, err := p.Create(t.Context(), req); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "set LOCAL_MACHINE to q35") {
		t.Fatalf("Create without KVM: %v, want FailedPrecondition that names LOCAL_MACHINE", err)
	}
	id := idOf(req.Token)
	if _, err := p.reserve(t.Context(), id, req, AccelTCG); err != nil {
		t.Fatal(err)
	}
	r, err := p.load(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.make(t.Context(), r, req.UserData, true); err != nil {
		t.Fatal(err)
	}
	if inst, err := p.Get(t.Context(), id); err != nil || inst.State != cloud.StateRunning {
		t.Errorf("Get: %+v, %v; want running", inst, err)
	}
	if err := p.Delete(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	noLeaks(t, dir)
}

// ask connects until the guest answers.
func ask(t testing.TB, p *Provider, inst cloud.Instance) string {
	t.Helper()
	var answer string
	eventually(t, "the guest answers", func() bool {
		now, err := p.Get(t.Context(), inst.ID)
		if err != nil || now.State != cloud.StateRunning {
			t.Fatalf("Get: %+v, %v", now, err)
		}
		d := net.Dialer{Timeout: 200 * time.Millisecond}
		c, err := d.DialContext(t.Context(), "tcp", net.JoinHostPort(inst.Addrs[0].String(), "15150"))
		if err != nil {
			return false
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		answer = string(b)
		return err == nil && answer != ""
	})
	return answer
}

func TestPanic(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, func(c *Config) { c.KernelArgs = "guest.panic" })
	inst := create(t, p, request(t, p, "a", cloud.Size{}))
	eventually(t, "the instance failed", func() bool {
		now, err := p.Get(t.Context(), inst.ID)
		if err != nil {
			t.Fatal(err)
		}
		if now.State == cloud.StateFailed && !strings.Contains(now.Detail, "Kernel panic - not syncing: Attempted to kill init") {
			t.Fatalf("detail %q does not tell the panic", now.Detail)
		}
		return now.State == cloud.StateFailed
	})
	if err := p.Delete(t.Context(), inst.ID); err != nil {
		t.Fatal(err)
	}
	noLeaks(t, dir)
}

func TestSecretsAndRecord(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, nil)
	inst := create(t, p, request(t, p, "a", cloud.Size{}))
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if m := info.Mode(); m.Perm()&0o077 != 0 && m.IsRegular() {
			t.Errorf("%s has mode %v", path, m)
		}
		if d.Type().IsRegular() && filepath.Base(path) != seedName {
			if b, err := os.ReadFile(path); err != nil || strings.Contains(string(b), "sekret") {
				t.Errorf("%s holds user data (%v)", path, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.load(inst.ID)
	if err != nil {
		t.Fatal(err)
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", r.Process.PID))
	if err != nil || strings.Contains(string(cmdline), "sekret") {
		t.Errorf("QEMU's command line, %v: %q", err, cmdline)
	}
	br, err := netlink.LinkByName("ppbr0")
	if err != nil {
		t.Fatal(err)
	}
	neigh, err := netlink.NeighList(br.Attrs().Index, netlink.FAMILY_V4)
	neigh = slices.DeleteFunc(neigh, func(n netlink.Neigh) bool { return n.IP.IsMulticast() })
	if err != nil || len(neigh) != 1 || neigh[0].State != netlink.NUD_PERMANENT || neigh[0].HardwareAddr.String() != r.MAC {
		t.Errorf("neighbours %v, %v; want one, permanent, %s", neigh, err, r.MAC)
	}
	if err := p.Delete(t.Context(), inst.ID); err != nil {
		t.Fatal(err)
	}
	noLeaks(t, dir)
}

// TestInterrupted puts the instance into the states that a killed Create or Delete
// leaves, and has a new provider go on from there.
func TestInterrupted(t *testing.T) {
	for name, crash := range map[string]func(t *testing.T, p *Provider, r *record){
		"QEMU started, not recorded": func(t *testing.T, p *Provider, r *record) {
			r.Process = process{}
			if err := p.store(r); err != nil {
				t.Fatal(err)
			}
		},
		"recorded, nothing made": func(t *testing.T, p *Provider, r *record) {
			if err := p.stop(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			r.Process = process{}
			for _, f := range []string{seedName, qmpName, serialName, stderrName} {
				if err := os.Remove(filepath.Join(p.dir(r.ID), f)); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(p.store(r), p.removeBridge()); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := stateDir(t)
			p := newProvider(t, dir, nil)
			req := request(t, p, "a", cloud.Size{})
			for _, adopt := range []bool{true, false} {
				inst := create(t, p, req)
				r, err := p.load(inst.ID)
				if err != nil {
					t.Fatal(err)
				}
				crash(t, p, r)
				p = newProvider(t, dir, nil)
				if now, err := p.Get(t.Context(), inst.ID); err != nil || now.State != cloud.StatePending {
					t.Fatalf("interrupted instance: %+v, %v; want pending", now, err)
				}
				if adopt {
					if again := create(t, p, req); again.ID != inst.ID || again.State != cloud.StateRunning {
						t.Fatalf("the token again: %+v", again)
					}
					procs, err := findByArg(serialArg(p.dir(inst.ID)))
					if err != nil || len(procs) != 1 {
						t.Fatalf("QEMU processes: %v, %v; want one", procs, err)
					}
				}
				if err := p.Delete(t.Context(), inst.ID); err != nil {
					t.Fatal(err)
				}
				noLeaks(t, dir)
			}
		})
	}
	t.Run("deleted but for the directory", func(t *testing.T) {
		dir := stateDir(t)
		p := newProvider(t, dir, nil)
		id := idOf("a")
		if err := os.MkdirAll(p.dir(id), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := touch(filepath.Join(p.dir(id), lockName)); err != nil {
			t.Fatal(err)
		}
		if err := p.Delete(t.Context(), id); !errdefs.IsNotFound(err) {
			t.Errorf("Delete: %v, want NotFound", err)
		}
		noLeaks(t, dir)
	})
}

func TestDamagedRecord(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, nil)
	inst := create(t, p, request(t, p, "a", cloud.Size{}))
	if err := os.WriteFile(filepath.Join(p.dir(inst.ID), recordName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := p.List(t.Context(), cloud.Owner{Cluster: "c"})
	if err != nil || len(l) != 1 || l[0].ID != inst.ID || l[0].State != cloud.StateUnknown || !strings.Contains(l[0].Detail, "damaged") {
		t.Fatalf("List: %+v, %v; want the damaged instance", l, err)
	}
	if err := p.Delete(t.Context(), inst.ID); err != nil {
		t.Fatal(err)
	}
	noLeaks(t, dir)
}

// TestPIDReuse makes sure that a record of an ended QEMU never leads to another
// process.
func TestPIDReuse(t *testing.T) {
	self, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if !self.alive() {
		t.Error("we are not alive")
	}
	other := process{PID: self.PID, Start: self.Start - 1}
	if other.alive() {
		t.Error("our PID with another start time is alive")
	}
	if err := other.kill(); err != nil { // kills this test if it is wrong
		t.Error(err)
	}
	if err := other.wait(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestForeignDevices(t *testing.T) {
	t.Run("bridge", func(t *testing.T) {
		dir := stateDir(t)
		p := newProvider(t, dir, nil)
		addLink(t, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "ppbr0"}})
		_, err := p.Create(t.Context(), request(t, p, "a", cloud.Size{}))
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "set another LOCAL_BRIDGE") {
			t.Fatalf("Create: %v, want FailedPrecondition that names LOCAL_BRIDGE", err)
		}
		if _, err := netlink.LinkByName("ppbr0"); err != nil {
			t.Errorf("the foreign bridge: %v", err)
		}
		if l, err := p.List(t.Context(), cloud.Owner{Cluster: "c"}); err != nil || len(l) != 0 {
			t.Errorf("List after a failed Create: %v, %v", l, err)
		}
	})
	t.Run("tap", func(t *testing.T) {
		dir := stateDir(t)
		p := newProvider(t, dir, nil)
		req := request(t, p, "a", cloud.Size{})
		tap := "ppt" + string(idOf(req.Token)[3:15])
		addLink(t, &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: tap}, Mode: netlink.TUNTAP_MODE_TAP})
		if _, err := p.Create(t.Context(), req); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), tap) {
			t.Fatalf("Create: %v, want FailedPrecondition that names the tap", err)
		}
		if diff := cmp.Diff([]string{"link " + tap}, leaks(dir)); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
	})
	t.Run("subnet", func(t *testing.T) {
		dir := stateDir(t)
		p := newProvider(t, dir, nil)
		d := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "taken0"}}
		addLink(t, d)
		a, err := netlink.ParseAddr("192.168.213.77/26")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(netlink.AddrAdd(d, a), netlink.LinkSetUp(d)); err != nil {
			t.Fatal(err)
		}
		_, err = p.Create(t.Context(), request(t, p, "a", cloud.Size{}))
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "set another LOCAL_SUBNET") {
			t.Fatalf("Create: %v, want FailedPrecondition that names LOCAL_SUBNET", err)
		}
	})
}

func addLink(t *testing.T, l netlink.Link) {
	t.Helper()
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(l); err != nil {
			t.Error(err)
		}
	})
}

func TestQEMUFails(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, func(c *Config) { c.Initrd = "/no/such/initrd" })
	_, err := p.Create(t.Context(), request(t, p, "a", cloud.Size{}))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/no/such/initrd") {
		t.Errorf("Create: %v, want FailedPrecondition with QEMU's words", err)
	}
	noLeaks(t, dir)
	p = newProvider(t, dir, func(c *Config) { c.QEMU = "no-such-qemu" })
	_, err = p.Create(t.Context(), request(t, p, "a", cloud.Size{}))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "install the package qemu-system-x86") {
		t.Errorf("Create: %v, want FailedPrecondition that names the package", err)
	}
	noLeaks(t, dir)
}

func TestCheckNamesAllProblems(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := touch(file); err != nil {
		t.Fatal(err)
	}
	p := newProvider(t, filepath.Join(file, "state"), func(c *Config) {
		c.QEMU, c.Kernel, c.Initrd, c.DefaultMemoryMiB = "no-such-qemu", "/no/kernel", "/no/initrd", maxMemoryMiB
	})
	err := p.Check(t.Context())
	if err == nil {
		t.Fatal("Check found nothing wrong")
	}
	for _, want := range []string{"install the package qemu-system-x86", "LOCAL_KERNEL: open /no/kernel", "LOCAL_INITRD: open /no/initrd", "LOCAL_DIR " + file, "LOCAL_MEMORY"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Check does not say %q:\n%v", want, err)
		}
	}
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("class of %v", err)
	}
}
