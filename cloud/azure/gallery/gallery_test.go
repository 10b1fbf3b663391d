// SPDX-License-Identifier: Apache-2.0

package gallery_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
	"github.com/kata-remote/kata-remote/cloud/azure/gallery"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
	"github.com/kata-remote/kata-remote/cloud/diskimage/diskimagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const cluster = "cluster-1"

type object = map[string]any

// world is an emulation; at its end everything of ours must be prunable.
type world struct {
	*testing.T
	arm  *fakearm.Server
	acct *azure.Account
	dir  string // where uploads come to be files
}

func inWorld(t *testing.T, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{T: t, dir: t.TempDir()}
		cfg := fakearm.Config{Dir: w.dir}
		cfg.Principals = []fakearm.Principal{{Client: fakearm.DefaultClient, Secret: fakearm.DefaultSecret}}
		for name, actions := range map[string][]string{"publish": gallery.PublishActions, "prune": gallery.PruneActions} {
			cfg.Principals = append(cfg.Principals, fakearm.Principal{Client: name, Secret: fakearm.DefaultSecret, Actions: actions})
			for _, a := range actions {
				cfg.Principals = append(cfg.Principals, fakearm.Principal{Client: name + " but " + a, Secret: fakearm.DefaultSecret, Actions: actions, NotActions: []string{a}})
			}
		}
		w.arm = fakearm.New(cfg)
		t.Cleanup(w.arm.Close)
		w.acct = w.account(fakearm.DefaultClient)
		f(w)
		w.arm.Heal()
		time.Sleep(72 * time.Hour) // of the bubble: what is abandoned is old enough
		if _, err := gallery.Prune(t.Context(), w.acct, gallery.PruneRequest{Cluster: cluster}); err != nil {
			t.Error(err)
		}
		for _, l := range w.arm.Leaks(nil) {
			t.Errorf("left behind: %s", l)
		}
	})
}

func (w *world) account(client string) *azure.Account {
	w.Helper()
	c := w.arm.Config()
	a, err := azure.NewAccount(azure.Config{SubscriptionID: c.Subscription, Region: c.Region, ResourceGroup: c.Groups[0],
		Credentials: azure.Credentials{TenantID: c.Tenant, ClientID: client, ClientSecret: fakearm.DefaultSecret},
		Endpoint:    "https://arm.test", AuthorityHost: "https://login.test", Transport: &http.Client{Transport: w.arm.Transport()}})
	if err != nil {
		w.Fatal(err)
	}
	return a
}

func (w *world) open(seed byte, blocks ...int) *diskimage.Image {
	w.Helper()
	return w.openDir(diskimagetest.Write(w.T, seed, blocks...))
}

func (w *world) openDir(dir string) *diskimage.Image {
	w.Helper()
	i, err := diskimage.Open(w.Context(), dir, diskimage.VHD)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { i.Close() })
	return i
}

func (w *world) publish(i *diskimage.Image) diskimage.Published {
	w.Helper()
	p, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: i, Cluster: cluster})
	if err != nil {
		w.Fatal(err)
	}
	return p
}

// ours: the versions there are, and no disk.
func (w *world) ours(want ...string) {
	w.Helper()
	time.Sleep(10 * time.Second)
	got := w.arm.Leaks(map[string]string{cloud.TagCluster: cluster})
	want = slices.Sorted(slices.Values(want))
	if !slices.EqualFunc(got, want, strings.EqualFold) {
		w.Errorf("there are %q, want %q", got, want)
	}
}

// all is what an image without empty blocks has, and the VHD's footer.
var all = int64(len(diskimagetest.Blocks))*512<<10 + 512

