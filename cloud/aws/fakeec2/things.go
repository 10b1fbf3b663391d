// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"slices"
	"strings"
	"time"
)

func volumeFilters() attrs[*volume] {
	attached := func(f func(*volume) string) func(*volume) []string {
		return func(v *volume) []string {
			if v.instance == nil {
				return nil
			}
			return []string{f(v)}
		}
	}
	return attrs[*volume]{
		"volume-id":              one(func(v *volume) string { return v.id }),
		"status":                 one((*volume).status),
		"size":                   one(func(v *volume) string { return itoa(v.gib) }),
		"volume-type":            one(func(v *volume) string { return v.kind }),
		"snapshot-id":            one(func(v *volume) string { return v.snapshot }),
		"availability-zone":      one(func(v *volume) string { return v.zone }),
		"encrypted":              one(func(v *volume) string { return map[bool]string{true: "true", false: "false"}[v.encrypted] }),
		"attachment.instance-id": attached(func(v *volume) string { return v.instance.id }),
		"attachment.device":      attached(func(v *volume) string { return v.device }),
		"attachment.status":      attached(func(*volume) string { return "attached" }),
		"attachment.delete-on-termination": attached(func(v *volume) string {
			return map[bool]string{true: "true", false: "false"}[v.deleteOnTermination]
		}),
		"create-time": one(func(v *volume) string { return timeText(v.created) }),
	}
}

func (v *volume) status() string {
	if v.instance != nil {
		return "in-use"
	}
	return "available"
}

