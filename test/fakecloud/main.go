// SPDX-License-Identifier: Apache-2.0

// Command fakecloud runs an emulation of a cloud on this node, with virtual machines
// behind its instances, and prints the configuration with which an adaptor uses it:
// for people who want to try a provider, or a client of their own, without an account.
//
//	fakecloud -provider aws -image _output/podvm > adaptor.env &
//	env $(cat adaptor.env) cloud-api-adaptor
//
// It makes a bridge cloud0 with the address 10.0.0.1/24 and a default route in the
// network namespace that it is started in, and ends with SIGINT or SIGTERM, when all of
// it goes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/kata-remote/kata-remote/test/cloudbed"
)

func main() {
	var cfg cloudbed.Config
	flag.StringVar(&cfg.Provider, "provider", "aws", "the cloud: "+strings.Join(cloudbed.Providers(), " or "))
	flag.StringVar(&cfg.Image, "image", "_output/podvm", "what instances boot: the folder that make podvm-image makes, or a disk image")
	flag.StringVar(&cfg.Dir, "dir", "fakecloud", "folder for consoles, certificates and uploads; made if missing")
	flag.BoolVar(&cfg.Paper, "paper", false, "make no machines: instances exist in the cloud's answers only")
	flag.DurationVar(&cfg.InstanceTime, "instance-time", 0, "how long an instance takes until it is switched on (default 1s)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, cfg, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fakecloud:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, cfg cloudbed.Config, out io.Writer) error {
	c, err := cloudbed.Start(ctx, cfg)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, strings.Join(c.Env, "\n")); err != nil {
		return errors.Join(err, c.Close())
	}
	<-ctx.Done()
	return c.Close()
}
