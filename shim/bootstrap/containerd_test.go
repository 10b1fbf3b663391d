// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/kata-remote/kata-remote/agent-protocol/agenttest"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/shimtest"
)

// image is an OCI image in a tar, of one layer with one program.
func image(t *testing.T, name string) string {
	t.Helper()
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for _, h := range []*tar.Header{
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "bin/prog", Typeflag: tar.TypeReg, Mode: 0o755, Size: 7},
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
	} {
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			io.WriteString(tw, "program")
		}
	}
	tw.Close()
	out, err := os.Create(filepath.Join(t.TempDir(), "image.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	iw := tar.NewWriter(out)
	put := func(name string, b []byte) {
		if err := iw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		iw.Write(b)
	}
	type descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int               `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	blob := func(mediaType string, b []byte) descriptor {
		sum := fmt.Sprintf("%x", sha256.Sum256(b))
		put("blobs/sha256/"+sum, b)
		return descriptor{MediaType: "application/vnd.oci.image." + mediaType, Digest: "sha256:" + sum, Size: len(b)}
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	l := blob("layer.v1.tar", layer.Bytes())
	config := blob("config.v1+json", encode(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{l.Digest}},
	}))
	manifest := blob("manifest.v1+json", encode(map[string]any{"schemaVersion": 2, "config": config, "layers": []descriptor{l}}))
	manifest.Annotations = map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"}
	put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	put("index.json", encode(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}}))
	iw.Close()
	return out.Name()
}

// daemon is a real containerd with everything of its own.
type daemon struct {
	t    *testing.T
	dir  string
	cmd  *exec.Cmd
	done chan error
	log  *os.File
}

func startDaemon(t *testing.T) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctrd")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, dir: dir}
	config := fmt.Sprintf(`version = 2
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "%[1]s/c.sock"
[ttrpc]
  address = "%[1]s/t.sock"
`, dir)
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if d.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	d.start()
	t.Cleanup(func() {
		d.stop()
		d.log.Close()
		for _, pid := range shims() { // those of a test that failed
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("containerd: %s", b)
		}
		os.RemoveAll(dir)
	})
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	d.cmd = exec.Command("containerd", "--config", filepath.Join(d.dir, "config.toml"))
	d.cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"))
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatalf("containerd must be installed for this test: %v", err)
	}
	d.done = make(chan error, 1)
	go func() { d.done <- d.cmd.Wait() }()
	deadline := time.Now().Add(30 * time.Second)
	for exec.Command("ctr", "-a", filepath.Join(d.dir, "c.sock"), "version").Run() != nil {
		if time.Now().After(deadline) {
			d.t.Fatal("containerd does not answer")
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (d *daemon) stop() {
	d.cmd.Process.Signal(syscall.SIGKILL)
	<-d.done
}

func (d *daemon) ctr(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ctr", append([]string{"-a", filepath.Join(d.dir, "c.sock"), "-n", "test"}, args...)...)
}

func (d *daemon) run(ctx context.Context, args ...string) (string, int) {
	d.t.Helper()
	var out bytes.Buffer
	cmd := d.ctr(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if cmd.ProcessState == nil {
		d.t.Fatal(err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// TestContainerd runs containers through a real containerd and its client: what the
// shim answers to start, the events and the clean-up are judged by the other side.
//
// Long: one life of one shim, where each step finds what the one before it left.
func TestContainerd(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	agent := &agenttest.Agent{
		Features: []extension.Feature{extension.Rootfs, extension.Streams},
		Programs: map[string]agenttest.Program{
			"prog": func(_ context.Context, p *agenttest.Proc) int {
				fmt.Fprintln(p.Stdout, "hello", strings.Join(p.Args[1:], " "))
				return 6
			},
			"cat": func(ctx context.Context, p *agenttest.Proc) int {
				defer context.AfterFunc(ctx, func() { p.Stdin.(io.Closer).Close() })()
				io.Copy(p.Stdout, p.Stdin)
				return 0
			},
			"sleep": func(ctx context.Context, p *agenttest.Proc) int {
				<-ctx.Done()
				return 0
			},
		},
	}
	adaptor := shimtest.NewAdaptor(t, agent)
	d := startDaemon(t)
	const ref = "example.org/prog:1"
	if out, code := d.run(ctx, "image", "import", "--snapshotter", "native", image(t, ref)); code != 0 {
		t.Fatalf("import: %s", out)
	}
	common := []string{"run", "--snapshotter", "native", "--runtime", "io.containerd.kata-remote.v2", "--runtime-config-path", adaptor.ConfigFile()}
	netns := "network:" + shimtest.NetNS(t)

	out, code := d.run(ctx, slices.Concat(common, []string{"--rm", "--with-ns", netns, ref, "one", "prog", "world"})...)
	if code != 6 || out != "hello world\n" {
		t.Fatalf("run: %d: %s", code, out)
	}
	if got := adaptor.Stops(); len(got) != 1 || got[0] != "one" {
		t.Errorf("StopVM of %v", got)
	}
	checkRootfs(t, agent)

	out, code = d.run(ctx, slices.Concat(common, []string{"--rm", ref, "nonet", "prog"})...)
	if code == 0 || !strings.Contains(out, "--with-ns network:") {
		t.Errorf("run without a network namespace: %d: %s", code, out)
	}

	if out, code = d.run(ctx, slices.Concat(common, []string{"-d", "--with-ns", netns, ref, "two", "sleep"})...); code != 0 {
		t.Fatalf("run -d: %d: %s", code, out)
	}
	cmd := d.ctr(ctx, "task", "exec", "--exec-id", "x", "two", "cat")
	cmd.Stdin = strings.NewReader("through and back")
	if b, err := cmd.CombinedOutput(); err != nil || string(b) != "through and back" {
		t.Errorf("exec: %v: %s", err, b)
	}
	d.stop() // a restart of containerd is not felt
	d.start()
	if out, code = d.run(ctx, "task", "exec", "--exec-id", "y", "two", "prog", "again"); code != 6 || out != "hello again\n" {
		t.Errorf("exec after a restart of containerd: %d: %s", code, out)
	}
	if out, _ = d.run(ctx, "task", "ls"); !strings.Contains(out, "RUNNING") {
		t.Errorf("tasks: %s", out)
	}
	if out, code = d.run(ctx, "task", "metrics", "two"); code != 0 {
		t.Errorf("metrics: %s", out)
	}
	if out, code = d.run(ctx, "task", "kill", "-s", "KILL", "two"); code != 0 {
		t.Errorf("kill: %s", out)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if out, _ = d.run(ctx, "task", "ls"); strings.Contains(out, "STOPPED") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("tasks: %s", out)
		}
	}
	if out, _ = d.run(ctx, "task", "delete", "two"); strings.Contains(out, "rpc error") {
		t.Errorf("delete: %s", out)
	}
	d.run(ctx, "container", "delete", "two")
	if got := adaptor.Stops(); !slices.Contains(got, "two") {
		t.Errorf("StopVM of %v", got)
	}
	if left, _ := filepath.Glob(filepath.Join(d.dir, "state/io.containerd.runtime.v2.task/test/*")); len(left) > 0 {
		t.Errorf("bundles are left: %v", left)
	}
	checkNoShim(t)
}

// checkRootfs looks at what was streamed for a container.
func checkRootfs(t *testing.T, agent *agenttest.Agent) {
	t.Helper()
	b := agent.Rootfs("one")
	if b == nil {
		return // removed with its container
	}
	z, err := zstd.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var names []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if !slices.Contains(names, "bin/prog") {
		t.Errorf("archive has %v", names)
	}
}

// shims are the servers of this test's binary that run.
func shims() (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil && alive(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// checkNoShim waits until no server of this test's binary runs.
func checkNoShim(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); len(shims()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("a shim is left")
			return
		}
	}
}
