// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// resource is anything with an id.
type resource struct {
	id, name, group string
	kind            *kind
	doc             map[string]any // as GET answers, without id, name and type
	made, gone      time.Time      // gone: zero while it exists
	op              *operation     // under way, or nil
	failed          func(now time.Time, err *apiError)

	vm   *machine // of a virtual machine
	nic  *nicState
	disk *diskState
	// image is what a virtual machine can be made of.
	image  *Image
	upload *upload // that the image is the content of
}

// kind is a type of resource.
type kind struct {
	name     string   // "Microsoft.Compute/virtualMachines"
	versions []string // of the API; the first is the newest
	body     string   // the shape of a PUT; "": there is none
	patch    string   // of a PATCH; "": there is none
	child    bool     // of another resource: not listed in its group
	put      func(s *Server, c *call, old *resource) (*reply, *apiError)
	update   func(s *Server, c *call, r *resource) (*reply, *apiError)
	remove   func(s *Server, c *call, r *resource) (*reply, *apiError)
	actions  map[string]func(s *Server, c *call, r *resource) (*reply, *apiError)
}

func (k *kind) provider() string {
	p, _, _ := strings.Cut(k.name, "/")
	return p
}

// API versions whose model schema.tsv has.
var (
	computeVersions = []string{"2026-04-01"}
	diskVersions    = []string{"2026-03-02"}
	galleryVersions = []string{"2025-12-03"}
	skuVersions     = []string{"2021-07-01"}
	networkVersions = []string{"2025-05-01"}
	groupVersions   = []string{"2025-04-01", "2024-11-01", "2022-09-01", "2021-04-01"}
)

// kinds are by lower-case name. It is filled in by init because the functions in it
// use it.
var kinds map[string]*kind

func init() {
	kinds = map[string]*kind{}
	for _, k := range []*kind{
		{name: "Microsoft.Compute/virtualMachines", versions: computeVersions, body: "compute.VirtualMachine", patch: "compute.VirtualMachineUpdate",
			put: (*Server).putVM, update: (*Server).patchVM, remove: (*Server).deleteVM, actions: vmActions},
		{name: "Microsoft.Compute/disks", versions: diskVersions, body: "compute.Disk", patch: "compute.DiskUpdate",
			put: (*Server).putDisk, update: (*Server).patchSimple, remove: (*Server).deleteDisk, actions: diskActions},
		{name: "Microsoft.Compute/images", versions: computeVersions, body: "compute.Image", put: (*Server).putImage, remove: (*Server).deleteSimple},
		{name: "Microsoft.Compute/galleries", versions: galleryVersions, body: "compute.Gallery", put: (*Server).putSimple, remove: (*Server).deleteParent},
		{name: "Microsoft.Compute/galleries/images", versions: galleryVersions, body: "compute.GalleryImage", child: true,
			put: (*Server).putGalleryImage, remove: (*Server).deleteParent},
		{name: "Microsoft.Compute/galleries/images/versions", versions: galleryVersions, body: "compute.GalleryImageVersion", child: true,
			put: (*Server).putImageVersion, remove: (*Server).deleteSimple},
		{name: "Microsoft.Network/networkInterfaces", versions: networkVersions, body: "network.Interface", patch: "network.TagsObject",
			put: (*Server).putNIC, update: (*Server).patchSimple, remove: (*Server).deleteNIC},
		{name: "Microsoft.Network/publicIPAddresses", versions: networkVersions, body: "network.PublicIPAddress", patch: "network.TagsObject",
			put: (*Server).putAddress, update: (*Server).patchSimple, remove: (*Server).deleteAddress},
		{name: "Microsoft.Network/networkSecurityGroups", versions: networkVersions, body: "network.SecurityGroup", patch: "network.TagsObject",
			put: (*Server).putGroup, update: (*Server).patchSimple, remove: (*Server).deleteInUse},
		{name: "Microsoft.Network/networkSecurityGroups/securityRules", versions: networkVersions, body: "network.SecurityRule", child: true,
			put: (*Server).putRule, remove: (*Server).deleteSimple},
		{name: "Microsoft.Network/virtualNetworks", versions: networkVersions, body: "network.VirtualNetwork", patch: "network.TagsObject",
			put: (*Server).putSimple, update: (*Server).patchSimple, remove: (*Server).deleteParent},
		{name: "Microsoft.Network/virtualNetworks/subnets", versions: networkVersions, body: "network.Subnet", child: true,
			put: (*Server).putSubnet, remove: (*Server).deleteInUse},
	} {
		kinds[strings.ToLower(k.name)] = k
	}
}

