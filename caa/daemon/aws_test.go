// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// The keys of peer-pods-cm and peer-pods-secret make a provider that works, and a key
// that is changed in the file is used without a restart.
func TestAWS(t *testing.T) {
	s := fakeec2.New(fakeec2.Config{})
	server := httptest.NewServer(s)
	defer server.Close()
	file := filepath.Join(t.TempDir(), "adaptor.conf")
	write := func(key fakeec2.Key, more string) {
		t.Helper()
		text := fmt.Sprintf(`CLOUD_PROVIDER=aws
AWS_REGION=%s
AWS_ENDPOINT_URL=%s
AWS_ACCESS_KEY_ID=%s
AWS_SECRET_ACCESS_KEY=%s
AWS_SUBNET_ID=%s,%s
AWS_SG_IDS=%s
AWS_VPC_ID=%s
PODVM_AMI_ID=%s
PODVM_INSTANCE_TYPES=m6a.large,m6a.xlarge
SSH_KP_NAME=%s
AWS_SPOT=true
TAGS=team=blue
%s`, fakeec2.DefaultRegion, server.URL, key.ID, key.Secret, fakeec2.DefaultSubnet, fakeec2.DefaultSubnetB,
			fakeec2.DefaultSecurityGroup, fakeec2.DefaultVPC, fakeec2.DefaultImage, fakeec2.DefaultKeyPair, more)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(fakeec2.DefaultKey, "")
	cfg, err := config.Load(file, nil, config.Flags{})
	if err != nil {
		t.Fatal(err)
	}
	var log logBuffer
	d, err := New(cfg, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	p := d.provider.(*awsProvider)
	defer p.Close()
	if err := d.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.Announce(t.Context(), d.log)
	plan, err := p.Plan(t.Context(), cloud.Size{VCPUs: 3})
	if err != nil || plan.Type != "m6a.xlarge" {
		t.Fatalf("%+v, %v", plan, err)
	}
	inst, err := p.Create(t.Context(), cloud.CreateRequest{Token: "t", Name: "podvm-a", SandboxID: "s", Owner: cloud.Owner{Cluster: "c", Node: "n"},
		Plan: plan, UserData: []byte("#cloud-config\n"), Tags: cfg.Tags})
	if err != nil {
		t.Fatal(err)
	}
	if i := s.Instances(); len(i) != 1 || i[0].ID != string(inst.ID) || i[0].RootGiB != 30 || i[0].KeyName != fakeec2.DefaultKeyPair ||
		!i[0].SEVSNP || i[0].Market != "spot" || i[0].Tags["team"] != "blue" {
		t.Errorf("made %+v", i)
	}

	write(fakeec2.DefaultKey, "PROXY_TIMEOUT=soon\n") // a mistake beside them does not take the keys away
	if keys, err := reloadedKeys(cfg)(); err != nil || keys != awsKeys(cfg) {
		t.Errorf("keys beside a mistake: %v, %v", keys, err)
	}
	other := fakeec2.Key{ID: "AKIAIOSFODNN7ANOTHER", Secret: "je7MtGbClwBF/2Zp9Utk/h3yCo8nvbEXAMPLEKEY", User: "peer-pods"}
	s.SetKey(other)
	s.RemoveKey(fakeec2.DefaultKey.ID)
	if err := p.Check(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Errorf("the old key: %v", err)
	}
	write(other, "")
	if err := p.Check(t.Context()); err != nil {
		t.Errorf("the new key: %v", err)
	}
	if err := p.Delete(t.Context(), inst.ID); err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	secrecy(t, log.String(), fakeec2.DefaultKey.Secret, other.Secret)
}

// secrecy holds a log to telling what was done, and no secrets.
func secrecy(t *testing.T, text string, secrets ...string) {
	t.Helper()
	if !strings.Contains(text, "m6a.large") || !strings.Contains(text, "action=RunInstances") {
		t.Errorf("the log does not tell of the choice and the calls:\n%s", text)
	}
	for _, secret := range secrets {
		if strings.Contains(text, secret) {
			t.Error("a secret is in the log")
		}
	}
}
