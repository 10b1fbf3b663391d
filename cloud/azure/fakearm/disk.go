// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"cmp"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// diskState is what there is of a disk besides its document.
type diskState struct {
	option string // deleteOption in the machine's storageProfile
	upload *upload
}

// rawPath is the file with the disk's content, or "".
func (d *diskState) rawPath() string {
	if d == nil || d.upload == nil {
		return ""
	}
	return d.upload.path
}

const (
	vhdFooter = 512
	mib       = 1 << 20
)

var diskActions = map[string]func(*Server, *call, *resource) (*reply, *apiError){
	"POST begingetaccess": (*Server).beginGetAccess,
	"POST endgetaccess":   (*Server).endGetAccess,
}

// putDisk makes a disk: an empty one, or one to be uploaded to.
func (s *Server) putDisk(c *call, old *resource) (*reply, *apiError) {
	option := text(c.body, "properties.creationData.createOption")
	size := number(c.body, "properties.creationData.uploadSizeBytes")
	switch {
	case old != nil && !same(at(old.doc, "properties.creationData"), at(c.body, "properties.creationData")):
		return nil, conflict("PropertyChangeNotAllowed", "creationData", "Changing property 'creationData' is not allowed.")
	case option == "Empty" && number(c.body, "properties.diskSizeGB") < 1:
		return nil, invalid("disk.diskSizeGB", "Required parameter 'disk.diskSizeGB' is missing (null).")
	case option == "Upload" && size == 0:
		return nil, invalid("creationData.uploadSizeBytes", "Required parameter 'creationData.uploadSizeBytes' is missing (null).")
	case option == "Upload" && at(c.body, "properties.diskSizeGB") != nil:
		return nil, invalid("disk.diskSizeGB", "Parameter 'disk.diskSizeGB' is not allowed with createOption Upload.")
	case option == "Upload" && (size < 20*mib+vhdFooter || (int64(size)-vhdFooter)%mib != 0):
		return nil, invalid("creationData.uploadSizeBytes", "The value of creationData.uploadSizeBytes is invalid: %.0f must be a whole number of MiB (20 at least) and the 512 bytes of a VHD footer.", size)
	case option != "Empty" && option != "Upload":
		return nil, invalid("creationData.createOption", "The createOption '%s' is not one that this emulation has: Empty and Upload.", option)
	}
	if kind := text(c.body, "properties.securityProfile.securityType"); kind != "" && text(c.body, "properties.hyperVGeneration") != "V2" {
		return nil, invalid("securityProfile.securityType", "Security type '%s' needs hyperVGeneration V2.", kind)
	}
	doc := clone(c.body)
	doc["location"] = s.cfg.Region
	if at(doc, "sku.name") == nil {
		put(doc, "sku.name", "Standard_LRS")
	}
	if old != nil {
		for _, p := range []string{"tags", "sku"} {
			if v := at(doc, p); v != nil {
				put(old.doc, p, v)
			}
		}
		return s.begun(c, old, http.StatusOK)
	}
	state := "Unattached"
	r := s.add(c.now, c.path.kind(), c.path.id(s), doc)
	r.disk = &diskState{}
	if option == "Upload" {
		state = "ReadyToUpload"
		put(doc, "properties.diskSizeGB", float64((int64(size)-vhdFooter+1<<30-1)>>30))
		put(doc, "properties.diskSizeBytes", size-vhdFooter)
	}
	put(doc, "properties.diskState", state)
	put(doc, "properties.uniqueId", newUUID())
	put(doc, "properties.timeCreated", c.now.UTC().Format(time.RFC3339Nano))
	rep, err := s.begun(c, r, http.StatusAccepted)
	return rep, err
}

func (s *Server) deleteDisk(c *call, d *resource) (*reply, *apiError) {
	if by := text(d.doc, "managedBy"); by != "" {
		return nil, conflict("OperationNotAllowed", "", "Disk %s is attached to VM %s.", d.name, by)
	}
	if text(d.doc, "properties.diskState") == "ActiveUpload" {
		return nil, conflict("OperationNotAllowed", "", "There is an active shared access signature outstanding for disk %s. Call EndGetAccess before deleting it.", d.name)
	}
	return s.removing(c, d, func(now time.Time) {
		s.dropUpload(d.disk.upload)
		s.erase(now, d)
	})
}

// beginGetAccess gives out a URL that a disk can be written through. Only uploads are
// emulated, so Write is the only access.
func (s *Server) beginGetAccess(c *call, d *resource) (*reply, *apiError) {
	if err := s.checkBody(c, "compute.GrantAccessData"); err != nil {
		return nil, err
	}
	state := text(d.doc, "properties.diskState")
	switch {
	case text(c.body, "access") != "Write":
		return nil, invalid("access", "The value '%s' of parameter 'access' is not one that this emulation has: Write.", text(c.body, "access"))
	case number(c.body, "durationInSeconds") < 1:
		return nil, invalid("durationInSeconds", "The value of parameter 'durationInSeconds' must be positive.")
	case state != "ReadyToUpload" && state != "ActiveUpload":
		return nil, conflict("OperationNotAllowed", "", "Disk %s is in state %s: only a disk with createOption Upload that was not uploaded to can be written.", d.name, state)
	case text(d.doc, "properties.provisioningState") != "Succeeded":
		return nil, conflict("Conflict", "", "Disk %s is being changed.", d.name)
	}
	if d.disk.upload == nil {
		up, err := s.newUpload(int64(number(d.doc, "properties.creationData.uploadSizeBytes")))
		if err != nil {
			return nil, &apiError{status: http.StatusInternalServerError, code: "InternalExecutionError", message: err.Error()}
		}
		d.disk.upload = up
		s.uploads[up.name] = up
	}
	up := d.disk.upload
	up.signature, up.expires = strings.ReplaceAll(newUUID(), "-", ""), c.now.Add(time.Duration(number(c.body, "durationInSeconds"))*time.Second)
	url := fmt.Sprintf("%s%s%s/abcd?sv=2018-03-28&sr=b&si=%s&sig=%s", c.base(), blobPrefix, up.name, newUUID(), up.signature)
	op := s.begin(c, d, s.cfg.Timing.Other, func(time.Time) *apiError {
		put(d.doc, "properties.diskState", "ActiveUpload")
		return nil
	})
	op.output = func() any { return map[string]any{"accessSAS": url} }
	return s.accepted(c, http.StatusAccepted, op, true, nil), nil
}

// endGetAccess ends the upload: the content must be a fixed VHD of the size that was
// said.
func (s *Server) endGetAccess(c *call, d *resource) (*reply, *apiError) {
	up := d.disk.upload
	if up == nil || up.signature == "" {
		return nil, conflict("OperationNotAllowed", "", "There is no shared access signature outstanding for disk %s.", d.name)
	}
	up.signature = ""
	op := s.begin(c, d, s.cfg.Timing.Other, func(time.Time) *apiError {
		put(d.doc, "properties.diskState", "Unattached")
		if err := up.checkVHD(); err != nil {
			put(d.doc, "properties.diskState", "ReadyToUpload")
			return badRequest("InvalidVhd", cmp.Or(d.name, ""), "The uploaded content of disk %s is no fixed VHD: %s.", d.name, err)
		}
		return nil
	})
	return s.accepted(c, http.StatusAccepted, op, true, nil), nil
}