func key(id string) string { return strings.ToLower(id) }

// route is a parsed resource id, or a collection, or an action on a resource.
type route struct {
	sub, group string
	types      []string // "Microsoft.Compute", "virtualMachines"
	names      []string
	action     string
}

// parse reads a path; ok is false when it is no path of a provider's resources.
func parse(p string) (out route, ok bool) {
	seg := strings.Split(strings.Trim(p, "/"), "/")
	if len(seg) >= 2 && strings.EqualFold(seg[0], "subscriptions") {
		out.sub, seg = seg[1], seg[2:]
	}
	if len(seg) >= 2 && strings.EqualFold(seg[0], "resourceGroups") {
		out.group, seg = seg[1], seg[2:]
	}
	if len(seg) < 3 || !strings.EqualFold(seg[0], "providers") {
		return out, false
	}
	out.types, seg = []string{seg[1]}, seg[2:]
	for len(seg) > 0 {
		name := strings.Join(append(slices.Clone(out.types), seg[0]), "/")
		if k := kinds[strings.ToLower(name)]; k == nil && len(out.names) > 0 && len(seg) == 1 {
			out.action = seg[0]
			return out, true
		}
		out.types = append(out.types, seg[0])
		if len(seg) == 1 {
			return out, true
		}
		out.names = append(out.names, seg[1])
		seg = seg[2:]
	}
	return out, true
}

func (p route) kind() *kind { return kinds[strings.ToLower(strings.Join(p.types, "/"))] }

// id is the resource's, in the type's own spelling.
func (p route) id(s *Server) string {
	id := "/subscriptions/" + s.cfg.Subscription + "/resourceGroups/" + p.group + "/providers/" + p.kind().provider()
	for i, t := range strings.Split(p.kind().name, "/")[1:] {
		id += "/" + t + "/" + p.names[i]
	}
	return id
}

// resourceManager answers for Azure Resource Manager itself. It needs mu.
func (s *Server) resourceManager(c *call) (*reply, *apiError) {
	if err := s.authenticate(c); err != nil {
		return nil, err
	}
	c.version = c.query("api-version")
	if c.version == "" {
		return nil, badRequest("MissingApiVersionParameter", "", "The api-version query parameter (?api-version=) is required for all requests.")
	}
	if len(c.raw) > maxBody {
		return nil, &apiError{status: http.StatusRequestEntityTooLarge, code: "RequestContentTooLarge", message: "The request content size exceeds the maximum size of 4 MB."}
	}
	if len(c.raw) > 0 && c.r.Method != http.MethodGet {
		if err := json.Unmarshal(c.raw, &c.body); err != nil {
			return nil, badRequest("InvalidRequestContent", "", "The request content was invalid and could not be deserialized: '%s'.", err)
		}
	}
	p, ok := parse(c.r.URL.Path)
	c.path = p
	if p.sub != "" && !strings.EqualFold(p.sub, s.cfg.Subscription) {
		return nil, &apiError{status: http.StatusNotFound, code: "SubscriptionNotFound", message: fmt.Sprintf("The subscription '%s' could not be found.", p.sub)}
	}
	if p.group != "" && !s.groupExists(p.group) {
		return nil, &apiError{status: http.StatusNotFound, code: "ResourceGroupNotFound", message: fmt.Sprintf("Resource group '%s' could not be found.", p.group)}
	}
	if !ok {
		return s.groups(c)
	}
	if p.group == "" || len(p.types) > 1 && strings.EqualFold(p.types[1], "locations") {
		if rep, err, done := s.regional(c); done {
			return rep, err
		}
	}
	k := p.kind()
	if k == nil {
		return nil, &apiError{status: http.StatusNotFound, code: "InvalidResourceType", message: fmt.Sprintf(
			"The resource type could not be found in the namespace '%s' for api version '%s'.", p.types[0], c.version)}
	}
	if err := c.versionOf(k.name, k.versions); err != nil {
		return nil, err
	}
	name := ""
	if len(p.names) > 0 {
		name = p.names[len(p.names)-1]
	}
	c.fault = s.fault(c.r.Method, k.name, name, c.body)
	if f := c.fault; f != nil && !f.AtEnd && !f.Leave {
		if f.Never {
			return &reply{status: http.StatusOK}, nil
		}
		if err := f.err(); err != nil {
			return nil, err
		}
	}
	if len(p.names) < len(strings.Split(k.name, "/"))-1 {
		if c.r.Method != http.MethodGet {
			return nil, methodNotAllowed(c)
		}
		return s.list(c, k)
	}
	return s.one(c, k)
}

