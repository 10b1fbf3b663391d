// SPDX-License-Identifier: Apache-2.0

//go:build crosscheck

package azure

import (
	"bytes"
	"encoding/pem"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

// TestJavaScript has the vendor's JavaScript clients ask the emulation, which was
// written with the Go ones. `make cross-check` installs them and names their folder in
// CROSSCHECK_AZURE.
func TestJavaScript(t *testing.T) {
	dir := os.Getenv("CROSSCHECK_AZURE")
	if dir == "" {
		t.Fatal("CROSSCHECK_AZURE is not set: run `make cross-check`")
	}
	cfg := fakearm.Config{PageSize: 2, Dir: t.TempDir(),
		Timing: fakearm.Timing{Start: 50 * time.Millisecond, Create: 200 * time.Millisecond, Fail: 200 * time.Millisecond, Delete: 100 * time.Millisecond,
			Power: 100 * time.Millisecond, Update: 100 * time.Millisecond, Other: 50 * time.Millisecond, Replicate: 200 * time.Millisecond,
			ListLag: -1, IndexLag: -1, Reserve: -1, RetryAfter: -1}}
	image := cfg.ImageID("", "", "1.0.0")
	cfg.Images = []fakearm.Image{{ID: image, SecurityType: "TrustedLaunchSupported"},
		{ID: "/CommunityGalleries/others-1234/Images/podvm/Versions/2.0.0", SecurityType: "ConfidentialVmSupported"}}
	s := fakearm.New(cfg)
	defer s.Close()
	s.SetCapacity("Standard_D8as_v5", "", false, 0)
	s.Inject(fakearm.Fault{Method: "GET", Type: "Microsoft.Compute/disks", Name: "js1-disk", Status: 429, Code: "TooManyRequests", RetryAfter: time.Second})
	srv := httptest.NewTLSServer(s)
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
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
	cmd.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+ca, "ENDPOINT="+srv.URL, "SUBSCRIPTION="+fakearm.DefaultSubscription, "TENANT="+fakearm.DefaultTenant,
		"CLIENT="+fakearm.DefaultClient, "SECRET="+fakearm.DefaultSecret, "IMAGE="+image, "SUBNET="+cfg.SubnetID(fakearm.Subnet{}), "NSG="+cfg.SecurityGroupID(""))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	t.Logf("\n%s", out.Bytes())
	if err != nil {
		t.Fatalf("the client: %v", err)
	}
	asked := 0
	for _, r := range s.Requests() {
		if strings.HasPrefix(r, "GET ") && strings.HasSuffix(r, "/disks/js1-disk") {
			asked++
		}
	}
	if asked != 2 {
		t.Errorf("the client asked %d times for the disk, want 2: a 429 and what came after it", asked)
	}
	if l := s.Leaks(nil); len(l) > 0 {
		t.Errorf("left behind: %q", l)
	}
}
