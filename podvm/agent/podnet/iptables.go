// SPDX-License-Identifier: Apache-2.0

package podnet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/netns"
)

// toolDirs are where a guest has iptables' programs, if it has them. The image that
// this repository builds holds one program and has none; a distribution's image in
// which podvmd is a service usually does.
var toolDirs = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"}

// IPTables returns the pod's packet filter as iptables-save writes it.
// FailedPrecondition: the guest does not have that program.
func (n *Network) IPTables(ctx context.Context, v6 bool) ([]byte, error) {
	return n.run(ctx, tool("iptables-save", v6), nil)
}

// SetIPTables replaces the tables that data names, in iptables-save's format, and
// returns what iptables-restore said. FailedPrecondition: the guest does not have
// that program.
func (n *Network) SetIPTables(ctx context.Context, v6 bool, data []byte) ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.run(ctx, tool("iptables-restore", v6), data)
}

func tool(name string, v6 bool) string {
	if v6 {
		return "ip6" + strings.TrimPrefix(name, "ip")
	}
	return name
}

// run runs a program in the pod's network namespace.
func (n *Network) run(ctx context.Context, name string, input []byte) ([]byte, error) {
	if n.path == "" {
		return nil, fmt.Errorf("%s: the pod has no network namespace of its own: %w", name, errdefs.ErrFailedPrecondition)
	}
	path := n.find(name)
	if path == "" {
		return nil, fmt.Errorf("the guest has no program %s, so the pod's packet filter is not to be had from here: use a pod VM image that holds iptables, or a container of the pod: %w", name, errdefs.ErrFailedPrecondition)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &stdout, &stderr
	if err := netns.Do(ctx, n.path, cmd.Run); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && ctx.Err() == nil {
			// It reads what the caller wrote: most likely that is wrong.
			return nil, fmt.Errorf("%s: %w: %s: %w", name, err, bytes.TrimSpace(stderr.Bytes()), errdefs.ErrInvalidArgument)
		}
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), ctx.Err())
	}
	return stdout.Bytes(), nil
}

func (n *Network) find(name string) string {
	for _, dir := range n.tools {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}
