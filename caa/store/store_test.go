// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/cloud"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func example(id string) Record {
	return Record{
		ID: id, State: "running", Reason: "r", Created: time.Unix(1, 2).UTC(), Changed: time.Unix(3, 4).UTC(), Lease: time.Unix(5, 6).UTC(),
		Pod: Pod{"default", "nginx"}, NetNS: "/run/netns/x", Request: "digest", AgentSocket: "/run/peerpod/pods/x/agent.ttrpc",
		Instance: Instance{
			Provider: "local", Owner: cloud.Owner{Cluster: "c", Node: "n"}, Name: "podvm-nginx-x", Token: "t",
			Plan: cloud.Plan{Type: "small", VCPUs: 2, MemoryMiB: 512}, Asked: true, ID: "i-1", Addr: netip.MustParseAddr("10.0.0.2"),
		},
		Tunnels: []Tunnel{{
			VNI: 555000, Port: 9000, Device: "ppvx555000", Local: netip.MustParsePrefix("10.0.0.1/24"), MTU: 1500,
			Pod: podvmconfig.PodNetwork{PodIP: netip.MustParsePrefix("10.88.0.2/16"), PodHWAddr: "02:00:00:00:00:01", Interface: "eth0"},
		}, {
			VNI: 555001, Port: 9000, Device: "ppvx555001", Local: netip.MustParsePrefix("10.0.0.1/24"), MTU: 1500,
			Pod: podvmconfig.PodNetwork{PodIP: netip.MustParsePrefix("10.89.0.2/16"), PodHWAddr: "02:00:00:00:00:02", Interface: "net1"},
		}},
		Rules: []podvmconfig.Rule{{Priority: 100, From: "10.89.0.2/32", Table: 100}},
		TLS:   TLS{ServerName: "podvm-nginx-x", CA: "PEM-CA", ClientCert: "PEM-CERT", ClientKey: "PEM-KEY"},
		Steps: []Step{{"reserve", 1.5}},
	}
}

func open1(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestRecordsSurvive(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := open1(t, dir)
	want := []Record{example("a"), example("b")}
	for _, r := range append(want, example("gone")) {
		if err := s.Put(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete("gone"); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete("gone"); err != nil {
		t.Errorf("deleting what is not there: %v", err)
	}
	installation := s.Installation()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open1(t, dir)
	got, broken, err := s.All()
	if err != nil || len(broken) > 0 {
		t.Fatal(err, broken)
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
		t.Error(d)
	}
	if s.Installation() != installation || len(installation) != 32 {
		t.Errorf("installation %q, then %q", installation, s.Installation())
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, s.Path(): 0o600} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v; want %v", path, fi.Mode().Perm(), err, want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 1 {
		t.Errorf("files in the state directory: %v, want the one", left)
	}
}

func TestModesAreTightened(t *testing.T) {
	dir := t.TempDir()
	open1(t, dir).Close()
	if err := os.Chmod(filepath.Join(dir, FileName), 0o644); err != nil {
		t.Fatal(err)
	}
	s := open1(t, dir)
	if fi, _ := os.Stat(s.Path()); fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v after opening, want 0600", fi.Mode().Perm())
	}
}

func TestBrokenRecordStandsAlone(t *testing.T) {
	s := open1(t, t.TempDir())
	if err := s.Put(example("good")); err != nil {
		t.Fatal(err)
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketSandboxes)
		for k, v := range map[string]string{"torn": `{"id":"torn","sta`, "other": `{"id":"another"}`} {
			if err := b.Put([]byte(k), []byte(v)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	got, broken, err := s.All()
	if err != nil || len(got) != 1 || got[0].ID != "good" {
		t.Fatalf("records %v, %v; want the good one", got, err)
	}
	if len(broken) != 2 || broken["torn"] == nil || broken["other"] == nil {
		t.Fatalf("broken = %v, want torn and other", broken)
	}
}

func TestSecondHolderIsTold(t *testing.T) {
	dir := t.TempDir()
	open1(t, dir)
	_, err := Open(t.Context(), dir)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "--state-dir") || !strings.Contains(err.Error(), FileName) {
		t.Errorf("second Open: %v", err)
	}
}

func TestDamageIsReportedAndKept(t *testing.T) {
	good := t.TempDir()
	s := open1(t, good)
	for i := range 200 {
		if err := s.Put(example(fmt.Sprintf("sandbox-%03d", i))); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	file, err := os.ReadFile(filepath.Join(good, FileName))
	if err != nil {
		t.Fatal(err)
	}
	zeroed := bytes.Clone(file)
	clear(zeroed[2*os.Getpagesize():])
	for name, content := range map[string][]byte{
		"empty":     {},
		"text":      []byte("not a database\n"),
		"truncated": file[:3*os.Getpagesize()],
		"noise":     bytes.Repeat([]byte{0xa5}, len(file)),
		"zeroed":    zeroed,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, FileName)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(t.Context(), dir)
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("Open = %v, want one sentence of class DataLoss with the path", err)
			}
			if left, err := os.ReadFile(path); err != nil || !bytes.Equal(left, content) {
				t.Errorf("the damaged file was changed (%v)", err)
			}
		})
	}
}

func TestForeignFileIsRefused(t *testing.T) {
	dir := t.TempDir()
	db, err := bolt.Open(filepath.Join(dir, FileName), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	if _, err := Open(t.Context(), dir); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "not the adaptor's") {
		t.Errorf("Open of another program's file: %v", err)
	}
}

