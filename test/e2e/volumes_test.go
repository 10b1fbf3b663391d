// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-remote/kata-remote/shim/volume/volumetest"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// volumePod is a pod with volumes laid out as the kubelet lays them out.
type volumePod struct {
	t        *testing.T
	bed      *testbed.Bed
	pod      *Pod
	dir      string // the kubelet's of the pod
	cfg      *volumetest.Writer
	one, two *Container
}

func (v *volumePod) must(errs ...error) {
	v.t.Helper()
	if err := errors.Join(errs...); err != nil {
		v.t.Fatal(err)
	}
}

func (v *volumePod) path(parts ...string) string {
	return filepath.Join(append([]string{v.dir}, parts...)...)
}

// exec runs a shell command in a container and returns its output.
func (v *volumePod) exec(ctx context.Context, c *Container, command string) string {
	v.t.Helper()
	out, err := c.Exec(ctx, "sh", "-c", command)
	if err != nil {
		v.t.Errorf("%s: %v", command, err)
	}
	return out
}

// see waits until a shell command in a container prints something, and returns for
// how long that took.
func (v *volumePod) see(ctx context.Context, c *Container, command, want string) time.Duration {
	v.t.Helper()
	start := time.Now()
	err := within(ctx, func(ctx context.Context) error {
		if out, err := c.Exec(ctx, "sh", "-c", command); err != nil || out != want {
			return fmt.Errorf("%s: %q, %v; want %q", command, out, err, want)
		}
		return nil
	})
	if err != nil {
		v.t.Error(err)
	}
	return time.Since(start)
}

// TestVolumes has two containers of a pod and everything the kubelet may mount in
// them, on a real machine.
func TestVolumes(t *testing.T) {
	bed := newBed(t, "e2e-volumes")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	v := &volumePod{t: t, bed: bed, dir: "/var/lib/kubelet/pods/volumes-uid"}
	v.must(bed.StartContainerd(ctx), bed.StartAdaptor(ctx))
	var err error
	v.pod, err = RunPod(ctx, bed, "volumes", testbed.Handler, map[string]string{"io.katacontainers.volume.emptydir_size_limit.small": "1Mi"})
	v.must(err)
	defer func() {
		if v.pod != nil {
			v.must(v.pod.Remove(ctx))
		}
	}()
	v.start(ctx)
	for _, check := range []struct {
		name string
		run  func(*volumePod, context.Context)
	}{
		{"ConfigMap", (*volumePod).checkConfigMap},
		{"ConfigMap updates are whole", (*volumePod).checkWhole},
		{"ConfigMap update while the adaptor is away", (*volumePod).checkOutage},
		{"emptyDir", (*volumePod).checkEmptyDir},
		{"subPath", (*volumePod).checkSubPath},
		{"files and termination message", (*volumePod).checkFiles},
		{"refused", (*volumePod).checkRefused},
	} {
		t.Run(check.name, func(t *testing.T) {
			sub := *v
			sub.t = t
			check.run(&sub, ctx)
		})
	}
	if t.Failed() {
		t.Logf("logs are in %s", filepath.Join(bed.Out, "logs"))
	}
}

// start makes the volumes and the two containers.
func (v *volumePod) start(ctx context.Context) {
	v.t.Helper()
	cfg, disk, mem, small := v.path("volumes/kubernetes.io~configmap/cfg"), v.path("volumes/kubernetes.io~empty-dir/disk"), v.path("volumes/kubernetes.io~empty-dir/mem"), v.path("volumes/kubernetes.io~empty-dir/small")
	for _, dir := range []string{cfg, disk, mem, small, v.path("containers/one")} {
		v.must(os.MkdirAll(dir, 0o755))
	}
	v.must(unix.Mount("tmpfs", mem, "tmpfs", 0, "size=2m,mode=1777"), os.Chown(disk, 0, 2000), os.Chmod(disk, os.ModeSetgid|0o777))
	v.cfg = &volumetest.Writer{Dir: cfg}
	v.must(v.cfg.Write(volumetest.Numbered(0), 2000))
	v.must(os.WriteFile(v.path("etc-hosts"), []byte("10.1.2.3 told-by-the-kubelet\n"), 0o644), os.WriteFile(v.path("containers/one/log"), nil, 0o666))
	// What the kubelet does for subPath: sub/dir.
	part := v.path("volume-subpaths/disk/one/0")
	v.must(os.MkdirAll(filepath.Join(disk, "sub/dir"), 0o777), os.MkdirAll(part, 0o755), unix.Mount(filepath.Join(disk, "sub/dir"), part, "", unix.MS_BIND, ""))
	key := v.path("volume-subpaths/cfg/one/1")
	v.must(os.MkdirAll(filepath.Dir(key), 0o755), os.WriteFile(key, nil, 0o644), unix.Mount(filepath.Join(cfg, "a"), key, "", unix.MS_BIND, ""))
	common := []Mount{{cfg, "/etc/cfg", true}, {disk, "/disk", false}, {mem, "/mem", false}, {small, "/small", false}}
	var err error
	v.one, err = v.pod.run(ctx, "one", append([]Mount{{part, "/part", false}, {key, "/key", true}, {v.path("etc-hosts"), "/etc/hosts", false}, {v.path("containers/one/log"), "/dev/termination-log", false}}, common...),
		"sh", "-c", "trap 'echo -n the last words > /dev/termination-log; exit 3' TERM; while :; do sleep 1; done")
	v.must(err)
	v.two, err = v.pod.run(ctx, "two", common, "sleep", "1000000")
	v.must(err)
}

