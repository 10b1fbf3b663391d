// SPDX-License-Identifier: Apache-2.0

// Command simadaptor is the adaptor with the simulated cloud, whose instances are
// podvmd processes in namespaces of their own on this machine: the whole path of a pod
// except for the virtual machine. What it costs is then our own doing, and not that of
// a processor in software. It is for benchmarks and tests and isolates nothing.
//
//	adaptor's namespaces              an instance's: net, mount, pid, uts, ipc, cgroup
//	  sim0 192.168.215.1/24 ── veth ── eth0 192.168.215.N
//	                                   init (this program) ── podvmd :15150
//
// It reads the adaptor's configuration (docs/adaptor-config.md) and these variables:
//
//	SIM_PODVMD   path of podvmd
//	SIM_DELAY    time added to each round trip on TCP 15150, such as "1ms"
//	SIM_DIR      folder for the instances' logs
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/caa/daemon"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

func main() {
	if os.Args[0] == machineName {
		fmt.Fprintln(os.Stderr, "machine:", runMachine())
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "simadaptor:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	cfg, err := config.Load("", os.Environ(), config.Flags{})
	if err != nil {
		return err
	}
	cfg.Provider = "sim"
	l := &launcher{podvmd: os.Getenv("SIM_PODVMD"), dir: os.Getenv("SIM_DIR")}
	if !filepath.IsAbs(l.podvmd) || !filepath.IsAbs(l.dir) {
		return errors.New("SIM_PODVMD and SIM_DIR: want absolute paths")
	}
	if v := os.Getenv("SIM_DELAY"); v != "" {
		if l.delay, err = time.ParseDuration(v); err != nil {
			return fmt.Errorf("SIM_DELAY: %w", err)
		}
	}
	if err := makeBridge(); err != nil {
		return err
	}
	world := sim.NewWorld(sim.Config{Launcher: l})
	defer world.Close()
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	return daemon.NewWith(cfg, provider{world.NewProvider()}, log).Run(ctx)
}

// provider knows the network between node and instances.
type provider struct{ *sim.Provider }

// Underlay implements cloud.UnderlayReporter.
func (provider) Underlay(context.Context) (cloud.Underlay, error) {
	return cloud.Underlay{Local: nodeAddr, MTU: mtu}, nil
}

var nodeAddr = netip.MustParsePrefix("192.168.215.1/24")

// mtu is what veth pairs are made with, bytes.
const mtu = 1500
