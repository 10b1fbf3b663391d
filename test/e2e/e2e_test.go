// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/test/testbed"
)

func TestMain(m *testing.M) {
	if code, done := testbed.Isolate(testbed.Isolation{}); done {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// newBed makes a node from what `make build podvm-image` built.
func newBed(t *testing.T, name string) *testbed.Bed {
	t.Helper()
	bin, podvm := os.Getenv("PEERPOD_BIN"), os.Getenv("PEERPOD_PODVM")
	if bin == "" || podvm == "" {
		t.Fatal("PEERPOD_BIN and PEERPOD_PODVM name the built programs and image: run make test, which sets them")
	}
	bed, err := testbed.New(bin, podvm, filepath.Join(filepath.Dir(bin), name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := bed.Stop(); err != nil {
			t.Error(err)
		}
	})
	return bed
}

// TestPods runs the scenario that make demo shows, each check as a test, under every
// generation of containerd.
func TestPods(t *testing.T) {
	for name, g := range testbed.Generations(os.Getenv("PEERPOD_BIN")) {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, "e2e-pods")
			bed.Generation = g
			runScenario(t, bed)
		})
	}
}

func runScenario(t *testing.T, bed *testbed.Bed) {
	s := &Scenario{Bed: bed}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	passed, failed := s.Run(ctx, func(title string) { t.Log("==", title) }, func(Check) {},
		func(c Check, seen string, err error, took time.Duration) {
			t.Run(c.Name, func(t *testing.T) {
				t.Log(took.Round(time.Millisecond), seen)
				if err != nil {
					t.Error(err)
				}
			})
		})
	if want := count(s); failed == 0 && passed != want {
		t.Errorf("%d of %d checks ran", passed, want)
	}
	if t.Failed() {
		t.Logf("logs are in %s", filepath.Join(bed.Out, "logs"))
	}
}

func count(s *Scenario) (n int) {
	for _, ch := range s.Chapters() {
		n += len(ch.Checks)
	}
	return n
}

func TestClassify(t *testing.T) {
	eth := func(typ uint16, payload ...byte) []byte {
		return append(append(make([]byte, 12), byte(typ>>8), byte(typ)), payload...)
	}
	ip := func(proto byte, sport, dport uint16) []byte {
		p := make([]byte, 28)
		p[0], p[9] = 0x45, proto
		p[20], p[21], p[22], p[23] = byte(sport>>8), byte(sport), byte(dport>>8), byte(dport)
		return eth(0x0800, p...)
	}
	for name, tc := range map[string]struct {
		frame []byte
		want  kind
	}{
		"tunnel":     {ip(17, 40000, 9000), kindTunnel},
		"agent":      {ip(6, 40000, 15150), kindAgent},
		"its answer": {ip(6, 15150, 40000), kindAgent},
		"HTTP":       {ip(6, 40000, 80), kindOther},
		"DNS":        {ip(17, 40000, 53), kindOther},
		"ARP":        {eth(0x0806), kindLocal},
		"short":      {[]byte{1}, kindOther},
	} {
		if got, what := classify(tc.frame); got != tc.want {
			t.Errorf("%s: kind %d (%s), want %d", name, got, what, tc.want)
		}
	}
	if got := fmt.Sprint(Snapshot{"a", "a", "b"}.Beyond(Snapshot{"a", "c"})); got != "[a b]" {
		t.Errorf("Beyond = %s", got)
	}
}
