// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"syscall"
)

// forwardingRE is what crictl says once it listens: the kernel chose the port.
var forwardingRE = regexp.MustCompile(`^Forwarding from (127\.0\.0\.1:\d+) ->`)

// checkPortForward asks for a page from a server that only the pod itself can reach.
func (s *Scenario) checkPortForward(ctx context.Context) (string, error) {
	if _, err := s.app.Exec(ctx, "httpd", "-p", "127.0.0.1:8081", "-h", "/www"); err != nil {
		return "", err
	}
	if _, err := httpGet(ctx, s.pod.IP+":8081"); err == nil {
		return "", fmt.Errorf("the server on the pod's loopback answers at the pod's address")
	}
	program, args := s.Bed.CrictlCommand("port-forward", s.pod.ID, "0:8081")
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if m := forwardingRE.FindStringSubmatch(lines.Text()); m != nil {
			var seen string
			// Twice: one connection's end must not end the other.
			for range 2 {
				if seen, err = httpGet(ctx, m[1]); err != nil {
					return "", fmt.Errorf("through %s: %w", m[1], err)
				}
			}
			return seen, nil
		}
	}
	return "", fmt.Errorf("crictl port-forward ended before it listened: %v", lines.Err())
}
