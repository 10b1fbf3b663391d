// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"maps"
	"slices"
	"strconv"
)

type template struct {
	resource
	name     string
	versions []*templateVersion
	def      int // number of the default version
}

type templateVersion struct {
	of          *template
	number      int
	description string
	data        *params
	resource
}

// withTemplate adds the parameters of the request's launch template, if it names one,
// to those it does not have itself.
func (s *Server) withTemplate(p *params) (*params, *templateVersion, error) {
	spec := p.at("LaunchTemplate")
	if spec == nil {
		return p, nil, nil
	}
	t, err := s.template(spec.str("LaunchTemplateId"), spec.str("LaunchTemplateName"))
	if err != nil {
		return nil, nil, err
	}
	v, err := t.version(spec.or("Version", "$Default"))
	if err != nil {
		return nil, nil, err
	}
	merged := &params{text: maps.Clone(v.data.text), texts: maps.Clone(v.data.texts), sub: maps.Clone(v.data.sub), subs: maps.Clone(v.data.subs)}
	for k, x := range p.text {
		merged.text[k] = x
	}
	for k, x := range p.texts {
		merged.texts[k] = x
	}
	for k, x := range p.subs {
		merged.subs[k] = x
	}
	for k, x := range p.sub {
		merged.sub[k] = x
	}
	return merged, v, nil
}

func (s *Server) template(id, name string) (*template, error) {
	if id != "" && name != "" {
		return nil, errorf(400, "InvalidParameterCombination", "You can specify either the launch template id or the launch template name, not both")
	}
	if id == "" && name == "" {
		return nil, errorf(400, "MissingParameter", "Either a launch template id or a launch template name is needed")
	}
	now := s.cfg.Now()
	for _, t := range s.templates {
		if t.exists(now) && (t.id == id || id == "" && t.name == name) {
			return t, nil
		}
	}
	if name != "" {
		return nil, errorf(400, "InvalidLaunchTemplateName.NotFoundException", "The specified launch template, with template name %s, does not exist.", name)
	}
	return nil, errorf(400, "InvalidLaunchTemplateId.NotFound", "The specified launch template, with template ID %s, does not exist.", id)
}

func (t *template) version(name string) (*templateVersion, error) {
	n := t.def
	switch name {
	case "$Default":
	case "$Latest":
		n = len(t.versions)
	default:
		var err error
		if n, err = strconv.Atoi(name); err != nil {
			return nil, errorf(400, "InvalidLaunchTemplateId.VersionNotFound", "The specified launch template version %q is malformed", name)
		}
	}
	if n < 1 || n > len(t.versions) {
		return nil, errorf(400, "InvalidLaunchTemplateId.VersionNotFound", "Could not find the specified version %d for the launch template with ID %s.", n, t.id)
	}
	return t.versions[n-1], nil
}

