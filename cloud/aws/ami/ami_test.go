// SPDX-License-Identifier: Apache-2.0

package ami_test

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/aws"
	"github.com/kata-remote/kata-remote/cloud/aws/ami"
	"github.com/kata-remote/kata-remote/cloud/aws/fakeec2"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
	"github.com/kata-remote/kata-remote/cloud/diskimage/diskimagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const cluster = "cluster-1"

// region is an emulation; at its end everything of ours must be prunable.
type region struct {
	*fakeec2.Server
	*testing.T
	api  *ec2.Client
	acct *aws.Account
	dir  string // where uploads come to be files
}

func inRegion(t *testing.T, f func(r *region)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &region{T: t, dir: t.TempDir()}
		r.Server = fakeec2.New(fakeec2.Config{MaxLag: 3 * time.Second, ImageDir: r.dir})
		hc := &http.Client{Transport: r.Transport()}
		var err error
		r.acct, err = aws.NewAccount(aws.Config{Region: fakeec2.DefaultRegion, HTTPClient: hc,
			Keys: aws.Keys{AccessKeyID: fakeec2.DefaultKey.ID, SecretAccessKey: aws.Secret(fakeec2.DefaultKey.Secret)}})
		if err != nil {
			t.Fatal(err)
		}
		r.api = ec2.New(ec2.Options{Region: fakeec2.DefaultRegion, HTTPClient: hc,
			Credentials: credentials.NewStaticCredentialsProvider(fakeec2.DefaultKey.ID, fakeec2.DefaultKey.Secret, "")})
		f(r)
		r.ClearFaults()
		r.SetKey(fakeec2.DefaultKey)
		time.Sleep(48 * time.Hour) // of the bubble: what is abandoned is old enough
		for _, c := range []string{cluster, ""} {
			if _, err := ami.Prune(t.Context(), r.acct, ami.PruneRequest{Cluster: c}); err != nil {
				t.Error(err)
			}
		}
		for _, l := range r.Leaks(nil) {
			if _, ours := l.Tags[cloud.TagImage]; ours {
				t.Errorf("left behind: %v", l)
			}
		}
	})
}

func (r *region) open(seed byte, blocks ...int) *diskimage.Image {
	r.Helper()
	i, err := diskimage.Open(r.Context(), diskimagetest.Write(r.T, seed, blocks...), diskimage.Raw)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { i.Close() })
	return i
}

func (r *region) publish(i *diskimage.Image) diskimage.Published {
	r.Helper()
	p, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: i, Cluster: cluster})
	if err != nil {
		r.Fatal(err)
	}
	return p
}

// all is what an image without empty blocks has.
var all = int64(len(diskimagetest.Blocks)) * 512 << 10

// TestPublish: what is registered is the disk, and says what it needs; twice is once.
func TestPublish(t *testing.T) {
	inRegion(t, func(r *region) {
		image := r.open(1)
		var steps []string
		var last diskimage.Progress
		p, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: image, Cluster: cluster, Tags: map[string]string{"team": "blue"}, Progress: func(p diskimage.Progress) {
			if steps = append(steps, p.Step); p.Step == "upload" {
				last = p
			}
		}})
		if err != nil || p.Existed || p.Sent != all || p.Skipped != 0 || last.Done != all || last.Total != all {
			r.Fatalf("%+v, %+v, %v", p, last, err)
		}
		if steps = slices.Compact(steps); !slices.Equal(steps, []string{"find", "upload", "complete", "register"}) {
			r.Errorf("steps %q", steps)
		}
		out, err := r.api.DescribeImages(r.Context(), &ec2.DescribeImagesInput{ImageIds: []string{p.ID}})
		if err != nil {
			r.Fatal(err)
		}
		i := out.Images[0]
		tags := map[string]string{}
		for _, t := range i.Tags {
			tags[*t.Key] = *t.Value
		}
		if i.BootMode != types.BootModeValuesUefi || !*i.EnaSupport || i.ImdsSupport != types.ImdsSupportValuesV20 || i.Architecture != "x86_64" ||
			tags[cloud.TagImage] != image.Tag() || tags[cloud.TagCluster] != cluster || tags["team"] != "blue" || tags[cloud.TagImage+"-version"] != "6.1.0-test" {
			r.Errorf("%+v %v", i, tags)
		}
		disk, err := os.ReadFile(filepath.Join(r.dir, *i.BlockDeviceMappings[0].Ebs.SnapshotId+".raw"))
		if want := diskimagetest.Disk(1); err != nil || !bytes.Equal(disk[:len(want)], want) {
			r.Errorf("the snapshot is not the disk: %v", err)
		}
		if again := r.publish(image); again.ID != p.ID || !again.Existed || again.Sent != 0 {
			r.Errorf("once more: %+v, first %s", again, p.ID)
		}
		other, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: image})
		if err != nil || other.ID == p.ID {
			r.Errorf("for no cluster: %+v, %v", other, err)
		}
	})
}

