// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// blobPrefix begins the path of every disk that is uploaded to. On Azure the blob is
// on a host of its own; here the path tells it apart.
const blobPrefix = "/blob/"

// upload is a disk that is written through its blob.
type upload struct {
	name      string
	path      string // of the file; a raw disk once the VHD's footer was checked and cut off
	size      int64  // with the footer
	signature string // of the URL that was given out; "": none is
	expires   time.Time
	pages     [][2]int64 // ranges that were written, in order, not touching
	users     int        // disk and images that it is the content of
	checked   bool
}

func (s *Server) newUpload(size int64) (*upload, error) {
	if s.dir == "" {
		dir, err := os.MkdirTemp(s.cfg.Dir, "fakearm-")
		if err != nil {
			return nil, err
		}
		s.dir = dir
	}
	up := &upload{name: "md-" + newUUID()[:13], size: size, users: 1}
	up.path = filepath.Join(s.dir, up.name)
	f, err := os.OpenFile(up.path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	return up, errors.Join(f.Truncate(size), f.Close())
}

// dropUpload forgets one use of an upload, and removes it with the last.
func (s *Server) dropUpload(up *upload) {
	if up == nil {
		return
	}
	if up.users--; up.users > 0 {
		return
	}
	delete(s.uploads, up.name)
	if err := os.Remove(up.path); err != nil {
		s.cfg.Log.Error("remove upload", "path", up.path, "error", err)
	}
}

// blobError is a refusal in the blob service's form.
func blobError(status int, code, words string) *reply {
	return &reply{status: status, header: http.Header{"Content-Type": {"application/xml"}, "X-Ms-Error-Code": {code}},
		body: []byte(`<?xml version="1.0" encoding="utf-8"?><Error><Code>` + code + `</Code><Message>` + words + `</Message></Error>`)}
}

// blob answers for page blobs. Source: learn.microsoft.com, "Put Page", "Get Page
// Ranges", "Get Blob Properties". It needs mu.
func (s *Server) blob(c *call) (*reply, *apiError) {
	if f := c.fault; f != nil {
		if err := f.err(); err != nil {
			rep := blobError(err.status, err.code, err.message)
			if err.retryAfter > 0 {
				rep.header.Set("Retry-After", fmt.Sprint(err.retryAfter))
			}
			return rep, nil
		}
	}
	name, _, _ := strings.Cut(strings.TrimPrefix(c.r.URL.Path, blobPrefix), "/")
	up := s.uploads[name]
	switch {
	case up == nil:
		return blobError(http.StatusNotFound, "ContainerNotFound", "The specified container does not exist."), nil
	case up.signature == "" || c.query("sig") != up.signature || !c.now.Before(up.expires):
		return blobError(http.StatusForbidden, "AuthenticationFailed", "Server failed to authenticate the request. Make sure the value of Authorization header is formed correctly including the signature."), nil
	case c.r.Header.Get("X-Ms-Version") == "":
		return blobError(http.StatusBadRequest, "MissingRequiredHeader", "An HTTP header that's mandatory for this request is not specified: x-ms-version."), nil
	}
	comp := c.query("comp")
	h := http.Header{"Etag": {fmt.Sprintf(`"0x%X"`, len(up.pages))}, "X-Ms-Version": {c.r.Header.Get("X-Ms-Version")}, "Last-Modified": {c.now.UTC().Format(http.TimeFormat)}}
	switch {
	case c.r.Method == http.MethodPut && comp == "page":
		return s.putPage(c, up, h), nil
	case c.r.Method == http.MethodGet && comp == "pagelist":
		list := `<?xml version="1.0" encoding="utf-8"?><PageList>`
		for _, p := range up.pages {
			list += fmt.Sprintf("<PageRange><Start>%d</Start><End>%d</End></PageRange>", p[0], p[1]-1)
		}
		h.Set("Content-Type", "application/xml")
		h.Set("X-Ms-Blob-Content-Length", fmt.Sprint(up.size))
		return &reply{status: http.StatusOK, header: h, body: []byte(list + "</PageList>")}, nil
	case c.r.Method == http.MethodHead && comp == "":
		h.Set("Content-Length", fmt.Sprint(up.size))
		h.Set("X-Ms-Blob-Type", "PageBlob")
		return &reply{status: http.StatusOK, header: h}, nil
	}
	return blobError(http.StatusForbidden, "AuthorizationPermissionMismatch", "This request is not authorized to perform this operation using this permission."), nil
}

var pageRange = regexp.MustCompile(`^bytes=(\d+)-(\d+)$`)

// maxPages is what one Put Page takes.
const maxPages = 4 << 20

func (s *Server) putPage(c *call, up *upload, h http.Header) *reply {
	spec := c.r.Header.Get("X-Ms-Range")
	if spec == "" {
		spec = c.r.Header.Get("Range")
	}
	g := pageRange.FindStringSubmatch(spec)
	if g == nil {
		return blobError(http.StatusBadRequest, "MissingRequiredHeader", "An HTTP header that's mandatory for this request is not specified: x-ms-range.")
	}
	from, err1 := strconv.ParseInt(g[1], 10, 64)
	last, err2 := strconv.ParseInt(g[2], 10, 64)
	to := last + 1
	write := c.r.Header.Get("X-Ms-Page-Write")
	switch {
	case err1 != nil || err2 != nil || from%512 != 0 || to%512 != 0 || from >= to || to > up.size:
		return blobError(http.StatusRequestedRangeNotSatisfiable, "InvalidPageRange", "The page range specified is invalid.")
	case write != "update" && write != "clear":
		return blobError(http.StatusBadRequest, "InvalidHeaderValue", "The value for one of the HTTP headers is not in the correct format: x-ms-page-write.")
	case write == "update" && to-from > maxPages:
		return blobError(http.StatusRequestEntityTooLarge, "RequestBodyTooLarge", "The request body is too large and exceeds the maximum permissible limit.")
	case write == "update" && int64(len(c.raw)) != to-from || write == "clear" && len(c.raw) > 0:
		return blobError(http.StatusBadRequest, "InvalidHeaderValue", "The value for one of the HTTP headers is not in the correct format: Content-Length.")
	}
	data := c.raw
	if sum := c.r.Header.Get("Content-Md5"); sum != "" && write == "update" {
		have := md5.Sum(data)
		if base64.StdEncoding.EncodeToString(have[:]) != sum {
			return blobError(http.StatusBadRequest, "Md5Mismatch", "The MD5 value specified in the request did not match with the MD5 value calculated by the server.")
		}
	}
	if write == "clear" {
		data = make([]byte, to-from)
	}
	if err := up.writeAt(data, from); err != nil {
		return blobError(http.StatusInternalServerError, "InternalError", err.Error())
	}
	up.mark(from, to, write == "update")
	h.Set("X-Ms-Blob-Sequence-Number", "0")
	h.Set("X-Ms-Request-Server-Encrypted", "true")
	return &reply{status: http.StatusCreated, header: h}
}

func (up *upload) writeAt(b []byte, at int64) error {
	f, err := os.OpenFile(up.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, at)
	return errors.Join(err, f.Close())
}

// mark keeps which pages hold something.
func (up *upload) mark(from, to int64, written bool) {
	var out [][2]int64
	for _, p := range up.pages {
		if p[1] < from || p[0] > to || !written && (p[1] == from || p[0] == to) {
			out = append(out, p)
			continue
		}
		if written {
			from, to = min(from, p[0]), max(to, p[1])
			continue
		}
		if p[0] < from {
			out = append(out, [2]int64{p[0], from})
		}
		if p[1] > to {
			out = append(out, [2]int64{to, p[1]})
		}
	}
	if written {
		out = append(out, [2]int64{from, to})
	}
	slices.SortFunc(out, func(a, b [2]int64) int { return int(min(max(a[0]-b[0], -1), 1)) })
	up.pages = out
}

// checkVHD holds the content to a fixed VHD (Microsoft's "Virtual Hard Disk Image
// Format Specification" 1.0) and cuts its footer off: what is left is the disk.
func (up *upload) checkVHD() error {
	if up.checked {
		return nil
	}
	f, err := os.OpenFile(up.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, vhdFooter)
	if _, err := f.ReadAt(b, up.size-vhdFooter); err != nil {
		return err
	}
	sum := binary.BigEndian.Uint32(b[64:])
	var have uint32
	for i, v := range b {
		if i < 64 || i >= 68 {
			have += uint32(v)
		}
	}
	switch {
	case string(b[:8]) != "conectix":
		return errors.New("the last 512 bytes are no VHD footer")
	case binary.BigEndian.Uint32(b[12:]) != 0x00010000:
		return errors.New("the footer's version is not 1.0")
	case binary.BigEndian.Uint32(b[60:]) != 2:
		return fmt.Errorf("its type is %d, not 2 (fixed)", binary.BigEndian.Uint32(b[60:]))
	case ^have != sum:
		return errors.New("the footer's checksum is wrong")
	case binary.BigEndian.Uint64(b[48:]) != uint64(up.size-vhdFooter):
		return fmt.Errorf("its size is %d bytes, and %d were uploaded before the footer", binary.BigEndian.Uint64(b[48:]), up.size-vhdFooter)
	}
	up.checked = true
	return f.Truncate(up.size - vhdFooter)
}