func (s *Server) createTemplate(c *call) (obj, error) {
	name := c.str("LaunchTemplateName")
	if len(name) < 3 || len(name) > 128 {
		return nil, errorf(400, "InvalidLaunchTemplateName.MalformedException", "Launch template names must be between 3 and 128 characters")
	}
	for _, t := range s.templates {
		if t.exists(c.now) && t.name == name {
			return nil, errorf(400, "InvalidLaunchTemplateName.AlreadyExistsException", "Launch template name already in use.")
		}
	}
	tags, err := s.tagsFor(c, "launch-template")
	if err != nil {
		return nil, err
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	t := &template{resource: s.newResource("lt-", c.now, tags["launch-template"]), name: name, def: 1}
	t.visible = c.now
	t.versions = []*templateVersion{{of: t, number: 1, description: c.str("VersionDescription"), data: c.at("LaunchTemplateData"),
		resource: resource{created: c.now, seq: 1}}}
	s.templates[t.id] = t
	return obj{"launchTemplate": s.templateObj(t)}, nil
}

func (s *Server) templateObj(t *template) obj {
	return obj{"launchTemplateId": t.id, "launchTemplateName": t.name, "createTime": t.created, "createdBy": "arn:aws:iam::" + s.cfg.Account + ":root",
		"defaultVersionNumber": t.def, "latestVersionNumber": len(t.versions), "tagSet": tagSet(t.tags)}
}

func (s *Server) deleteTemplate(c *call) (obj, error) {
	t, err := s.template(c.str("LaunchTemplateId"), c.str("LaunchTemplateName"))
	if err != nil {
		return nil, err
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	t.gone = c.now
	return obj{"launchTemplate": s.templateObj(t)}, nil
}

func (s *Server) describeTemplates(c *call) (obj, error) {
	items, err := pick(c, s.templates, "LaunchTemplateId", "lt-", func(t *template) *resource { return &t.resource }, attrs[*template]{
		"launch-template-name": one(func(t *template) string { return t.name }),
		"create-time":          one(func(t *template) string { return timeText(t.created) }),
	})
	if err != nil {
		return nil, err
	}
	for _, n := range c.strs("LaunchTemplateName") {
		if _, err := s.template("", n); err != nil {
			return nil, errorf(400, "InvalidLaunchTemplateName.NotFoundException", "At least one of the launch templates specified in the request does not exist.")
		}
	}
	if names := c.strs("LaunchTemplateName"); len(names) > 0 {
		items = slices.DeleteFunc(items, func(t *template) bool { return !slices.Contains(names, t.name) })
	}
	items, next, err := page(c, 1, 200, items, func(t *template) int { return t.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, t := range items {
		set = append(set, s.templateObj(t))
	}
	return obj{"launchTemplates": set, "nextToken": next}, nil
}

func (s *Server) describeTemplateVersions(c *call) (obj, error) {
	t, err := s.template(c.str("LaunchTemplateId"), c.str("LaunchTemplateName"))
	if err != nil {
		return nil, err
	}
	versions := t.versions
	if want := c.strs("LaunchTemplateVersion"); len(want) > 0 {
		versions = nil
		for _, w := range want {
			v, err := t.version(w)
			if err != nil {
				return nil, err
			}
			versions = append(versions, v)
		}
	}
	set := []obj{}
	for _, v := range versions {
		set = append(set, obj{"launchTemplateId": t.id, "launchTemplateName": t.name, "versionNumber": v.number, "versionDescription": v.description,
			"createTime": v.created, "createdBy": "arn:aws:iam::" + s.cfg.Account + ":root", "defaultVersion": v.number == t.def,
			"launchTemplateData": templateData(v.data)})
	}
	return obj{"launchTemplateVersionSet": set}, c.dryRun()
}

// templateData is what a reply says of a version's parameters: those that a launch of
// a pod VM may take from it.
func templateData(d *params) obj {
	o := obj{"imageId": d.str("ImageId"), "instanceType": d.str("InstanceType"), "keyName": d.str("KeyName"), "userData": d.str("UserData"),
		"instanceInitiatedShutdownBehavior": d.str("InstanceInitiatedShutdownBehavior")}
	if g := d.strs("SecurityGroupId"); len(g) > 0 {
		o["securityGroupIdSet"] = g
	}
	if p := d.at("Placement"); p != nil {
		o["placement"] = obj{"availabilityZone": p.str("AvailabilityZone"), "groupName": p.str("GroupName"), "tenancy": p.str("Tenancy")}
	}
	if m := d.at("MetadataOptions"); m != nil {
		mo := obj{"httpTokens": m.str("HttpTokens"), "httpEndpoint": m.str("HttpEndpoint")}
		if m.has("HttpPutResponseHopLimit") {
			mo["httpPutResponseHopLimit"] = m.num("HttpPutResponseHopLimit")
		}
		o["metadataOptions"] = mo
	}
	var blocks []obj
	for _, b := range d.all("BlockDeviceMapping") {
		e := b.at("Ebs")
		eo := obj{"volumeType": e.str("VolumeType"), "snapshotId": e.str("SnapshotId"), "encrypted": e.bool("Encrypted")}
		if e.has("VolumeSize") {
			eo["volumeSize"] = e.num("VolumeSize")
		}
		blocks = append(blocks, obj{"deviceName": b.str("DeviceName"), "ebs": eo})
	}
	if blocks != nil {
		o["blockDeviceMappingSet"] = blocks
	}
	var nics []obj
	for _, n := range d.all("NetworkInterface") {
		no := obj{"subnetId": n.str("SubnetId"), "description": n.str("Description"), "deviceIndex": n.num("DeviceIndex")}
		if n.has("AssociatePublicIpAddress") {
			no["associatePublicIpAddress"] = n.bool("AssociatePublicIpAddress")
		}
		nics = append(nics, no)
	}
	if nics != nil {
		o["networkInterfaceSet"] = nics
	}
	var specs []obj
	for _, t := range d.all("TagSpecification") {
		tags, _ := tagsOf(t)
		specs = append(specs, obj{"resourceType": t.str("ResourceType"), "tagSet": tagSet(tags)})
	}
	if specs != nil {
		o["tagSpecificationSet"] = specs
	}
	return o
}
