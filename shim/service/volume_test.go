// SPDX-License-Identifier: Apache-2.0

package service_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/agent-protocol/extension"
	"github.com/kata-remote/kata-remote/shim/shimtest"
	"github.com/kata-remote/kata-remote/shim/stdio"
	"github.com/kata-remote/kata-remote/shim/volume/volumetest"
)

// TestVolume: a container's volume follows the node as long as there is the container,
// and no longer; one that cannot be had is no container.
func TestVolume(t *testing.T) {
	e := newEnv(t, append([]extension.Feature{extension.Volumes}, ours...))
	e.must(e.create("pod", "pod", stdio.Config{}, "pause"))
	e.start("pod", "")
	host := t.TempDir()
	w := &volumetest.Writer{Dir: filepath.Join(t.TempDir(), "pods/uid/volumes/kubernetes.io~configmap/cfg")}
	e.must(os.MkdirAll(w.Dir, 0o755))
	e.must(w.Write(map[string]string{"k": "1"}, 0))
	create := func(id string, mounts ...specs.Mount) error {
		spc := shimtest.Spec(e.netns, map[string]string{annotation.ContainerType: annotation.ContainerTypeContainer, annotation.SandboxID: "pod"}, "pause")
		spc.Mounts = append(spc.Mounts, mounts...)
		return e.createFrom(id, spc)
	}
	cfg := specs.Mount{Type: "bind", Source: w.Dir, Destination: "/cfg", Options: []string{"rbind", "ro"}}
	err := create("wrong", cfg, specs.Mount{Type: "bind", Source: host, Destination: "/host", Options: []string{"rbind", "rw"}})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "volume at /host: the directory "+host) {
		t.Errorf("a directory of the node: %v", err)
	}
	e.must(create("app", cfg))
	e.start("app", "")
	mounts := e.agent.Container("app").OCI.Mounts
	at := mounts[len(mounts)-1].Source
	holds := func(value string) func() bool {
		return func() bool {
			files, _ := e.agent.Volume(at)
			return string(files[files["..data"].Target+"/k"].Data) == value
		}
	}
	if !holds("1")() {
		t.Error("the container has started without its volume")
	}
	e.must(w.Write(map[string]string{"k": "2"}, 0))
	e.until("the update", holds("2"))
	e.kill("app", "", syscall.SIGKILL)
	e.wait("app", "")
	e.delete("app", "")
	e.until("the volume's removal", func() bool { return len(e.agent.Volumes()) == 0 })
	e.must(create("again", cfg))
	if n := len(e.agent.Volumes()); n != 1 {
		t.Errorf("%d volumes for the container that came next", n)
	}
}
