// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	blank "github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/kata-remote/kata-remote/agent-protocol/agentpb"
)

// imageRegistry serves an image with busybox as .../box:1. hold, if it is not nil, is
// called before a blob is served.
func imageRegistry(t *testing.T, hold func(*http.Request)) (host string) {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	pushed := false
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if pushed && hold != nil && r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			hold(r)
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	host = strings.TrimPrefix(srv.URL, "http://")
	box := must[[]byte](t)(os.ReadFile("/bin/busybox"))
	entries := []any{
		tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg}, string(box),
		tar.Header{Name: "bin/sh", Typeflag: tar.TypeLink, Linkname: "bin/busybox"}, "",
		tar.Header{Name: "etc/motd", Typeflag: tar.TypeReg}, "pulled",
	}
	for _, dir := range []string{"proc/", "dev/", "tmp/"} {
		entries = append(entries, tar.Header{Name: dir, Typeflag: tar.TypeDir}, "")
	}
	archive := archiveOf(t, entries...)
	layer := must[v1.Layer](t)(tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive)), nil }))
	img := must[v1.Image](t)(mutate.ConfigFile(blank.Image, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}}))
	img = must[v1.Image](t)(mutate.AppendLayers(img, layer))
	ref := must[name.Reference](t)(name.ParseReference(host + "/box:1"))
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	pushed = true
	return host
}

// pulled is a request as kata's runtime makes it for an image the guest is to pull
// (kata-containers 4.1, virtcontainers/kata_agent.go, handleImageGuestPullBlockVolume).
func (g *guest) pulled(id, source, command string) *agentpb.CreateContainerRequest {
	root := filepath.Join(g.agent.cfg.StateDir, id, "rootfs")
	spec := g.spec(command)
	spec.Root.Path = root
	return &agentpb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec, Storages: []*agentpb.Storage{{
		Driver: guestPull, DriverOptions: []string{guestPull + `={"metadata":{"io.kubernetes.cri.image-name":"` + source + `"}}`},
		Source: source, Fstype: "overlay", MountPoint: root,
	}}}
}

func TestPulledImageRunsAContainer(t *testing.T) {
	host := imageRegistry(t, nil)
	g := newGuest(t)
	g.sandbox()
	for _, id := range []string{"one", "two"} {
		must[any](t)(g.CreateContainer(g.ctx(), g.pulled(id, host+"/box:1", `busybox cat /etc/motd; echo `+id+` > /etc/motd; busybox cat /etc/motd; exit 3`)))
		g.start(id)
		if out, status := g.readAll(id, id), g.wait(id, id); out != "pulled"+id+"\n" || status != 3 {
			t.Errorf("%s: %q, status %d", id, out, status)
		}
	}
	g.remove("one")
	if _, err := os.Stat(filepath.Join(g.agent.cfg.StateDir, "one")); !os.IsNotExist(err) {
		t.Errorf("the root of a removed container: %v", err)
	}
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
	if _, err := os.Stat(filepath.Join(g.agent.cfg.StateDir, "image")); !os.IsNotExist(err) {
		t.Errorf("the image of a pod that is gone: %v", err)
	}
}

func TestPullRefusals(t *testing.T) {
	host := imageRegistry(t, nil)
	g := newGuest(t)
	g.sandbox()
	_, err := g.CreateContainer(g.ctx(), g.pulled("c1", host+"/box:2", "true"))
	wantClass(t, "unknown image", err, errdefs.ErrNotFound)
	if !strings.Contains(err.Error(), host+"/box:2") {
		t.Errorf("the image is not named: %v", err)
	}
	_, err = g.CreateContainer(g.ctx(), g.pulled("c1", "a b", "true"))
	wantClass(t, "bad reference", err, errdefs.ErrInvalidArgument)
	r := g.pulled("c1", host+"/box:1", "true")
	r.Storages[0].DriverOptions = []string{guestPull + "=metadata"}
	_, err = g.CreateContainer(g.ctx(), r)
	wantClass(t, "option that is not JSON", err, errdefs.ErrInvalidArgument)
	r = g.pulled("c1", host+"/box:1", "true")
	r.Storages[0].Options = []string{"bind"}
	_, err = g.CreateContainer(g.ctx(), r)
	wantClass(t, "bind", err, errdefs.ErrInvalidArgument)
	r = g.pulled("image", host+"/box:1", "true")
	_, err = g.CreateContainer(g.ctx(), r)
	wantClass(t, "a container with the name of the images' directory", err, errdefs.ErrInvalidArgument)
}

// A container is removed while its image is on the way.
func TestRemoveDuringPull(t *testing.T) {
	began := make(chan struct{}, 8)
	host := imageRegistry(t, func(r *http.Request) {
		began <- struct{}{}
		<-r.Context().Done()
	})
	g := newGuest(t)
	g.sandbox()
	done := make(chan error, 1)
	go func() {
		_, err := g.CreateContainer(g.ctx(), g.pulled("c1", host+"/box:1", "true"))
		done <- err
	}()
	<-began
	_, _ = g.RemoveContainer(g.ctx(), &agentpb.RemoveContainerRequest{ContainerId: "c1"}) // it may find nothing left to remove
	if err := <-done; err == nil {
		t.Error("the container was created")
	}
	must[any](t)(g.DestroySandbox(g.ctx(), &agentpb.DestroySandboxRequest{}))
}

// A runtime whose connection breaks during a pull calls again and gets its container.
func TestConnectionBreaksDuringPull(t *testing.T) {
	began, goOn := make(chan struct{}, 8), make(chan struct{})
	host := imageRegistry(t, func(r *http.Request) {
		began <- struct{}{}
		select {
		case <-goOn:
		case <-r.Context().Done():
		}
	})
	g := newGuest(t)
	g.sandbox()
	first := g.dial()
	done := make(chan error, 2)
	create := func(c *client) {
		_, err := c.CreateContainer(g.ctx(), g.pulled("c1", host+"/box:1", "exit 3"))
		done <- err
	}
	go create(first)
	<-began
	go create(g.client)
	first.close()
	if err := <-done; err == nil {
		t.Error("one call succeeded before the image was there")
	}
	close(goOn)
	// The agent may have finished for the first caller before it saw it leave.
	if err := <-done; err != nil && class(err) != errdefs.ErrAlreadyExists {
		t.Fatal(err)
	}
	g.start("c1")
	if got := g.wait("c1", "c1"); got != 3 {
		t.Errorf("status %d", got)
	}
	g.remove("c1")
}

// The sandbox container as a stock runtime sends it where images are pulled runs the
// agent's own program, and nothing is pulled for it.
func TestPauseIsNotPulled(t *testing.T) {
	g := newGuest(t)
	g.sandbox()
	r := g.pulled("pause", "pause", "true")
	r.OCI.Annotations = pauseSpec().Annotations
	must[any](t)(g.CreateContainer(g.ctx(), r))
	g.start("pause")
	if exe := must[string](t)(os.Readlink("/proc/" + strconv.Itoa(g.pausePID("pause")) + "/exe")); exe != must[string](t)(os.Executable()) {
		t.Errorf("it runs %s", exe)
	}
	if _, err := os.Stat(filepath.Join(g.agent.cfg.StateDir, "pause")); !os.IsNotExist(err) {
		t.Errorf("it has a root: %v", err)
	}
	g.signal("pause", 15)
	if got := g.wait("pause", "pause"); got != 0 {
		t.Errorf("status %d", got)
	}
	g.remove("pause")
}
