// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kata-remote/kata-remote/agent-protocol/annotation"
	"github.com/kata-remote/kata-remote/test/testbed"
)

const (
	// bridgeAddr is the node's on the local provider's bridge: what a pod VM reaches
	// through its own interface.
	bridgeAddr   = "192.168.213.1"
	registryUser = "puller"
	registryPass = "correct-horse-battery"
)

// registryOnNode serves a registry at every address of the node, for those who have
// the password, and counts the blobs it gave out.
func registryOnNode(t *testing.T) (port string, blobs *atomic.Int32) {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	blobs = new(atomic.Int32)
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := r.BasicAuth(); user != registryUser || pass != registryPass {
			w.Header().Set("WWW-Authenticate", `Basic realm="e2e"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			blobs.Add(1)
		}
		inner.ServeHTTP(w, r)
	}))
	srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	_, port, err = net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port, blobs
}

// marked is the busybox image with a file that tells it from others.
func marked(ctx context.Context, bed *testbed.Bed, ref, mark string) (testbed.Image, error) {
	img, err := bed.Busybox(ctx)
	img.Ref = ref
	img.Files = append(img.Files, testbed.File{Name: "etc/mark", Mode: 0o644, Data: []byte(mark + "\n")})
	return img, err
}

// push puts a marked image into the registry, and one of another content under the
// same name on the node, which must never be seen in the pod.
func push(ctx context.Context, t *testing.T, bed *testbed.Bed, port, name, mark string) v1.Hash {
	t.Helper()
	img, err := marked(ctx, bed, "127.0.0.1:"+port+"/"+name, mark)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Push(ctx, remote.WithAuth(&authn.Basic{Username: registryUser, Password: registryPass}))
	if err != nil {
		t.Fatal(err)
	}
	onNode, err := marked(ctx, bed, bridgeAddr+":"+port+"/"+name, "the node's "+mark)
	if err != nil {
		t.Fatal(err)
	}
	if err := bed.Import(ctx, onNode); err != nil {
		t.Fatal(err)
	}
	return digest
}

// TestGuestPull runs containers whose images the pod VM pulls, with credentials, by
// tag and by digest.
func TestGuestPull(t *testing.T) {
	bed := newBed(t, "e2e-pull")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	port, blobs := registryOnNode(t)
	at := bridgeAddr + ":" + port
	authFile := filepath.Join(bed.Out, "auth.json")
	password := func(p string) {
		auth := base64.StdEncoding.EncodeToString([]byte(registryUser + ":" + p))
		if err := os.WriteFile(authFile, fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, at, auth), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	password(registryPass)
	bed.AdaptorEnv = []string{"PULL_AUTH_FILE=" + authFile, "PULL_INSECURE_REGISTRIES=" + at}
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	byTag := at + "/shop/app:1"
	push(ctx, t, bed, port, "shop/app:1", "by tag")
	digest := push(ctx, t, bed, port, "shop/other:1", "by digest")
	byDigest := at + "/shop/other@" + digest.String()
	if err := bed.Tag(ctx, at+"/shop/other:1", byDigest); err != nil {
		t.Fatal(err)
	}
	if _, err := testbed.Run(ctx, "ctr", "-a", testbed.ContainerdSocket, "-n", "k8s.io", "images", "rm", "--sync", at+"/shop/other:1"); err != nil {
		t.Fatal(err)
	}
	force := map[string]string{annotation.ForceGuestPull: "true"}
	p, err := RunPod(ctx, bed, "pull", testbed.Handler, force)
	if err != nil {
		t.Fatal(err)
	}
	before := blobs.Load()
	run := func(name, image, mark string) {
		t.Helper()
		c, err := p.RunImage(ctx, name, image, "sh", "-c", "cat /etc/mark; echo written > /etc/mark && exit 7")
		if err != nil {
			t.Fatal(err)
		}
		if code, err := c.Wait(ctx); err != nil || code != 7 {
			t.Errorf("%s: exit code %d, %v", name, code, err)
		}
		if out, err := c.Log("stdout"); err != nil || out != mark+"\n" {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
	run("tag", byTag, "by tag")
	run("digest", byDigest, "by digest")
	if n := blobs.Load() - before; n != 4 {
		t.Errorf("the registry gave out %d blobs, want configuration and layer of two images", n)
	}
	run("again", byDigest, "by digest")
	if n := blobs.Load() - before; n != 4 {
		t.Errorf("the registry gave out %d blobs for what was there", n-4)
	}
	if err := p.Remove(ctx); err != nil {
		t.Error(err)
	}

	password(registryPass + "x")
	checkPullRefused(ctx, t, bed, at, byTag)
	checkNoPassword(t, bed)
}

// checkPullRefused runs a pod whose password for the registry is wrong.
func checkPullRefused(ctx context.Context, t *testing.T, bed *testbed.Bed, at, byTag string) {
	t.Helper()
	p, err := RunPod(ctx, bed, "refused", testbed.Handler, map[string]string{annotation.ForceGuestPull: "true"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.RunImage(ctx, "refused", byTag, "true")
	if err == nil {
		t.Fatal("the container runs, with the wrong password")
	}
	t.Log(err)
	for _, want := range []string{"pull image " + byTag, at + " refuses the credentials", "PULL_AUTH_FILE"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q", want)
		}
	}
	if strings.Contains(err.Error(), registryPass) {
		t.Error("the error has the password")
	}
	if err := p.Remove(ctx); err != nil {
		t.Error(err)
	}
}

// checkNoPassword looks for the registry's password in every log of the bed.
func checkNoPassword(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(bed.Out, "logs", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range logs {
		b, err := os.ReadFile(l)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), registryPass) || strings.Contains(string(b), base64.StdEncoding.EncodeToString([]byte(registryUser + ":"))[:9]) {
			t.Errorf("%s has the password", l)
		}
	}
}
