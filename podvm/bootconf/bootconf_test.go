// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/kdomanski/iso9660"
)

const goodUserData = `#cloud-config
write_files:
- path: /run/peerpod/apf.json
  content: |
      {
        "pod-name": "a"
      }
- path: /run/peerpod/scratch-space.marker
`

func TestParseUserData(t *testing.T) {
	got, err := ParseUserData([]byte(goodUserData))
	if err != nil {
		t.Fatal(err)
	}
	want := []File{
		{Path: "/run/peerpod/apf.json", Content: []byte("{\n  \"pod-name\": \"a\"\n}\n")},
		{Path: "/run/peerpod/scratch-space.marker", Content: []byte{}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// refuses checks that an error has its class, is one line and has the words that
// tell what to mend.
func refuses(t *testing.T, err error, words ...string) {
	t.Helper()
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("got %v, want InvalidArgument", err)
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q is more than one line", err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not have %q", err, w)
		}
	}
}

func TestParseUserDataRefuses(t *testing.T) {
	entry := "#cloud-config\nwrite_files:\n- path: /run/peerpod/apf.json\n"
	for name, c := range map[string]struct {
		doc  string
		want []string
	}{
		"empty":             {"", []string{"empty"}},
		"blank":             {" \n\n", []string{"empty"}},
		"header only":       {"#cloud-config\n", []string{"empty"}},
		"no header":         {"write_files: []\n", []string{"first line", "#cloud-config"}},
		"script":            {"#!/bin/sh\nreboot\n", []string{"first line"}},
		"binary":            {"\x00\x01\x02", []string{"first line"}},
		"no files":          {"#cloud-config\nwrite_files: []\n", []string{"write_files is missing"}},
		"other top key":     {"#cloud-config\nruncmd: [reboot]\n", []string{"line 2", "runcmd"}},
		"permissions":       {entry + "  permissions: '0777'\n", []string{"line 4", "permissions"}},
		"encoding":          {entry + "  encoding: b64\n", []string{"encoding"}},
		"path outside":      {"#cloud-config\nwrite_files:\n- path: /etc/passwd\n", []string{"write_files[0].path", "/etc/passwd"}},
		"path with dots":    {"#cloud-config\nwrite_files:\n- path: /run/peerpod/../peerpod/apf.json\n", []string{"write_files[0].path"}},
		"no path":           {"#cloud-config\nwrite_files:\n- content: x\n", []string{"write_files[0].path"}},
		"twice":             {entry + "- path: /run/peerpod/apf.json\n", []string{"write_files[1].path", "twice"}},
		"content is a list": {entry + "  content: [s3cret]\n", []string{"line 4", "want string"}},
		"files is a string": {"#cloud-config\nwrite_files: s3cret\n", []string{"line 2", "want list"}},
		"two documents":     {goodUserData + "---\n" + goodUserData, []string{"more than one"}},
		"broken yaml":       {"#cloud-config\nwrite_files: [\n", []string{"yaml"}},
		"too large":         {"#cloud-config\n" + strings.Repeat("#", MaxDocument), []string{"more than"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseUserData([]byte(c.doc))
			refuses(t, err, c.want...)
			if strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%q shows a value", err)
			}
		})
	}
}

func FuzzParseUserData(f *testing.F) {
	f.Add([]byte(goodUserData))
	f.Fuzz(func(t *testing.T, doc []byte) {
		files, err := ParseUserData(doc)
		if err == nil && len(files) == 0 {
			t.Error("neither files nor an error")
		}
	})
}

const goodNetwork = `version: 2
ethernets:
  id0:
    match:
      macaddress: "02:00:00:00:00:01"
    addresses: [192.168.213.2/24, "fd00::2/64"]
    mtu: 9000
    gateway4: 192.168.213.1
    routes:
    - to: 10.0.0.0/8
      via: 192.168.213.1
    - {to: default, via: "fd00::1"}
    - {to: 169.254.169.254/32}
`

