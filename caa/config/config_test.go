// SPDX-License-Identifier: Apache-2.0

package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// write makes a configuration file, with kernel and initramfs in place of @K and @I.
func write(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	for name, mark := range map[string]string{"vmlinuz": "@K", "initrd": "@I"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		text = strings.ReplaceAll(text, mark, path)
	}
	path := filepath.Join(dir, "adaptor.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const images = "LOCAL_KERNEL=@K\nLOCAL_INITRD=@I\n"

func TestDefaults(t *testing.T) {
	c, err := Load(write(t, images), nil, Flags{})
	if err != nil {
		t.Fatal(err)
	}
	if c.ProxyTimeout != 5*time.Minute || c.VXLANPort != 9000 || c.ForwarderPort != 15150 || c.Limit != 10 ||
		c.Provider != "local" || c.Socket != "/run/peerpod/hypervisor.sock" || c.PodsDir != "/run/peerpod/pods" ||
		c.StateDir != "/var/lib/peerpod" || c.Local.Dir != "/var/lib/peerpod/local" || c.LogLevel != slog.LevelInfo {
		t.Errorf("%+v", c)
	}
	if host, _ := os.Hostname(); c.Node != host {
		t.Errorf("node %q on host %q", c.Node, host)
	}
}

func TestPrecedence(t *testing.T) {
	path := write(t, images+`
# a comment
PROXY_TIMEOUT = "90s"
VXLAN_PORT='4789'
PODS_DIR=/run/file
STATE_DIR=/var/lib/file
TAGS=team=web,env=a=b
NODE_NAME=
LOCAL_ACCEL=tcg
PULL_AUTH_FILE=/etc/peerpod/auth.json
PULL_INSECURE_REGISTRIES=r.example:5000, [fd00::1]:5000,10.0.0.1
`)
	c, err := Load(path, []string{"PROXY_TIMEOUT=2m", "PODS_DIR=/run/env", "LOG_LEVEL=warn", "HOME=/root", "LOCAL_UNHEARD_OF=1"},
		Flags{PodsDir: "/run/flag", LogLevel: "debug"})
	if err != nil {
		t.Fatal(err)
	}
	if c.VXLANPort != 4789 || c.ProxyTimeout != 2*time.Minute || c.PodsDir != "/run/flag" || c.StateDir != "/var/lib/file" || c.LogLevel != slog.LevelDebug {
		t.Errorf("%+v", c)
	}
	if d := cmp.Diff(map[string]string{"team": "web", "env": "a=b"}, c.Tags); d != "" {
		t.Error(d)
	}
	if c.Local.Dir != "/var/lib/file/local" || c.Local.Accel != "tcg" {
		t.Errorf("local: %+v", c.Local)
	}
	if d := cmp.Diff(Pull{AuthFile: "/etc/peerpod/auth.json", Insecure: []string{"r.example:5000", "[fd00::1]:5000", "10.0.0.1"}}, c.Pull); d != "" {
		t.Error(d)
	}
	// The environment can take a setting of the file back.
	if c, err = Load(path, []string{"VXLAN_PORT="}, Flags{}); err != nil || c.VXLANPort != 9000 {
		t.Errorf("VXLAN_PORT emptied by the environment: %+v, %v", c, err)
	}
}

func TestEveryProblemAtOnce(t *testing.T) {
	path := write(t, `
CLOUD_PROVIDER=local
PROXY_TIMEOUT=5
VXLAN_PORT=70000
FORWARDER_PORT=<port>
PEERPODS_LIMIT_PER_NODE=many
PODS_DIR=run/pods
TAGS=a
LOCAL_ACCEL=hvf
LOCAL_SUBNET=10.0.0.1/24
LOCAL_MEMORY=1
LOCAL_BRIDGE=a/b
LOCAL_KERNEL=/absent/vmlinuz
PROXY_TIMEOT=5m
NONSENSE=1
what is this
TLS_SKIP_VERIFY=true
VXLAN_MIN_ID=1
VXLAN_MIN_ID=2
PULL_AUTH_FILE=auth.json
PULL_INSECURE_REGISTRIES=http://r.example
`)
	_, err := Load(path, []string{"REMOTE_HYPERVISOR_ENDPOINT=/" + strings.Repeat("x", 120)}, Flags{LogLevel: "loud"})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	lines := strings.Split(err.Error(), "\n")
	want := []string{
		`PROXY_TIMEOUT is "5"`, `VXLAN_PORT is "70000"`, `FORWARDER_PORT is still the placeholder "<port>"`,
		`PEERPODS_LIMIT_PER_NODE is "many"`, `PODS_DIR is "run/pods"`, `TAGS is "a"`, `LOCAL_ACCEL is "hvf"`,
		`LOCAL_SUBNET is "10.0.0.1/24"`, `LOCAL_MEMORY is "1"`, `LOCAL_BRIDGE is "a/b"`, `LOCAL_KERNEL is "/absent/vmlinuz"`,
		`LOCAL_INITRD is not set`, `did you mean PROXY_TIMEOUT?`, `NONSENSE is not a setting`, `: want KEY=VALUE, or a #`,
		`TLS_SKIP_VERIFY is "true"`, `VXLAN_MIN_ID is set twice`, `LOG_LEVEL is "loud" (flag --log-level)`,
		`REMOTE_HYPERVISOR_ENDPOINT is`, `PULL_AUTH_FILE is "auth.json"`, `PULL_INSECURE_REGISTRIES is "http://r.example"`,
	}
	for _, w := range want {
		n := 0
		for _, l := range lines {
			if strings.Contains(l, w) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%q is in %d problems, want one", w, n)
		}
	}
	if len(lines) != len(want) {
		t.Errorf("%d problems, want %d:\n%s", len(lines), len(want), err)
	}
}

func TestOtherProvidersKeysAreNoProblem(t *testing.T) {
	path := write(t, images+`
AWS_ACCESS_KEY_ID=AKIA
AWS_FROBNICATE=1
USE_PUBLIC_IP=perhaps
AZURE_CLIENT_SECRET=s
PODVM_INSTANCE_TYPE=m6a.large
DISABLECVM=true
PAUSE_IMAGE=pause
CLOUD_CONFIG_VERIFY=true
INITDATA=
TLS_SKIP_VERIFY=false
`)
	c, err := Load(path, []string{"POD_UID=1", "GCP_ZONE=<zone>"}, Flags{})
	if err != nil {
		t.Fatal(err)
	}
	warned := strings.Join(c.Warnings, "\n")
	if !strings.Contains(warned, "PAUSE_IMAGE") || strings.Contains(warned, "POD_UID") || strings.Contains(warned, "AKIA") {
		t.Errorf("warnings: %s", warned)
	}
}

func TestSocketPathsFit(t *testing.T) {
	for dir, ok := range map[string]bool{
		"/" + strings.Repeat("p", 29): true,  // 30 + 1 + 64 + 12 = 107
		"/" + strings.Repeat("p", 30): false, // one byte more than the kernel takes
		"/run/a:b":                    false,
	} {
		_, err := Load(write(t, images), []string{"PODS_DIR=" + dir}, Flags{})
		if (err == nil) != ok {
			t.Errorf("PODS_DIR of %d bytes: %v", len(dir), err)
		}
		if err != nil && !strings.Contains(err.Error(), "PODS_DIR") {
			t.Errorf("%v does not name the key", err)
		}
	}
}

func TestReservedTags(t *testing.T) {
	_, err := Load(write(t, images), []string{"TAGS=Name=x,peerpod-node=y"}, Flags{})
	if err == nil || !strings.Contains(err.Error(), `"Name"`) || !strings.Contains(err.Error(), `"peerpod-node"`) {
		t.Errorf("Load = %v", err)
	}
}

func TestMissingFile(t *testing.T) {
	_, err := Load("/absent/adaptor.conf", nil, Flags{})
	if err == nil || !strings.Contains(err.Error(), "/absent/adaptor.conf") {
		t.Errorf("Load = %v", err)
	}
}

func TestKeysAreDistinct(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range allKeys {
		if seen[k.name] {
			t.Errorf("%s twice", k.name)
		}
		seen[k.name] = true
	}
	for _, k := range notHere {
		if seen[k.name] {
			t.Errorf("%s twice", k.name)
		}
		seen[k.name] = true
	}
}

// TestKeysAreDocumented holds docs/adaptor-config.md to the keys there are: each has a
// row in a table of keys, and each row is of a key.
func TestKeysAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/adaptor-config.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]int{}
	name := regexp.MustCompile("`([A-Z][A-Z0-9_]+)`")
	inKeys := false
	for line := range strings.Lines(string(doc)) {
		switch {
		case strings.HasPrefix(line, "| key |"):
			inKeys = true
		case !strings.HasPrefix(line, "|"):
			inKeys = false
		case inKeys:
			for _, m := range name.FindAllStringSubmatch(strings.Split(line, "|")[1], -1) {
				rows[m[1]]++
			}
		}
	}
	for _, k := range allKeys {
		if rows[k.name] != 1 {
			t.Errorf("%s has %d rows in docs/adaptor-config.md, want one", k.name, rows[k.name])
		}
		delete(rows, k.name)
	}
	for k := range rows {
		t.Errorf("docs/adaptor-config.md has a row of %s, which is no key", k)
	}
	for _, k := range notHere {
		if !strings.Contains(string(doc), "`"+k.name+"`") {
			t.Errorf("%s is not in docs/adaptor-config.md", k.name)
		}
	}
}
