// SPDX-License-Identifier: Apache-2.0

//go:build crosscheck

package aws

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/test/guide"
)

// TestGuide types the commands of docs/aws.md that are the AWS CLI's into a shell that
// has it: those of IAM meet moto, those of EC2 the emulation.
func TestGuide(t *testing.T) {
	blocks, err := guide.Blocks(filepath.Join("..", "..", "..", "docs", "aws.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, env := serve(t)
	moto := startMoto(t)
	endpoint := ""
	for _, e := range env {
		if url, ok := strings.CutPrefix(e, "ENDPOINT="); ok {
			endpoint = url
		}
	}
	dir := t.TempDir()
	for _, b := range blocks {
		if b.Is("json policy") {
			if err := os.WriteFile(filepath.Join(dir, "peer-pods-policy.json"), []byte(b.Text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for info, url := range map[string]string{"sh iam": moto, "sh aws": endpoint} {
		ran := 0
		for _, b := range blocks {
			if !b.Is(info) {
				continue
			}
			ran++
			cmd := exec.CommandContext(t.Context(), "bash", "-euc", "aws() { /usr/bin/aws --endpoint-url "+url+" \"$@\"; }\n"+b.Text)
			cmd.Dir, cmd.Env = dir, append([]string{"ACCOUNT=" + fakeec2.DefaultAccount}, env...)
			out, err := cmd.CombinedOutput()
			t.Logf("%v\n%s", b, out)
			if err != nil {
				t.Errorf("%v: %v", b, err)
			}
		}
		if ran == 0 {
			t.Errorf("docs/aws.md has no block %q", info)
		}
	}
}