// oldFile makes a file as a build of that version would have.
func oldFile(t *testing.T, dir string, version byte) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, FileName), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		meta, err := tx.CreateBucket(bucketMeta)
		if err != nil {
			return err
		}
		sandboxes, err := tx.CreateBucket(bucketSandboxes)
		if err != nil {
			return err
		}
		if err := sandboxes.Put([]byte("old"), []byte(`{"id":"old","state":"running","netns":"/run/netns/old"}`)); err != nil {
			return err
		}
		return meta.Put(keyVersion, []byte{version})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestUpgradeFromVersion0(t *testing.T) {
	dir := t.TempDir()
	oldFile(t, dir, 0)
	s := open1(t, dir)
	recs, broken, err := s.All()
	if err != nil || len(broken) > 0 || len(recs) != 1 || recs[0].NetNS != "/run/netns/old" {
		t.Fatalf("records after the upgrade: %v, %v, %v", recs, broken, err)
	}
	if len(s.Installation()) != 32 {
		t.Errorf("installation %q", s.Installation())
	}
	if v, err := s.version(); err != nil || v != Version {
		t.Errorf("version %d, %v", v, err)
	}
	// The backup is the file as it was.
	db, err := bolt.Open(s.Path()+".v0.bak", 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.View(func(tx *bolt.Tx) error {
		if v := tx.Bucket(bucketMeta).Get(keyVersion); !bytes.Equal(v, []byte{0}) {
			t.Errorf("version of the backup is %v", v)
		}
		if tx.Bucket(bucketMeta).Get(keyInstallation) != nil || tx.Bucket(bucketSandboxes).Get([]byte("old")) == nil {
			t.Error("the backup is not the file as it was")
		}
		return nil
	})
}

// TestUpgradeFromVersion1: testdata/adaptor-v1.db was written by the last build of
// version 1: a pod that runs and one that is reserved.
func TestUpgradeFromVersion1(t *testing.T) {
	old, err := os.ReadFile("testdata/adaptor-v1.db")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, FileName), old, 0o600); err != nil {
		t.Fatal(err)
	}
	s := open1(t, dir)
	got, broken, err := s.All()
	if err != nil || len(broken) > 0 || len(got) != 2 {
		t.Fatal(got, broken, err)
	}
	reserved, running := got[0], got[1]
	if v, err := s.version(); err != nil || v != Version {
		t.Errorf("version %d, %v", v, err)
	}
	want := example("running")
	want.Rules = nil
	want.Tunnels = want.Tunnels[:1]
	want.Tunnels[0].Pod = podvmconfig.PodNetwork{
		PodIP: netip.MustParsePrefix("10.88.0.2/16"), PodIPs: []netip.Prefix{netip.MustParsePrefix("10.88.0.2/16"), netip.MustParsePrefix("fd88::2/64")},
		PodHWAddr: "02:00:00:00:00:01", Interface: "eth0", WorkerNodeIP: netip.MustParsePrefix("10.0.0.1/24"), TunnelType: "vxlan",
		Routes:    []podvmconfig.Route{{Dst: "0.0.0.0/0", GW: "10.88.0.1", Dev: "eth0", Protocol: "boot", Scope: "universe"}},
		Neighbors: []podvmconfig.Neighbor{{IP: "10.88.0.1", HWAddr: "02:00:00:00:00:02", Dev: "eth0", State: "permanent"}},
		MTU:       1500, VXLANPort: 9000, VXLANID: 555000,
	}
	if d := cmp.Diff(want, running, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
		t.Errorf("the running pod (-want +got):\n%s", d)
	}
	if len(reserved.Tunnels) != 1 || reserved.Tunnels[0].VNI != 555001 || reserved.Tunnels[0].Device != "ppvx555001" || reserved.State != "reserved" {
		t.Errorf("the reserved pod: %+v", reserved)
	}
	if backup, err := os.ReadFile(s.Path() + ".v1.bak"); err != nil || len(backup) == 0 {
		t.Errorf("backup: %d bytes, %v", len(backup), err)
	}
}

func TestNewerVersionIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	oldFile(t, dir, Version+1)
	before, _ := os.ReadFile(filepath.Join(dir, FileName))
	_, err := Open(t.Context(), dir)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), fmt.Sprintf("version %d", Version+1)) {
		t.Errorf("Open = %v", err)
	}
	if after, _ := os.ReadFile(filepath.Join(dir, FileName)); !bytes.Equal(before, after) {
		t.Error("opening a newer file changed it")
	}
}

func TestEveryVersionHasItsUpgrade(t *testing.T) {
	for v, f := range upgrades {
		if f == nil {
			t.Errorf("nothing brings version %d to %d", v, v+1)
		}
	}
}

func TestLogHidesKeys(t *testing.T) {
	var buf bytes.Buffer
	r := example("x")
	log := slog.New(slog.NewJSONHandler(&buf, nil))
	log.Info("a", "record", r, "tls", r.TLS, "key", r.TLS.ClientKey)
	fmt.Fprintf(&buf, "%v %+v %#v", r.TLS.ClientKey, r.TLS.ClientKey, r.TLS.ClientKey)
	if strings.Contains(buf.String(), "PEM-KEY") {
		t.Errorf("the key is in the log: %s", buf.String())
	}
	if !strings.Contains(buf.String(), "podvm") && !strings.Contains(buf.String(), "default/nginx") {
		t.Errorf("the log does not name the pod: %s", buf.String())
	}
}
