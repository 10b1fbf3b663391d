// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/agent-protocol/podvmconfig"
	"github.com/kata-remote/kata-remote/caa/pki"
)

func TestPullIsTold(t *testing.T) {
	const secret = "dXNlcjpodW50ZXIy"
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	b, err := pki.Issue("registry", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	auth := write("auth.json", `{
  "auths": {"r.example": {"auth": "`+secret+`"}},
  "credHelpers": {"other.example": "helper"}
}`)
	p := Pull{AuthFile: auth, CAFile: write("ca.pem", b.CA), Insecure: []string{"10.0.0.1:5000"}}
	var cfg podvmconfig.Config
	files, err := p.tell(&cfg)
	if err != nil || len(files) != 1 || files[0].Path != "/run/peerpod/auth.json" {
		t.Fatalf("%d files, %v", len(files), err)
	}
	if got, want := string(files[0].Content), `{"auths":{"r.example":{"auth":"`+secret+`"}}}`+"\n"; got != want {
		t.Errorf("credentials %s, want %s", got, want)
	}
	if block, _ := pem.Decode([]byte(cfg.RegistryCA)); block == nil || len(cfg.InsecureRegistries) != 1 {
		t.Errorf("the VM is told %q, %v", cfg.RegistryCA, cfg.InsecureRegistries)
	}
	if s := fmt.Sprint(p.LogValue()); strings.Contains(s, secret) || !strings.Contains(s, auth) {
		t.Errorf("the log would have %s", s)
	}
	if files, err := (Pull{AuthFile: write("empty.json", `{"auths": {}}`)}).tell(&cfg); err != nil || len(files) != 0 {
		t.Errorf("no credentials: %v, %v", files, err)
	}
	if files, err := (Pull{}).tell(&cfg); err != nil || len(files) != 0 || cfg.RegistryCA == "" {
		t.Errorf("nothing set: %v, %v", files, err)
	}
	for name, c := range map[string]struct {
		p    Pull
		want string
	}{
		"no file":          {Pull{AuthFile: filepath.Join(dir, "absent")}, "PULL_AUTH_FILE"},
		"not JSON":         {Pull{AuthFile: write("bad.json", `{"auths": "`+secret)}, "PULL_AUTH_FILE"},
		"too many":         {Pull{AuthFile: write("big.json", `{"auths": {"r.example": {"auth": "`+strings.Repeat(secret, 1000)+`"}}}`)}, "12288"},
		"no authority":     {Pull{CAFile: write("bad.pem", secret)}, "PULL_CA_FILE"},
		"too many of them": {Pull{CAFile: write("big.pem", strings.Repeat(b.CA, 20))}, "8192"},
	} {
		if err := c.p.Check(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
