// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"testing"
	"time"
)

// direct calls the EBS direct API.
func (c *client) direct(method, path string, body []byte, headers ...string) (*http.Response, []byte) {
	c.t.Helper()
	r, err := http.NewRequest(method, "http://ebs.test"+path, bytes.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	c.sign(r, "ebs", body)
	resp, err := c.s.Transport().RoundTrip(r)
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, out
}

func sum64(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// TestUpload makes an image of blocks, launches it and removes it.
func TestUpload(t *testing.T) {
	for name, dir := range map[string]string{"memory": "", "files": t.TempDir()} {
		t.Run(name, func(t *testing.T) { upload(t, dir) })
	}
}

// Long: one image's life, of which each step needs the one before.
func upload(t *testing.T, dir string) {
	now := newClock()
	s := New(Config{Now: now.now, ImageDir: dir})
	c := newClient(t, s)
	expect := func(want int, resp *http.Response, body []byte) []byte {
		t.Helper()
		if resp.StatusCode != want {
			t.Fatalf("%d %s, want %d", resp.StatusCode, body, want)
		}
		return body
	}
	refused := func(resp *http.Response, body []byte) {
		t.Helper()
		if resp.StatusCode != 400 || resp.Header.Get("X-Amzn-Errortype") != "ValidationException" {
			t.Errorf("%d %s %s, want a ValidationException", resp.StatusCode, resp.Header.Get("X-Amzn-Errortype"), body)
		}
	}
	request := []byte(`{"VolumeSize":1,"ClientToken":"t","Description":"podvm","Tags":[{"Key":"owner","Value":"test"}]}`)
	var started struct{ SnapshotId, Status string }
	resp, body := c.direct("POST", "/snapshots", request)
	if err := json.Unmarshal(expect(201, resp, body), &started); err != nil || started.Status != "pending" {
		t.Fatalf("%s: %v", body, err)
	}
	id := started.SnapshotId
	resp, body = c.direct("POST", "/snapshots", request)
	if again := expect(201, resp, body); !bytes.Contains(again, []byte(id)) {
		t.Errorf("the token made another snapshot: %s", again)
	}
	if resp, _ := c.direct("POST", "/snapshots", bytes.Replace(request, []byte("1"), []byte("2"), 1)); resp.Header.Get("X-Amzn-Errortype") != "ConflictException" {
		t.Error("the token was taken with another request")
	}
	refused(c.direct("POST", "/snapshots", []byte(`{"VolumeSize":1,"Size":2}`)))
	refused(c.direct("POST", "/snapshots", []byte(`{"VolumeSize":0}`)))

	block := bytes.Repeat([]byte("podvm..."), blockSize/8)
	last := bytes.Repeat([]byte{0xff}, blockSize)
	headers := func(b []byte) []string {
		return []string{"x-amz-Data-Length", itoa(len(b)), "x-amz-Checksum", sum64(b), "x-amz-Checksum-Algorithm", "SHA256"}
	}
	put := func(index string, b []byte, h []string) (*http.Response, []byte) {
		return c.direct("PUT", "/snapshots/"+id+"/blocks/"+index, b, h...)
	}
	refused(put("0", block, headers(last)))
	refused(put("0", block[1:], headers(block[1:])))
	refused(put("2048", block, headers(block)))
	resp, body = put("2047", last, headers(last))
	expect(201, resp, body)
	resp, body = put("0", block, headers(block))
	expect(201, resp, body)
	if resp, _ := c.direct("PUT", "/snapshots/snap-00000000/blocks/0", block, headers(block)...); resp.StatusCode != 404 {
		t.Errorf("a block of no snapshot: %d", resp.StatusCode)
	}
	first, second := sha256.Sum256(block), sha256.Sum256(last)
	whole := sum64(append(first[:], second[:]...))
	done := []string{"x-amz-ChangedBlocksCount", "2", "x-amz-Checksum", whole, "x-amz-Checksum-Algorithm", "SHA256", "x-amz-Checksum-Aggregation-Method", "LINEAR"}
	refused(c.direct("POST", "/snapshots/completion/"+id, nil, "x-amz-ChangedBlocksCount", "3"))
	refused(c.direct("POST", "/snapshots/completion/"+id, nil, append([]string{"x-amz-ChangedBlocksCount", "2", "x-amz-Checksum", sum64(last)}, done[4:]...)...))
	c.fails("IncorrectState", "RegisterImage", "Name", "early", "Architecture", "x86_64", "VirtualizationType", "hvm", "RootDeviceName", "/dev/xvda",
		"BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.SnapshotId", id)
	resp, body = c.direct("POST", "/snapshots/completion/"+id, nil, done...)
	expect(202, resp, body)
	refused(put("1", block, headers(block)))

	var list struct {
		Blocks []struct {
			BlockIndex int
			BlockToken string
		}
	}
	resp, body = c.direct("GET", "/snapshots/"+id+"/blocks", nil)
	if err := json.Unmarshal(expect(200, resp, body), &list); err != nil || len(list.Blocks) != 2 || list.Blocks[1].BlockIndex != 2047 {
		t.Fatalf("%s: %v", body, err)
	}
	resp, body = c.direct("GET", "/snapshots/"+id+"/blocks/2047?blockToken="+escape(list.Blocks[1].BlockToken), nil)
	if got := expect(200, resp, body); !bytes.Equal(got, last) {
		t.Error("a block came back as another")
	}
	if d := c.do("DescribeSnapshots", "SnapshotId.1", id); d.at("snapshotSet/item/status") != "completed" || d.at("snapshotSet/item/tagSet/item/key") != "owner" {
		t.Errorf("snapshot %v", d)
	}

	image := c.do("RegisterImage", "Name", "podvm-1", "Architecture", "x86_64", "VirtualizationType", "hvm", "EnaSupport", "true", "BootMode", "uefi",
		"ImdsSupport", "v2.0", "RootDeviceName", "/dev/xvda", "BlockDeviceMapping.1.DeviceName", "/dev/xvda", "BlockDeviceMapping.1.Ebs.SnapshotId", id,
		"BlockDeviceMapping.1.Ebs.VolumeType", "gp3", "TagSpecification.1.ResourceType", "image", "TagSpecification.1.Tag.1.Key", "owner",
		"TagSpecification.1.Tag.1.Value", "test").at("imageId")
	c.fails("InvalidAMIName.Duplicate", "RegisterImage", "Name", "podvm-1", "Architecture", "x86_64", "VirtualizationType", "hvm")
	instance := c.run("ImageId", image)
	if i := s.Instances()[0]; i.RootGiB != 1 || i.MetadataTokens != "required" {
		t.Errorf("instance %+v", i)
	}
	if dir != "" {
		disk, err := os.Open(s.images[image].file)
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close()
		got := make([]byte, blockSize)
		if _, err := disk.ReadAt(got, 2047*blockSize); err != nil || !bytes.Equal(got, last) {
			t.Errorf("the disk's last block is another: %v", err)
		}
		if st, err := disk.Stat(); err != nil || st.Size() != 1<<30 {
			t.Errorf("the disk's size: %v %v", st.Size(), err)
		}
	}
	c.fails("InvalidSnapshot.InUse", "DeleteSnapshot", "SnapshotId", id)
	c.do("DeregisterImage", "ImageId", image)
	c.fails("InvalidAMIID.Unavailable", "DeregisterImage", "ImageId", image)
	c.fails("InvalidAMIID.NotFound", "RunInstances", launch("ImageId", image)...)
	if l := s.Leaks(map[string]string{"owner": "test"}); len(l) != 4 {
		t.Errorf("instance, volume, interface and snapshot are left: %v", l)
	}
	c.do("TerminateInstances", "InstanceId.1", instance)
	c.do("DeleteSnapshot", "SnapshotId", id)
	if l := s.Leaks(map[string]string{"owner": "test"}); len(l) != 0 {
		t.Errorf("left: %v", l)
	}

	// An upload that nobody goes on with ends in error.
	resp, body = c.direct("POST", "/snapshots", []byte(`{"VolumeSize":1,"Timeout":10}`))
	if err := json.Unmarshal(expect(201, resp, body), &started); err != nil {
		t.Fatal(err)
	}
	now.add(11 * time.Minute)
	if d := c.do("DescribeSnapshots", "SnapshotId.1", started.SnapshotId); d.at("snapshotSet/item/status") != "error" {
		t.Error("an upload that was left alone is still pending")
	}
	limited := newClient(t, s)
	limited.key = Key{ID: "AKIALIMITED", Secret: "s", Deny: []string{"ebs:*"}}
	s.SetKey(limited.key)
	if resp, _ := limited.direct("POST", "/snapshots", request); resp.StatusCode != 403 || resp.Header.Get("X-Amzn-Errortype") != "AccessDeniedException" {
		t.Errorf("without permission: %d", resp.StatusCode)
	}
	limited.key.Secret = "wrong"
	if resp, _ := limited.direct("POST", "/snapshots", request); resp.Header.Get("X-Amzn-Errortype") != "UnrecognizedClientException" {
		t.Errorf("with a wrong key: %d", resp.StatusCode)
	}
}