func methodNotAllowed(c *call) *apiError {
	return &apiError{status: http.StatusMethodNotAllowed, code: "MethodNotAllowed", message: "The resource does not support method '" + c.r.Method + "'."}
}

func (c *call) versionOf(what string, known []string) *apiError {
	if slices.Contains(known, c.version) {
		return nil
	}
	return badRequest("NoRegisteredProviderFound", "", "No registered resource provider found for location '%s' and API version '%s' for type '%s'. The supported api-versions are '%s'.",
		c.s.cfg.Region, c.version, what[strings.Index(what, "/")+1:], strings.Join(known, ", "))
}

func (s *Server) groupExists(name string) bool {
	return slices.ContainsFunc(s.cfg.Groups, func(g string) bool { return strings.EqualFold(g, name) })
}

// one answers a request for one resource.
func (s *Server) one(c *call, k *kind) (*reply, *apiError) {
	id := c.path.id(s)
	r := s.resources[key(id)]
	action := k.name + map[string]string{http.MethodGet: "/read", http.MethodHead: "/read", http.MethodPut: "/write", http.MethodPatch: "/write", http.MethodDelete: "/delete"}[c.r.Method]
	if c.path.action != "" {
		action = k.name + "/" + c.path.action + "/action"
		if c.r.Method == http.MethodGet {
			action = k.name + "/" + c.path.action + "/read"
		}
	}
	if err := c.authorize(action, id); err != nil {
		return nil, err
	}
	if err := s.throttleOne(c, k, id); err != nil {
		return nil, err
	}
	missing := &apiError{status: http.StatusNotFound, code: "ResourceNotFound", message: fmt.Sprintf(
		"The Resource '%s/%s' under resource group '%s' was not found. For more details please go to https://aka.ms/ARMResourceNotFoundFix",
		k.name, strings.Join(c.path.names, "/"), c.path.group)}
	if c.path.action != "" {
		do := k.actions[c.r.Method+" "+strings.ToLower(c.path.action)]
		if do == nil {
			return nil, methodNotAllowed(c)
		}
		if r == nil {
			return nil, missing
		}
		return do(s, c, r)
	}
	switch c.r.Method {
	case http.MethodGet:
		if r == nil {
			return nil, missing
		}
		return &reply{status: http.StatusOK, body: s.view(c, r)}, nil
	case http.MethodPut:
		if err := s.checkBody(c, k.body); err != nil {
			return nil, err
		}
		return k.put(s, c, r)
	case http.MethodPatch:
		if k.update == nil {
			return nil, methodNotAllowed(c)
		}
		if r == nil {
			return nil, missing
		}
		if err := s.checkBody(c, k.patch); err != nil {
			return nil, err
		}
		return k.update(s, c, r)
	case http.MethodDelete:
		if r == nil {
			return &reply{status: http.StatusNoContent}, nil
		}
		return k.remove(s, c, r)
	}
	return nil, methodNotAllowed(c)
}

