// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// guestPull is the driver of storages that are the root file system of an image, and
// the name of the option that describes it.
const guestPull = "image_guest_pull"

// pullImage mounts a root file system whose image the guest pulls. What the option
// says beside its form, labels and annotations, is not needed.
func pullImage(ctx context.Context, a *Agent, r *storageRequest) (undo func() error, err error) {
	for _, o := range r.DriverOptions {
		text, found := strings.CutPrefix(o, guestPull+"=")
		var doc struct {
			Metadata map[string]string `json:"metadata"`
		}
		if found && json.Unmarshal([]byte(text), &doc) != nil {
			return nil, fmt.Errorf(`driver option %s is not JSON of the form {"metadata": {"key": "value"}}: %w`, guestPull, errdefs.ErrInvalidArgument)
		}
	}
	if r.opts.flags&unix.MS_BIND != 0 {
		return nil, fmt.Errorf("an image is not bound: remove bind from the options: %w", errdefs.ErrInvalidArgument)
	}
	return a.images.Mount(ctx, r.Source, fdPath(r.dir), r.opts.flags)
}

// withoutPulledPause takes the root of a pod's sandbox container out of a request. A
// runtime that has images pulled sends one for it too, with the source "pause", and
// the kata-agent answers with a program of its own (kata-containers 4.1,
// src/agent/src/storage/image_pull_handler.rs, unpack_pause_image). So does this one.
func withoutPulledPause(spec *specs.Spec, storages []*agentpb.Storage) []*agentpb.Storage {
	if !isSandbox(spec) || spec.Root == nil {
		return storages
	}
	var rest []*agentpb.Storage
	for _, s := range storages {
		if s.Driver == guestPull && filepath.Clean(s.MountPoint) == filepath.Clean(spec.Root.Path) {
			spec.Root.Path = ""
			continue
		}
		rest = append(rest, s)
	}
	return rest
}
