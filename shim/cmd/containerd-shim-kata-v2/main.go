// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-kata-v2 is the containerd runtime for pods in virtual
// machines of their own. containerd runs it; it works under any name, and
// containerd-shim-kata-remote-v2 is the one that handler kata-remote implies.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/kata-remote/kata-remote/shim/bootstrap"
)

// version is set when it is linked.
var version = "0.0.0-dev"

func main() {
	if err := bootstrap.Run(context.Background(), os.Args[1:], version); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
