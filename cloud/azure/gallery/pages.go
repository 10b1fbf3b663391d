// SPDX-License-Identifier: Apache-2.0

package gallery

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud/azure"
	"github.com/kata-remote/kata-remote/cloud/diskimage"
)

const (
	// writers are how many write at once: disks take 500 pages a second and 60 MiB/s.
	writers = 8
	// accessFor is how long the URL for the upload is good: more than publishing takes.
	accessFor = 24 * time.Hour
	// blobVersion of the API (x-ms-version); Put Page has been as it is since 2016.
	blobVersion = "2021-12-02"
)

// upload makes the disk and writes what is missing of it.
func (p *publication) upload(ctx context.Context) error {
	var d resource
	err := p.Get(ctx, p.disk, azure.APIDisk, &d)
	switch {
	case azure.Missing(err):
	case err != nil:
		return err
	case !p.ours(d):
		return fmt.Errorf("the disk %s is not of this image; remove it: %w", p.disk, errdefs.ErrFailedPrecondition)
	case d.Properties.DiskState == "Unattached", d.Properties.DiskState == "Reserved":
		return nil // the upload is over
	case d.Properties.DiskState != "ReadyToUpload" && d.Properties.DiskState != "ActiveUpload" || d.Properties.ProvisioningState == "Failed":
		if err := dropDisk(ctx, p.Account, p.disk, d.Properties.DiskState); err != nil {
			return err
		}
		d = resource{}
	}
	if d.ID == "" {
		if err := p.makeDisk(ctx); err != nil {
			return err
		}
	}
	b, err := p.access(ctx)
	if errdefs.IsUnavailable(err) || errdefs.IsFailedPrecondition(err) { // somebody's URL is in the way
		if err := dropDisk(ctx, p.Account, p.disk, "ActiveUpload"); err != nil {
			return err
		}
		if err := p.makeDisk(ctx); err != nil {
			return err
		}
		b, err = p.access(ctx)
	}
	if err != nil {
		return err
	}
	if err := p.write(ctx, b); err != nil {
		return err
	}
	p.Progress(diskimage.Progress{Step: "complete"})
	return p.Post(ctx, p.disk+"/endGetAccess", azure.APIDisk, nil, nil)
}

func (p *publication) makeDisk(ctx context.Context) error {
	return p.Put(ctx, p.disk, azure.APIDisk, map[string]any{"location": p.Region(), "tags": p.tags(), "sku": map[string]any{"name": "Standard_LRS"},
		"properties": map[string]any{"osType": "Linux", "hyperVGeneration": "V2",
			"supportedCapabilities": map[string]any{"architecture": definitions[p.Image.Architecture].arch},
			"creationData":          map[string]any{"createOption": "Upload", "uploadSizeBytes": p.Image.Size}}})
}

// blob is a disk's page blob.
type blob struct {
	pipeline runtime.Pipeline
	url      *url.URL // a secret: who has it may write
}

func (p *publication) access(ctx context.Context) (*blob, error) {
	var out struct {
		AccessSAS string `json:"accessSAS"`
	}
	err := p.Post(ctx, p.disk+"/beginGetAccess", azure.APIDisk, map[string]any{"access": "Write", "durationInSeconds": int(accessFor / time.Second)}, &out)
	if err != nil {
		return nil, err
	}
	b := &blob{}
	if b.pipeline, err = p.Blob(out.AccessSAS); err != nil {
		return nil, err
	}
	if b.url, err = url.Parse(out.AccessSAS); err != nil {
		return nil, fmt.Errorf("the URL for the upload cannot be read: %w", errdefs.ErrFailedPrecondition)
	}
	return b, nil
}

