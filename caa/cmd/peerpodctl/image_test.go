// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/diskimage/diskimagetest"
)

// kubectl puts a stand-in into the PATH that keeps the ConfigMap in a file, and takes
// only what kubectl patch would. It returns the file.
func kubectl(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	script := `#!/bin/sh
if [ "$1 $2 $3 $4" != "patch configmap peer-pods-cm --namespace" ] || [ "$6 $7 $8" != "--type merge --patch" ] || [ $# != 9 ]; then
	echo "error: unknown command: $*" >&2; exit 1
fi
if [ "$5" = forbidden ]; then
	echo 'Error from server (Forbidden): configmaps "peer-pods-cm" is forbidden' >&2; exit 1
fi
echo "$5 $9" >> ` + state + `
echo "configmap/peer-pods-cm patched"
`
	if err := os.WriteFile(filepath.Join(dir, "kubectl"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return state
}

var (
	amiID   = regexp.MustCompile(`ami-[0-9a-f]{17}`)
	instant = regexp.MustCompile(`2[0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z`)
	version = regexp.MustCompile(`[0-9]{4}\.[0-9]{3,4}\.[0-9]{1,6}`)
	partly  = regexp.MustCompile(`(?m)^uploading: .*\([0-9]{1,2} %\)\n`) // as many as time allows
	row     = regexp.MustCompile(`(?m)^(IMAGE|ami-|/subscriptions).*$`)  // whose columns are as wide as what is in them
	gap     = regexp.MustCompile(` {2,}`)
)

// settled is a session without what is another each time.
func settled(s, dir string) string {
	s = strings.ReplaceAll(s, dir, "_output/podvm")
	s = partly.ReplaceAllString(s, "")
	s = amiID.ReplaceAllString(s, "ami-0123456789abcdef0")
	s = instant.ReplaceAllString(s, "2026-11-22T02:00:00Z")
	s = version.ReplaceAllString(s, "2026.1122.20000")
	return row.ReplaceAllStringFunc(s, func(r string) string { return gap.ReplaceAllString(r, "  ") })
}

func TestImageAWS(t *testing.T) {
	s := awsAccount(t, map[string]string{"CLUSTER_NAME": "blue"})
	state, dir := kubectl(t), diskimagetest.Write(t, 1)
	golden(t, "image-aws", settled(session(t,
		"image publish --help",
		"image publish aws --image "+dir,
		"image publish aws --image "+dir+" --update-config",
		"image prune --help",
		"image prune aws",
		"image prune aws --keep 0 --dry-run",
		"image publish aws --image "+dir+" --update-config --namespace forbidden",
	), dir))
	set, err := os.ReadFile(state)
	image := s.Leaks(map[string]string{cloud.TagCluster: "blue"})
	if err != nil || string(set) != `openshift-sandboxed-containers-operator {"data":{"PODVM_AMI_ID":"`+image[1].ID+"\"}}\n" {
		t.Errorf("the ConfigMap: %s %v, images %v", set, err, image)
	}
	out, err := execute(t, "image", "prune", "aws", "--keep", "0", "-o", "json")
	var v prunedView
	if err != nil || json.Unmarshal([]byte(out), &v) != nil || len(v.Images) != 1 || !v.Images[0].Removed || v.Images[0].ID != image[1].ID {
		t.Errorf("%v: %s", err, out)
	}
	if l := s.Leaks(map[string]string{cloud.TagCluster: "blue"}); len(l) != 0 {
		t.Errorf("left behind: %v", l)
	}
}

func TestImageAzure(t *testing.T) {
	s := azureAccount(t, nil)
	state, dir := kubectl(t), diskimagetest.Write(t, 1, 3)
	golden(t, "image-azure", settled(session(t,
		"image publish azure --image "+dir+" --update-config --namespace pods",
		"image publish azure --image "+dir,
		"image prune azure --keep 0 --dry-run",
	), dir))
	set, err := os.ReadFile(state)
	if err != nil || !regexp.MustCompile(`^pods {"data":{"AZURE_IMAGE_ID":"/subscriptions/.*/galleries/PodVMGallery/images/podvm-x64/versions/[0-9.]+"}}\n$`).Match(set) {
		t.Errorf("the ConfigMap: %s, %v", set, err)
	}
	if out, err := execute(t, "image", "prune", "azure", "--keep", "0"); err != nil || len(s.Leaks(nil)) != 0 {
		t.Errorf("%v: %s; left behind: %q", err, out, s.Leaks(nil))
	}
}

// TestPublishJSON: the keys are a promise.
func TestPublishJSON(t *testing.T) {
	awsAccount(t, nil)
	out, err := execute(t, "image", "publish", "aws", "--image", diskimagetest.Write(t, 2, 3), "-o", "json")
	if i := strings.Index(out, "{"); i >= 0 {
		out = out[i:] // after the progress
	}
	var v map[string]any
	if err != nil || json.Unmarshal([]byte(out), &v) != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, k := range []string{"id", "name", "digest", "version", "existed", "sentBytes", "skippedBytes", "key", "updated"} {
		if _, ok := v[k]; !ok {
			t.Errorf("no %q in %s", k, out)
		}
	}
}

func TestImageExitCodes(t *testing.T) {
	s := awsAccount(t, nil)
	dir := diskimagetest.Write(t, 3, 3)
	empty := t.TempDir()
	interrupted, cancel := context.WithCancel(t.Context())
	cancel()
	denied := fakeec2.DefaultKey
	denied.Deny = []string{"ec2:RegisterImage"}
	for _, c := range []struct {
		args []string
		ctx  context.Context
		want int
	}{
		{[]string{"image"}, t.Context(), exitUsage},
		{[]string{"image", "publish"}, t.Context(), exitUsage},
		{[]string{"image", "publish", "local"}, t.Context(), exitUsage},
		{[]string{"image", "publish", "aws", "-o", "table"}, t.Context(), exitUsage},
		{[]string{"image", "prune", "aws", "--keep", "-1"}, t.Context(), exitUsage},
		{[]string{"image", "publish", "aws", "--image", empty}, t.Context(), exitFailed},
		{[]string{"image", "publish", "aws", "--image", dir}, interrupted, exitInterrupted},
		{[]string{"image", "publish", "aws", "--image", dir}, t.Context(), exitFailed}, // denied
	} {
		if c.want == exitFailed {
			s.SetKey(denied)
		}
		if got := run(c.ctx, c.args); got != c.want {
			t.Errorf("peerpodctl %v: exit %d, want %d", c.args, got, c.want)
		}
	}
	t.Setenv("PATH", empty)
	_, err := execute(t, "image", "publish", "aws", "--image", dir, "--update-config")
	if err == nil || !strings.Contains(err.Error(), "install kubectl") {
		t.Errorf("without kubectl: %v", err)
	}
}
