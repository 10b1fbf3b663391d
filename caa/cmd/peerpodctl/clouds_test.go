// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

// TestExplainAsksTheCloud: the whole way, from the configuration to the clouds' APIs.
func TestExplainAsksTheCloud(t *testing.T) {
	t.Run("aws", func(t *testing.T) {
		ec2 := fakeec2.New(fakeec2.Config{})
		t.Cleanup(ec2.Close)
		askCloud(t, ec2, map[string]string{
			"CLOUD_PROVIDER": "aws", "AWS_ENDPOINT_URL": "@", "AWS_REGION": fakeec2.DefaultRegion,
			"AWS_ACCESS_KEY_ID": fakeec2.DefaultKey.ID, "AWS_SECRET_ACCESS_KEY": fakeec2.DefaultKey.Secret,
			"PODVM_AMI_ID": fakeec2.DefaultImage, "AWS_SUBNET_ID": fakeec2.DefaultSubnet, "AWS_SG_IDS": fakeec2.DefaultSecurityGroup,
			"PODVM_INSTANCE_TYPE": "t3.medium", "PODVM_INSTANCE_TYPES": "t3.small,m6a.xlarge,t3.medium,m6a.large", "DISABLECVM": "true",
		}, "m6a.xlarge")
	})
	t.Run("azure", func(t *testing.T) {
		c := fakearm.Config{}
		c.Images = []fakearm.Image{{ID: c.ImageID("", "", "1.0.0")}}
		arm := fakearm.New(c)
		t.Cleanup(arm.Close)
		c = arm.Config()
		askCloud(t, arm, map[string]string{
			"CLOUD_PROVIDER": "azure", "AZURE_ENDPOINT": "@", "AZURE_AUTHORITY_HOST": "@",
			"AZURE_SUBSCRIPTION_ID": c.Subscription, "AZURE_TENANT_ID": c.Tenant, "AZURE_REGION": c.Region, "AZURE_RESOURCE_GROUP": fakearm.DefaultGroup,
			"AZURE_CLIENT_ID": fakearm.DefaultClient, "AZURE_CLIENT_SECRET": fakearm.DefaultSecret,
			"AZURE_SUBNET_ID": c.SubnetID(fakearm.Subnet{}), "AZURE_IMAGE_ID": c.ImageID("", "", "1.0.0"),
			"AZURE_INSTANCE_SIZE": "Standard_D2as_v5", "AZURE_INSTANCE_SIZES": "Standard_D2as_v5,Standard_D4as_v5", "DISABLECVM": "true",
		}, "Standard_D4as_v5")
	})
}

// serve starts an emulation that answers at "@" of env, which it sets.
func serve(t *testing.T, emulation http.Handler, env map[string]string) *httptest.Server {
	t.Helper()
	bare(t)
	start := httptest.NewServer
	if env["CLOUD_PROVIDER"] == "azure" { // whose library gives secrets to nobody over plain HTTP
		start = httptest.NewTLSServer
	}
	server := start(emulation)
	t.Cleanup(server.Close)
	if cert := server.Certificate(); cert != nil {
		// The same one each time: Go reads this file once in a process.
		file := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("SSL_CERT_FILE", file)
	}
	for k, v := range env {
		t.Setenv(k, strings.ReplaceAll(v, "@", server.URL))
	}
	return server
}

// askCloud asks for three vCPUs of the emulation that answers at "@".
func askCloud(t *testing.T, emulation http.Handler, env map[string]string, want string) {
	t.Helper()
	server := serve(t, emulation, env)
	out, err := execute(t, "instance", "explain", "--vcpus", "3", "--memory", "5000", "-o", "json")
	var got choiceView
	if err != nil || json.Unmarshal([]byte(out), &got) != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got.Type != want || got.Considered[0].VCPUs < 3 || got.Considered[0].MemoryMiB < 5000 || got.Considered[0].PricePerHour == 0 || got.Remark == "" {
		t.Errorf("got %s; want %s, with its size, its price and where that is from:\n%s", got.Type, want, out)
	}

	// What the cloud said can be kept, and used without it.
	types, err := execute(t, "instance", "explain", "-o", "types")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "types")
	if err := os.WriteFile(path, []byte(types), 0o600); err != nil {
		t.Fatal(err)
	}
	server.Close()
	if _, err := execute(t, "instance", "explain", "--types-file", path, "--vcpus", "3", "--memory", "5000"); err != nil {
		t.Errorf("without the cloud: %v", err)
	}
}
