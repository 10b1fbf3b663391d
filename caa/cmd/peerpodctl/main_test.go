// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/caa/adminpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	now      = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	examples = []*adminpb.Sandbox{
		{
			Id: "0123456789abcdef0123456789abcdef", State: "running", PodNamespace: "default", PodName: "nginx",
			Netns: "/run/netns/x", AgentSocket: "/run/peerpod/pods/0/agent.ttrpc", Provider: "local",
			InstanceName: "podvm-nginx-01234567", InstanceId: "pp-1", Address: "10.0.0.2", Vni: 555000, VxlanPort: 9000,
			TunnelDevice: "ppvx555000", Tunnels: []*adminpb.Tunnel{{Interface: "eth0", Device: "ppvx555000", Vni: 555000}, {Interface: "net1", Device: "ppvx555007", Vni: 555007}},
			CreatedUnixNano: now.Add(-90 * time.Second).UnixNano(), ChangedUnixNano: now.Add(-80 * time.Second).UnixNano(),
			Steps: []*adminpb.Step{{Name: "reserve", Milliseconds: 1.25}, {Name: "instance", Milliseconds: 120.4}}, Connections: 2, Vcpus: 1, MemoryMib: 512,
		},
		{Id: "test", State: "deleting", Reason: "StopVM", PodName: "test", Provider: "local", Vni: 555001, CreatedUnixNano: now.Add(-72 * time.Hour).UnixNano(), ChangedUnixNano: now.UnixNano()},
	}
)

func TestList(t *testing.T) {
	want := `
SANDBOX        POD            STATE     INSTANCE  ADDRESS   VNI     AGE  STEPS (ms)
0123456789abc  default/nginx  running   pp-1      10.0.0.2  555000  1m   reserve 1, instance 120
test           test           deleting  -         -         555001  3d   -
`[1:]
	if d := cmp.Diff(want, list(examples, now)); d != "" {
		t.Error(d)
	}
}

func TestShow(t *testing.T) {
	got := show(examples[0], now)
	for _, want := range []string{
		"0123456789abcdef0123456789abcdef", "default/nginx", "running, since 1m", "pp-1 (podvm-nginx-01234567, local)",
		"1 vCPUs, 512 MiB", "10.0.0.2", "ppvx555000 in /run/netns/x, VNI 555000, UDP port 9000", "tunnel net1", "ppvx555007 in /run/netns/x, VNI 555007", "2 connections", "step instance  120.4 ms",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if got := show(examples[1], now); !strings.Contains(got, "StopVM") {
		t.Errorf("no reason in\n%s", got)
	}
}

// TestJSON: the keys are a promise.
func TestJSON(t *testing.T) {
	text, err := asJSON(examples)
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal([]byte(text), &got); err != nil || len(got) != 2 {
		t.Fatal(err, got)
	}
	for _, key := range []string{
		"id", "state", "podNamespace", "podName", "netns", "agentSocket", "connections", "provider", "instanceName", "instanceID",
		"vcpus", "memoryMiB", "address", "vni", "vxlanPort", "tunnelDevice", "tunnels", "created", "changed", "steps",
	} {
		for _, s := range got {
			if _, ok := s[key]; !ok {
				t.Errorf("sandbox %v has no key %q", s["id"], key)
			}
		}
	}
	if got[0]["created"] != "2026-11-21T11:58:30Z" {
		t.Errorf("created %v", got[0]["created"])
	}
	if text, err := asJSON(nil); err != nil || text != "[]\n" {
		t.Errorf("no sandboxes: %q, %v", text, err)
	}
}

func TestExitCodes(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"sandbox", "list", "--socket", socket}, exitFailed}, // nobody there
		{[]string{"sandbox", "show"}, exitUsage},
		{[]string{"sandbox"}, exitUsage},
		{[]string{}, exitUsage},
		{[]string{"nonsense"}, exitUsage},
		{[]string{"sandbox", "list", "--output", "xml"}, exitUsage},
		{[]string{"--help"}, 0},
	} {
		if got := run(t.Context(), c.args); got != c.want {
			t.Errorf("peerpodctl %v: exit %d, want %d", c.args, got, c.want)
		}
	}
}
