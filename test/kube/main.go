// SPDX-License-Identifier: Apache-2.0

// Command kube brings up a Kubernetes cluster whose one node is a testbed and judges
// the product by it: what users do with kubectl, and what Kubernetes' own suite tests,
// with every pod in a machine of its own. It is what `make e2e-k8s` runs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/kata-remote/kata-remote/test/kube/cluster"
	"github.com/kata-remote/kata-remote/test/kube/images"
	"github.com/kata-remote/kata-remote/test/testbed"
)

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "_output/bin", "folder of the built programs")
	flag.StringVar(&o.podvm, "podvm", "_output/podvm", "folder of the pod VM image")
	flag.StringVar(&o.kube, "kube", "_output/kube", "folder of Kubernetes' programs")
	flag.StringVar(&o.out, "out", "_output/e2e-k8s", "folder for logs and state")
	flag.StringVar(&o.containerd, "containerd", "2", "generation of containerd: 1.6, 1.7 or 2")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster running")
	stop := flag.Bool("stop", false, "stop what -keep left running")
	flag.Parse()
	o.pidFile = o.out + ".pid"
	if *stop {
		if err := testbed.Stop(o.pidFile); err != nil {
			fmt.Fprintln(os.Stderr, "e2e-k8s:", err)
			os.Exit(1)
		}
		return
	}
	if code, done := testbed.Isolate(testbed.Isolation{PIDFile: o.pidFile, MayKeep: o.keep}); done {
		os.Exit(code)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "e2e-k8s:", err)
		os.Exit(1)
	}
	if o.keep {
		if err := testbed.Keep(0); err != nil {
			fmt.Fprintln(os.Stderr, "e2e-k8s:", err)
			os.Exit(1)
		}
		<-ctx.Done()
	}
}

type options struct {
	bin, podvm, kube, out, containerd, pidFile string
	keep                                       bool
}

func run(ctx context.Context, o options) error {
	bed, err := testbed.New(o.bin, o.podvm, o.out)
	if err != nil {
		return err
	}
	g, ok := testbed.Generations(bed.Bin)["containerd "+o.containerd]
	if !ok {
		return errors.New("no such generation of containerd: " + o.containerd)
	}
	bed.Generation = g
	kube, err := filepath.Abs(o.kube)
	if err != nil {
		return err
	}
	c, err := cluster.New(bed, filepath.Join(kube, "kube-all"))
	if err != nil {
		return err
	}
	if err := c.Start(ctx); err != nil {
		return err
	}
	all, err := images.All(ctx, bed, kube)
	if err != nil {
		return err
	}
	return bed.Import(ctx, all...)
}
