// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/kata-remote/kata-remote/cloud"
)

func TestReadLimits(t *testing.T) {
	const meminfo = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"
	for _, tc := range []struct {
		name  string
		files map[string]string
		want  nodeLimits
	}{
		{"no cgroup", map[string]string{"proc/self/cgroup": "0::/\n"}, nodeLimits{16384, 8192, "the node", 2}},
		{"v2, limit of a parent", map[string]string{
			"proc/self/cgroup":                        "0::/kubepods/pod1\n",
			"sys/fs/cgroup/kubepods/pod1/memory.max":  "max\n",
			"sys/fs/cgroup/kubepods/memory.max":       fmt.Sprint(4 << 30),
			"sys/fs/cgroup/kubepods/memory.current":   fmt.Sprint(3 << 30),
			"sys/fs/cgroup/kubepods/memory.stat":      "anon 5\ninactive_file " + fmt.Sprint(1<<30) + "\n",
			"sys/fs/cgroup/kubepods/pod1/memory.stat": "anon 5\n",
		}, nodeLimits{4096, 2048, "the cgroup /sys/fs/cgroup/kubepods", 2}},
		{"v1", map[string]string{
			"proc/self/cgroup":                             "5:cpu:/\n4:memory:/a\n0::/\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":   "9223372036854771712\n",
			"sys/fs/cgroup/memory/memory.usage_in_bytes":   "1\n",
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes": fmt.Sprint(2 << 30),
			"sys/fs/cgroup/memory/a/memory.usage_in_bytes": fmt.Sprint(1 << 30),
		}, nodeLimits{2048, 1024, "the cgroup /sys/fs/cgroup/memory/a", 2}},
		{"limit above the node", map[string]string{
			"proc/self/cgroup":               "0::/a\n",
			"sys/fs/cgroup/a/memory.max":     fmt.Sprint(64 << 30),
			"sys/fs/cgroup/a/memory.current": "0",
		}, nodeLimits{16384, 8192, "the node", 2}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			tc.files["proc/meminfo"] = meminfo
			for name, text := range tc.files {
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := readLimits(root, 2)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(nodeLimits{})); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestAdmission(t *testing.T) {
	l := nodeLimits{total: 8192, free: 4096, source: "the node", cpus: 2}
	pending := func(vcpus, mem int) *record { return &record{Plan: cloud.Plan{VCPUs: vcpus, MemoryMiB: mem}} }
	for _, tc := range []struct {
		name   string
		plan   cloud.Plan
		others []*record
		words  string // "" fits
	}{
		{"fits", cloud.Plan{VCPUs: 2, MemoryMiB: 2048}, nil, ""},
		{"fits exactly", cloud.Plan{VCPUs: 1, MemoryMiB: 4096 - reserveMiB - qemuOverheadMiB}, nil, ""},
		{"a MiB more", cloud.Plan{VCPUs: 1, MemoryMiB: 4096 - reserveMiB - qemuOverheadMiB + 1}, nil, "has 4096 MiB available"},
		{"others have not taken theirs yet", cloud.Plan{VCPUs: 1, MemoryMiB: 2048}, []*record{pending(1, 2048)}, "1 instances may still take 2240"},
		{"more CPUs than there are", cloud.Plan{VCPUs: 3, MemoryMiB: 512}, nil, "which has 2 CPUs"},
		{"all CPUs promised", cloud.Plan{VCPUs: 2, MemoryMiB: 256}, []*record{pending(2, 128), pending(2, 128), pending(2, 128), pending(1, 128)}, "4 instances have 7 of the 8 vCPUs"},
		{"more memory than there is", cloud.Plan{VCPUs: 1, MemoryMiB: 8192}, nil, "at most 7744"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := l.fits(tc.plan)
			if err == nil {
				err = l.admit(tc.plan, tc.others, 4)
			}
			if tc.words == "" && err == nil {
				return
			}
			if tc.words == "" || !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("got %v; want %q", err, tc.words)
			}
		})
	}
}

// TestFull fills the node with real VMs.
func TestFull(t *testing.T) {
	dir := stateDir(t)
	p := newProvider(t, dir, func(c *Config) { c.CPUOvercommit = 1 })
	l, err := readLimits("/", 1)
	if err != nil {
		t.Fatal(err)
	}
	var made []cloud.InstanceID
	for n := 0; ; n++ {
		inst, err := p.Create(t.Context(), request(t, p, fmt.Sprint("full-", n), cloud.Size{}))
		if err == nil {
			made = append(made, inst.ID)
			if n > runtime.NumCPU() {
				t.Fatalf("%d instances on a node with %+v", n, l)
			}
			continue
		}
		if !errdefs.IsResourceExhausted(err) || len(made) == 0 {
			t.Fatalf("after %d: %v", len(made), err)
		}
		break
	}
	if listed, err := p.List(t.Context(), cloud.Owner{Cluster: "c"}); err != nil || len(listed) != len(made) {
		t.Errorf("%d listed, %v; want %d: a refused Create must leave nothing", len(listed), err, len(made))
	}
	if err := p.Delete(t.Context(), made[0]); err != nil {
		t.Fatal(err)
	}
	made[0] = create(t, p, request(t, p, "room", cloud.Size{})).ID
	for _, id := range made {
		if err := p.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	noLeaks(t, dir)
}

func TestAddresses(t *testing.T) {
	for _, tc := range []struct {
		subnet, first, last string
		n                   int
	}{
		{"192.168.213.0/24", "192.168.213.2", "192.168.213.254", 253},
		{"10.1.255.252/30", "10.1.255.254", "10.1.255.254", 1},
		{"10.0.0.0/8", "10.0.0.2", "10.0.255.254", 1<<16 - 3},
		{"fd00:1::/64", "fd00:1::2", "fd00:1::fffe", 1<<16 - 3},
	} {
		c, err := Config{Kernel: "/k", Initrd: "/i", Subnet: netip.MustParsePrefix(tc.subnet)}.complete(2)
		if err != nil {
			t.Fatal(err)
		}
		first, ok1 := c.address(0)
		last, ok2 := c.address(tc.n - 1)
		_, past := c.address(tc.n)
		if c.addresses() != tc.n || !ok1 || !ok2 || past || first.String() != tc.first || last.String() != tc.last {
			t.Errorf("%s: %d addresses, %v to %v (past the end: %v)", tc.subnet, c.addresses(), first, last, past)
		}
	}
	p := newProvider(t, t.TempDir(), func(c *Config) { c.Subnet = netip.MustParsePrefix("10.9.9.0/29") })
	var others []*record
	seen := map[netip.Prefix]bool{}
	for n := range 5 {
		a, err := p.pick(idOf(fmt.Sprint(n)), others)
		if err != nil || seen[a] || a.Addr() == p.cfg.gateway().Addr() {
			t.Fatalf("address %d: %v, %v", n, a, err)
		}
		seen[a] = true
		others = append(others, &record{Addr: a})
	}
	if _, err := p.pick(idOf("x"), others); !errdefs.IsResourceExhausted(err) {
		t.Errorf("full subnet: %v", err)
	}
}

func TestConfigNamesAllProblems(t *testing.T) {
	_, err := New(Config{Machine: "pc", Accel: "hvf", Bridge: "a/b", Subnet: netip.MustParsePrefix("10.0.0.0/31"), MTU: 100, DefaultVCPUs: -1, DefaultMemoryMiB: 1})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("New: %v", err)
	}
	for _, key := range []string{"MACHINE", "ACCEL", "KERNEL", "INITRD", "BRIDGE", "SUBNET", "VCPUS", "MEMORY"} {
		if !strings.Contains(err.Error(), "LOCAL_"+key) {
			t.Errorf("no word on %s:\n%v", key, err)
		}
	}
}

func TestLogs(t *testing.T) {
	p := newProvider(t, t.TempDir(), nil)
	for n := range keepLogs + 5 {
		r := &record{ID: idOf(fmt.Sprint(n)), Name: "podvm-x"}
		path := filepath.Join(p.dir(r.ID), serialName)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.Repeat("x", keepSerialBytes+n)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := p.saveLog(r); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(int64(n), 0)
		kept, err := filepath.Glob(filepath.Join(p.logsDir(), "*"+string(r.ID)+".log"))
		if err != nil || len(kept) != 1 {
			t.Fatalf("log %d: %v, %v", n, kept, err)
		}
		if info, err := os.Stat(kept[0]); err != nil || info.Size() != keepSerialBytes || info.Mode().Perm() != 0o600 {
			t.Errorf("log %d: %v, %v", n, info, err)
		}
		if err := os.Chtimes(kept[0], at, at); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := os.ReadDir(p.logsDir()); err != nil || len(kept) != keepLogs {
		t.Errorf("%d logs kept, %v; want %d", len(kept), err, keepLogs)
	}

	path := filepath.Join(t.TempDir(), "serial.log")
	w, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600) // as QEMU has it
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	fmt.Fprint(w, "0123456789")
	if err := boundLog(path, 9, 4); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(w, "abc\x1b[0m\n\r\n")
	if b, err := os.ReadFile(path); err != nil || string(b) != "6789abc\x1b[0m\n\r\n" {
		t.Errorf("bounded log, %v: %q", err, b)
	}
	if l := lastLine(path); l != "6789abc[0m" {
		t.Errorf("last line %q", l)
	}
}

func TestLastWords(t *testing.T) {
	for _, tc := range []struct{ console, qemu, want string }{
		{"", "", "QEMU ended without a word"},
		{"a\nb\n", "", "b"},
		{"a\n", "qemu: out of memory\n", "qemu: out of memory"},
		{"podvmd: fatal: no seed\n[    4.186689] reboot: Power down\n", "", "podvmd: fatal: no seed"},
		{"[    4.186689] reboot: Power down\n\n", "", "[    4.186689] reboot: Power down"},
		{"a\n[    1.000000] Kernel panic - not syncing: VFS\n[    1.000001] CPU: 0\n", "qemu: warning\n", "[    1.000000] Kernel panic - not syncing: VFS"},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{serialName: tc.console, stderrName: tc.qemu} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := lastWords(dir); got != tc.want {
			t.Errorf("console %q, QEMU %q: %q, want %q", tc.console, tc.qemu, got, tc.want)
		}
	}
}