// TestResume: a publication that ends at any call is gone on with by the next, in the
// same snapshot, and what was noted is not sent again.
func TestResume(t *testing.T) {
	gone := &fakeec2.Error{Status: 403, Code: "OperationNotPermitted", Message: "stopped here"}
	for _, c := range []struct {
		name    string
		fault   fakeec2.Fault
		skipped int64
	}{
		{"before the snapshot", fakeec2.Fault{Action: "StartSnapshot", Err: gone}, 0},
		{"in the first batch", fakeec2.Fault{Action: "PutSnapshotBlock", Skip: 10, Err: gone}, 0},
		{"in the second batch", fakeec2.Fault{Action: "PutSnapshotBlock", Skip: 18, Err: gone}, 16 * 512 << 10},
		{"at completion", fakeec2.Fault{Action: "CompleteSnapshot", Err: gone}, all},
		{"at registration", fakeec2.Fault{Action: "RegisterImage", Err: gone}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			inRegion(t, func(r *region) {
				image := r.open(2)
				r.Inject(c.fault)
				if _, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: image, Cluster: cluster}); err == nil {
					r.Fatal("no error")
				}
				r.ClearFaults()
				time.Sleep(5 * time.Second) // beyond the lag
				p := r.publish(image)
				if p.Existed || p.Skipped != c.skipped || c.name != "at registration" && p.Sent+p.Skipped != all || c.name == "at registration" && p.Sent != 0 {
					r.Errorf("%+v; want %d skipped of %d", p, c.skipped, all)
				}
				r.oneOf()
			})
		})
	}
}

// oneOf: there is one image and one snapshot of ours.
func (r *region) oneOf() {
	r.Helper()
	n := map[string]int{}
	for _, l := range r.Leaks(map[string]string{cloud.TagCluster: cluster}) {
		n[l.Kind]++
	}
	if n["snapshot"] != 1 || n["image"] != 1 {
		r.Errorf("there are %v", n)
	}
}

// TestInterrupted: who presses Ctrl-C in the middle loses nothing that was sent in full batches.
func TestInterrupted(t *testing.T) {
	inRegion(t, func(r *region) {
		image := r.open(3)
		ctx, cancel := context.WithCancel(r.Context())
		_, err := ami.Publish(ctx, r.acct, ami.Request{Image: image, Cluster: cluster, Progress: func(p diskimage.Progress) {
			if p.Done >= 17*512<<10 {
				cancel()
			}
		}})
		if !strings.Contains(err.Error(), context.Canceled.Error()) {
			r.Fatalf("%v", err)
		}
		time.Sleep(5 * time.Second)
		if p := r.publish(image); p.Skipped != 16*512<<10 {
			r.Errorf("%+v", p)
		}
		r.oneOf()
	})
}

