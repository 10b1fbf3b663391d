// SPDX-License-Identifier: Apache-2.0

// Command podvmd is the one program of a pod VM. As PID 1 of the pod VM image it
// takes no arguments; as a service of an ordinary system it is told where its
// configuration is:
//
//	podvmd --config /run/peerpod/apf.json
//
// Before a stock kata-agent it takes the place, and the flags, of
// agent-protocol-forwarder (docs/interop.md):
//
//	podvmd -pod-namespace /run/netns/podns -kata-agent-socket /run/kata-containers/agent.sock
//
// In the image it is also /sbin/modprobe: it loads what the kernel asks for.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/kata-remote/kata-remote/podvm/agent"
	"github.com/kata-remote/kata-remote/podvm/boot"
	"github.com/kata-remote/kata-remote/podvm/kmod"
)

// version is set with -ldflags '-X main.version=...'.
var version = "devel"

func main() {
	kmod.RequestMain(os.Args)
	agent.Init()
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	slog.SetDefault(log)
	cfg := boot.Config{Version: version, Logger: log}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if isInit(os.Getpid(), os.Args[1:]) {
		boot.RunInit(ctx, cfg)
	}
	flag.StringVar(&cfg.ConfigPath, "config", "", "the pod VM's configuration (default /run/peerpod/apf.json)")
	flag.StringVar(&cfg.Listen, "listen", "", "TCP address of the forwarder (default :15150)")
	flag.StringVar(&cfg.PodNetNS, "pod-netns", "", "path of the pod's network namespace, made if missing (default /run/netns/podns)")
	flag.StringVar(&cfg.PodNetNS, "pod-namespace", "", "the same as -pod-netns, as agent-protocol-forwarder calls it")
	flag.StringVar(&cfg.AgentSocket, "kata-agent-socket", "", "unix socket of a stock kata-agent, to be served in place of podvmd's own (default: the configuration's agent_socket)")
	flag.StringVar(&cfg.StateDir, "state-dir", "", "directory of the agent's files (default /run/kata-containers)")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println("podvmd", version)
		return
	}
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "podvmd: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	if err := boot.RunService(ctx, cfg); err != nil {
		fmt.Fprintln(os.Stderr, "podvmd:", err)
		os.Exit(1)
	}
}

// isInit tells PID 1 of the image from PID 1 of some container: the latter is given
// a configuration. The kernel passes words of its command line that it does not know
// to PID 1, so arguments as such say nothing.
func isInit(pid int, args []string) bool {
	return pid == 1 && !slices.ContainsFunc(args, func(a string) bool {
		return strings.HasPrefix(a, "-config") || strings.HasPrefix(a, "--config")
	})
}
