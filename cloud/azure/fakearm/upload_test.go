// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"bytes"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

const testDisk = 20 << 20 // bytes, without the footer

// vhd is the footer of a fixed VHD.
func vhd(size uint64) []byte {
	b := make([]byte, 512)
	copy(b, "conectix")
	binary.BigEndian.PutUint32(b[12:], 0x00010000)
	binary.BigEndian.PutUint64(b[48:], size)
	binary.BigEndian.PutUint32(b[60:], 2)
	var sum uint32
	for _, v := range b {
		sum += uint32(v)
	}
	binary.BigEndian.PutUint32(b[64:], ^sum)
	return b
}

// uploadDisk makes a disk to be uploaded to and returns its id and the blob's URL.
func (c *client) uploadDisk(name string) (id, sas string) {
	c.t.Helper()
	id = Config{}.withDefaults().id(DefaultGroup, "Microsoft.Compute/disks", name)
	c.finish(c.want(http.StatusAccepted, http.MethodPut, id, map[string]any{"location": DefaultRegion, "tags": map[string]any{"t": "1"}, "properties": map[string]any{
		"osType": "Linux", "hyperVGeneration": "V2", "creationData": map[string]any{"createOption": "Upload", "uploadSizeBytes": testDisk + 512}}}))
	a := c.want(http.StatusAccepted, http.MethodPost, id+"/beginGetAccess", map[string]any{"access": "Write", "durationInSeconds": 3600})
	st := c.finish(a)
	final := c.want(http.StatusOK, http.MethodGet, a.header.Get("Location"), nil)
	if sas = text(final.body, "accessSAS"); sas == "" || text(st, "properties.output.accessSAS") != sas {
		c.t.Fatalf("no URL in %s or %v", final.raw, st)
	}
	return id, sas
}

// page writes to a blob.
func (c *client) page(sas string, at int, data []byte, header ...string) answer {
	c.t.Helper()
	r, err := http.NewRequest(http.MethodPut, sas+"&comp=page", bytes.NewReader(data))
	if err != nil {
		c.t.Fatal(err)
	}
	r.Header.Set("X-Ms-Version", "2025-01-05")
	r.Header.Set("X-Ms-Page-Write", "update")
	r.Header.Set("X-Ms-Range", fmt.Sprintf("bytes=%d-%d", at, at+len(data)-1))
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return c.send(r)
}

// TestUpload: from an empty disk to a machine that starts from what was uploaded.
func TestUpload(t *testing.T) {
	c := start(t, Config{Dir: t.TempDir()})
	disk, sas := c.uploadDisk("up")
	content := bytes.Repeat([]byte("disk"), 1<<10)
	sum := md5.Sum(content)
	for name, tc := range map[string]struct {
		a      answer
		status int
		code   string
	}{
		"page":            {c.page(sas, 4096, content, "Content-Md5", base64.StdEncoding.EncodeToString(sum[:])), 201, ""},
		"wrong sum":       {c.page(sas, 4096, content, "Content-Md5", base64.StdEncoding.EncodeToString(make([]byte, 16))), 400, "Md5Mismatch"},
		"not aligned":     {c.page(sas, 100, content), 416, "InvalidPageRange"},
		"half a page":     {c.page(sas, 0, content[:100]), 416, "InvalidPageRange"},
		"past the end":    {c.page(sas, testDisk+512, content), 416, "InvalidPageRange"},
		"wrong length":    {c.page(sas, 0, content, "X-Ms-Range", "bytes=0-511"), 400, "InvalidHeaderValue"},
		"no range":        {c.page(sas, 0, content, "X-Ms-Range", ""), 400, "MissingRequiredHeader"},
		"no version":      {c.page(sas, 0, content, "X-Ms-Version", ""), 400, "MissingRequiredHeader"},
		"wrong signature": {c.page(sas+"x", 0, content), 403, "AuthenticationFailed"},
		"no such disk":    {c.page(strings.Replace(sas, "/md-", "/md-x", 1), 0, content), 404, "ContainerNotFound"},
	} {
		if tc.a.status != tc.status || tc.a.header.Get("X-Ms-Error-Code") != tc.code {
			t.Errorf("%s: %d %s, want %d %s", name, tc.a.status, tc.a.header.Get("X-Ms-Error-Code"), tc.status, tc.code)
		}
	}
	c.page(sas, testDisk-512, bytes.Repeat([]byte("x"), 512))
	c.page(sas, testDisk-512, nil, "X-Ms-Page-Write", "clear", "X-Ms-Range", fmt.Sprintf("bytes=%d-%d", testDisk-512, testDisk-1))
	if a := c.page(sas, testDisk, vhd(testDisk)); a.status != http.StatusCreated {
		t.Fatalf("footer: %d %s", a.status, a.raw)
	}
	r := c.request(http.MethodGet, sas+"&comp=pagelist", nil)
	r.Header.Set("X-Ms-Version", "2025-01-05")
	want := fmt.Sprintf("<PageRange><Start>4096</Start><End>8191</End></PageRange><PageRange><Start>%d</Start><End>%d</End></PageRange>", testDisk, testDisk+511)
	if a := c.send(r); !strings.Contains(string(a.raw), "<PageList>"+want+"</PageList>") {
		t.Errorf("ranges: %s", a.raw)
	}
	c.refused(http.StatusConflict, "OperationNotAllowed", http.MethodDelete, disk, nil)
	gallery := id("Microsoft.Compute/galleries", "g")
	version := gallery + "/images/i/versions/1.0.0"
	body := map[string]any{"location": DefaultRegion, "properties": map[string]any{"storageProfile": map[string]any{"osDiskImage": map[string]any{"source": map[string]any{"id": disk}}}}}
	c.refused(http.StatusNotFound, "ParentResourceNotFound", http.MethodPut, gallery+"/images/i", galleryImage("V2"))
	c.finish(c.want(http.StatusCreated, http.MethodPut, gallery, map[string]any{"location": DefaultRegion}))
	c.refused(http.StatusBadRequest, "InvalidParameter", http.MethodPut, gallery+"/images/i", galleryImage("V1"))
	c.finish(c.want(http.StatusCreated, http.MethodPut, gallery+"/images/i", galleryImage("V2")))
	c.refused(http.StatusConflict, "OperationNotAllowed", http.MethodPut, version, body)

	c.finish(c.want(http.StatusAccepted, http.MethodPost, disk+"/endGetAccess", nil))
	if a := c.page(sas, 0, content); a.status != http.StatusForbidden {
		t.Errorf("after the end of access: %d", a.status)
	}
	c.refused(http.StatusBadRequest, "InvalidParameter", http.MethodPut, gallery+"/images/i/versions/one", body)
	a := c.want(http.StatusCreated, http.MethodPut, version, body)
	c.refused(http.StatusConflict, "OperationNotAllowed", http.MethodPut, vmID("a"), vmBody("a", with("properties.storageProfile.imageReference.id", version)))
	c.finish(a)
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, disk, nil))
	path := c.s.resources[key(version)].image.Path
	got, err := os.ReadFile(path)
	if err != nil || len(got) != testDisk || !bytes.Equal(got[4096:8192], content) || bytes.ContainsRune(got[8192:], 'x') {
		t.Errorf("the image has %d bytes, %v; want the disk without its footer", len(got), err)
	}
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a", with("properties.storageProfile.imageReference.id", gallery+"/images/i"))))
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil))
	if l := c.s.Leaks(nil); len(l) != 1 || l[0] != version {
		t.Errorf("left: %q, want the version", l)
	}
	c.refused(http.StatusConflict, "CannotDeleteResource", http.MethodDelete, gallery, nil)
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, version, nil))
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the last use of the upload is gone, and its file is not: %v", err)
	}
}

