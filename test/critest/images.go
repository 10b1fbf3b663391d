// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/kata-remote/kata-remote/test/testbed"
)

// critest has the names of its images compiled in (cri-tools 1.30.0,
// pkg/framework/util.go, pkg/validate/consts.go, security_context_linux.go): what
// stands in for them must be had under these.
const (
	testImages = "registry.k8s.io/e2e-test-images/"
	criImages  = "gcr.io/k8s-staging-cri-tools/"
)

// pushImages fills the registry with stand-ins for every image that critest pulls.
// programs is the folder of the built commands of test/critest/image.
func pushImages(ctx context.Context, bed *testbed.Bed, r *testbed.Registry, programs string) error {
	sh, err := os.ReadFile(filepath.Join(programs, "sh"))
	if err != nil {
		return err
	}
	base, err := baseFiles(ctx, bed, sh)
	if err != nil {
		return err
	}
	web, err := os.ReadFile(filepath.Join(programs, "web"))
	if err != nil {
		return err
	}
	nnp, err := os.ReadFile(filepath.Join(programs, "nnp"))
	if err != nil {
		return err
	}
	server := func(path string) []testbed.File {
		return []testbed.File{{Name: path, Mode: 0o755, Data: web}}
	}
	shell := v1.Config{Cmd: []string{"sh"}}
	user := func(u string) v1.Config { return v1.Config{Cmd: []string{"sh"}, User: u} }
	for _, i := range []testbed.Image{
		{Ref: testImages + "busybox:1.29-2", Config: shell},
		{Ref: testImages + "nginx:1.14-2", Config: v1.Config{Cmd: []string{"nginx", "-say", "nginx: master process"}}, Files: server("usr/bin/nginx")},
		{Ref: testImages + "httpd:2.4.39-4", Config: v1.Config{Cmd: []string{"httpd-foreground", "-say", "Command line: 'httpd -D FOREGROUND'"}}, Files: server("usr/bin/httpd-foreground")},
		{Ref: testImages + "nonewprivs:1.3", Config: v1.Config{Cmd: []string{"nnp"}}, Files: []testbed.File{{Name: "usr/bin/nnp", Mode: 0o4755, Data: nnp}}},
		{Ref: criImages + "hostnet-nginx-amd64:latest", Config: v1.Config{Cmd: []string{"nginx", "-addr", ":12003"}}, Files: server("usr/bin/nginx")},
		{Ref: criImages + "test-image-user-uid:latest", Config: user("1002")},
		{Ref: criImages + "test-image-user-username:latest", Config: user("www-data")},
		{Ref: criImages + "test-image-user-uid-group:latest", Config: user("1003:1004")},
		{Ref: criImages + "test-image-user-username-group:latest", Config: user("www-data:1004")},
		{Ref: criImages + "test-image-predefined-group:latest", Config: user("1000"), Files: []testbed.File{
			{Name: "etc/passwd", Mode: 0o644, Data: []byte(passwd + "default-user:x:1000:1000::/home:/bin/sh\n")},
			{Name: "etc/group", Mode: 0o644, Data: []byte(group + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")},
		}},
		// What follows is pulled, listed and removed, and never run.
		{Ref: criImages + "test-image-latest:latest", Config: shell, Files: marker("latest")},
		{Ref: criImages + "test-image-tag:test", Config: shell, Files: marker("tag-test")},
		{Ref: criImages + "test-image-tag:all", Config: shell, Files: marker("tag-all")},
		{Ref: criImages + "test-image-1:latest", Config: shell, Files: marker("1")},
		{Ref: criImages + "test-image-2:latest", Config: shell, Files: marker("2")},
		{Ref: criImages + "test-image-3:latest", Config: shell, Files: marker("3")},
		{Ref: criImages + "test-image-tags:1", Config: shell, Files: marker("tags")},
		{Ref: criImages + "test-image-tags:2", Config: shell, Files: marker("tags")},
		{Ref: criImages + "test-image-tags:3", Config: shell, Files: marker("tags")},
	} {
		i.Files = slices.Concat(base, i.Files)
		if err := r.Push(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// marker makes an image different from the others.
func marker(name string) []testbed.File {
	return []testbed.File{{Name: "etc/image", Mode: 0o644, Data: []byte(name + "\n")}}
}

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/www:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
	group  = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n"
)

// baseFiles is busybox as critest expects one to be: with the users it names, with the
// commands that Debian's busybox lacks, and with a shell that looks for ls where ls is.
func baseFiles(ctx context.Context, bed *testbed.Bed, sh []byte) ([]testbed.File, error) {
	image, err := bed.Busybox(ctx)
	if err != nil {
		return nil, err
	}
	script := func(name, line string) testbed.File {
		return testbed.File{Name: "bin/" + name, Mode: 0o755, Data: []byte("#!/bin/sh\n" + line + "\n")}
	}
	return slices.Concat(image.Files, []testbed.File{
		{Name: "etc/passwd", Mode: 0o644, Data: []byte(passwd)},
		{Name: "etc/group", Mode: 0o644, Data: []byte(group)},
		{Name: "home/", Mode: 0o755}, {Name: "var/", Mode: 0o755}, {Name: "usr/", Mode: 0o755},
		{Name: "bin/sh", Mode: 0o755, Data: sh},
		script("pgrep", `exec pidof "$1"`),
		script("ipcs", "exec cat /proc/sysvipc/shm"),
		// critest masks ls: as a link to busybox it would mask all commands.
		script("ls", `exec busybox ls "$@"`),
	}), nil
}