// TestTrouble: throttles, outages and lost replies are no matter.
func TestTrouble(t *testing.T) {
	inRegion(t, func(r *region) {
		image := r.open(4)
		for _, a := range []string{"StartSnapshot", "PutSnapshotBlock", "CompleteSnapshot", "RegisterImage"} {
			r.Inject(fakeec2.Fault{Action: a, Times: 1, Lost: true})
		}
		r.Inject(fakeec2.Fault{Action: "PutSnapshotBlock", Skip: 3, Times: 12, Err: &fakeec2.Error{Status: 400, Code: "RequestThrottledException", Message: "slow down"}})
		r.Inject(fakeec2.Fault{Action: "PutSnapshotBlock", Skip: 10, Times: 3, Err: &fakeec2.Error{Status: 500, Code: "InternalServerException", Message: "oops"}})
		r.Inject(fakeec2.Fault{Action: "DescribeImages", Times: 3, Err: &fakeec2.Error{Status: 503, Code: "RequestLimitExceeded", Message: "Request limit exceeded."}})
		r.publish(image)
		r.oneOf()
	})
}

// TestAbandoned: EBS gives a snapshot up that nobody has written to for a day.
func TestAbandoned(t *testing.T) {
	inRegion(t, func(r *region) {
		image := r.open(5)
		r.Inject(fakeec2.Fault{Action: "PutSnapshotBlock", Skip: 18, Err: &fakeec2.Error{Status: 403, Code: "OperationNotPermitted", Message: "stopped here"}})
		if _, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: image, Cluster: cluster}); err == nil {
			r.Fatal("no error")
		}
		r.ClearFaults()
		time.Sleep(30 * time.Hour)
		if p := r.publish(image); p.Skipped != 0 || p.Sent != all {
			r.Errorf("%+v", p)
		}
		r.oneOf()
	})
}

// TestDamaged: nothing is asked of the cloud for an image that is not what it says.
func TestDamaged(t *testing.T) {
	dir := diskimagetest.Write(t, 6)
	f, err := os.OpenFile(filepath.Join(dir, "disk.raw"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{0x55}, 11<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := diskimage.Open(t.Context(), dir, diskimage.Raw); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "disk.raw is damaged") {
		t.Errorf("%v", err)
	}
	// The file changes after it was opened: the snapshot is never completed.
	inRegion(t, func(r *region) {
		dir := diskimagetest.Write(r.T, 6)
		image, err := diskimage.Open(r.Context(), dir, diskimage.Raw)
		if err != nil {
			r.Fatal(err)
		}
		defer image.Close()
		f, err := os.OpenFile(filepath.Join(dir, "disk.raw"), os.O_WRONLY, 0)
		if err != nil {
			r.Fatal(err)
		}
		f.WriteAt([]byte{0x55}, 11<<20)
		f.Close()
		if _, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: image, Cluster: cluster}); !errdefs.IsInvalidArgument(err) || r.Calls("CompleteSnapshot") != 0 {
			r.Errorf("%v", err)
		}
	})
}

