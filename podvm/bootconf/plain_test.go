// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

const (
	plainBlocks   = goodUserData + "- path: /run/peerpod/aa.toml\n  content: |-\n      a: \"#b\"\n\n        - path: c\n      ---\n"
	plainNetworks = "version: 2\nethernets:\n  id0:\n    match:\n      macaddress: \"02:00:00:00:00:01\"\n    addresses:\n    - \"192.168.213.2/24\"\n    - \"fd00::2/64\"\n    mtu: 9000\n" +
		"  id1:\n    match:\n      macaddress: \"02:00:00:00:00:02\"\n    addresses:\n    - \"10.0.0.1/8\"\n"
	plainMeta = "instance-id: pp-0123\nlocal-hostname: podvm-default-0123\n"
)

// sameUserData wants what the plain reader accepts to be what YAML says it is.
func sameUserData(t *testing.T, doc []byte) bool {
	t.Helper()
	got, plain := plainUserData(doc)
	if !plain {
		return false
	}
	var want cloudConfig
	if err := decodeStrict(doc, &want); err != nil {
		t.Errorf("%q is not YAML: %v", doc, err)
	} else if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%q (-YAML +plain):\n%s", doc, d)
	}
	return true
}

func sameNetwork(t *testing.T, doc []byte) bool {
	t.Helper()
	got, plain := plainNetwork(doc)
	if !plain {
		return false
	}
	var want netplan
	if err := decodeStrict(doc, &want); err != nil {
		t.Errorf("%q is not YAML: %v", doc, err)
	} else if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%q (-YAML +plain):\n%s", doc, d)
	}
	return true
}

func sameHostname(t *testing.T, doc []byte) bool {
	t.Helper()
	got, plain := plainHostname(doc)
	if !plain {
		return false
	}
	var want struct {
		Hostname string `yaml:"local-hostname"`
	}
	if err := yaml.Unmarshal(doc, &want); err != nil || want.Hostname != got {
		t.Errorf("%q: YAML has %q, %v; plain %q", doc, want.Hostname, err, got)
	}
	return true
}

// Every document that is one byte away from a plain one, or cut short, is either left
// to YAML or means the same.
func TestPlainIsYAML(t *testing.T) {
	for name, c := range map[string]struct {
		doc  string
		same func(*testing.T, []byte) bool
	}{
		"user data":      {plainBlocks, sameUserData},
		"network config": {plainNetworks, sameNetwork},
		"meta-data":      {plainMeta, sameHostname},
	} {
		t.Run(name, func(t *testing.T) {
			if !c.same(t, []byte(c.doc)) {
				t.Fatal("the plain form is not read as such")
			}
			for i := range len(c.doc) + 1 {
				c.same(t, []byte(c.doc[:i]))
				for _, b := range []string{"", " ", "\n", "\t", "\r", "#", "-", ":", "'", "\"", "|", "0", "x", "\x00", "é", "- ", "\n      "} {
					c.same(t, []byte(c.doc[:i]+b+c.doc[i:]))
					if i < len(c.doc) {
						c.same(t, []byte(c.doc[:i]+b+c.doc[i+1:]))
					}
				}
			}
		})
	}
}

func FuzzPlainIsYAML(f *testing.F) {
	f.Add([]byte(plainBlocks))
	f.Add([]byte(plainNetworks))
	f.Add([]byte(plainMeta))
	f.Add([]byte("instance-id: -\nlocal-hostname: A-\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		sameUserData(t, doc)
		sameNetwork(t, doc)
		sameHostname(t, doc)
	})
}