func (v *volumePod) checkConfigMap(ctx context.Context) {
	if out := v.exec(ctx, v.one, "cd /etc/cfg; cat a sub/c; stat -L -c ' %a:%g' b sub; ls; touch x 2>&1; true"); out != "00 644:2000\n 755:2000\na\nb\nof-0\nonly-0\nsub\ntouch: x: Read-only file system" {
		v.t.Errorf("at first: %q", out)
	}
	if err := v.cfg.Write(volumetest.Numbered(1), 2000); err != nil {
		v.t.Fatal(err)
	}
	took := v.see(ctx, v.one, "cd /etc/cfg; cat a sub/c; ls | tr '\\n' ' '", "11a b of-1 only-1 sub")
	v.t.Logf("an update was seen after %v; a look at it alone takes %v", took, v.see(ctx, v.one, "cat /etc/cfg/a", "1"))
	v.see(ctx, v.two, "cat /etc/cfg/only-1", "1")
	if out := v.exec(ctx, v.one, "ls -d /etc/cfg/..2* | wc -l; readlink /etc/cfg/..data; cat /key"); out != "1\n..2026_11_21_10_00_00.2\n0" {
		v.t.Errorf("revisions: %q", out)
	}
}

// checkWhole has a container read a volume again and again, while it is updated.
func (v *volumePod) checkWhole(ctx context.Context) {
	// The directory is entered once for all files; a revision that is gone by then is
	// no revision.
	const look = `while [ ! -e /disk/stop ]; do
cd /etc/cfg/..data && a=$(cat a) && b=$(cat b) && c=$(cat sub/c) && o=$(cat only-$a) && n=$(ls | wc -l) &&
[ "$(readlink -f .)" = "$(readlink -f /etc/cfg/..data)" ] || continue
[ "$a $b $c $o $n" = "$a $a $a $a 5" ] || echo "mixed: $a $b $c $o $n"
[ "$a" = "$last" ] || echo "$a"; last=$a
done 2>/dev/null; rm /disk/stop`
	reader, err := v.pod.run(ctx, "reader", []Mount{{v.cfg.Dir, "/etc/cfg", true}, {v.path("volumes/kubernetes.io~empty-dir/disk"), "/disk", false}}, "sh", "-c", look)
	if err != nil {
		v.t.Fatal(err)
	}
	const last = 60
	for n := 2; n <= last; n++ {
		if err := v.cfg.Write(volumetest.Numbered(n), 2000); err != nil {
			v.t.Fatal(err)
		}
		if n%10 == 0 {
			v.see(ctx, v.two, "cat /etc/cfg/a", fmt.Sprint(n))
		}
	}
	v.must(within(ctx, func(context.Context) error {
		log, err := reader.Log("stdout")
		if err == nil && !strings.HasSuffix(log, fmt.Sprintf("\n%d\n", last)) {
			err = fmt.Errorf("the reader saw %q", log)
		}
		return err
	}))
	v.exec(ctx, v.two, "touch /disk/stop")
	if code, err := reader.Wait(ctx); err != nil || code != 0 {
		v.t.Errorf("reader: %d, %v", code, err)
	}
	log, err := reader.Log("stdout")
	if err != nil || strings.Contains(log, "mixed") {
		v.t.Errorf("the reader saw %q, %v", log, err)
	}
	v.t.Logf("the reader saw %d revisions", strings.Count(log, "\n"))
}

