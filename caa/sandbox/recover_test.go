// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/kata-remote/kata-remote/agent-protocol/relay"
	"github.com/kata-remote/kata-remote/caa/store"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

func TestRestartIsInvisible(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	path := a.up("s1")
	c, err := relay.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a.end()
	if _, err := io.ReadAll(c); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
		t.Fatal(err)
	}
	a = w.start()
	if err := check(t, path); err != nil {
		t.Errorf("the same socket after a restart: %v", err)
	}
	if n := len(w.cloud.Instances()); n != 1 {
		t.Errorf("%d instances", n)
	}
	if err := a.Start(t.Context(), "s1"); err != nil {
		t.Errorf("StartVM again after a restart: %v", err)
	}
	a.Stop(t.Context(), "s1")
	a.gone("s1")
	w.wantNothing(a)
}

func TestRestartWithoutProvider(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	path := a.up("s1")
	a.end()
	w.cloud.Inject(sim.Fault{Op: sim.OpGet, Err: errdefs.ErrUnavailable, Count: -1})
	a = w.start()
	if err := check(t, path); err != nil {
		t.Errorf("a pod was lost because its provider was down at a restart: %v", err)
	}
}

func TestRestartFindsLosses(t *testing.T) {
	for name, lose := range map[string]func(*world, store.Record){
		"instance gone":   func(w *world, r store.Record) { deleteInstance(w, r.Instance.ID) },
		"instance failed": func(w *world, r store.Record) { w.cloud.Fail(r.Instance.ID, "host died") },
		"netns gone": func(w *world, r store.Record) {
			w.network.mu.Lock()
			defer w.network.mu.Unlock()
			clear(w.network.spaces)
			clear(w.network.tunnels)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, sim.Config{})
			a := w.start()
			a.up("s1")
			rec := a.Infos()[0].Record
			a.end()
			lose(w, rec)
			a = w.start()
			a.gone("s1")
			w.wantNothing(a)
		})
	}
}

func deleteInstance(w *world, id cloud.InstanceID) {
	p := w.cloud.NewProvider()
	w.until("the instance to go", func() bool { return errdefs.IsNotFound(p.Delete(context.Background(), id)) })
}

func TestRestartRepairsTheTunnel(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	a.up("s1")
	a.end()
	clear(w.network.tunnels)
	w.network.fail = errors.New("netlink is busy")
	a = w.start()
	w.network.mu.Lock()
	w.network.fail = nil
	w.network.mu.Unlock()
	w.until("the tunnel", func() bool {
		w.network.mu.Lock()
		defer w.network.mu.Unlock()
		return len(w.network.tunnels) == 2
	})
}

func TestOtherProvidersRecordsAreRefused(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	a.create("s1")
	sb, _ := a.find("s1")
	if err := sb.update(func(r *store.Record) { r.Instance.Provider = "aws" }); err != nil {
		t.Fatal(err)
	}
	a.end()
	_, err := w.tryStart()
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "CLOUD_PROVIDER") || !strings.Contains(err.Error(), `"aws"`) {
		t.Errorf("start over records of another provider: %v", err)
	}
}

func TestBrokenRecordIsKeptAndCanBeStopped(t *testing.T) {
	w := newWorld(t, sim.Config{})
	a := w.start()
	a.up("bad")
	good := a.up("good")
	inst := a.Infos()[0].Instance
	a.end()
	db, err := bolt.Open(a.store.Path(), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("sandboxes")).Put([]byte("bad"), []byte("{")) })
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	a = w.start()
	if err := check(t, good); err != nil {
		t.Errorf("the other sandbox: %v", err)
	}
	if !strings.Contains(w.logged(), "cannot be read") {
		t.Error("the log does not mention the broken record")
	}
	for _, i := range w.cloud.Instances() {
		if !a.Knows(i) {
			t.Errorf("the sweep would take instance %s of sandbox %s", i.ID, i.SandboxID)
		}
	}
	if a.Knows(cloud.Instance{ID: "i-9", Token: "x", SandboxID: "good"}) || a.Knows(cloud.Instance{ID: "i-9", Token: inst.Token, SandboxID: "nobody"}) {
		t.Error("strangers are known")
	}
	if err := a.Start(t.Context(), "bad"); !errdefs.IsDataLoss(err) {
		t.Errorf("Start of a broken record: %v", err)
	}
	if err := a.Stop(t.Context(), "bad"); err != nil {
		t.Fatal(err)
	}
	a.gone("bad")
	if l := w.cloud.Instances(); len(l) != 1 || l[0].SandboxID != "good" {
		t.Errorf("instances left: %v, want that of the good record", l)
	}
}

func TestCloseDuringAStart(t *testing.T) {
	w := newWorld(t, sim.Config{})
	w.vms.Mute.Store(true)
	a := w.start()
	done := a.up2(t, "s1")
	w.until("an instance", func() bool { return len(w.cloud.Instances()) == 1 })
	a.end()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("Start = %v, want ErrClosed", err)
	}
	if n := len(w.cloud.Instances()); n != 1 {
		t.Errorf("%d instances after a clean stop, want 1: it undoes nothing", n)
	}
	a = w.start()
	a.gone("s1")
	w.wantNothing(a)
}
