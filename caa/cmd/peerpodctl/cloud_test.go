// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

// golden compares with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Error(d)
	}
}

// session is what a person sees of commands one after the other.
func session(t *testing.T, commands ...string) string {
	t.Helper()
	var b strings.Builder
	for _, c := range commands {
		out, err := execute(t, strings.Fields(c)...)
		b.WriteString("$ peerpodctl " + c + "\n" + out)
		if err != nil {
			b.WriteString("peerpodctl: " + err.Error() + "\n")
		}
		b.WriteString("\n")
	}
	return b.String()
}

// awsAccount starts an emulation, and sets the environment to that of a person who has
// just begun: no image yet.
func awsAccount(t *testing.T, more map[string]string) *fakeec2.Server {
	t.Helper()
	s := fakeec2.New(fakeec2.Config{})
	t.Cleanup(s.Close)
	env := map[string]string{"CLOUD_PROVIDER": "aws", "AWS_ENDPOINT_URL": "@", "AWS_REGION": fakeec2.DefaultRegion, "PODVM_AMI_ID": "<ami_id>",
		"AWS_ACCESS_KEY_ID": fakeec2.DefaultKey.ID, "AWS_SECRET_ACCESS_KEY": fakeec2.DefaultKey.Secret}
	for k, v := range more {
		env[k] = v
	}
	serve(t, s, env)
	return s
}

// azureAccount is awsAccount for Azure.
func azureAccount(t *testing.T, more map[string]string) *fakearm.Server {
	t.Helper()
	s := fakearm.New(fakearm.Config{Dir: t.TempDir(), Timing: fakearm.Instant})
	t.Cleanup(s.Close)
	c := s.Config()
	env := map[string]string{"CLOUD_PROVIDER": "azure", "AZURE_ENDPOINT": "@", "AZURE_AUTHORITY_HOST": "@", "AZURE_IMAGE_ID": "<azure_image_id>",
		"AZURE_SUBSCRIPTION_ID": c.Subscription, "AZURE_TENANT_ID": c.Tenant, "AZURE_REGION": c.Region, "AZURE_RESOURCE_GROUP": fakearm.DefaultGroup,
		"AZURE_CLIENT_ID": fakearm.DefaultClient, "AZURE_CLIENT_SECRET": fakearm.DefaultSecret}
	for k, v := range more {
		env[k] = v
	}
	serve(t, s, env)
	return s
}

func TestOpenPortsAWS(t *testing.T) {
	awsAccount(t, map[string]string{"AWS_SG_IDS": fakeec2.DefaultSecurityGroup, "VXLAN_PORT": "9000"})
	golden(t, "open-ports-aws", session(t,
		"cloud open-ports --help",
		"cloud open-ports aws --dry-run",
		"cloud open-ports aws",
		"cloud open-ports aws",
		"cloud open-ports aws --provider-id azure:///subscriptions/x",
	))
	var v rulesView
	out, err := execute(t, "cloud", "open-ports", "aws", "-o", "json")
	if err != nil || json.Unmarshal([]byte(out), &v) != nil || len(v.Rules) != 3 || v.Rules[1].Protocol != "udp" || v.Rules[1].Number != 9000 || v.Rules[1].State != cloud.RuleThere || v.Remark == "" {
		t.Errorf("%v: %s", err, out)
	}
}

func TestOpenPortsAzure(t *testing.T) {
	s := azureAccount(t, map[string]string{"AZURE_NSG_ID": fakearm.Config{}.SecurityGroupID(""), "FORWARDER_PORT": "15151"})
	golden(t, "open-ports-azure", session(t,
		"cloud open-ports azure --dry-run",
		"cloud open-ports azure -o json",
		"cloud open-ports azure",
	))
	t.Setenv("AZURE_NSG_ID", "")
	t.Setenv("AZURE_SUBNET_ID", s.Config().SubnetID(fakearm.Subnet{}))
	if out, err := execute(t, "cloud", "open-ports", "azure"); err != nil || !strings.Contains(out, "nothing to open") {
		t.Errorf("a subnet without a group: %v: %s", err, out)
	}
}

func TestOpenPortsExitCodes(t *testing.T) {
	awsAccount(t, nil)
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"cloud"}, exitUsage},
		{[]string{"cloud", "open-ports"}, exitUsage},
		{[]string{"cloud", "open-ports", "gcp"}, exitUsage},
		{[]string{"cloud", "open-ports", "aws", "-o", "xml"}, exitUsage},
		{[]string{"cloud", "open-ports", "aws"}, exitFailed}, // nothing says which groups
	} {
		if got := run(t.Context(), c.args); got != c.want {
			t.Errorf("peerpodctl %v: exit %d, want %d", c.args, got, c.want)
		}
	}
}
