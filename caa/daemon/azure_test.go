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
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

// The keys of peer-pods-cm and peer-pods-secret make a provider that works, and a secret
// that is changed in the file is used without a restart.
func TestAzure(t *testing.T) {
	image := fakearm.Config{}.ImageID("", "", "1.0.0")
	s := fakearm.New(fakearm.Config{Timing: fakearm.Instant, Images: []fakearm.Image{{ID: image, SecurityType: "ConfidentialVmSupported"}}})
	defer s.Close()
	server := httptest.NewServer(s)
	defer server.Close()
	file := filepath.Join(t.TempDir(), "adaptor.conf")
	write := func(secret, more string) { t.Helper(); writeAzure(t, file, s, server.URL, image, secret, more) }
	write(fakearm.DefaultSecret, "")
	cfg, err := config.Load(file, nil, config.Flags{})
	if err != nil {
		t.Fatal(err)
	}
	var log logBuffer
	d, err := New(cfg, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	p := d.provider.(*azureProvider)
	defer p.Close()
	if err := d.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.Announce(t.Context(), d.log)
	plan, err := p.Plan(t.Context(), cloud.Size{VCPUs: 3})
	if err != nil || plan.Type != "Standard_DC4as_v5" {
		t.Fatalf("%+v, %v", plan, err)
	}
	inst, err := p.Create(t.Context(), cloud.CreateRequest{Token: "t", Name: "podvm-a", SandboxID: "s", Owner: cloud.Owner{Cluster: "c", Node: "n"},
		Plan: plan, UserData: []byte("#cloud-config\n"), Tags: cfg.Tags})
	if err != nil {
		t.Fatal(err)
	}
	if v := s.VMs(); len(v) != 1 || v[0].Size != plan.Type || !v[0].Spot || v[0].Zone == "" || v[0].Tags["team"] != "blue" {
		t.Errorf("made %+v", v)
	}

	const second = "second-secret"
	write(fakearm.DefaultSecret, "PROXY_TIMEOUT=soon\n") // a mistake beside it does not take the secret away
	if c, err := reloadedCredentials(cfg)(); err != nil || c != azureCredentials(cfg) {
		t.Errorf("credentials beside a mistake: %v, %v", c, err)
	}
	s.SetSecret(fakearm.DefaultClient, second)
	s.ExpireTokens()
	if err := p.Check(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Errorf("the old secret: %v", err)
	}
	write(second, "")
	if err := p.Check(t.Context()); err != nil {
		t.Errorf("the new secret: %v", err)
	}
	if err := p.Delete(t.Context(), inst.ID); err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	text := log.String()
	if !strings.Contains(text, "Standard_DC2as_v5") || !strings.Contains(text, `action="PUT virtualMachines"`) {
		t.Errorf("the log does not tell of the choice and the calls:\n%s", text)
	}
	for _, secret := range []string{fakearm.DefaultSecret, second} {
		if strings.Contains(text, secret) {
			t.Error("a secret is in the log")
		}
	}
}

// writeAzure writes the configuration file.
func writeAzure(t *testing.T, file string, s *fakearm.Server, url, image, secret, more string) {
	t.Helper()
	text := fmt.Sprintf(`CLOUD_PROVIDER=azure
AZURE_SUBSCRIPTION_ID=%s
AZURE_REGION=%s
AZURE_RESOURCE_GROUP=%s
AZURE_SUBNET_ID=%s
AZURE_NSG_ID=%s
AZURE_IMAGE_ID=%s
AZURE_INSTANCE_SIZES=Standard_DC2as_v5,Standard_DC4as_v5
AZURE_ZONES=1,2
AZURE_SPOT=true
AZURE_TENANT_ID=%s
AZURE_CLIENT_ID=%s
AZURE_CLIENT_SECRET=%s
AZURE_ENDPOINT=%s
AZURE_AUTHORITY_HOST=%s
ROOT_VOLUME_SIZE=40
TAGS=team=blue
%s`, fakearm.DefaultSubscription, fakearm.DefaultRegion, fakearm.DefaultGroup, s.Config().SubnetID(fakearm.Subnet{}), s.Config().SecurityGroupID(""),
		image, fakearm.DefaultTenant, fakearm.DefaultClient, secret, url, url, more)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
