// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/kata-remote/kata-remote/caa/config"
	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/sim"
)

var update = flag.Bool("update", false, "write the golden files")

const typesFile = "testdata/types"

// bare takes away what the environment of the test says of a cloud.
func bare(t *testing.T) {
	for _, k := range []string{"CLOUD_PROVIDER", "PODVM_AMI_ID", "PODVM_INSTANCE_TYPES", "PODVM_INSTANCE_TYPE", "AWS_REGION", "DISABLECVM",
		"AWS_SG_IDS", "AZURE_NSG_ID", "AZURE_SUBNET_ID", "AZURE_IMAGE_ID", "VXLAN_PORT", "FORWARDER_PORT", "CLUSTER_NAME", "REMOTE_HYPERVISOR_ENDPOINT"} {
		t.Setenv(k, "") // to have it restored
		os.Unsetenv(k)
	}
}

// execute runs the command and returns what it printed.
func execute(t *testing.T, args ...string) (string, error) {
	t.Helper()
	asked := false
	cmd := command(&asked)
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	if err != nil && !asked {
		t.Fatalf("%v: the command line was not understood: %v", args, err)
	}
	return out.String(), err
}

func TestExplainGolden(t *testing.T) {
	bare(t)
	conf := filepath.Join(t.TempDir(), "adaptor.conf")
	if err := os.WriteFile(conf, []byte("CLOUD_PROVIDER=aws\nPODVM_AMI_ID=ami-0123456789abcdef0\nAWS_REGION=us-east-1\nPODVM_INSTANCE_TYPES=t3.small,m6a.large,m6a.xlarge,r6a.large\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"vcpus-memory": {"--vcpus", "3", "--memory", "5000"},
		"gpu":          {"--gpus", "1", "--gpu-model", "nvidia-t4"},
		"named":        {"--type", "m6a.large"},
		"too-much":     {"--vcpus", "128"},
		"json":         {"--vcpus", "3", "--memory", "5000", "-o", "json"},
		"types":        {"--memory", "8000", "-o", "types"},
		"configured":   {"--memory", "7000", "--config", conf},
		"default":      {"--config", conf},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := execute(t, append([]string{"instance", "explain", "--types-file", typesFile}, args...)...)
			got := "$ peerpodctl instance explain --types-file types " + strings.ReplaceAll(strings.Join(args, " "), conf, "adaptor.conf") + "\n" + out
			if err != nil {
				got += "error: " + err.Error() + "\n"
			}
			golden := filepath.Join("testdata", "explain-"+name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestTypesCanBeReadBack: what --output types prints gives the same answer again.
func TestTypesCanBeReadBack(t *testing.T) {
	bare(t)
	types, err := execute(t, "instance", "explain", "--types-file", typesFile, "-o", "types")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "types")
	if err := os.WriteFile(path, []byte(types), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := execute(t, "instance", "explain", "--types-file", typesFile, "--vcpus", "3")
	b, err2 := execute(t, "instance", "explain", "--types-file", path, "--vcpus", "3")
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	taken := func(s string) string { return strings.Split(s, "\n")[3] }
	if taken(a) != taken(b) || !strings.Contains(taken(a), "taken") {
		t.Errorf("%q and %q", taken(a), taken(b))
	}
}

// unreachable is a provider whose cloud does not answer.
type unreachable struct{ cloud.Provider }

func (unreachable) Explain(context.Context, cloud.Size) (cloud.Choice, error) {
	return cloud.Choice{}, fmt.Errorf("DescribeInstanceTypes: no route to host: %w", errdefs.ErrUnavailable)
}

// TestExplainByProvider: without a file the provider is asked.
func TestExplainByProvider(t *testing.T) {
	bare(t)
	t.Setenv("CLOUD_PROVIDER", "aws")
	t.Setenv("PODVM_AMI_ID", "ami-0123456789abcdef0")
	var answer cloud.Provider = sim.NewWorld(sim.Config{}).NewProvider()
	old := newProvider
	t.Cleanup(func() { newProvider = old })
	newProvider = func(cfg *config.Config) (cloud.Provider, error) {
		if cfg.AWS.ImageID != "ami-0123456789abcdef0" {
			t.Errorf("%+v", cfg.AWS)
		}
		return answer, nil
	}
	out, err := execute(t, "instance", "explain", "--gpus", "1", "-o", "json")
	var got choiceView
	if err != nil || json.Unmarshal([]byte(out), &got) != nil || got.Type != "sim.gpu" || len(got.Considered) != 4 || got.Considered[0].Outcome != "taken" || got.Asked.GPUs != 1 {
		t.Errorf("%v: %s", err, out)
	}
	answer = unreachable{}
	if out, err := execute(t, "instance", "explain"); err == nil || out != "" || !strings.Contains(err.Error(), "no route to host") || !strings.Contains(err.Error(), "--types-file") {
		t.Errorf("unreachable: %v, %q", err, out)
	}
	t.Setenv("PODVM_AMI_ID", "<ami>")
	if _, err := execute(t, "instance", "explain"); err == nil || !strings.Contains(err.Error(), "PODVM_AMI_ID is still the placeholder") {
		t.Errorf("wrong configuration: %v", err)
	}
}

func TestExplainLocal(t *testing.T) {
	bare(t)
	dir := t.TempDir()
	for _, f := range []string{"kernel", "initrd"} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("CLOUD_PROVIDER", "local")
	t.Setenv("LOCAL_KERNEL", filepath.Join(dir, "kernel"))
	t.Setenv("LOCAL_INITRD", filepath.Join(dir, "initrd"))
	for _, more := range [][]string{nil, {"--types-file", typesFile}} {
		if _, err := execute(t, append([]string{"instance", "explain"}, more...)...); err == nil || !strings.Contains(err.Error(), "has no instance types") {
			t.Errorf("%v: %v", more, err)
		}
	}
}

func TestExplainExitCodes(t *testing.T) {
	bare(t)
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"instance"}, exitUsage},
		{[]string{"instance", "explain", "nginx"}, exitUsage},
		{[]string{"instance", "explain", "--vcpus", "-1"}, exitUsage},
		{[]string{"instance", "explain", "--vcpus", "many"}, exitUsage},
		{[]string{"instance", "explain", "-o", "xml"}, exitUsage},
		{[]string{"instance", "explain", "--types-file", "/absent"}, exitFailed},
		{[]string{"instance", "explain", "--types-file", typesFile, "--gpus", "64"}, exitFailed},
		{[]string{"instance", "explain", "--types-file", typesFile, "--gpus", "1"}, 0},
	} {
		if got := run(t.Context(), c.args); got != c.want {
			t.Errorf("peerpodctl %v: exit %d, want %d", c.args, got, c.want)
		}
	}
}