// TestPublish: the version is the disk, and says what it needs; twice is once.
func TestPublish(t *testing.T) {
	inWorld(t, func(w *world) {
		image := w.open(1)
		var steps []string
		var last diskimage.Progress
		p, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: image, Cluster: cluster, Tags: map[string]string{"team": "blue"}, Progress: func(p diskimage.Progress) {
			if steps = append(steps, p.Step); p.Step == "upload" {
				last = p
			}
		}})
		if err != nil || p.Existed || p.Sent != all || p.Skipped != 0 || last.Done != all || last.Total != all {
			w.Fatalf("%+v, %+v, %v", p, last, err)
		}
		if steps = slices.Compact(steps); !slices.Equal(steps, []string{"find", "prepare", "upload", "complete", "register"}) {
			w.Errorf("steps %q", steps)
		}
		if !strings.Contains(p.ID, "/galleries/PodVMGallery_cluster_1/images/podvm-x64/versions/2000.101.") || !strings.HasPrefix(p.Name, "PodVMGallery_cluster_1/podvm-x64/2000.") {
			w.Errorf("%+v", p)
		}
		var v, def object
		for path, into := range map[string]*object{p.ID: &v, p.ID[:strings.Index(p.ID, "/versions/")]: &def} {
			if err := w.acct.Get(w.Context(), path, azure.APIGallery, into); err != nil {
				w.Fatal(err)
			}
		}
		if tags := fmt.Sprint(v["tags"]); !strings.Contains(tags, image.Tag()) || !strings.Contains(tags, "team:blue") || !strings.Contains(tags, "image-version:6.1.0-test") {
			w.Errorf("tags %s", tags)
		}
		if d := fmt.Sprint(def["properties"]); !strings.Contains(d, "TrustedLaunchAndConfidentialVmSupported") || !strings.Contains(d, "hyperVGeneration:V2") || !strings.Contains(d, "architecture:x64") {
			w.Errorf("definition %s", d)
		}
		files, _ := filepath.Glob(w.dir + "/*/*")
		if len(files) != 1 {
			w.Fatalf("files %q", files)
		}
		if disk, err := os.ReadFile(files[0]); err != nil || !bytes.Equal(disk, diskimagetest.Disk(1)) {
			w.Errorf("the version is not the disk: %v", err)
		}
		if again := w.publish(image); again.ID != p.ID || !again.Existed || again.Sent != 0 {
			w.Errorf("once more: %+v, first %s", again, p.ID)
		}
		w.ours(p.ID)
	})
}

// TestResume: a publication that ends at any request is gone on with by the next, and
// pages that the blob has are not sent again.
func TestResume(t *testing.T) {
	const disks, vers = "Microsoft.Compute/disks", "Microsoft.Compute/galleries/images/versions"
	for _, c := range []struct {
		name  string
		fault fakearm.Fault
		least int64 // skipped
	}{
		{"gallery", fakearm.Fault{Method: "PUT", Type: "Microsoft.Compute/galleries"}, 0},
		{"definition", fakearm.Fault{Method: "PUT", Type: "Microsoft.Compute/galleries/images"}, 0},
		{"disk", fakearm.Fault{Method: "PUT", Type: disks}, 0},
		{"URL", fakearm.Fault{Method: "POST", Type: disks}, 0},
		{"first pages", fakearm.Fault{Method: "PUT", Type: "blob"}, 0},
		{"some pages", fakearm.Fault{Method: "PUT", Type: "blob", Skip: 12}, 4 * 512 << 10},
		{"end of the upload", fakearm.Fault{Method: "POST", Type: disks, Skip: 1}, all},
		{"version", fakearm.Fault{Method: "PUT", Type: vers}, 0},
		{"removal of the disk", fakearm.Fault{Method: "DELETE", Type: disks}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				image := w.open(2)
				c.fault.Status, c.fault.Code, c.fault.Message, c.fault.Count = 400, "StoppedHere", "stopped here", -1
				w.arm.Inject(c.fault)
				if _, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: image, Cluster: cluster}); err == nil || !strings.Contains(err.Error(), "stopped here") {
					w.Fatalf("%v", err)
				}
				w.arm.Heal()
				time.Sleep(10 * time.Second) // beyond the lag of lists
				p := w.publish(image)
				late := c.name == "version" || c.name == "removal of the disk"
				if p.Skipped < c.least || !late && p.Sent+p.Skipped != all || late && p.Sent != 0 || p.Existed != (c.name == "removal of the disk") {
					w.Errorf("%+v; want at least %d skipped of %d", p, c.least, all)
				}
				w.ours(p.ID)
			})
		})
	}
}

