// SPDX-License-Identifier: Apache-2.0

// Package images makes stand-ins for the images that Kubernetes' own tests name. There
// is no registry to pull them from: each has the program that the tests run, from
// Debian or built on the spot, under the very name that e2e.test has compiled in.
package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// Names that e2e.test of the version in test/tools/kube has.
const (
	Agnhost = "registry.k8s.io/e2e-test-images/agnhost:2.56"
	Busybox = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"
	pause   = "registry.k8s.io/pause:3.10.1"
)

// webServers are images whose program the tests only want to stay, and to answer.
var webServers = []string{
	"registry.k8s.io/e2e-test-images/nginx:1.14-4",
	"registry.k8s.io/e2e-test-images/nginx:1.15-4",
	"registry.k8s.io/e2e-test-images/httpd:2.4.38-4",
	"registry.k8s.io/e2e-test-images/httpd:2.4.39-4",
}

// curlSource is as much of curl as the tests' commands ask for. Debian's own needs
// thirty libraries.
const curlSource = `package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
)

func main() {
	for _, arg := range os.Args[1:] {
		if strings.HasPrefix(arg, "-") {
			continue
		}
		resp, err := http.Get(arg)
		if err == nil {
			_, err = io.Copy(os.Stdout, resp.Body)
			resp.Body.Close()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "curl:", err)
			os.Exit(7)
		}
	}
}
`

// All makes the images. kube is the folder where make built Kubernetes' programs.
func All(ctx context.Context, bed *testbed.Bed, kube string) ([]testbed.Image, error) {
	base, err := busybox(ctx, bed)
	if err != nil {
		return nil, err
	}
	agn, err := agnhost(ctx, bed, base, kube)
	if err != nil {
		return nil, err
	}
	p, err := bed.Pause(ctx)
	if err != nil {
		return nil, err
	}
	p.Ref = pause
	all := []testbed.Image{agn, p, {Ref: Busybox, Files: base, Config: v1.Config{Cmd: []string{"sh"}}}}
	for _, ref := range webServers {
		all = append(all, testbed.Image{Ref: ref, Files: base, Config: v1.Config{Cmd: []string{"httpd", "-f", "-p", "80", "-h", "/www"}}})
	}
	return all, nil
}

// busybox is the testbed's, with another shell: Debian's busybox drops variables of
// the environment whose names are not a shell's, and the tests look for "data-1".
func busybox(ctx context.Context, bed *testbed.Bed) ([]testbed.File, error) {
	img, err := bed.Busybox(ctx)
	if err != nil {
		return nil, err
	}
	bash, err := os.ReadFile("/bin/bash-static")
	if err != nil {
		return nil, fmt.Errorf("%w (test/setup.sh installs it)", err)
	}
	files := slices.DeleteFunc(img.Files, func(f testbed.File) bool { return f.Name == "bin/sh" })
	return append(files, testbed.File{Name: "bin/sh", Mode: 0o755, Data: bash}), nil
}

// agnhost is the program of most tests, with what its own image has beside it.
func agnhost(ctx context.Context, bed *testbed.Bed, base []testbed.File, kube string) (testbed.Image, error) {
	img := testbed.Image{Ref: Agnhost, Files: slices.Clone(base), Config: v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}}
	for _, f := range []struct {
		name string
		mode int64
	}{{"agnhost", 0o755}, {"localhost.crt", 0o644}, {"localhost.key", 0o644}} {
		data, err := os.ReadFile(filepath.Join(kube, f.name))
		if err != nil {
			return img, err
		}
		img.Files = append(img.Files, testbed.File{Name: f.name, Mode: f.mode, Data: data})
	}
	curl, err := bed.Build(ctx, "curl", curlSource)
	img.Files = append(img.Files,
		testbed.File{Name: "agnhost-2", Mode: 0o777, Target: "agnhost"},
		testbed.File{Name: "uploads/", Mode: 0o777},
		testbed.File{Name: "bin/curl", Mode: 0o755, Data: curl})
	return img, err
}
