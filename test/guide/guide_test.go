// SPDX-License-Identifier: Apache-2.0

package guide

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/ami"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	awsports "github.com/kata-remote/kata-remote/cloud/aws/ports"
	"github.com/kata-remote/kata-remote/cloud/azure"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
	"github.com/kata-remote/kata-remote/cloud/azure/gallery"
	azureports "github.com/kata-remote/kata-remote/cloud/azure/ports"
)

// page is a guide and the cloud it is run against.
type page struct {
	*testing.T
	path   string
	blocks []Block
	dir    string   // the person's folder
	env    []string // of the person's shell
}

func open(t *testing.T, name string) *page {
	t.Helper()
	path := filepath.Join("..", "..", "docs", name)
	blocks, err := Blocks(path)
	if err != nil {
		t.Fatal(err)
	}
	return &page{T: t, path: path, blocks: blocks, dir: t.TempDir()}
}

// only is the one block with an info.
func (p *page) only(info string) Block {
	p.Helper()
	var found []Block
	for _, b := range p.blocks {
		if b.Is(info) {
			found = append(found, b)
		}
	}
	if len(found) != 1 {
		p.Fatalf("%s has %d blocks %q, want one", p.path, len(found), info)
	}
	return found[0]
}

// known refuses blocks that nobody would check.
func (p *page) known(infos ...string) {
	p.Helper()
	for _, b := range p.blocks {
		if !slices.ContainsFunc(infos, b.Is) {
			p.Errorf("%v: a block %q is checked by nobody", b, b.Info)
		}
	}
}

// rows looks for the rows of a table of rights: what needs them, and what they are.
func (p *page) rows(rights map[string][]string) {
	p.Helper()
	text, err := os.ReadFile(p.path)
	if err != nil {
		p.Fatal(err)
	}
	for what, actions := range rights {
		if row := "| `" + what + "` | `" + strings.Join(actions, "`, `") + "` |\n"; !strings.Contains(string(text), row) {
			p.Errorf("%s lacks the row %s", p.path, row)
		}
	}
}