// TestPrune: what is used, named or new stays.
func TestPrune(t *testing.T) {
	inRegion(t, func(r *region) {
		var ids []string
		for seed := range byte(6) {
			ids = append(ids, r.publish(r.open(10+seed, 3)).ID)
			time.Sleep(time.Minute)
		}
		if _, err := r.api.RunInstances(r.Context(), &ec2.RunInstancesInput{ImageId: &ids[0], InstanceType: "m6a.large", MinCount: awssdk.Int32(1), MaxCount: awssdk.Int32(1),
			SubnetId: awssdk.String(fakeec2.DefaultSubnet)}); err != nil {
			r.Fatal(err)
		}
		lt, err := r.api.CreateLaunchTemplate(r.Context(), &ec2.CreateLaunchTemplateInput{LaunchTemplateName: awssdk.String("kata"), LaunchTemplateData: &types.RequestLaunchTemplateData{ImageId: &ids[1]}})
		if err != nil {
			r.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		want := map[string]string{ids[0]: "used by instance", ids[1]: "used by launch template kata, version 1", ids[2]: "PODVM_AMI_ID", ids[3]: "old", ids[4]: "old", ids[5]: "newest 1"}
		for _, dry := range []bool{true, false} {
			out, err := ami.Prune(r.Context(), r.acct, ami.PruneRequest{Cluster: cluster, Configured: ids[2], Keep: 1, DryRun: dry})
			if err != nil || len(out) != 6 {
				r.Fatalf("%+v, %v", out, err)
			}
			for _, p := range out {
				if !strings.Contains(p.Reason, want[p.ID]) || p.Removed != (want[p.ID] == "old") {
					r.Errorf("dry run %t: %+v, want %q", dry, p, want[p.ID])
				}
			}
			kinds := r.Leaks(map[string]string{cloud.TagCluster: cluster})
			kinds = slices.DeleteFunc(kinds, func(l fakeec2.Resource) bool { return l.Kind != "image" && l.Kind != "snapshot" })
			if n, want := len(kinds), map[bool]int{true: 12, false: 8}[dry]; n != want {
				r.Errorf("dry run %t: %d images and snapshots, want %d", dry, n, want)
			}
		}
		instances := r.Instances()
		if _, err := r.api.TerminateInstances(r.Context(), &ec2.TerminateInstancesInput{InstanceIds: []string{instances[0].ID}}); err != nil {
			r.Fatal(err)
		}
		if _, err := r.api.DeleteLaunchTemplate(r.Context(), &ec2.DeleteLaunchTemplateInput{LaunchTemplateId: lt.LaunchTemplate.LaunchTemplateId}); err != nil {
			r.Fatal(err)
		}
	})
}

// TestActions: the tables are enough, and nothing in them is too much.
func TestActions(t *testing.T) {
	inRegion(t, func(r *region) {
		allow := func(actions []string) {
			k := fakeec2.DefaultKey
			k.Allow = actions
			r.SetKey(k)
		}
		spoil := func(image *diskimage.Image) { // an upload of it that has ended in error
			r.Inject(fakeec2.Fault{Action: "CompleteSnapshot", Err: &fakeec2.Error{Status: 403, Code: "OperationNotPermitted", Message: "stopped here"}})
			if _, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: image, Cluster: cluster}); err == nil {
				r.Error("no error")
			}
			r.ClearFaults()
			time.Sleep(30 * time.Hour)
		}
		for i, a := range append(slices.Clone(ami.PublishActions), "") {
			image := r.open(byte(40+i), 3)
			spoil(image)
			allow(slices.DeleteFunc(slices.Clone(ami.PublishActions), func(s string) bool { return s == a }))
			_, err := ami.Publish(r.Context(), r.acct, ami.Request{Image: image, Cluster: cluster})
			r.refused(a, err)
			r.SetKey(fakeec2.DefaultKey)
		}
		if _, err := r.api.CreateLaunchTemplate(r.Context(), &ec2.CreateLaunchTemplateInput{LaunchTemplateName: awssdk.String("other"), LaunchTemplateData: &types.RequestLaunchTemplateData{ImageId: awssdk.String(fakeec2.DefaultImage)}}); err != nil {
			r.Fatal(err)
		}
		for i, a := range append(slices.Clone(ami.PruneActions), "") {
			r.publish(r.open(byte(60+i), 3))
			time.Sleep(time.Minute)
			allow(slices.DeleteFunc(slices.Clone(ami.PruneActions), func(s string) bool { return s == a }))
			_, err := ami.Prune(r.Context(), r.acct, ami.PruneRequest{Cluster: cluster})
			r.refused(a, err)
			r.SetKey(fakeec2.DefaultKey)
		}
	})
}

// refused: without an action the error names it; "": all are there.
func (r *region) refused(action string, err error) {
	r.Helper()
	if action == "" && err != nil {
		r.Error(err)
	}
	if action != "" && (!errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), action)) {
		r.Errorf("without %s: %v", action, err)
	}
}
