// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"fmt"
	"os"
)

// runtimeName is what -info reports; kata's says io.containerd.kata.v2.
const runtimeName = "io.containerd.kata-remote.v2"

// Run does what the command line says.
func Run(ctx context.Context, args []string, version string) error {
	f := ParseFlags(args)
	switch {
	case f.Version:
		_, err := fmt.Printf("containerd-shim-kata-v2: %s (%s)\n", version, runtimeName)
		return err
	case f.Info:
		return Info(os.Stdout, runtimeName, version)
	case f.Action == actionStart:
		return Start(ctx, f, os.Stdin, os.Stdout)
	case f.Action == actionDelete:
		return Delete(ctx, f, os.Stdout, os.Stderr)
	case f.Action == "" && f.Socket != "":
		return Serve(ctx, f, version)
	case f.Action == "":
		return fmt.Errorf("this program is run by containerd: set runtime_type = %q for a runtime handler", runtimeName)
	}
	return fmt.Errorf("action %q is not start or delete", f.Action)
}