// run types all "sh" blocks into one shell, in order, and returns what each printed.
func (p *page) run() map[int]string {
	p.Helper()
	bin := os.Getenv("PEERPOD_BIN")
	if bin == "" {
		p.Fatal("PEERPOD_BIN is not set: run `make test`")
	}
	var script strings.Builder
	script.WriteString("set -eu\nmake() { :; }\n")
	for _, b := range p.blocks {
		if b.Is("sh") {
			fmt.Fprintf(&script, "echo '=== %d'\n%s\n", b.Line, b.Text)
		}
	}
	ctx, cancel := context.WithTimeout(p.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script.String())
	cmd.Dir = p.dir
	cmd.Env = append([]string{"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + p.dir}, p.env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		p.Fatalf("%s: %v\n%s\n%s", p.path, err, out.String(), errs.String())
	}
	said := map[int]string{}
	for part := range strings.SplitSeq("\n"+out.String(), "\n=== ") {
		var line int
		if _, err := fmt.Sscan(part, &line); err == nil {
			_, said[line], _ = strings.Cut(part, "\n")
		}
	}
	return said
}

// says looks for a text in what the block that has a command printed.
func (p *page) says(said map[int]string, command, want string) {
	p.Helper()
	for _, b := range p.blocks {
		if b.Is("sh") && strings.Contains(b.Text, command) {
			if !strings.Contains(said[b.Line], want) {
				p.Errorf("%v: %s printed\n%s\nwant %q in it", b, command, said[b.Line], want)
			}
			return
		}
	}
	p.Errorf("%s has no %q", p.path, command)
}

// commands holds the commands of blocks to what their programs take: the words of each,
// and its options, all of which it must have. The programs themselves are run by
// `make cross-check`, where they can be had.
func (p *page) commands(info string, take map[string][]string) {
	p.Helper()
	seen := map[string]bool{}
	for _, b := range p.blocks {
		if !b.Is(info) {
			continue
		}
		for line := range strings.SplitSeq(strings.TrimSpace(b.Text), "\n") {
			words, rest, _ := strings.Cut(line, " --")
			options, ok := take[words]
			if !ok {
				p.Errorf("%v: nobody knows %q", b, words)
				continue
			}
			seen[words] = true
			var has []string
			for _, o := range strings.Fields("--" + rest) {
				if strings.HasPrefix(o, "--") {
					has = append(has, o)
				}
			}
			if !slices.Equal(has, options) {
				p.Errorf("%v: %s has the options %q, want %q", b, words, has, options)
			}
		}
	}
	for words := range take {
		if !seen[words] {
			p.Errorf("%s has no %q", p.path, words)
		}
	}
}

// image puts the pod VM image where `make podvm-image` would have.
func (p *page) image() {
	p.Helper()
	built := os.Getenv("PEERPOD_PODVM")
	if built == "" {
		p.Fatal("PEERPOD_PODVM is not set: run `make test`")
	}
	built, err := filepath.Abs(built)
	if err == nil {
		err = os.Mkdir(filepath.Join(p.dir, "_output"), 0o755)
	}
	if err == nil {
		err = os.Symlink(built, filepath.Join(p.dir, "_output", "podvm"))
	}
	if err != nil {
		p.Fatal(err)
	}
}

// checkPod: the pod of the guide is one that Kubernetes would take as YAML.
func (p *page) checkPod() {
	p.Helper()
	b := p.only("yaml")
	d := yaml.NewDecoder(strings.NewReader(b.Text))
	var kinds []string
	for {
		var o struct {
			Kind    string
			Handler string
			Spec    struct {
				RuntimeClassName string `yaml:"runtimeClassName"`
			}
		}
		if err := d.Decode(&o); err != nil {
			break
		}
		kinds = append(kinds, o.Kind+" "+o.Handler+o.Spec.RuntimeClassName)
	}
	if want := []string{"RuntimeClass kata-remote", "Pod kata-remote"}; !slices.Equal(kinds, want) {
		p.Errorf("%v: it has %q, want %q", b, kinds, want)
	}
}

func TestAWS(t *testing.T) {
	p := open(t, "aws.md")
	p.known("sh", "sh iam", "sh node", "sh aws", "json policy", "yaml")
	p.checkPod()
	var policy struct {
		Statement []struct{ Action []string }
	}
	b := p.only("json policy")
	if err := json.Unmarshal([]byte(b.Text), &policy); err != nil || len(policy.Statement) != 1 || !slices.Equal(policy.Statement[0].Action, aws.Actions) {
		t.Errorf("%v: %v, allows %v; the provider needs %v", b, err, policy, aws.Actions)
	}
	p.rows(aws.ActionsFor)
	p.rows(map[string][]string{
		"peerpodctl cloud open-ports aws": awsports.Actions, "peerpodctl image publish aws": ami.PublishActions, "peerpodctl image prune aws": ami.PruneActions,
	})

	s := fakeec2.New(fakeec2.Config{})
	srv := httptest.NewServer(s)
	defer srv.Close()
	node := awsNode(t, s)
	p.image()
	key := fakeec2.DefaultKey
	p.env = []string{"AWS_ENDPOINT_URL=" + srv.URL, "AWS_ACCESS_KEY_ID=" + key.ID, "AWS_SECRET_ACCESS_KEY=" + key.Secret,
		"PROVIDER_ID=aws:///us-east-1a/" + node, "SUBNET=" + fakeec2.DefaultSubnet, "SECURITY_GROUP=" + fakeec2.DefaultSecurityGroup,
		"AWS_EC2_METADATA_DISABLED=true"}
	said := p.run()
	p.says(said, "--check-config", "config ok")
	p.says(said, "instance explain", "taken")
	p.says(said, "open-ports", "made")
	p.says(said, "image prune", "configured as PODVM_AMI_ID")
	p.commands("sh iam", map[string][]string{ // AWS CLI Command Reference, iam
		"aws iam create-policy":      {"--policy-name", "--policy-document"},
		"aws iam create-user":        {"--user-name"},
		"aws iam attach-user-policy": {"--user-name", "--policy-arn"},
		"aws iam create-access-key":  {"--user-name"},
	})
	p.commands("sh aws", map[string][]string{
		"aws ec2 describe-instances": {"--filters"},
		"aws ec2 describe-volumes":   {"--filters"},
	})
}

// awsNode makes the instance of a worker node, and returns its id.
func awsNode(t *testing.T, s *fakeec2.Server) string {
	t.Helper()
	cfg := aws.Config{
		Region: fakeec2.DefaultRegion, ImageID: fakeec2.DefaultImage, InstanceType: "m6a.large", DisableCVM: true,
		Keys:      aws.Keys{AccessKeyID: fakeec2.DefaultKey.ID, SecretAccessKey: aws.Secret(fakeec2.DefaultKey.Secret)},
		SubnetIDs: []string{fakeec2.DefaultSubnet}, SecurityGroupIDs: []string{fakeec2.DefaultSecurityGroup},
		HTTPClient: &http.Client{Transport: s.Transport()},
	}
	node, err := aws.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	return makeNode(t, node)
}

func TestAzure(t *testing.T) {
	p := open(t, "azure.md")
	p.known("sh", "sh az", "sh node", "json role", "yaml")
	p.checkPod()
	var role struct {
		Name, Description   string
		IsCustom            bool
		Actions, NotActions []string
		AssignableScopes    []string
	}
	b := p.only("json role")
	if err := json.Unmarshal([]byte(b.Text), &role); err != nil || !slices.Equal(role.Actions, azure.Actions) {
		t.Errorf("%v: %v, allows %v; the provider needs %v", b, err, role.Actions, azure.Actions)
	}
	if role.Name == "" || role.Description == "" || !role.IsCustom || len(role.AssignableScopes) != 1 || len(role.NotActions) > 0 {
		t.Errorf("%v is no definition of a role: %+v", b, role)
	}
	p.rows(map[string][]string{
		"peerpodctl cloud open-ports azure": azureports.Actions, "peerpodctl image publish azure": gallery.PublishActions, "peerpodctl image prune azure": gallery.PruneActions,
	})

	c := fakearm.Config{Timing: fakearm.Instant}
	c.Images = []fakearm.Image{{ID: c.ImageID("nodes", "node", "1.0.0")}}
	arm := fakearm.New(c)
	defer arm.Close()
	c = arm.Config()
	srv := httptest.NewTLSServer(arm)
	defer srv.Close()
	ca := filepath.Join(p.dir, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	node, err := azure.New(azure.Config{
		SubscriptionID: c.Subscription, Region: c.Region, ResourceGroup: fakearm.DefaultGroup, SubnetID: c.SubnetID(fakearm.Subnet{}),
		NSGID: c.SecurityGroupID(""), ImageID: c.Images[0].ID, InstanceSize: "Standard_D2as_v5", SecurityType: azure.SecurityStandard,
		Credentials: azure.Credentials{TenantID: c.Tenant, ClientID: fakearm.DefaultClient, ClientSecret: fakearm.DefaultSecret},
		Endpoint:    srv.URL, AuthorityHost: srv.URL, Transport: srv.Client(),
	})
	if err != nil {
		t.Fatal(err)
	}
	id := makeNode(t, node)
	p.image()
	p.env = []string{"SSL_CERT_FILE=" + ca, "AZURE_ENDPOINT=" + srv.URL, "AZURE_AUTHORITY_HOST=" + srv.URL,
		"AZURE_SUBSCRIPTION_ID=" + c.Subscription, "AZURE_TENANT_ID=" + c.Tenant, "AZURE_CLIENT_ID=" + fakearm.DefaultClient,
		"AZURE_CLIENT_SECRET=" + fakearm.DefaultSecret, "PROVIDER_ID=azure://" + id,
		"SUBNET=" + c.SubnetID(fakearm.Subnet{}), "SECURITY_GROUP=" + c.SecurityGroupID("")}
	said := p.run()
	p.says(said, "--check-config", "config ok")
	p.says(said, "instance explain", "taken")
	p.says(said, "open-ports", "made")
	p.says(said, "image prune", "configured as AZURE_IMAGE_ID")
	p.commands("sh az", map[string][]string{ // Azure CLI reference
		"az group create":           {"--name", "--location"},
		"az role definition create": {"--role-definition"},
		"az ad sp create-for-rbac":  {"--name", "--role", "--scopes"},
		"az resource list":          {"--resource-group", "--tag", "--output"},
	})
}

// makeNode makes the machine of a worker node, and returns its id.
func makeNode(t *testing.T, p cloud.Provider) string {
	t.Helper()
	plan, err := p.Plan(t.Context(), cloud.Size{})
	if err != nil {
		t.Fatal(err)
	}
	node, err := p.Create(t.Context(), cloud.CreateRequest{Token: "node", Name: "node", SandboxID: "node",
		Owner: cloud.Owner{Cluster: "nodes", Node: "node"}, Plan: plan, UserData: []byte("#cloud-config\n")})
	if err != nil {
		t.Fatal(err)
	}
	return string(node.ID)
}
