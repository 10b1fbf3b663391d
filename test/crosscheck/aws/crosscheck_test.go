// SPDX-License-Identifier: Apache-2.0

//go:build crosscheck

package aws

import (
	"bytes"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
)

// tools is where `make cross-check` has put the other clients.
func tools(t *testing.T) string {
	dir := os.Getenv("CROSSCHECK_AWS")
	if dir == "" {
		t.Fatal("CROSSCHECK_AWS is not set: run `make cross-check`")
	}
	return dir
}

// serve starts the emulation, and returns the environment of a client that asks it and
// nothing else.
func serve(t *testing.T) (*fakeec2.Server, []string) {
	s := fakeec2.New(fakeec2.Config{StartTime: 200 * time.Millisecond, StopTime: 200 * time.Millisecond})
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	home := t.TempDir()
	return s, []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "ENDPOINT=" + srv.URL, "AWS_EC2_METADATA_DISABLED=true",
		"AWS_REGION=" + fakeec2.DefaultRegion, "AWS_DEFAULT_REGION=" + fakeec2.DefaultRegion, "AWS_PAGER=", "AWS_DEFAULT_OUTPUT=text",
		"AWS_ACCESS_KEY_ID=" + fakeec2.DefaultKey.ID, "AWS_SECRET_ACCESS_KEY=" + fakeec2.DefaultKey.Secret,
		"IMAGE=" + fakeec2.DefaultImage, "SUBNET=" + fakeec2.DefaultSubnet, "GROUP=" + fakeec2.DefaultSecurityGroup}
}

// TestJavaScript has the vendor's JavaScript clients ask the emulation, which was
// written beside the Go ones.
func TestJavaScript(t *testing.T) {
	dir := tools(t)
	s, env := serve(t)
	s.SetCapacity(fakeec2.Capacity{Type: "m6a.4xlarge", Free: 0})
	lost := s.Inject(fakeec2.Fault{Action: "RunInstances", Type: "m6a.xlarge", Skip: 1, Times: 1, Lost: true})
	late := s.Inject(fakeec2.Fault{Action: "RunInstances", Type: "m6a.xlarge", Skip: 1, Times: 1,
		Err: &fakeec2.Error{Status: 503, Code: "RequestLimitExceeded", Message: "Request limit exceeded."}})
	key := fakeec2.DefaultKey
	key.Deny = []string{"ec2:DeleteVolume"}
	s.SetKey(key)
	script, err := os.ReadFile("check.mjs")
	if err != nil {
		t.Fatal(err)
	}
	// Modules are looked for beside the script.
	here := filepath.Join(dir, "check.mjs")
	if err := os.WriteFile(here, script, 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "node", here)
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	t.Logf("\n%s", out)
	if err != nil {
		t.Fatalf("the client: %v", err)
	}
	if lost() != 1 || late() != 1 {
		t.Errorf("%d lost replies and %d throttled calls, want one of each", lost(), late())
	}
	if l := s.Leaks(nil); len(l) > 0 {
		t.Errorf("left behind: %v", l)
	}
}

// TestCommandLine has Debian's awscli, whose model is of December 2022, ask the
// emulation.
func TestCommandLine(t *testing.T) {
	s, env := serve(t)
	aws := func(args ...string) (string, error) {
		t.Helper()
		env := env
		for _, e := range env {
			if url, ok := strings.CutPrefix(e, "ENDPOINT="); ok {
				args = append([]string{"--endpoint-url", url}, args...)
			}
		}
		cmd := exec.CommandContext(t.Context(), "/usr/bin/aws", args...)
		cmd.Env = env
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.Output()
		text := strings.TrimSpace(string(out) + errs.String())
		t.Logf("aws %s\n%s", strings.Join(args[2:], " "), text)
		return text, err
	}
	must := func(want string, args ...string) string {
		t.Helper()
		out, err := aws(args...)
		if err != nil || want != "" && out != want {
			t.Fatalf("aws %v: %v %q, want %q", args, err, out, want)
		}
		return out
	}
	refused := func(code string, args ...string) {
		t.Helper()
		if out, err := aws(args...); err == nil || !strings.Contains(out, "("+code+")") {
			t.Errorf("aws %v: %v %q, want %s", args, err, out, code)
		}
	}
	must(fakeec2.DefaultAccount, "sts", "get-caller-identity", "--query", "Account")
	must("m6a.large\t2\t8192", "ec2", "describe-instance-types", "--instance-types", "m6a.large", "--query", "InstanceTypes[].[InstanceType,VCpuInfo.DefaultVCpus,MemoryInfo.SizeInMiB]")
	run := []string{"ec2", "run-instances", "--image-id", fakeec2.DefaultImage, "--instance-type", "m6a.large", "--client-token", "cli", "--user-data", "hello",
		"--network-interfaces", "DeviceIndex=0,SubnetId=" + fakeec2.DefaultSubnet + ",Groups=" + fakeec2.DefaultSecurityGroup + ",DeleteOnTermination=true",
		"--metadata-options", "HttpTokens=required,HttpPutResponseHopLimit=1", "--instance-initiated-shutdown-behavior", "terminate",
		"--block-device-mappings", "DeviceName=/dev/xvda,Ebs={VolumeSize=6,Encrypted=true,VolumeType=gp3}",
		"--tag-specifications", "ResourceType=instance,Tags=[{Key=owner,Value=cli}]", "ResourceType=volume,Tags=[{Key=owner,Value=cli}]",
		"ResourceType=network-interface,Tags=[{Key=owner,Value=cli}]", "--query", "Instances[].InstanceId"}
	id := must("", run...)
	must(id, run...)
	refused("IdempotentParameterMismatch", append(run, "--key-name", fakeec2.DefaultKeyPair)...)
	must("", "ec2", "wait", "instance-running", "--instance-ids", id)
	must("required\t1\tcli", "ec2", "describe-instances", "--filters", "Name=tag:owner,Values=c?i", "--query",
		"Reservations[].Instances[].[MetadataOptions.HttpTokens,MetadataOptions.HttpPutResponseHopLimit,ClientToken]")
	must("6\tTrue\tgp3", "ec2", "describe-volumes", "--filters", "Name=attachment.instance-id,Values="+id, "--query", "Volumes[].[Size,Encrypted,VolumeType]")
	must("aGVsbG8=", "ec2", "describe-instance-attribute", "--instance-id", id, "--attribute", "userData", "--query", "UserData.Value")
	must("True", "ec2", "authorize-security-group-ingress", "--group-id", fakeec2.DefaultSecurityGroup, "--protocol", "udp", "--port", "9000",
		"--source-group", fakeec2.DefaultSecurityGroup, "--query", "Return")
	refused("InvalidPermission.Duplicate", "ec2", "authorize-security-group-ingress", "--group-id", fakeec2.DefaultSecurityGroup, "--protocol", "udp", "--port", "9000",
		"--source-group", fakeec2.DefaultSecurityGroup)
	refused("DryRunOperation", "ec2", "terminate-instances", "--instance-ids", id, "--dry-run")
	refused("InvalidInstanceID.NotFound", "ec2", "terminate-instances", "--instance-ids", "i-00000000000000000")
	must("shutting-down", "ec2", "terminate-instances", "--instance-ids", id, "--query", "TerminatingInstances[].CurrentState.Name")
	must("", "ec2", "wait", "instance-terminated", "--instance-ids", id)
	if l := s.Leaks(nil); len(l) > 0 {
		t.Errorf("left behind: %v", l)
	}
}