// TestInterrupted: who presses Ctrl-C in the middle loses nothing.
func TestInterrupted(t *testing.T) {
	inWorld(t, func(w *world) {
		image := w.open(3)
		ctx, cancel := context.WithCancel(w.Context())
		_, err := gallery.Publish(ctx, w.acct, gallery.Request{Image: image, Cluster: cluster, Progress: func(p diskimage.Progress) {
			if p.Done >= 10*512<<10 {
				cancel()
			}
		}})
		if err == nil || !strings.Contains(err.Error(), context.Canceled.Error()) {
			w.Fatalf("%v", err)
		}
		time.Sleep(30 * time.Hour) // the URL is not good any more
		p := w.publish(image)
		if p.Skipped < 10*512<<10 || p.Sent+p.Skipped != all {
			w.Errorf("%+v", p)
		}
		w.ours(p.ID)
	})
}

// TestTrouble: throttles, outages and lost replies are no matter; an operation that fails
// at its end is said.
func TestTrouble(t *testing.T) {
	inWorld(t, func(w *world) {
		for _, f := range []fakearm.Fault{
			{Method: "PUT", Type: "Microsoft.Compute/galleries", Lost: true},
			{Method: "PUT", Type: "Microsoft.Compute/disks", Status: 429, Code: "TooManyRequests", RetryAfter: 30 * time.Second, Count: 2},
			{Method: "POST", Type: "Microsoft.Compute/disks", Status: 503, Code: "ServerBusy", Count: 2},
			{Method: "PUT", Type: "blob", Skip: 5, Status: 503, Code: "ServerBusy", Count: 5},
			{Method: "PUT", Type: "blob", Lost: true, Count: 2},
			{Method: "PUT", Type: "Microsoft.Compute/galleries/images/versions", Lost: true},
			{Method: "DELETE", Type: "Microsoft.Compute/disks", Lost: true},
		} {
			w.arm.Inject(f)
		}
		w.ours(w.publish(w.open(4)).ID)

		image := w.open(5, 3)
		w.arm.Inject(fakearm.Fault{Method: "PUT", Type: "Microsoft.Compute/galleries/images/versions", AtEnd: true, Status: 409, Code: "ReplicationFailed", Message: "no replica"})
		if _, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: image, Cluster: cluster}); err == nil || !strings.Contains(err.Error(), "ReplicationFailed: no replica") {
			w.Errorf("%v", err)
		}
		time.Sleep(10 * time.Second)
		if p := w.publish(image); p.Existed || p.Sent != 0 {
			w.Errorf("after a version that failed: %+v", p)
		}
	})
}

// TestSecretURL: the URL for the upload lets anybody write, so no error shows it.
func TestSecretURL(t *testing.T) {
	inWorld(t, func(w *world) {
		image := w.open(8, 3)
		for _, f := range []fakearm.Fault{{Type: "blob", Lost: true, Count: -1}, {Type: "blob", Status: 403, Code: "AuthenticationFailed", Count: -1}} {
			w.arm.Inject(f)
			_, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: image, Cluster: cluster})
			if err == nil || strings.Contains(err.Error(), "sig=") || strings.Contains(err.Error(), "/blob/") {
				w.Errorf("%v", err)
			}
			w.arm.Heal()
		}
	})
}

// TestMistakes: what is damaged, or in the way, is refused.
func TestMistakes(t *testing.T) {
	inWorld(t, func(w *world) {
		dir := diskimagetest.Write(w.T, 6)
		image, err := diskimage.Open(w.Context(), dir, diskimage.VHD)
		if err != nil {
			w.Fatal(err)
		}
		defer image.Close()
		f, err := os.OpenFile(filepath.Join(dir, "disk.vhd"), os.O_WRONLY, 0)
		if err != nil {
			w.Fatal(err)
		}
		f.WriteAt([]byte{0x55}, 11<<20)
		f.Close()
		if _, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: image, Cluster: cluster}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "damaged") {
			w.Errorf("changed after it was opened: %v", err)
		}
		group, _ := w.acct.Group()
		path := group + "/providers/Microsoft.Compute/galleries/old"
		for _, step := range []struct {
			path string
			body object
		}{{path, object{}}, {path + "/images/podvm-x64", object{"osType": "Linux", "osState": "Generalized", "hyperVGeneration": "V1", "identifier": object{"publisher": "p", "offer": "o", "sku": "s"}}}} {
			if err := w.acct.Put(w.Context(), step.path, azure.APIGallery, object{"location": w.acct.Region(), "properties": step.body}); err != nil {
				w.Fatal(err)
			}
		}
		other := w.open(7, 3)
		if _, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: other, Cluster: cluster, Gallery: "old"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "generation V1") {
			w.Errorf("a definition of generation 1: %v", err)
		}
		if _, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: other, Gallery: "not-good"}); !errdefs.IsInvalidArgument(err) {
			w.Errorf("a wrong name: %v", err)
		}
	})
}

