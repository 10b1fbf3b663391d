// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
)

// TestMain runs the tests in a network namespace of their own: bridges and taps
// never meet the machine's network, and none can be left behind.
func TestMain(m *testing.M) {
	const inside = "PEERPOD_LOCAL_TEST_NETNS"
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit):
			os.Exit(exit.ExitCode())
		case err != nil:
			fmt.Fprintln(os.Stderr, "network namespace for the tests:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if guestDir != "" {
		os.RemoveAll(guestDir)
	}
	os.Exit(code)
}

var guestDir string // of the test image; removed by TestMain

// image returns the project's kernel and an initramfs with its modules and the
// guest of testdata as init.
var image = sync.OnceValues(func() ([2]string, error) {
	dir := os.Getenv("PEERPOD_PODVM")
	if dir == "" {
		dir = "../../_output/podvm"
	}
	var paths [2]string
	for _, name := range []string{"vmlinux", "vmlinuz"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil && paths[0] == "" {
			paths[0] = filepath.Join(dir, name)
		}
	}
	if paths[0] == "" {
		return paths, fmt.Errorf("no kernel in %s: run `make podvm-image`, or set PEERPOD_PODVM", dir)
	}
	tmp, err := os.MkdirTemp("", "local-test-guest-")
	if err != nil {
		return paths, err
	}
	guestDir = tmp
	build := exec.Command("go", "build", "-o", filepath.Join(tmp, "init"), "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return paths, fmt.Errorf("build the guest: %w\n%s", err, out)
	}
	paths[1] = filepath.Join(tmp, "initrd")
	return paths, replaceInit(filepath.Join(dir, "initrd.img"), filepath.Join(tmp, "init"), paths[1])
})

func replaceInit(from, init, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	program, err := os.ReadFile(init)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	r, w := cpio.NewReader(in), cpio.NewWriter(&b)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if h.Name == "init" {
			data, h.Size = program, int64(len(program))
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(to, b.Bytes(), 0o600)
}

// newProvider returns a provider over dir that emulates.
func newProvider(t *testing.T, dir string, change func(*Config)) *Provider {
	t.Helper()
	img, err := image()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Kernel: img[0], Initrd: img[1], StateDir: dir, Accel: AccelTCG, DefaultMemoryMiB: 256, CPUOvercommit: 64}
	if change != nil {
		change(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// leaks is what an empty provider must not have: processes, links, files.
func leaks(dir string) []string {
	var out []string
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range entries {
		cmdline, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err == nil && strings.Contains(string(cmdline), dir+"/") && bytes.Contains(cmdline, []byte("qemu")) {
			out = append(out, "process "+e.Name()+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return append(out, err.Error())
	}
	for _, l := range links {
		if l.Attrs().Name != "lo" {
			out = append(out, "link "+l.Attrs().Name)
		}
	}
	for _, pattern := range []string{"instances/*", "bridge.json*", "probe", "*.new"} {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return append(out, err.Error())
		}
		out = append(out, files...)
	}
	return out
}

func noLeaks(t *testing.T, dir string) {
	t.Helper()
	for _, l := range leaks(dir) {
		t.Errorf("left behind: %s", l)
	}
}

// stateDir is a directory whose instances are ended with the test, even when it
// fails half way.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		all, err := filepath.Glob(filepath.Join(dir, "instances", "*"))
		if err != nil {
			t.Error(err)
		}
		for _, d := range all {
			procs, err := findByArg(serialArg(d))
			if err != nil {
				t.Error(err)
			}
			for _, p := range procs {
				if err := p.kill(); err != nil {
					t.Error(err)
				}
			}
		}
		if l, err := netlink.LinkByName("ppbr0"); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	return dir
}

func request(t *testing.T, p *Provider, token string, size cloud.Size) cloud.CreateRequest {
	t.Helper()
	plan, err := p.Plan(t.Context(), size)
	if err != nil {
		t.Fatal(err)
	}
	return cloud.CreateRequest{
		Token: token, Name: "podvm-" + token, SandboxID: "sandbox-" + token, Owner: cloud.Owner{Cluster: "c", Node: "n"}, Plan: plan,
		UserData: []byte("#cloud-config\nwrite_files:\n- path: /run/x\n  content: |\n      sekret-" + token + "\n"),
	}
}

func create(t *testing.T, p *Provider, req cloud.CreateRequest) cloud.Instance {
	t.Helper()
	inst, err := p.Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return inst
}

// eventually polls f for a time that only a broken machine needs.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !f(); {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		if err := cloud.Pause(t.Context(), 20*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
}