func TestParseNetworkConfig(t *testing.T) {
	got, err := ParseNetworkConfig([]byte(goodNetwork))
	if err != nil {
		t.Fatal(err)
	}
	want := []Ethernet{{
		ID: "id0", HWAddr: []byte{2, 0, 0, 0, 0, 1}, MTU: 9000,
		Addrs:   []netip.Prefix{netip.MustParsePrefix("192.168.213.2/24"), netip.MustParsePrefix("fd00::2/64")},
		Gateway: netip.MustParseAddr("192.168.213.1"),
		Routes: []Route{
			{Dst: netip.MustParsePrefix("10.0.0.0/8"), Via: netip.MustParseAddr("192.168.213.1")},
			{Dst: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd00::1")},
			{Dst: netip.MustParsePrefix("169.254.169.254/32")},
		},
	}}
	equal := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	equalPrefix := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	if d := cmp.Diff(want, got, equal, equalPrefix); d != "" {
		t.Error(d)
	}
}

func TestParseNetworkConfigRefuses(t *testing.T) {
	change := func(old, new string) string {
		if !strings.Contains(goodNetwork, old) {
			t.Fatalf("the good document has no %q", old)
		}
		return strings.Replace(goodNetwork, old, new, 1)
	}
	for name, c := range map[string]struct {
		doc  string
		want string
	}{
		"empty":          {"", "empty"},
		"no version":     {"ethernets: {}\n", "version is missing"},
		"version 1":      {change("version: 2", "version: 1"), "version is 1"},
		"no ethernets":   {"version: 2\n", "ethernets is missing"},
		"bonds":          {goodNetwork + "bonds: {}\n", "bonds"},
		"dhcp":           {change("mtu: 9000", "dhcp4: true"), "ethernets.id0.dhcp4"},
		"no mac":         {change(`macaddress: "02:00:00:00:00:01"`, "{}"), "ethernets.id0.match.macaddress"},
		"bad mac":        {change("02:00:00:00:00:01", "02:00"), "ethernets.id0.match.macaddress"},
		"infiniband mac": {change("02:00:00:00:00:01", "02:00:00:00:00:01:00:00"), "ethernets.id0.match.macaddress"},
		"by name":        {change("macaddress:", "name:"), "name"},
		"mtu":            {change("9000", "60"), "ethernets.id0.mtu"},
		"mtu text":       {change("9000", "large"), "line 7"},
		"no length":      {change("192.168.213.2/24", "192.168.213.2"), "ethernets.id0.addresses"},
		"no addresses":   {change(`addresses: [192.168.213.2/24, "fd00::2/64"]`, "addresses: []"), "ethernets.id0.addresses"},
		"gateway family": {change("gateway4: 192.168.213.1", "gateway4: fd00::1"), "ethernets.id0.gateway4"},
		"route to":       {change("10.0.0.0/8", "ten"), "ethernets.id0.routes"},
		"route via":      {change("via: 192.168.213.1", "via: x"), "ethernets.id0.routes"},
		"route mixed":    {change("via: 192.168.213.1", "via: fd00::1"), "mixes"},
		"default alone":  {change(`{to: default, via: "fd00::1"}`, "{to: default}"), "default route without via"},
		"same mac":       {goodNetwork + "  id1:\n    match: {macaddress: \"02:00:00:00:00:01\"}\n    addresses: [10.0.0.1/8]\n", "ethernets.id1.match.macaddress"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseNetworkConfig([]byte(c.doc))
			refuses(t, err, c.want)
		})
	}
}

func TestParseMetaData(t *testing.T) {
	for name, c := range map[string]struct {
		doc, host string
		bad       bool
	}{
		"both":       {"instance-id: i-1\nlocal-hostname: podvm-x-0123\n", "podvm-x-0123", false},
		"other keys": {"instance-id: i-1\npublic-keys: [a]\n", "", false},
		"empty":      {"", "", false},
		"json":       {`{"local-hostname": "a.b"}`, "a.b", false},
		"not a name": {"local-hostname: 'a b'\n", "", true},
		"dash first": {"local-hostname: -a\n", "", true},
		"too long":   {"local-hostname: " + strings.Repeat("a", 65) + "\n", "", true},
		"a list":     {"- a\n", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseMetaData([]byte(c.doc))
			if c.bad {
				refuses(t, err)
			} else if err != nil || got != c.host {
				t.Errorf("got %q, %v; want %q", got, err, c.host)
			}
		})
	}
}

