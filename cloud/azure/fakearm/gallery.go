// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"cmp"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// preload makes what exists from the start.
func (s *Server) preload() {
	now := s.cfg.Now().Add(-time.Hour) // no list lags
	for _, sn := range s.cfg.Subnets {
		id := s.cfg.SubnetID(sn)
		if sn.CIDR != sn.CIDR.Masked() || !sn.CIDR.IsValid() {
			panic(fmt.Sprintf("fakearm: subnet %s: %s is no network", id, sn.CIDR))
		}
		net := id[:strings.LastIndex(id, "/subnets/")]
		s.ensure(now, "Microsoft.Network/virtualNetworks", net, map[string]any{"properties": map[string]any{"addressSpace": map[string]any{"addressPrefixes": []any{
			netip.PrefixFrom(sn.CIDR.Addr(), min(sn.CIDR.Bits(), 16)).Masked().String()}}}})
		r := s.ensure(now, "Microsoft.Network/virtualNetworks/subnets", id, map[string]any{"properties": map[string]any{"addressPrefix": sn.CIDR.String()}})
		delete(r.doc, "location")
	}
	for _, name := range s.cfg.SecurityGroups {
		s.ensure(now, "Microsoft.Network/networkSecurityGroups", s.cfg.SecurityGroupID(name), map[string]any{"properties": map[string]any{}})
	}
	for _, img := range s.cfg.Images {
		s.addImage(now, img)
	}
}

// ensure makes a resource that is as it should be, unless it exists. It needs mu.
func (s *Server) ensure(now time.Time, kind, id string, doc map[string]any) *resource {
	if r := s.resources[key(id)]; r != nil {
		return r
	}
	doc["location"] = s.cfg.Region
	put(doc, "properties.provisioningState", "Succeeded")
	return s.add(now, kinds[strings.ToLower(kind)], id, doc)
}

// AddImage makes an image exist.
func (s *Server) AddImage(img Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addImage(s.cfg.Now(), img)
}

func (s *Server) addImage(now time.Time, img Image) {
	if !strings.HasPrefix(key(img.ID), "/subscriptions/") {
		s.foreign[key(img.ID)] = img
		return
	}
	p, ok := parse(img.ID)
	if !ok || p.kind() == nil || len(p.names) != len(p.types)-1 {
		panic("fakearm: image id " + img.ID + " is none of a gallery image version or a managed image")
	}
	if !strings.EqualFold(p.sub, s.cfg.Subscription) {
		s.foreign[key(img.ID)] = img
		return
	}
	if p.kind().name == "Microsoft.Compute/images" {
		s.ensure(now, p.kind().name, img.ID, map[string]any{"properties": map[string]any{"hyperVGeneration": cmp.Or(img.Generation, "V2")}}).image = &img
		return
	}
	parts := strings.Split(img.ID, "/")
	s.ensure(now, "Microsoft.Compute/galleries", strings.Join(parts[:9], "/"), map[string]any{"properties": map[string]any{}})
	def := map[string]any{"osType": "Linux", "osState": cmp.Or(img.State, "Generalized"), "hyperVGeneration": cmp.Or(img.Generation, "V2"),
		"architecture": cmp.Or(img.Arch, "x64"), "identifier": map[string]any{"publisher": "peerpods", "offer": "podvm", "sku": parts[10]}}
	if img.SecurityType != "" {
		def["features"] = []any{map[string]any{"name": "SecurityType", "value": img.SecurityType}}
	}
	s.ensure(now, "Microsoft.Compute/galleries/images", strings.Join(parts[:11], "/"), map[string]any{"properties": def})
	s.ensure(now, "Microsoft.Compute/galleries/images/versions", img.ID, map[string]any{"properties": map[string]any{}}).image = &img
}

