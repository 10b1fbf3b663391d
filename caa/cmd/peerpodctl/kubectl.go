// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"

	"github.com/containerd/errdefs"
)

// findKubectl fails early: an upload takes long.
func findKubectl() error {
	if _, err := exec.LookPath("kubectl"); err != nil {
		return fmt.Errorf("--update-config: %w; install kubectl, or set the id yourself: %w", err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// patchConfigMap sets a key of peer-pods-cm with the user's kubectl.
func patchConfigMap(ctx context.Context, stderr io.Writer, o publishOptions, key, value string) error {
	patch, err := json.Marshal(map[string]any{"data": map[string]string{key: value}})
	if err != nil {
		return err
	}
	args := []string{"patch", "configmap", "peer-pods-cm", "--namespace", o.namespace, "--type", "merge", "--patch", string(patch)}
	if o.kubeconfig != "" {
		args = append([]string{"--kubeconfig", o.kubeconfig}, args...)
	}
	cmd := exec.CommandContext(ctx, "kubectl", args...)
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the image is published, but kubectl could not set %s in the ConfigMap peer-pods-cm of namespace %s: %w: %s; set it, or run the command again",
			key, o.namespace, err, strings.TrimSpace(said.String()))
	}
	_, err = io.WriteString(stderr, out.String()+said.String()) // the answer on stdout is the image's id
	return err
}
