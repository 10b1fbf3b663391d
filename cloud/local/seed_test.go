// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kdomanski/iso9660"

	ours "github.com/kata-remote/kata-remote/cloud/iso9660"
)

// TestSeedImage reads the image with somebody else's code.
func TestSeedImage(t *testing.T) {
	files := map[string][]byte{
		"user-data": bytes.Repeat([]byte("x"), 3*2048+1), "meta-data": []byte("instance-id: a\n"), "network-config": {},
	}
	img, err := ours.Image(seedLabel, files, time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	iso, err := iso9660.OpenImage(bytes.NewReader(img))
	if err != nil {
		t.Fatal(err)
	}
	if label, err := iso.Label(); err != nil || label != seedLabel {
		t.Errorf("label %q, %v", label, err)
	}
	root, err := iso.RootDir()
	if err != nil {
		t.Fatal(err)
	}
	children, err := root.GetChildren()
	if err != nil {
		t.Fatal(err)
	}
	if len(children) != len(files) {
		t.Errorf("%d files, want %d", len(children), len(files))
	}
	for _, c := range children {
		got, err := io.ReadAll(c.Reader())
		if err != nil {
			t.Fatal(err)
		}
		if want, ok := files[c.Name()]; !ok || !bytes.Equal(got, want) {
			t.Errorf("file %q: %d bytes, want %d", c.Name(), len(got), len(want))
		}
		if y := c.ModTime().Year(); y != 2026 {
			t.Errorf("file %q is of %d", c.Name(), y)
		}
	}
}

// TestSeedLabel asks blkid, which guests with udev use to find the seed.
func TestSeedLabel(t *testing.T) {
	img, err := ours.Image(seedLabel, map[string][]byte{"user-data": []byte("#cloud-config\n")}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "seed.iso")
	if err := os.WriteFile(path, img, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("blkid", "-p", "-o", "export", path).CombinedOutput()
	if err != nil {
		t.Fatalf("blkid: %v: %s", err, out)
	}
	for _, want := range []string{"LABEL=cidata\n", "TYPE=iso9660\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("blkid does not say %q:\n%s", want, out)
		}
	}
}