// imageOf finds what a machine is to be made of. A gallery image without a version is
// its newest.
func (s *Server) imageOf(id string) (*Image, *apiError) {
	k := strings.TrimSuffix(key(id), "/versions/latest")
	if img, ok := s.foreign[k]; ok {
		return &img, nil
	}
	r := s.resources[k]
	if r != nil && r.kind.name == "Microsoft.Compute/galleries/images" {
		r = s.newest(r)
	}
	if r == nil || r.image == nil && r.kind.name != "Microsoft.Compute/galleries/images/versions" && r.kind.name != "Microsoft.Compute/images" {
		for _, f := range sortedKeys(s.foreign) {
			if strings.HasPrefix(f, k+"/versions/") {
				img := s.foreign[f]
				return &img, nil
			}
		}
		return nil, &apiError{status: http.StatusNotFound, code: "GalleryImageNotFound", target: "imageReference", message: fmt.Sprintf(
			"The gallery image %s is not available in %s region. Please contact image owner to replicate to this region, or change your requested region.", id, s.cfg.Region)}
	}
	if state := text(r.doc, "properties.provisioningState"); r.image == nil || state != "Succeeded" && state != "Updating" {
		return nil, conflict("OperationNotAllowed", "imageReference", "The image %s is in provisioningState %s and cannot be used.", id, state)
	}
	return r.image, nil
}

func (s *Server) newest(def *resource) *resource {
	var best *resource
	for k, r := range s.resources {
		if strings.HasPrefix(k, key(def.id)+"/versions/") && r.image != nil && (best == nil || versionLess(best.name, r.name)) {
			best = r
		}
	}
	return best
}

func versionLess(a, b string) bool {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	return slices.CompareFunc(x, y, func(p, q string) int {
		i, _ := strconv.Atoi(p)
		j, _ := strconv.Atoi(q)
		return cmp.Compare(i, j)
	}) < 0
}

func (s *Server) parent(c *call, sub string) (*resource, *apiError) {
	id := c.path.id(s)
	id = id[:strings.LastIndex(id, sub)]
	if r := s.resources[key(id)]; r != nil {
		return r, nil
	}
	return nil, &apiError{status: http.StatusNotFound, code: "ParentResourceNotFound", message: fmt.Sprintf(
		"Can not perform requested operation on nested resource. Parent resource '%s' not found.", id)}
}

// putGalleryImage makes an image definition. What it says of machines cannot change.
func (s *Server) putGalleryImage(c *call, old *resource) (*reply, *apiError) {
	if _, err := s.parent(c, "/images/"); err != nil {
		return nil, err
	}
	for _, p := range []string{"hyperVGeneration", "architecture", "features", "osState", "osType", "identifier"} {
		if old != nil && at(c.body, "properties."+p) != nil && !same(at(old.doc, "properties."+p), at(c.body, "properties."+p)) {
			return nil, conflict("PropertyChangeNotAllowed", "galleryImage.properties."+p, "Changing property 'galleryImage.properties.%s' is not allowed.", p)
		}
	}
	kinds := []string{"Standard", "TrustedLaunch", "TrustedLaunchSupported", "ConfidentialVM", "ConfidentialVmSupported", "TrustedLaunchAndConfidentialVmSupported"}
	for i, f := range list(c.body, "properties.features") {
		if text(f, "name") == "SecurityType" && !slices.Contains(kinds, text(f, "value")) {
			return nil, invalid(fmt.Sprintf("galleryImage.properties.features[%d]", i), "The value '%s' of feature SecurityType is none of %s.", text(f, "value"), strings.Join(kinds, ", "))
		}
	}
	if gen := text(c.body, "properties.hyperVGeneration"); len(list(c.body, "properties.features")) > 0 && gen != "V2" {
		return nil, invalid("galleryImage.properties.hyperVGeneration", "The features of an image need hyperVGeneration V2.")
	}
	if old == nil && at(c.body, "properties.hyperVGeneration") == nil {
		put(c.body, "properties.hyperVGeneration", "V1") // the service's default
	}
	return s.putSimple(c, old)
}