// TestPrune: what is used, named or new stays.
func TestPrune(t *testing.T) {
	inWorld(t, func(w *world) {
		var ids []string
		for seed := range byte(5) {
			ids = append(ids, w.publish(w.open(10+seed, 3)).ID)
		}
		group, _ := w.acct.Group()
		vm := group + "/providers/Microsoft.Compute/virtualMachines/user"
		sub := w.arm.Config().SubnetID(fakearm.Subnet{})
		if err := w.acct.Put(w.Context(), vm, azure.APIVM, object{"location": w.acct.Region(), "properties": object{"hardwareProfile": object{"vmSize": "Standard_D2as_v5"},
			"storageProfile": object{"imageReference": object{"id": ids[0]}, "osDisk": object{"name": "user-disk", "createOption": "FromImage", "deleteOption": "Delete"}},
			"osProfile": object{"computerName": "user", "adminUsername": "core", "linuxConfiguration": object{"disablePasswordAuthentication": true, "ssh": object{"publicKeys": []any{
				object{"path": "/home/core/.ssh/authorized_keys", "keyData": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f pods"}}}}},
			"networkProfile": object{"networkApiVersion": "2022-11-01", "networkInterfaceConfigurations": []any{object{"name": "nic", "properties": object{"primary": true, "deleteOption": "Delete",
				"ipConfigurations": []any{object{"name": "ip", "properties": object{"subnet": object{"id": sub}}}}}}}}}}); err != nil {
			w.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		want := map[string]string{ids[0]: "used by virtual machine user", ids[1]: "AZURE_IMAGE_ID", ids[2]: "old", ids[3]: "old", ids[4]: "newest 1"}
		for _, dry := range []bool{true, false} {
			out, err := gallery.Prune(w.Context(), w.acct, gallery.PruneRequest{Cluster: cluster, Configured: strings.ToUpper(ids[1]), Keep: 1, DryRun: dry})
			if err != nil || len(out) != 5 {
				w.Fatalf("%+v, %v", out, err)
			}
			for _, p := range out {
				if !strings.Contains(p.Reason, want[p.ID]) || p.Removed != (want[p.ID] == "old") {
					w.Errorf("dry run %t: %+v, want %q", dry, p, want[p.ID])
				}
			}
			if dry {
				w.ours(ids...)
			}
		}
		w.ours(ids[0], ids[1], ids[4])
		if err := w.acct.Delete(w.Context(), vm, azure.APIVM); err != nil {
			w.Fatal(err)
		}
	})
}

// TestActions: the tables are enough, and nothing in them is too much.
func TestActions(t *testing.T) {
	one, two := diskimagetest.Write(t, 20, 3), diskimagetest.Write(t, 21, 3)
	for _, a := range append(slices.Clone(gallery.PublishActions), "") {
		inWorld(t, func(w *world) {
			client := "publish but " + a
			if a == "" {
				client = "publish"
			}
			_, err := gallery.Publish(w.Context(), w.account(client), gallery.Request{Image: w.openDir(one), Cluster: cluster})
			w.refused(a, err)
		})
	}
	for _, a := range append(slices.Clone(gallery.PruneActions), "") {
		inWorld(t, func(w *world) {
			w.publish(w.openDir(one))
			// Beside it, an upload that was left.
			w.arm.Inject(fakearm.Fault{Method: "PUT", Type: "blob", Status: 400, Code: "StoppedHere"})
			if _, err := gallery.Publish(w.Context(), w.acct, gallery.Request{Image: w.openDir(two), Cluster: cluster}); err == nil {
				w.Error("no error")
			}
			time.Sleep(72 * time.Hour)
			client := "prune but " + a
			if a == "" {
				client = "prune"
			}
			_, err := gallery.Prune(w.Context(), w.account(client), gallery.PruneRequest{Cluster: cluster})
			w.refused(a, err)
		})
	}
}

// refused: without an action the error names it; "": all are there.
func (w *world) refused(action string, err error) {
	w.Helper()
	if action == "" && err != nil {
		w.Error(err)
	}
	if action != "" && (!errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), action)) {
		w.Errorf("without %s: %v", action, err)
	}
}
