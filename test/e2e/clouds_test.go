// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/test/cloudbed"
	"github.com/kata-remote/kata-remote/test/testbed"
)

// TestClouds runs pods through each cloud's provider, on an emulation of the cloud with
// virtual machines behind it: one whose adaptor is killed while the cloud makes its
// machine, and one that is used and removed. Nothing is left of either, on the node or
// in the cloud.
func TestClouds(t *testing.T) {
	bed := newBed(t, "e2e-clouds")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := bed.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	plain, err := RunPod(ctx, bed, "plain", "", nil) // the CNI's bridge stays
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Remove(context.WithoutCancel(ctx))
	for _, provider := range cloudbed.Providers() {
		t.Run(provider, func(t *testing.T) { testCloud(ctx, t, bed, provider) })
	}
}

func testCloud(ctx context.Context, t *testing.T, bed *testbed.Bed, provider string) {
	held := &heldBack{committed: make(chan struct{})}
	bed.AdaptorEnv = nil
	cloud, err := StartCloud(ctx, bed, cloudbed.Config{Provider: provider, Wrap: held.wrap})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cloud.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := bed.Adaptor.Stop(); err != nil {
			t.Error(err)
		}
	}()
	before, err := TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	clean := func(t *testing.T) {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, cloudGone)
		defer cancel()
		if err := testbed.Poll(ctx, func(ctx context.Context) error { return errors.Join(cloud.Leaks(), forgotten(ctx, bed)) }); err != nil {
			t.Error(err)
		}
		if err := within(ctx, func(context.Context) error { return leftBehind(before) }); err != nil {
			t.Error(err)
		}
	}
	t.Run("the adaptor is killed while the cloud makes its machine", func(t *testing.T) {
		killWhileMade(ctx, t, bed, held)
		clean(t)
		if n := cloud.Machines(); n > 1 {
			t.Errorf("%d machines were made for one pod", n)
		}
	})
	t.Run("a pod is used and removed", func(t *testing.T) {
		useAndRemove(ctx, t, bed)
		clean(t)
	})
}

// forgotten is nil when the adaptor has no pod left. It forgets one when the cloud's
// answers say that its machine is gone, which lag.
func forgotten(ctx context.Context, bed *testbed.Bed) error {
	out, err := testbed.Run(ctx, filepath.Join(bed.Bin, "peerpodctl"), "sandbox", "list", "--output", "json")
	if err == nil && strings.TrimSpace(out) != "[]" {
		err = fmt.Errorf("the adaptor still has %s", out)
	}
	return err
}

// killWhileMade kills the adaptor when the cloud has taken its order for a machine and
// not answered yet, and has its successor see to it.
func killWhileMade(ctx context.Context, t *testing.T, bed *testbed.Bed, held *heldBack) {
	held.armed.Store(true)
	result := make(chan error, 1)
	go func() {
		p, err := RunPod(ctx, bed, "killed", testbed.Handler, nil)
		if err == nil {
			err = p.Remove(ctx)
		}
		result <- err
	}()
	select {
	case <-held.committed:
	case err := <-result:
		t.Fatalf("the cloud was not asked for a machine, and the pod's start ended with: %v", err)
	}
	bed.Adaptor.Kill()
	if err := bed.StartAdaptor(ctx); err != nil {
		t.Fatal(err)
	}
	t.Log("the pod's start ended with:", <-result)
}

// useAndRemove runs a pod, asks its web server through the tunnel, runs a command in it
// and removes it.
func useAndRemove(ctx context.Context, t *testing.T, bed *testbed.Bed) {
	pod, err := RunPod(ctx, bed, "used", testbed.Handler, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Log("ready after", pod.Took)
	app, err := pod.Run(ctx, "app", "httpd", "-f", "-p", "80", "-h", "/www")
	if err != nil {
		t.Fatal(err)
	}
	if err := within(ctx, func(ctx context.Context) error { return dial(ctx, pod.IP) }); err != nil {
		t.Error(err)
	}
	if seen, err := httpGet(ctx, pod.IP); err != nil {
		t.Error(err)
	} else {
		t.Log(seen)
	}
	if out, err := app.Exec(ctx, "uname", "-r"); err != nil || out == kernelRelease() {
		t.Errorf("its kernel is %q (%v), the node's is %q", out, err, kernelRelease())
	}
	if err := pod.Remove(ctx); err != nil {
		t.Error(err)
	}
}

// heldBack stands before a cloud. While it is armed, the next call that makes a machine
// takes effect and is never answered.
type heldBack struct {
	armed     atomic.Bool
	committed chan struct{} // closed when that call has taken effect
}

func (h *heldBack) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the caller left
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		if !makesMachine(r, body) || !h.armed.CompareAndSwap(true, false) {
			next.ServeHTTP(w, r)
			return
		}
		answer := httptest.NewRecorder()
		next.ServeHTTP(answer, r)
		if answer.Code >= http.StatusMultipleChoices { // it made none: say why
			w.WriteHeader(answer.Code)
			_, _ = w.Write(answer.Body.Bytes())
			return
		}
		close(h.committed)
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	})
}

// makesMachine tells a request that makes a machine: of EC2's query protocol, or of
// Azure Resource Manager.
func makesMachine(r *http.Request, body []byte) bool {
	if r.Method == http.MethodPut {
		return strings.EqualFold(path.Base(path.Dir(r.URL.Path)), "virtualMachines")
	}
	form, err := url.ParseQuery(string(body))
	return err == nil && slices.Contains([]string{"RunInstances", "CreateFleet"}, form.Get("Action"))
}
