// SPDX-License-Identifier: Apache-2.0

// Command cloud-api-adaptor gives pods virtual machines of their own: it is the
// remote hypervisor of the shims on its node. It logs to stderr, one JSON object to
// a line. SIGTERM and SIGINT end it and no pod.
//
// Exit codes: 0 it was told to stop, or the configuration is good (--check-config);
// 1 it could not go on; 2 the configuration or the command line is wrong.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/kata-remote/kata-remote/agent-protocol/logkey"
	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/caa/daemon"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	fs := flag.NewFlagSet("cloud-api-adaptor", flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprintf(fs.Output(), "usage: cloud-api-adaptor [flags]\n\nEverything without a flag is set in the environment or the --config file.\n\n")
		fs.PrintDefaults()
	}
	var (
		flags config.Flags
		path  = fs.String("config", "", "`file` of KEY=VALUE lines; the environment overrides it")
		check = fs.Bool("check-config", false, "check the configuration and what the provider needs, then exit 0 or 2")
		show  = fs.Bool("version", false, "print the version and exit")
	)
	fs.StringVar(&flags.StateDir, "state-dir", "", "`directory` of the state file (default "+config.DefaultStateDir+")")
	fs.StringVar(&flags.Socket, "socket", "", "`path` of the hypervisor socket (default "+config.DefaultSocket+")")
	fs.StringVar(&flags.PodsDir, "pods-dir", "", "`directory` of the agent sockets (default "+config.DefaultPodsDir+")")
	fs.StringVar(&flags.LogLevel, "log-level", "", "debug, info, warn or error (default info)")
	switch err := fs.Parse(args); {
	case err == flag.ErrHelp:
		return 0
	case err != nil:
		return 2
	case fs.NArg() > 0:
		fmt.Fprintf(os.Stderr, "cloud-api-adaptor: unexpected argument %q; the provider is set with CLOUD_PROVIDER\n", fs.Arg(0))
		return 2
	}
	if *show {
		fmt.Println("cloud-api-adaptor", version())
		return 0
	}

	cfg, err := config.Load(*path, os.Environ(), flags)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	d, err := daemon.New(cfg, log)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if *check {
		if err := d.Check(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		fmt.Println("config ok")
		return 0
	}
	if err := d.Run(ctx); err != nil {
		log.Error("the adaptor cannot go on", logkey.Error, err)
		return 1
	}
	return 0
}

// version is what the build recorded of the source.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	revision, modified := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = " " + s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = " (modified)"
		}
	}
	return info.Main.Version + revision + modified
}