func TestWriteFiles(t *testing.T) {
	root := t.TempDir()
	for _, content := range []string{"first", "second"} {
		if err := WriteFiles(root, []File{{Path: "/run/peerpod/apf.json", Content: []byte(content)}}); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(root, "run/peerpod/apf.json")
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Errorf("got %q, %v; want %q", got, err, content)
		}
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v; want 0600", st.Mode(), err)
		}
	}
}

// disk writes an ISO image as a device node of a made-up machine and returns the
// source that looks there.
func disk(t *testing.T, label string, files map[string]string) NoCloud {
	t.Helper()
	n := NoCloud{Disks{Sys: t.TempDir(), Dev: t.TempDir(), Wait: -1}}
	w, err := iso9660.NewWriter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Cleanup()
	for name, content := range files {
		if err := w.AddFile(strings.NewReader(content), name); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(n.Dev, "vda"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := w.WriteTo(f, label); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(n.Sys, "vda"), 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRead(t *testing.T) {
	n := disk(t, "cidata", map[string]string{
		"user-data": goodUserData, "meta-data": "local-hostname: host\n", "network-config": goodNetwork,
	})
	// Another disk before it, empty, and one whose node is not there yet.
	for _, d := range []string{"vd0", "vd1"} {
		if err := os.Mkdir(filepath.Join(n.Sys, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(n.Dev, "vd0"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := Read(context.Background(), NoCloud{Disks{Sys: t.TempDir(), Wait: -1}}, n)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Files) != 2 || cfg.Hostname != "host" || len(cfg.Links) != 1 {
		t.Errorf("got %+v", cfg)
	}
}

func TestReadRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		label string
		files map[string]string
		want  string
	}{
		"other label":  {"config-2", map[string]string{"user-data": goodUserData}, "no disk with label cidata (looked at: vda)"},
		"no user data": {"cidata", map[string]string{"meta-data": "a: b\n"}, "no file user-data"},
		"bad document": {"CIDATA", map[string]string{"user-data": "x"}, "NoCloud disk: user-data: the first line"},
		"bad network":  {"cidata", map[string]string{"user-data": goodUserData, "network-config": "version: 1\n"}, "network-config: version is 1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Read(context.Background(), disk(t, c.label, c.files))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestSeedWaitsForDisk(t *testing.T) {
	n := disk(t, "cidata", map[string]string{"user-data": goodUserData})
	node, hidden := filepath.Join(n.Sys, "vda"), filepath.Join(n.Dev, "hidden")
	if err := os.Rename(node, hidden); err != nil {
		t.Fatal(err)
	}
	n.Wait = DefaultSeedWait
	got := make(chan error, 1)
	go func() {
		_, err := n.Seed(context.Background())
		got <- err
	}()
	if err := os.Rename(hidden, node); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func FuzzReadISO(f *testing.F) {
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, patch []byte, at int) {
		image := make([]byte, 40*isoSector)
		copy(image[16*isoSector:], "\x01CD001\x01")
		copy(image[16*isoSector+158:], "\x14\x00\x00\x00\x00\x00\x00\x14\x00\x08\x00\x00")
		copy(image[17*isoSector:], "\xffCD001\x01")
		if at >= 0 && at < len(image) {
			copy(image[at:], patch)
		}
		// No panic and no endless loop is all that is asked of garbage.
		v, err := readISO(strings.NewReader(string(image)))
		if err != nil {
			return
		}
		for name := range v.files {
			_, _ = v.read(strings.NewReader(string(image)), name)
		}
	})
}

func TestISONames(t *testing.T) {
	for in, want := range map[string]string{"USER_DATA.;1": "user-data", "user-data;1": "user-data", "META-DATA": "meta-data"} {
		if got := plainName(in); got != want {
			t.Errorf("plainName(%q) = %q, want %q", in, got, want)
		}
	}
	if got := jolietName([]byte{0, 'u', 0, '-', 0, 'd', 0, ';', 0, '1'}); got != "u-d" {
		t.Errorf("jolietName: %q", got)
	}
	rr := []byte("RR\x05\x01\x00NM\x09\x01\x00user" + "NM\x0a\x01\x00-data")
	if got := rockRidgeName(rr); got != "user-data" {
		t.Errorf("rockRidgeName: %q", got)
	}
}
