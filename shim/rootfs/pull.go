// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
)

const (
	// virtualVolume begins the mount option by which a snapshotter, nydus' for one,
	// says that the guest is to make the root file system: base64 of a
	// KataVirtualVolume in JSON (kata-containers 4.1, src/libs/kata-types/src/mount.rs).
	virtualVolume = "io.katacontainers.volume="
	// guestPull is the type of such a volume, the agent's storage driver and the name
	// of the driver's option.
	guestPull = "image_guest_pull"
	// pauseSource stands for the image of a pod's sandbox container, for which the
	// agent has a program of its own.
	pauseSource = "pause"
)

// GuestPull has the agent pull the image. What the node offers is neither mounted nor
// read.
type GuestPull struct {
	// metadata of the snapshot, or nil.
	metadata map[string]string
}

// ForcesPull tells whether a pod's or container's annotations ask that the guest pull
// its image. InvalidArgument: they say neither true nor false.
func ForcesPull(annotations map[string]string) (bool, error) {
	v, ok := annotations[annotation.ForceGuestPull]
	if !ok {
		return false, nil
	}
	force, err := strconv.ParseBool(v)
	if err != nil {
		return false, fmt.Errorf("annotation %s is %q, neither true nor false: %w", annotation.ForceGuestPull, v, errdefs.ErrInvalidArgument)
	}
	return force, nil
}

// pulled returns a way where the request asks for a pull, nil where it does not.
func pulled(r Request) (*GuestPull, error) {
	var found *GuestPull
	for _, m := range r.Mounts {
		for _, o := range m.Options {
			text, ok := strings.CutPrefix(o, virtualVolume)
			if !ok {
				continue
			}
			p, err := parseVolume(text)
			if err != nil {
				return nil, fmt.Errorf("container %s: mount option %s...: %w", r.Container, virtualVolume, err)
			}
			found = p
		}
	}
	if found == nil && r.ForcePull {
		found = &GuestPull{}
	}
	if found != nil && len(r.Handlers) > 0 && !slices.Contains(r.Handlers, guestPull) {
		return nil, fmt.Errorf("container %s: the agent in the pod VM cannot pull images (it has no storage driver %s): use a pod VM image whose agent can, or have the node's images used: %w", r.Container, guestPull, errdefs.ErrNotImplemented)
	}
	return found, nil
}

func parseVolume(text string) (*GuestPull, error) {
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("not base64: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var v struct {
		Type      string `json:"volume_type"`
		ImagePull struct {
			Metadata map[string]string `json:"metadata"`
		} `json:"image_pull"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, fmt.Errorf("not a KataVirtualVolume: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if v.Type != guestPull {
		return nil, fmt.Errorf("the snapshotter offers a volume of the type %q, and a pod VM, which has no device and no directory of the node, can use %s alone: set the snapshotter up for that (nydus: proxy mode), or use an ordinary one such as overlayfs: %w", v.Type, guestPull, errdefs.ErrNotImplemented)
	}
	return &GuestPull{metadata: v.ImagePull.Metadata}, nil
}

// Prepare implements Source: it writes down what the agent has to do, as kata's
// runtime does (kata-containers 4.1, virtcontainers/kata_agent.go).
func (p *GuestPull) Prepare(_ context.Context, r Request) (Result, error) {
	image, err := imageName(r)
	if err != nil {
		return Result{}, err
	}
	metadata := maps.Clone(p.metadata)
	if metadata == nil {
		metadata = map[string]string{}
	}
	for k, v := range r.Annotations {
		if k != annotation.InitData && k != annotation.Policy {
			metadata[k] = v
		}
	}
	option, err := json.Marshal(map[string]any{"metadata": metadata})
	if err != nil {
		return Result{}, err
	}
	path := "/run/kata-containers/" + r.Container + "/rootfs"
	return Result{Path: path, Storages: []*agentpb.Storage{{
		Driver: guestPull, DriverOptions: []string{guestPull + "=" + string(option)},
		Source: image, Fstype: "overlay", MountPoint: path,
	}}}, nil
}

// imageName is the reference that the pod has its image by. Only containerd's CRI
// plugin and CRI-O say it.
func imageName(r Request) (string, error) {
	if r.Sandbox {
		return pauseSource, nil
	}
	for _, key := range []string{annotation.ImageName, annotation.CRIOImageName} {
		name := r.Annotations[key]
		switch {
		case name == "":
		case strings.HasPrefix(name, "sha256:"):
			return "", fmt.Errorf("container %s: the pod VM is to pull its image, and annotation %s is %s, the id of an image on the node and no name in a registry: give the pod an image by name: %w", r.Container, key, name, errdefs.ErrInvalidArgument)
		default:
			return name, nil
		}
	}
	return "", fmt.Errorf("container %s: the pod VM is to pull its image, and nothing says which that is: annotation %s is missing; with ctr or nerdctl give --annotation %s=REGISTRY/NAME:TAG: %w", r.Container, annotation.ImageName, annotation.ImageName, errdefs.ErrInvalidArgument)
}
