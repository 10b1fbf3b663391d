// SPDX-License-Identifier: Apache-2.0

// Command demo runs a pod in a virtual machine of its own on this machine and shows,
// check by check, that it is one. It is what `make demo` runs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/kata-remote/kata-remote/test/cloudbed"
	"github.com/kata-remote/kata-remote/test/e2e"
	"github.com/kata-remote/kata-remote/test/testbed"
)

func main() {
	bin := flag.String("bin", "_output/bin", "folder of the built programs")
	podvm := flag.String("podvm", "_output/podvm", "folder of the pod VM image")
	out := flag.String("out", "_output/demo", "folder for logs and state")
	keep := flag.Bool("keep", false, "leave the node and the pod running")
	provider := flag.String("provider", "", "run the pods through this cloud's provider, on an emulation of the cloud: aws or azure; empty: the embedded provider")
	stop := flag.Bool("stop", false, "stop what -keep left running")
	flag.Parse()
	pidFile := *out + ".pid"
	if *stop {
		if err := testbed.Stop(pidFile); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	if code, done := testbed.Isolate(testbed.Isolation{PIDFile: pidFile, MayKeep: *keep}); done {
		os.Exit(code)
	}
	if !slices.Contains(append(cloudbed.Providers(), ""), *provider) {
		fmt.Fprintf(os.Stderr, "demo: PROVIDER is %q, and the demo knows %q\n", *provider, cloudbed.Providers())
		os.Exit(2)
	}
	os.Exit(run(*bin, *podvm, *out, pidFile, *provider, *keep))
}

func run(bin, podvm, out, pidFile, provider string, keep bool) int {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	bed, err := testbed.New(bin, podvm, out)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		fmt.Println("demo: 0 passed, 1 failed")
		return 1
	}
	n := &e2e.Narrator{}
	s := &e2e.Scenario{Bed: bed, Provider: provider, Keep: keep}
	passed, failed := s.Run(ctx, n.Chapter, n.Begin, n.Report)
	if failed > 0 {
		fmt.Printf("\ndemo: %s\n", n.FirstFailure)
		fmt.Printf("demo: logs are in %s\n", filepath.Join(bed.Out, "logs"))
		bed.Stop()
	}
	if failed > 0 || !keep {
		if err := s.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			failed++
		}
	}
	if failed == 0 && keep {
		fmt.Print(howToUse(pidFile, s))
	}
	fmt.Printf("demo: %d passed, %d failed\n", passed, failed)
	switch {
	case failed > 0 || passed == 0:
		return 1
	case keep:
		if err := testbed.Keep(0); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			return 1
		}
		<-ctx.Done() // until testbed.Stop ends process 1 of these namespaces
	}
	return 0
}

// howToUse tells what to type next.
func howToUse(pidFile string, s *e2e.Scenario) string {
	pid := "$(head -n 1 " + pidFile + ")"
	if b, err := os.ReadFile(pidFile); err == nil {
		pid, _, _ = strings.Cut(string(b), "\n")
	} else if !errors.Is(err, os.ErrNotExist) {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
	crictl, args := s.Bed.CrictlCommand()
	enter := "nsenter -t " + pid + " -a"
	return fmt.Sprintf(`
The node and the pod keep running, in namespaces of their own. To look inside:

  %[1]s %[2]s pods
  %[1]s %[2]s exec -it %.12[3]s sh
  %[1]s %[4]s sandbox list

To stop it: make demo-stop

`, enter, crictl+" "+strings.Join(args, " "), s.Container(), filepath.Join(s.Bed.Bin, "peerpodctl"))
}