func (s *Server) describeVolumes(c *call) (obj, error) {
	items, err := pick(c, s.volumes, "VolumeId", "vol-", func(v *volume) *resource { return &v.resource }, volumeFilters())
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 5, 1000, items, func(v *volume) int { return v.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, v := range items {
		o := obj{"volumeId": v.id, "size": v.gib, "snapshotId": present(v.snapshot), "availabilityZone": v.zone, "status": v.status(),
			"createTime": v.created, "volumeType": v.kind, "encrypted": v.encrypted, "kmsKeyId": v.kms, "multiAttachEnabled": false,
			"tagSet": tagSet(v.tags), "attachmentSet": []obj{}}
		if v.iops > 0 {
			o["iops"] = v.iops
		}
		if v.throughput > 0 {
			o["throughput"] = v.throughput
		}
		if v.instance != nil {
			o["attachmentSet"] = []obj{{"volumeId": v.id, "instanceId": v.instance.id, "device": v.device, "status": "attached",
				"attachTime": v.attached, "deleteOnTermination": v.deleteOnTermination}}
		}
		set = append(set, o)
	}
	return obj{"volumeSet": set, "nextToken": next}, nil
}

func (s *Server) deleteVolume(c *call) (obj, error) {
	id := c.str("VolumeId")
	if err := wellFormed("vol-", id); err != nil {
		return nil, err
	}
	v := s.volumes[id]
	if v == nil || !v.seen(c.now) {
		return nil, unknownID("vol-", id)
	}
	if v.instance != nil {
		return nil, errorf(400, "VolumeInUse", "Volume %s is currently attached to %s", id, v.instance.id)
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	v.gone = c.now
	return nil, nil
}

func eniFilters() attrs[*eni] {
	attached := func(f func(*eni) string) func(*eni) []string {
		return func(e *eni) []string {
			if e.instance == nil {
				return nil
			}
			return []string{f(e)}
		}
	}
	return attrs[*eni]{
		"network-interface-id":         one(func(e *eni) string { return e.id }),
		"status":                       one((*eni).status),
		"subnet-id":                    one(func(e *eni) string { return e.subnet.ID }),
		"vpc-id":                       one(func(e *eni) string { return e.subnet.VPC }),
		"availability-zone":            one(func(e *eni) string { return e.subnet.Zone }),
		"mac-address":                  one(func(e *eni) string { return e.mac }),
		"description":                  one(func(e *eni) string { return e.description }),
		"private-ip-address":           one(func(e *eni) string { return e.addr.String() }),
		"addresses.private-ip-address": one(func(e *eni) string { return e.addr.String() }),
		"attachment.instance-id":       attached(func(e *eni) string { return e.instance.id }),
		"attachment.attachment-id":     attached(func(e *eni) string { return e.attachment }),
		"attachment.status":            attached(func(*eni) string { return "attached" }),
		"attachment.device-index":      attached(func(e *eni) string { return itoa(e.index) }),
		"group-id": func(e *eni) (ids []string) {
			for _, g := range e.groups {
				ids = append(ids, g.ID)
			}
			return ids
		},
	}
}

func (e *eni) status() string {
	if e.instance != nil {
		return "in-use"
	}
	return "available"
}

func (s *Server) describeENIs(c *call) (obj, error) {
	items, err := pick(c, s.enis, "NetworkInterfaceId", "eni-", func(e *eni) *resource { return &e.resource }, eniFilters())
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 5, 1000, items, func(e *eni) int { return e.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, e := range items {
		o := s.instanceENI(e)
		delete(o, "attachment")
		o["status"], o["availabilityZone"], o["tagSet"], o["requesterManaged"] = e.status(), e.subnet.Zone, tagSet(e.tags), false
		if e.instance != nil {
			o["attachment"] = obj{"attachmentId": e.attachment, "instanceId": e.instance.id, "instanceOwnerId": s.cfg.Account, "deviceIndex": e.index,
				"networkCardIndex": 0, "status": "attached", "attachTime": e.attached, "deleteOnTermination": e.deleteOnTermination}
		}
		set = append(set, o)
	}
	return obj{"networkInterfaceSet": set, "nextToken": next}, nil
}

func (s *Server) deleteENI(c *call) (obj, error) {
	id := c.str("NetworkInterfaceId")
	if err := wellFormed("eni-", id); err != nil {
		return nil, err
	}
	e := s.enis[id]
	if e == nil || !e.seen(c.now) {
		return nil, unknownID("eni-", id)
	}
	if e.instance != nil {
		return nil, errorf(400, "InvalidParameterValue", "Network interface '%s' is currently in use.", id)
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	e.gone = c.now
	return nil, nil
}

// describeAddresses has none to describe: this emulation gives public addresses with
// instances only, and those are not Elastic IP addresses.
func (s *Server) describeAddresses(c *call) (obj, error) {
	return obj{"addressesSet": []obj{}}, c.dryRun()
}

// kinds are the resource types as tags know them, by the prefix of ids.
var kinds = map[string]string{"i-": "instance", "vol-": "volume", "eni-": "network-interface", "snap-": "snapshot", "ami-": "image",
	"sir-": "spot-instances-request", "lt-": "launch-template", "subnet-": "subnet", "sg-": "security-group"}

// tagged finds the tags of a thing that exists, and how CreateTags sees it.
func (s *Server) tagged(id string, now time.Time) (map[string]string, *resource) {
	cut := strings.IndexByte(id, '-') + 1
	var r *resource
	switch id[:cut] {
	case "i-":
		if i := s.instances[id]; i != nil {
			r = &i.resource
		}
	case "vol-":
		if v := s.volumes[id]; v != nil {
			r = &v.resource
		}
	case "eni-":
		if e := s.enis[id]; e != nil {
			r = &e.resource
		}
	case "snap-":
		if n := s.snapshots[id]; n != nil {
			r = &n.resource
		}
	case "ami-":
		if i := s.images[id]; i != nil {
			r = &i.resource
		}
	case "sir-":
		if q := s.spots[id]; q != nil {
			r = &q.resource
		}
	case "lt-":
		if t := s.templates[id]; t != nil {
			r = &t.resource
		}
	case "subnet-":
		if n := s.subnets[id]; n != nil {
			return n.tags, &resource{id: id, tags: n.tags}
		}
	case "sg-":
		if g := s.groups[id]; g != nil {
			return g.tags, &resource{id: id, tags: g.tags}
		}
	}
	if r == nil || !r.seen(now) {
		return nil, nil
	}
	return r.tags, r
}

// eachTagged finds the things a tagging request names.
func (s *Server) eachTagged(c *call) ([]map[string]string, error) {
	var all []map[string]string
	for _, id := range c.strs("ResourceId") {
		cut := strings.IndexByte(id, '-') + 1
		if _, ok := kinds[id[:cut]]; !ok {
			return nil, errorf(400, "InvalidID", "The ID '%s' is not valid", id)
		}
		tags, _ := s.tagged(id, c.now)
		if tags == nil {
			return nil, unknownID(id[:cut], id)
		}
		all = append(all, tags)
	}
	return all, nil
}

func (s *Server) createTags(c *call) (obj, error) {
	tags, err := tagsOf(c.params)
	if err != nil {
		return nil, err
	}
	all, err := s.eachTagged(c)
	if err != nil {
		return nil, err
	}
	for _, have := range all {
		n := len(have)
		for k := range tags {
			if _, ok := have[k]; !ok {
				n++
			}
		}
		if n > 50 {
			return nil, errorf(400, "TagLimitExceeded", "The maximum number of Tags for a resource has been reached.")
		}
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	for _, have := range all {
		for k, v := range tags {
			have[k] = v
		}
	}
	return nil, nil
}

func (s *Server) deleteTags(c *call) (obj, error) {
	all, err := s.eachTagged(c)
	if err != nil {
		return nil, err
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	for _, have := range all {
		for _, t := range c.all("Tag") {
			if v, ok := have[t.str("Key")]; ok && (!t.has("Value") || t.str("Value") == v) {
				delete(have, t.str("Key"))
			}
		}
		if !c.has("Tag") { // all but the service's own
			for k := range have {
				if !strings.HasPrefix(k, "aws:") {
					delete(have, k)
				}
			}
		}
	}
	return nil, nil
}

// tag is one tag of one thing.
type tag struct {
	id, kind, key, value string
	seq                  int
}

func (s *Server) describeTags(c *call) (obj, error) {
	var ids []string
	ids = appendKeys(ids, s.instances)
	ids = appendKeys(ids, s.volumes)
	ids = appendKeys(ids, s.enis)
	ids = appendKeys(ids, s.snapshots)
	ids = appendKeys(ids, s.images)
	ids = appendKeys(ids, s.spots)
	ids = appendKeys(ids, s.templates)
	ids = appendKeys(ids, s.subnets)
	ids = appendKeys(ids, s.groups)
	slices.Sort(ids)
	var all []tag
	for _, id := range ids {
		tags, _ := s.tagged(id, c.now)
		for _, o := range tagSet(tags) {
			all = append(all, tag{id: id, kind: kinds[id[:strings.IndexByte(id, '-')+1]], key: o["key"].(string), value: string(o["value"].(present))})
		}
	}
	all, err := filtered(c, all, func(tag) map[string]string { return nil }, attrs[tag]{
		"resource-id":   one(func(t tag) string { return t.id }),
		"resource-type": one(func(t tag) string { return t.kind }),
		"key":           one(func(t tag) string { return t.key }),
		"value":         one(func(t tag) string { return t.value }),
	})
	if err != nil {
		return nil, err
	}
	for i := range all {
		all[i].seq = i
	}
	all, next, err := page(c, 5, 1000, all, func(t tag) int { return t.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, t := range all {
		set = append(set, obj{"resourceId": t.id, "resourceType": t.kind, "key": t.key, "value": present(t.value)})
	}
	return obj{"tagSet": set, "nextToken": next}, c.dryRun()
}

func appendKeys[T any](ids []string, m map[string]T) []string {
	for id := range m {
		ids = append(ids, id)
	}
	return ids
}