func (s *Server) throttleOne(c *call, k *kind, id string) *apiError {
	if k.name != "Microsoft.Compute/virtualMachines" {
		return nil
	}
	op := map[string]string{http.MethodGet: "GetVM", http.MethodPut: "PutVM", http.MethodDelete: "DeleteVM"}[c.r.Method]
	if op == "" {
		op = "UpdateVM"
	}
	return s.throttle(c.now, op, op+"PerResource "+key(id))
}

// checkBody holds the body to its shape and to what all resources have in common.
func (s *Server) checkBody(c *call, shape string) *apiError {
	if c.body == nil {
		return badRequest("InvalidRequestContent", "", "The request content was invalid and could not be deserialized: 'A body is required.'.")
	}
	if err := readSchema().check(shape, c.body); err != nil {
		return err
	}
	if err := checkTags(c.body); err != nil {
		return err
	}
	if l := text(c.body, "location"); l != "" && !strings.EqualFold(strings.ReplaceAll(l, " ", ""), s.cfg.Region) {
		return badRequest("LocationNotAvailableForResourceType", "location", "The provided location '%s' is not available for resource type '%s'. List of available regions for the resource type is '%s'.",
			l, c.path.kind().name, s.cfg.Region)
	}
	return nil
}

// view is a resource as GET answers it.
func (s *Server) view(c *call, r *resource) map[string]any {
	m := clone(r.doc)
	m["id"], m["name"], m["type"] = r.id, r.name, r.kind.name
	if r.vm != nil {
		s.viewVM(c, r, m)
	}
	if r.kind.name == "Microsoft.Network/networkSecurityGroups" {
		put(m, "properties.securityRules", s.children(c, r))
	}
	if r.kind.name == "Microsoft.Network/virtualNetworks" {
		put(m, "properties.subnets", s.children(c, r))
	}
	return m
}

func (s *Server) children(c *call, r *resource) []any {
	out := []any{}
	for _, k := range sortedKeys(s.resources) {
		if rest, ok := strings.CutPrefix(k, key(r.id)+"/"); ok && strings.Count(rest, "/") == 1 {
			out = append(out, s.view(c, s.resources[k]))
		}
	}
	return out
}

// add makes a resource. It needs mu.
func (s *Server) add(now time.Time, k *kind, id string, doc map[string]any) *resource {
	seg := strings.Split(id, "/")
	r := &resource{id: id, name: seg[len(seg)-1], group: seg[4], kind: k, doc: doc, made: now}
	s.resources[key(id)] = r
	return r
}

// erase removes a resource; lists may still show it. It needs mu.
func (s *Server) erase(now time.Time, r *resource) {
	if s.resources[key(r.id)] != r {
		return
	}
	delete(s.resources, key(r.id))
	r.gone = now
	s.gone = append(s.gone, r)
	s.gone = slices.DeleteFunc(s.gone, func(r *resource) bool {
		return now.Sub(r.gone) > max(s.cfg.Timing.ListLag, s.cfg.Timing.IndexLag)
	})
}

// listed tells what a list shows: with a lag, that is not what there is. It needs mu.
func (s *Server) listed(now time.Time, lag time.Duration, want func(*resource) bool) []*resource {
	var out []*resource
	for _, r := range s.resources {
		if now.Sub(r.made) >= lag && want(r) {
			out = append(out, r)
		}
	}
	for _, r := range s.gone {
		if now.Sub(r.gone) < lag && now.Sub(r.made) >= lag && want(r) && s.resources[key(r.id)] == nil {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *resource) int { return strings.Compare(key(a.id), key(b.id)) })
	return out
}
