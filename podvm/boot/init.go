// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/podvm/bootconf"
	"github.com/kata-remote/kata-remote/podvm/guestnet"
	"github.com/kata-remote/kata-remote/podvm/kmod"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	cgroupRoot = "/sys/fs/cgroup"
	cpuRoot    = "/sys/devices/system/cpu"
	// searchPath is what the kernel does not set for PID 1.
	searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// maxFiles is the limit that processes inherit; the kernel's 4096 is too low for
	// servers that ask for no limit of their own. It is systemd's for services.
	maxFiles = 1 << 20
)

// RunInit is PID 1: it prepares the machine, serves the pod until ctx is done, and
// turns the machine off. It does not return. An error goes to the console as one
// sentence first.
func RunInit(ctx context.Context, cfg Config) {
	m := newMarks()
	runtime.GOMAXPROCS(1) // see onlineCPUs
	err := runInit(ctx, cfg.complete(), m)
	if err != nil {
		m.log(cfg.complete().Logger)
		writeFatal(os.Stderr, err)
	}
	powerOff()
}

// writeFatal writes the sentence that tells why a start failed, on a line of its own.
func writeFatal(w io.Writer, err error) {
	// Joined errors are several lines.
	fmt.Fprintf(w, "\npodvmd: fatal: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
}

// powerOff stops the machine. Everything it has written is in its memory, so there
// is nothing to sync.
func powerOff() {
	for _, how := range []int{unix.LINUX_REBOOT_CMD_POWER_OFF, unix.LINUX_REBOOT_CMD_RESTART, unix.LINUX_REBOOT_CMD_HALT} {
		// Each is tried because the one before did not work.
		if err := unix.Reboot(how); err != nil {
			fmt.Fprintln(os.Stderr, "podvmd: power off:", err)
		}
	}
	os.Exit(1) // the kernel panics, and with panic=-1 restarts
}

// onlineCPUs takes the CPUs into use that the kernel command line's maxcpus= left out,
// and lets Go use all there are.
//
// The start is faster on one CPU: emulated CPUs wait for each other at every change of
// kernel code, and a handful of short goroutines gains nothing from a second one
// (QEMU 7.2, 2 vCPUs, 2026-11-21: 2.7 s of the node's CPU instead of 3.3 to 4).
func onlineCPUs(root string) error {
	files, err := filepath.Glob(filepath.Join(root, "cpu[0-9]*", "online"))
	if err != nil {
		return err
	}
	for _, f := range files {
		state, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(state)) == "0" {
			err = os.WriteFile(f, []byte("1"), 0)
		}
		if err != nil {
			return fmt.Errorf("take all CPUs into use: %w", err)
		}
	}
	runtime.SetDefaultGOMAXPROCS()
	return nil
}

func runInit(ctx context.Context, cfg Config, m *marks) error {
	if err := prepare(); err != nil {
		return err
	}
	m.done("root")
	loading, err := startModules(ctx)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := guestnet.UpLoopback(); err != nil {
			return err
		}
		return enableControllers(cgroupRoot)
	})
	g.Go(func() error {
		defer m.done("modules")
		return loading.Wait()
	})
	g.Go(func() error {
		loading.Follow(ctx, func(err error) { cfg.Logger.Error("a device has no driver", logkey.Error, err.Error()) })
		return nil
	})
	scratched := make(chan struct{})
	g.Go(func() error {
		defer close(scratched)
		addScratch(ctx, loading, m, cfg.Logger)
		return nil
	})
	cfg.beforeAgent = scratched
	g.Go(func() error {
		lease := newLeasing(loading, m)
		defer lease.stop()
		platform := bootconf.Detect("")
		cfg.notices = watchOf(platform)
		boot, pod, err := readSeed(ctx, platform, loading, lease, m)
		if err != nil {
			return err
		}
		network := func() error { return bringUpNetwork(ctx, cfg, boot, pod, loading, lease, m) }
		return serve(ctx, cfg, pod, m, network, func(log *slog.Logger) {
			g.Go(func() error {
				finish(ctx, loading, m, log)
				return nil
			})
			g.Go(func() error {
				lease.keep(ctx, log)
				return nil
			})
			if cfg.notices != nil {
				g.Go(func() error {
					cfg.notices.Run(ctx)
					return nil
				})
			}
			if platform == bootconf.PlatformAzure {
				g.Go(func() error {
					reportReady(ctx, log)
					return nil
				})
			}
		})
	})
	return g.Wait()
}

// quiet is how long finish keeps off the CPU after the port opened. The adaptor
// connects at once, and 0.2 s later the pod is ready, also under emulation.
const quiet = 300 * time.Millisecond

// finish does what the port need not wait for: the other CPUs, and when the first calls
// are over, the report of the start and the late modules. What fails makes a slower pod,
// which is better than none.
func finish(ctx context.Context, loading *kmod.Loading, m *marks, log *slog.Logger) {
	if err := onlineCPUs(cpuRoot); err != nil {
		log.Error("not all CPUs are in use", logkey.Error, err.Error())
	}
	m.done("cpus")
	wait := time.NewTimer(quiet)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-ctx.Done():
	}
	if err := loading.LoadLate(); err != nil {
		log.Error("not all kernel modules are loaded", logkey.Error, err.Error())
	}
	m.log(log)
}

// prepare makes the initramfs a system that containers can be run on.
func prepare() error {
	if err := leaveRootfs(); err != nil {
		return fmt.Errorf("leave the initial root file system: %w", err)
	}
	if err := mountAll(); err != nil {
		return err
	}
	if err := freezeRoot(); err != nil {
		return err
	}
	limit := unix.Rlimit{Cur: maxFiles, Max: maxFiles}
	return errors.Join(
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit),
		// Moving network devices and ending mount and network namespaces wait for
		// RCU grace periods, some 20 ms each. The other way costs interrupts, of
		// which a machine with one pod has few.
		os.WriteFile("/sys/kernel/rcu_expedited", []byte("1"), 0),
		os.Setenv("PATH", searchPath),
	)
}

func startModules(ctx context.Context) (*kmod.Loading, error) {
	list, aliases, err := kmod.Lists(kmod.Dir)
	if err != nil {
		return nil, fmt.Errorf("read the image's module list: %w", err)
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	return kmod.Load(ctx, kmod.Dir, list, aliases, string(cmdline)), nil
}
