// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
)

// nydus is a mount as nydus-snapshotter makes it in proxy mode.
func nydus(volume string) []*types.Mount {
	option := virtualVolume + base64.StdEncoding.EncodeToString([]byte(volume))
	return []*types.Mount{{Type: "fuse.nydus-overlayfs", Source: "overlay", Options: []string{"lowerdir=/nonesuch", option}}}
}

const pullVolume = `{"volume_type":"image_guest_pull","source":"","fs_type":"","options":[],"image_pull":{"metadata":{"containerd.io/snapshot/cri.layer-digest":"sha256:1"}}}`

func TestGuestPull(t *testing.T) {
	const image = "registry.example/shop/app:1"
	handlers := []string{"bind", "image_guest_pull"}
	metadata := func(m map[string]string) map[string]map[string]string {
		return map[string]map[string]string{"metadata": m}
	}
	cri := map[string]string{annotation.ImageName: image, annotation.InitData: "long", annotation.Policy: "long too"}
	for name, c := range map[string]struct {
		in     Request
		source string
		option map[string]map[string]string
	}{
		"a snapshotter's": {Request{Mounts: nydus(pullVolume), Annotations: cri, Handlers: handlers}, image,
			metadata(map[string]string{"containerd.io/snapshot/cri.layer-digest": "sha256:1", annotation.ImageName: image})},
		"forced": {Request{Mounts: []*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/nonesuch"}}}, ForcePull: true, Annotations: cri},
			image, metadata(map[string]string{annotation.ImageName: image})},
		"CRI-O": {Request{ForcePull: true, Annotations: map[string]string{annotation.CRIOImageName: image}}, image, metadata(map[string]string{annotation.CRIOImageName: image})},
		"the sandbox": {Request{Mounts: nydus(pullVolume), Sandbox: true, Annotations: map[string]string{annotation.ContainerType: "sandbox"}}, "pause",
			metadata(map[string]string{"containerd.io/snapshot/cri.layer-digest": "sha256:1", annotation.ContainerType: "sandbox"})},
	} {
		t.Run(name, func(t *testing.T) {
			c.in.Container = "c1"
			source, err := Choose(nil, nil, c.in) // as a stock agent has it: no feature of ours
			if err != nil {
				t.Fatal(err)
			}
			got, err := source.Prepare(t.Context(), c.in)
			if err != nil {
				t.Fatal(err)
			}
			const root = "/run/kata-containers/c1/rootfs"
			if got.Path != root || got.Own || len(got.Storages) != 1 {
				t.Fatalf("%+v", got)
			}
			s := got.Storages[0]
			if s.Driver != "image_guest_pull" || s.Source != c.source || s.Fstype != "overlay" || s.MountPoint != root || len(s.DriverOptions) != 1 {
				t.Errorf("%+v", s)
			}
			text, found := strings.CutPrefix(s.DriverOptions[0], "image_guest_pull=")
			var option map[string]map[string]string
			if err := json.Unmarshal([]byte(text), &option); !found || err != nil {
				t.Fatalf("driver option %s: %v", s.DriverOptions[0], err)
			}
			if d := cmp.Diff(c.option, option); d != "" {
				t.Errorf("driver option (-want +got):\n%s", d)
			}
		})
	}
	ours := extension.Set{string(extension.Rootfs), string(extension.Pause)}
	if source, err := Choose(nil, ours, Request{Sandbox: true, ForcePull: true}); err != nil || source != (AgentsOwn{}) {
		t.Errorf("the sandbox of an agent with a program for it: %T, %v", source, err)
	}
	if source, err := Choose(nil, ours, Request{Handlers: handlers}); err != nil {
		t.Error(err)
	} else if _, ok := source.(*FromNode); !ok {
		t.Errorf("nobody asked for a pull: %T", source)
	}
}

func TestGuestPullRefused(t *testing.T) {
	named := map[string]string{annotation.ImageName: "registry.example/app:1"}
	for name, c := range map[string]struct {
		in    Request
		class func(error) bool
		want  string
	}{
		"ctr, nerdctl":   {Request{ForcePull: true}, errdefs.IsInvalidArgument, "--annotation " + annotation.ImageName},
		"an image's id":  {Request{ForcePull: true, Annotations: map[string]string{annotation.ImageName: "sha256:12"}}, errdefs.IsInvalidArgument, "sha256:12"},
		"another volume": {Request{Mounts: nydus(`{"volume_type":"layer_raw_block"}`), Annotations: named}, errdefs.IsNotImplemented, `"layer_raw_block"`},
		"not JSON":       {Request{Mounts: nydus(`{`), Annotations: named}, errdefs.IsInvalidArgument, "KataVirtualVolume"},
		"not base64":     {Request{Mounts: []*types.Mount{{Options: []string{virtualVolume + "%"}}}, Annotations: named}, errdefs.IsInvalidArgument, "base64"},
		"an agent that cannot": {Request{ForcePull: true, Annotations: named, Handlers: []string{"ephemeral", "local"}}, errdefs.IsNotImplemented,
			"no storage driver image_guest_pull"},
	} {
		c.in.Container = "c1"
		source, err := Choose(nil, extension.Set{string(extension.Rootfs)}, c.in)
		if err == nil {
			_, err = source.Prepare(t.Context(), c.in)
		}
		if !c.class(err) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "c1") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestForcesPull(t *testing.T) {
	for value, want := range map[string]bool{"true": true, "false": false, "1": true} {
		if got, err := ForcesPull(map[string]string{annotation.ForceGuestPull: value}); err != nil || got != want {
			t.Errorf("%s: %v, %v", value, got, err)
		}
	}
	if got, err := ForcesPull(nil); err != nil || got {
		t.Errorf("no annotation: %v, %v", got, err)
	}
	if _, err := ForcesPull(map[string]string{annotation.ForceGuestPull: "please"}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), annotation.ForceGuestPull) {
		t.Errorf("neither: %v", err)
	}
}