// checkOutage changes the volume while nobody carries it to the guest.
func (v *volumePod) checkOutage(ctx context.Context) {
	v.bed.Adaptor.Kill()
	if err := v.cfg.Write(volumetest.Numbered(100), 2000); err != nil {
		v.t.Fatal(err)
	}
	v.must(v.bed.StartAdaptor(ctx))
	v.see(ctx, v.two, "cat /etc/cfg/only-100", "100")
}

func (v *volumePod) checkEmptyDir(ctx context.Context) {
	v.exec(ctx, v.one, "echo from one > /disk/f; echo one > /mem/f")
	if out := v.exec(ctx, v.two, "cat /disk/f /mem/f; stat -c %a:%g /disk /disk/f /mem; rm /disk/f /mem/f"); out != "from one\none\n2777:2000\n644:2000\n1777:0" {
		v.t.Errorf("shared: %q", out)
	}
	// A socket of one container takes what another one sends.
	v.exec(ctx, v.one, "ln -s /disk/log /dev/log && syslogd -O /disk/messages")
	v.exec(ctx, v.two, "ln -s /disk/log /dev/log && logger through the socket")
	v.see(ctx, v.two, "grep -o 'through the socket' /disk/messages", "through the socket")
	for dir, size := range map[string]int{"/mem": 2048, "/small": 1024} {
		if out := v.exec(ctx, v.one, fmt.Sprintf("dd if=/dev/zero of=%s/big bs=1k count=%d 2>&1 | grep -o 'No space left'; stat -c %%s %[1]s/big; rm %[1]s/big", dir, 2*size)); out != fmt.Sprintf("No space left\n%d", size<<10) {
			v.t.Errorf("%s: %q", dir, out)
		}
	}
	if list, err := os.ReadDir(v.path("volumes/kubernetes.io~empty-dir/mem")); err != nil || len(list) > 0 {
		v.t.Errorf("on the node: %v, %v", list, err)
	}
}

func (v *volumePod) checkSubPath(ctx context.Context) {
	v.exec(ctx, v.one, "echo part > /part/f")
	if out := v.exec(ctx, v.two, "cat /disk/sub/dir/f"); out != "part" {
		v.t.Errorf("in the whole: %q", out)
	}
}

func (v *volumePod) checkFiles(ctx context.Context) {
	if out := v.exec(ctx, v.one, "cat /etc/hosts; echo 10.9.9.9 mine >> /etc/hosts && grep mine /etc/hosts"); out != "10.1.2.3 told-by-the-kubelet\n10.9.9.9 mine" {
		v.t.Errorf("hosts: %q", out)
	}
	if b, err := os.ReadFile(v.path("etc-hosts")); err != nil || string(b) != "10.1.2.3 told-by-the-kubelet\n" {
		v.t.Errorf("on the node: %q, %v", b, err)
	}
	if _, err := v.bed.Crictl(ctx, "stop", "-t", "30", v.one.ID); err != nil {
		v.t.Error(err)
	}
	if code, err := v.one.Wait(ctx); err != nil || code != 3 {
		v.t.Errorf("exit code %d, %v", code, err)
	}
	if b, err := os.ReadFile(v.path("containers/one/log")); err != nil || string(b) != "the last words" {
		v.t.Errorf("termination message %q, %v", b, err)
	}
}

func (v *volumePod) checkRefused(ctx context.Context) {
	claim := v.path("volumes/kubernetes.io~csi/claim/mount")
	v.must(os.MkdirAll(claim, 0o755), os.WriteFile(filepath.Join(claim, "f"), []byte("data"), 0o644))
	_, err := v.pod.run(ctx, "refused", []Mount{{claim, "/data", false}}, "true")
	if err == nil || !strings.Contains(err.Error(), "volume at /data: the directory "+claim) {
		v.t.Errorf("a claim that can be written: %v", err)
	}
	c, err := v.pod.run(ctx, "copied", []Mount{{claim, "/data", true}}, "cat", "/data/f")
	if err != nil {
		v.t.Fatal(err)
	}
	if code, err := c.Wait(ctx); err != nil || code != 0 {
		v.t.Errorf("exit code %d, %v", code, err)
	}
	if log, err := c.Log("stdout"); err != nil || log != "data" && log != "data\n" {
		v.t.Errorf("a claim that is only read: %q, %v", log, err)
	}
}