// write writes the chunks that are neither empty nor there.
func (p *publication) write(ctx context.Context, b *blob) error {
	there, err := b.ranges(ctx)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		n   int64
		err error
	}
	results := make(chan result)
	running := 0
	var failed error
	collect := func() {
		r := <-results
		running--
		if r.err != nil && failed == nil {
			failed = r.err
			cancel()
		}
		if p.out.Sent += r.n; failed == nil {
			p.Progress(diskimage.Progress{Step: "upload", Done: p.out.Sent + p.out.Skipped, Total: p.Image.Content, Skipped: p.out.Skipped})
		}
	}
	err = p.Image.Chunks(bounded, func(c diskimage.Chunk) error {
		if c.Zero {
			return nil
		}
		if covered(there, c.At, c.At+int64(len(c.Data))) {
			p.out.Skipped += int64(len(c.Data))
			return nil
		}
		for running == writers {
			collect()
		}
		if failed != nil {
			return failed
		}
		running++
		go func() {
			err := b.put(bounded, c)
			n := int64(len(c.Data))
			if err != nil {
				n = 0
			}
			results <- result{n, err}
		}()
		return nil
	})
	for running > 0 {
		collect()
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case failed != nil:
		return failed
	}
	return err
}

// pages are a range of bytes of the blob, the last included.
type pages struct {
	Start, End int64
}

func covered(there []pages, from, to int64) bool {
	for _, r := range there {
		if r.Start <= from && to <= r.End+1 {
			return true
		}
	}
	return false
}

// ranges are what has been written.
func (b *blob) ranges(ctx context.Context) ([]pages, error) {
	var all []pages
	marker := ""
	for {
		body, err := b.do(ctx, http.MethodGet, url.Values{"comp": {"pagelist"}, "marker": {marker}}, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("list the pages of the upload: %w", err)
		}
		var list struct {
			PageRange  []pages
			NextMarker string
		}
		if err := xml.Unmarshal(body, &list); err != nil {
			return nil, fmt.Errorf("list the pages of the upload: %w: %w", err, errdefs.ErrUnavailable)
		}
		all = append(all, list.PageRange...)
		if marker = list.NextMarker; marker == "" {
			return all, nil
		}
	}
}

func (b *blob) put(ctx context.Context, c diskimage.Chunk) error {
	sum := md5.Sum(c.Data) // what the service checks a page's way by
	_, err := b.do(ctx, http.MethodPut, url.Values{"comp": {"page"}}, http.Header{
		"X-Ms-Page-Write": {"update"}, "X-Ms-Range": {fmt.Sprintf("bytes=%d-%d", c.At, c.At+int64(len(c.Data))-1)},
		"Content-Md5": {base64.StdEncoding.EncodeToString(sum[:])},
	}, c.Data)
	if err != nil {
		return fmt.Errorf("write the pages from byte %d on: %w", c.At, err)
	}
	return nil
}

// do makes a request. Errors do not have the URL in them.
func (b *blob) do(ctx context.Context, method string, query url.Values, header http.Header, data []byte) ([]byte, error) {
	u := *b.url
	q := u.Query()
	for k, v := range query {
		if v[0] != "" {
			q[k] = v
		}
	}
	u.RawQuery = ""
	req, err := runtime.NewRequest(ctx, method, u.String())
	if err != nil {
		return nil, fmt.Errorf("the URL for the upload is wrong: %w", errdefs.ErrFailedPrecondition)
	}
	req.Raw().URL.RawQuery = q.Encode()
	req.Raw().Header.Set("x-ms-version", blobVersion)
	for k, v := range header {
		req.Raw().Header[k] = v
	}
	if data != nil {
		if err := req.SetBody(streaming.NopCloser(bytes.NewReader(data)), "application/octet-stream"); err != nil {
			return nil, err
		}
	}
	resp, err := b.pipeline.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the URL
		}
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	if resp.StatusCode/100 != 2 {
		return nil, blobError(resp, body)
	}
	return body, nil
}

func blobError(resp *http.Response, body []byte) error {
	var e struct{ Code, Message string }
	if xml.Unmarshal(body, &e) != nil || e.Code == "" {
		e.Code = resp.Header.Get("X-Ms-Error-Code")
	}
	var class error = errdefs.ErrFailedPrecondition
	switch {
	case resp.StatusCode == http.StatusForbidden:
		class = errdefs.ErrPermissionDenied
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500:
		class = errdefs.ErrUnavailable
	}
	return fmt.Errorf("the blob service answered %d %s: %s: %w", resp.StatusCode, e.Code, e.Message, class)
}