var imageVersion = regexp.MustCompile(`^\d{1,9}\.\d{1,9}\.\d{1,9}$`)

// putImageVersion makes a version of an uploaded disk or of a managed image.
func (s *Server) putImageVersion(c *call, old *resource) (*reply, *apiError) {
	def, err := s.parent(c, "/versions/")
	if err != nil {
		return nil, err
	}
	if !imageVersion.MatchString(c.path.names[2]) {
		return nil, invalid("galleryImageVersionName", "The gallery image version name '%s' is invalid: it must be Major.Minor.Patch.", c.path.names[2])
	}
	if old != nil {
		if a, b := at(old.doc, "properties.storageProfile"), at(c.body, "properties.storageProfile"); !same(a, b) {
			return nil, conflict("PropertyChangeNotAllowed", "galleryImageVersion.properties.storageProfile", "Changing property 'galleryImageVersion.properties.storageProfile' is not allowed.")
		}
		if text(old.doc, "properties.provisioningState") != "Failed" {
			merge(old.doc, clone(c.body))
			return s.begun(c, old, http.StatusOK)
		}
	}
	for _, t := range list(c.body, "properties.publishingProfile.targetRegions") {
		if !strings.EqualFold(strings.ReplaceAll(text(t, "name"), " ", ""), s.cfg.Region) {
			return nil, invalid("targetRegions", "The target region '%s' is not one of this emulation: it has %s.", text(t, "name"), s.cfg.Region)
		}
	}
	img := &Image{ID: c.path.id(s), State: text(def.doc, "properties.osState"), Generation: text(def.doc, "properties.hyperVGeneration"), Arch: text(def.doc, "properties.architecture")}
	for _, f := range list(def.doc, "properties.features") {
		if text(f, "name") == "SecurityType" && text(f, "value") != "Standard" {
			img.SecurityType = text(f, "value")
		}
	}
	source := cmp.Or(text(c.body, "properties.storageProfile.osDiskImage.source.id"), text(c.body, "properties.storageProfile.source.id"))
	src := s.resources[key(source)]
	var up *upload
	switch {
	case source == "":
		return nil, invalid("galleryImageVersion.properties.storageProfile", "Required parameter 'storageProfile.osDiskImage.source.id' or 'storageProfile.source.id' is missing (null).")
	case src == nil:
		return nil, &apiError{status: http.StatusNotFound, code: "ResourceNotFound", message: fmt.Sprintf("The source %s of the gallery image version was not found.", source)}
	case src.disk != nil:
		if err := c.linked("Microsoft.Compute/disks/read", src.id, "Microsoft.Compute/galleries/images/versions/write"); err != nil {
			return nil, err
		}
		if up = src.disk.upload; up == nil || !up.checked || text(src.doc, "properties.diskState") == "ActiveUpload" {
			return nil, conflict("OperationNotAllowed", "", "Disk %s is in state %s and holds no image.", src.name, text(src.doc, "properties.diskState"))
		}
		img.Path, img.SizeGB = up.path, int(number(src.doc, "properties.diskSizeGB"))
	case src.image != nil:
		img.Path, img.SizeGB, up = src.image.Path, src.image.SizeGB, src.upload
	default:
		return nil, invalid("galleryImageVersion.properties.storageProfile", "The source %s is neither a disk nor an image.", source)
	}
	r, status := old, http.StatusOK
	if r == nil {
		doc := clone(c.body)
		doc["location"] = s.cfg.Region
		r, status = s.add(c.now, c.path.kind(), c.path.id(s), doc), http.StatusCreated
		if r.upload = up; up != nil {
			up.users++
		}
	}
	put(r.doc, "properties.provisioningState", "Creating")
	r.failed = func(time.Time, *apiError) { put(r.doc, "properties.provisioningState", "Failed") }
	op := s.begin(c, r, s.cfg.Timing.Replicate, func(time.Time) *apiError {
		r.image = img
		put(r.doc, "properties.provisioningState", "Succeeded")
		put(r.doc, "properties.publishingProfile.publishedDate", c.now.UTC().Format(time.RFC3339Nano))
		return nil
	})
	return s.accepted(c, status, op, false, s.view(c, r)), nil
}

