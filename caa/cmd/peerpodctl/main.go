// SPDX-License-Identifier: Apache-2.0

// Command peerpodctl shows what the adaptor on this node has: its sandboxes, how far
// they are and how long each step of their start took; and which instance type a pod
// would get. It prepares a cloud's account for pod VMs: their image, and open ports.
// Answers are on stdout.
//
// Exit codes: 0 answered; 1 the adaptor or the cloud could not be asked, or refused, or
// no instance type fits; 2 the command line is wrong; 4 there is no such sandbox; 5 it
// was interrupted; image publish then goes on where it was when it is run again.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/spf13/cobra"

	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/caa/adminpb"
	"github.com/kata-remote/kata-remote/caa/config"
)

const (
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 4

	exitInterrupted = 5
)

// callTimeout bounds one question. The adaptor answers from memory.
const callTimeout = 10 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	asked := false // whether the command line was understood
	cmd := command(&asked)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "peerpodctl: %v\n", err)
	switch {
	case !asked:
		return exitUsage
	case errdefs.IsNotFound(err):
		return exitNotFound
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return exitInterrupted
	}
	return exitFailed
}

func command(asked *bool) *cobra.Command {
	var socket, output string
	root := &cobra.Command{
		Use: "peerpodctl", Short: "look at the pod VMs of this node",
		SilenceErrors: true, SilenceUsage: true, Args: cobra.NoArgs,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.Help()
			return fmt.Errorf("give a command, such as: peerpodctl sandbox list")
		},
	}
	def := config.DefaultSocket
	if v := os.Getenv("REMOTE_HYPERVISOR_ENDPOINT"); v != "" {
		def = v
	}
	root.PersistentFlags().StringVar(&socket, "socket", def, "the adaptor's socket")
	sandbox := &cobra.Command{
		Use: "sandbox", Short: "sandboxes, their VMs and their starts", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return fmt.Errorf("give a verb: list or show") },
	}
	root.AddCommand(sandbox, instanceCommand(asked), cloudCommand(asked), imageCommand(asked))
	add := func(c *cobra.Command, id func([]string) string, table func([]*adminpb.Sandbox) string) {
		c.Flags().StringVarP(&output, "output", "o", "table", "table or json")
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("--output is %q; want table or json", output)
			}
			*asked = true
			sandboxes, err := ask(cmd.Context(), socket, id(args))
			if err != nil {
				return err
			}
			text := ""
			if output == "json" {
				text, err = asJSON(sandboxes)
			} else {
				text = table(sandboxes)
			}
			fmt.Fprint(cmd.OutOrStdout(), text)
			return err
		}
		sandbox.AddCommand(c)
	}
	add(&cobra.Command{Use: "list", Short: "all sandboxes of the node, oldest first", Args: cobra.NoArgs},
		func([]string) string { return "" },
		func(s []*adminpb.Sandbox) string { return list(s, time.Now()) })
	add(&cobra.Command{Use: "show ID", Short: "one sandbox, with all that is known of it; the beginning of its id is enough", Args: cobra.ExactArgs(1)},
		func(args []string) string { return args[0] },
		func(s []*adminpb.Sandbox) string { return show(s[0], time.Now()) })
	return root
}

// ask returns the sandboxes of the adaptor on socket: all, or the one id names.
func ask(ctx context.Context, socket, id string) ([]*adminpb.Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := relay.Dial(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("%w; is the adaptor running, and with this --socket?", err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	resp, err := adminpb.NewAdminClient(client).ListSandboxes(ctx, &adminpb.ListSandboxesRequest{Id: id})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	if id != "" && len(resp.Sandboxes) != 1 {
		return nil, fmt.Errorf("the adaptor answered with %d sandboxes for one id", len(resp.Sandboxes))
	}
	return resp.Sandboxes, nil
}