func galleryImage(generation string) map[string]any {
	return map[string]any{"location": DefaultRegion, "properties": map[string]any{"osType": "Linux", "osState": "Generalized", "hyperVGeneration": generation,
		"identifier": map[string]any{"publisher": "p", "offer": "o", "sku": "s"}, "features": []any{map[string]any{"name": "SecurityType", "value": "TrustedLaunchSupported"}}}}
}

// TestBadVHD: what was uploaded must be what it says.
func TestBadVHD(t *testing.T) {
	c := start(t, Config{Dir: t.TempDir()})
	for name, footer := range map[string][]byte{
		"no footer":  make([]byte, 512),
		"wrong size": vhd(testDisk / 2),
		"wrong sum":  append(vhd(testDisk)[:511], 1),
	} {
		disk, sas := c.uploadDisk(strings.ReplaceAll(name, " ", "-"))
		c.page(sas, testDisk, footer)
		if st := c.finish(c.want(http.StatusAccepted, http.MethodPost, disk+"/endGetAccess", nil)); text(st, "error.code") != "InvalidVhd" {
			t.Errorf("%s: %v", name, st)
		}
	}
	if l := c.s.Leaks(map[string]string{"t": "1"}); len(l) != 3 {
		t.Errorf("disks: %q", l)
	}
	c.refused(http.StatusBadRequest, "InvalidParameter", http.MethodPut, id("Microsoft.Compute/disks", "odd"), map[string]any{"location": DefaultRegion,
		"properties": map[string]any{"creationData": map[string]any{"createOption": "Upload", "uploadSizeBytes": testDisk}}})
	_, sas := c.uploadDisk("late")
	c.clock.Advance(2 * time.Hour)
	if a := c.page(sas, 0, make([]byte, 512)); a.status != http.StatusForbidden {
		t.Errorf("an expired URL: %d", a.status)
	}
}

// TestOthersImages: shared and community galleries, and managed images.
func TestOthersImages(t *testing.T) {
	managed := id("Microsoft.Compute/images", "old")
	c := start(t, Config{Images: []Image{
		{ID: managed, Generation: "V1"},
		{ID: "/CommunityGalleries/com-1/Images/i/Versions/1.0.0"}, {ID: "/CommunityGalleries/com-1/Images/i/Versions/2.0.0"},
		{ID: "/SharedGalleries/shared-1/Images/i/Versions/1.0.0"},
	}})
	where := "/subscriptions/" + DefaultSubscription + "/providers/Microsoft.Compute/locations/westeurope"
	if got := names(c.want(http.StatusOK, http.MethodGet, where+"/communityGalleries/com-1/images/i/versions", nil)); got != "[1.0.0 2.0.0]" {
		t.Errorf("versions: %s", got)
	}
	if a := c.want(http.StatusOK, http.MethodGet, where+"/sharedGalleries/shared-1/images/i", nil); text(a.body, "name") != "i" {
		t.Errorf("image: %s", a.raw)
	}
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, where+"/sharedGalleries/shared-2/images/i", nil)
	for name, ref := range map[string]map[string]any{
		"com":     {"communityGalleryImageId": "/CommunityGalleries/com-1/Images/i"},
		"shared":  {"sharedGalleryImageId": "/SharedGalleries/shared-1/Images/i/Versions/latest"},
		"managed": {"id": managed},
	} {
		c.finish(c.want(http.StatusCreated, http.MethodPut, vmID(name), vmBody(name, with("properties.storageProfile.imageReference", ref))))
	}
}