// putImage makes a managed image of an uploaded disk.
func (s *Server) putImage(c *call, old *resource) (*reply, *apiError) {
	id := text(c.body, "properties.storageProfile.osDisk.managedDisk.id")
	src := s.resources[key(id)]
	if src == nil || src.disk == nil {
		return nil, notFoundReference(id, c.path.id(s))
	}
	up := src.disk.upload
	if up == nil || !up.checked {
		return nil, conflict("OperationNotAllowed", "", "Disk %s holds no image.", src.name)
	}
	rep, err := s.putSimple(c, old)
	if err != nil {
		return nil, err
	}
	r := s.resources[key(c.path.id(s))]
	r.image = &Image{ID: r.id, Path: up.path, State: text(c.body, "properties.storageProfile.osDisk.osState"), Generation: cmp.Or(text(c.body, "properties.hyperVGeneration"), "V1"),
		SizeGB: int(number(src.doc, "properties.diskSizeGB"))}
	if r.upload == nil {
		r.upload = up
		up.users++
	}
	return rep, nil
}

// foreignGallery answers for galleries that others share: definitions and versions of
// Config.Images whose id begins with /SharedGalleries or /CommunityGalleries.
func (s *Server) foreignGallery(c *call, rest []string) (*reply, *apiError) {
	if err := c.versionOf("Microsoft.Compute/"+rest[2], galleryVersions); err != nil {
		return nil, err
	}
	if c.r.Method != http.MethodGet {
		return nil, methodNotAllowed(c)
	}
	action := "Microsoft.Compute/locations/" + strings.Join(every(rest[2:], 2), "/") + "/read"
	if err := c.authorize(action, c.r.URL.Path); err != nil {
		return nil, err
	}
	want := key("/" + strings.Join(rest[2:], "/"))
	var found []Image
	exact := len(rest)%2 == 0
	for _, k := range sortedKeys(s.foreign) {
		if k == want || strings.HasPrefix(k, want+"/") {
			found = append(found, s.foreign[k])
		}
	}
	if len(found) == 0 {
		return nil, &apiError{status: http.StatusNotFound, code: "ResourceNotFound", message: fmt.Sprintf("The resource %s was not found.", want)}
	}
	view := func(img Image) map[string]any {
		parts := strings.Split(strings.Trim(img.ID, "/"), "/")
		n := min(len(parts), len(rest)-2+1)
		n -= n % 2
		props := map[string]any{"osType": "Linux", "osState": cmp.Or(img.State, "Generalized"), "hyperVGeneration": cmp.Or(img.Generation, "V2"), "architecture": cmp.Or(img.Arch, "x64"),
			"identifier": map[string]any{"publisher": "others", "offer": "podvm", "sku": parts[3]}}
		if img.SecurityType != "" {
			props["features"] = []any{map[string]any{"name": "SecurityType", "value": img.SecurityType}}
		}
		return map[string]any{"name": parts[n-1], "location": s.cfg.Region, "type": "Microsoft.Compute/locations/" + strings.Join(every(rest[2:], 2), "/"),
			"identifier": map[string]any{"uniqueId": "/" + strings.Join(parts[:n], "/")}, "properties": props}
	}
	if exact {
		return &reply{status: http.StatusOK, body: view(found[0])}, nil
	}
	return s.page(c, len(found), func(i int) any { return view(found[i]) })
}

// every takes each nth of a list, the first included.
func every(l []string, n int) []string {
	var out []string
	for i := 0; i < len(l); i += n {
		out = append(out, l[i])
	}
	return out
}
