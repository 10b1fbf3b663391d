// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"slices"
	"strings"
	"time"
)

// addImage takes an image of the Config into the account.
func (s *Server) addImage(i Image) {
	if i.Architecture == "" {
		i.Architecture = "x86_64"
	}
	if i.RootDevice == "" {
		i.RootDevice = "/dev/xvda"
	}
	if i.RootGiB == 0 {
		i.RootGiB = 1
	}
	now := s.cfg.Now()
	snap := s.newSnapshot(now, i.RootGiB, nil)
	snap.status, snap.description, snap.visible, snap.given = "completed", "root of "+i.ID, time.Time{}, true
	img := &image{resource: s.newResource("ami-", now, i.Tags), Image: i, file: i.File, ena: true, imds: "",
		mappings: []mapping{{device: i.RootDevice, snapshot: snap.id, kind: "gp3", gib: i.RootGiB, deleteOnTermination: true}}}
	img.id, img.visible = i.ID, time.Time{}
	s.images[i.ID] = img
}

var imageFilters = func(account string) attrs[*image] {
	return attrs[*image]{
		"image-id":            one(func(i *image) string { return i.id }),
		"name":                one(func(i *image) string { return i.Name }),
		"description":         one(func(i *image) string { return i.description }),
		"architecture":        one(func(i *image) string { return i.Architecture }),
		"state":               one(func(*image) string { return "available" }),
		"owner-id":            one(func(*image) string { return account }),
		"owner-alias":         func(*image) []string { return nil },
		"is-public":           one(func(*image) string { return "false" }),
		"root-device-type":    one(func(*image) string { return "ebs" }),
		"root-device-name":    one(func(i *image) string { return i.RootDevice }),
		"virtualization-type": one(func(*image) string { return "hvm" }),
		"boot-mode":           one(func(i *image) string { return i.BootMode }),
		"image-type":          one(func(*image) string { return "machine" }),
		"block-device-mapping.snapshot-id": func(i *image) (ids []string) {
			for _, m := range i.mappings {
				ids = append(ids, m.snapshot)
			}
			return ids
		},
	}
}

func (s *Server) describeImages(c *call) (obj, error) {
	items, err := pick(c, s.images, "ImageId", "ami-", func(i *image) *resource { return &i.resource }, imageFilters(s.cfg.Account))
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 1, 1000, items, func(i *image) int { return i.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, i := range items {
		if o := c.strs("Owner"); len(o) > 0 && !slices.Contains(o, "self") && !slices.Contains(o, s.cfg.Account) {
			continue
		}
		blocks := []obj{}
		for _, m := range i.mappings {
			blocks = append(blocks, obj{"deviceName": m.device, "ebs": obj{"snapshotId": m.snapshot, "volumeSize": m.gib, "volumeType": m.kind,
				"deleteOnTermination": m.deleteOnTermination, "encrypted": m.encrypted}})
		}
		set = append(set, obj{"imageId": i.id, "imageLocation": s.cfg.Account + "/" + i.Name, "imageState": "available", "imageOwnerId": s.cfg.Account,
			"isPublic": false, "productCodes": []obj{}, "architecture": i.Architecture, "imageType": "machine", "name": i.Name,
			"description": i.description, "rootDeviceType": "ebs", "rootDeviceName": i.RootDevice, "blockDeviceMapping": blocks,
			"virtualizationType": "hvm", "tagSet": tagSet(i.tags), "hypervisor": "xen", "enaSupport": i.ena, "bootMode": i.BootMode,
			"imdsSupport": i.imds, "tpmSupport": i.tpm, "creationDate": timeText(i.created), "platformDetails": "Linux/UNIX",
			"usageOperation": "RunInstances", "deprecationTime": timeText(i.created.AddDate(2, 0, 0))})
	}
	return obj{"imagesSet": set, "nextToken": next}, nil
}

func (s *Server) registerImage(c *call) (obj, error) {
	name := c.str("Name")
	if len(name) < 3 || len(name) > 128 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789()[] ./-'@_") != "" {
		return nil, errorf(400, "InvalidAMIName.Malformed", "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, '(', ')', '.', '-', '/' and '_'")
	}
	for _, i := range s.images {
		if i.Name == name && i.exists(c.now) {
			return nil, errorf(400, "InvalidAMIName.Duplicate", "AMI name %s is already in use by AMI %s", name, i.id)
		}
	}
	i := &image{Image: Image{Name: name, Architecture: c.or("Architecture", "i386"), BootMode: c.str("BootMode"), RootDevice: c.str("RootDeviceName")},
		description: c.str("Description"), ena: c.bool("EnaSupport"), imds: c.str("ImdsSupport"), tpm: c.str("TpmSupport")}
	if c.or("VirtualizationType", "paravirtual") != "hvm" {
		return nil, errorf(400, "InvalidParameterCombination", "This emulation has hvm images only: VirtualizationType")
	}
	if i.Architecture == "arm64" && i.BootMode != "" && i.BootMode != "uefi" {
		return nil, errorf(400, "InvalidParameterCombination", "The boot mode '%s' is not supported for the architecture arm64", i.BootMode)
	}
	if i.tpm != "" && i.BootMode != "uefi" {
		return nil, errorf(400, "InvalidParameterCombination", "TpmSupport requires the boot mode uefi")
	}
	for _, b := range c.all("BlockDeviceMapping") {
		e := b.at("Ebs")
		if e == nil {
			return nil, errorf(400, "InvalidBlockDeviceMapping", "The device '%s' has no volume", b.str("DeviceName"))
		}
		m := mapping{device: b.str("DeviceName"), snapshot: e.str("SnapshotId"), kind: e.or("VolumeType", "gp2"), gib: e.num("VolumeSize"),
			encrypted: e.bool("Encrypted"), deleteOnTermination: !e.has("DeleteOnTermination") || e.bool("DeleteOnTermination")}
		if m.snapshot != "" {
			snap := s.snapshots[m.snapshot]
			if snap == nil || !snap.seen(c.now) {
				return nil, unknownID("snap-", m.snapshot)
			}
			if snap.state(c.now) != "completed" {
				return nil, errorf(400, "IncorrectState", "Snapshot '%s' is not in state 'completed'", m.snapshot)
			}
			if e.has("Encrypted") {
				return nil, errorf(400, "InvalidBlockDeviceMapping", "the encrypted flag cannot be specified since device %s has a snapshot specified.", m.device)
			}
			if e.has("VolumeSize") && m.gib < snap.gib {
				return nil, errorf(400, "InvalidBlockDeviceMapping", "Volume of size %dGB is smaller than snapshot '%s', expect size >= %dGB", m.gib, m.snapshot, snap.gib)
			}
			m.gib, m.encrypted = max(m.gib, snap.gib), snap.encrypted
			if m.device == i.RootDevice {
				i.file = snap.file
			}
		}
		i.mappings = append(i.mappings, m)
	}
	if !slices.ContainsFunc(i.mappings, func(m mapping) bool { return m.device == i.RootDevice && m.snapshot != "" }) {
		return nil, errorf(400, "InvalidBlockDeviceMapping", "The root device '%s' must be among the block devices, with a snapshot", i.RootDevice)
	}
	tags, err := s.tagsFor(c, "image", "snapshot")
	if err != nil {
		return nil, err
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	i.resource = s.newResource("ami-", c.now, tags["image"])
	i.Image.ID = i.id
	s.images[i.id] = i
	return obj{"imageId": i.id}, nil
}

// tagsFor reads TagSpecification, in which only the kinds may be; to tag is a
// permission of its own.
func (s *Server) tagsFor(c *call, kinds ...string) (map[string]map[string]string, error) {
	all := map[string]map[string]string{}
	if c.has("TagSpecification") && !c.key.may("ec2:CreateTags") {
		return nil, s.unauthorized(c.key, "ec2:CreateTags")
	}
	for _, t := range c.all("TagSpecification") {
		kind := t.str("ResourceType")
		if !slices.Contains(kinds, kind) {
			return nil, errorf(400, "InvalidParameterValue", "'%s' is not a valid taggable resource type for this operation.", kind)
		}
		tags, err := tagsOf(t)
		if err != nil {
			return nil, err
		}
		all[kind] = tags
	}
	return all, nil
}

func (s *Server) deregisterImage(c *call) (obj, error) {
	id := c.str("ImageId")
	if err := wellFormed("ami-", id); err != nil {
		return nil, err
	}
	i := s.images[id]
	if i == nil || !i.seen(c.now) {
		if i != nil && !i.exists(c.now) {
			return nil, errorf(400, "InvalidAMIID.Unavailable", "The image ID '%s' is no longer available", id)
		}
		return nil, unknownID("ami-", id)
	}
	if c.bool("DeleteAssociatedSnapshots") && !c.key.may("ec2:DeleteSnapshot") {
		return nil, s.unauthorized(c.key, "ec2:DeleteSnapshot")
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	i.gone = c.now
	o := obj{"return": true}
	if c.bool("DeleteAssociatedSnapshots") {
		results := []obj{}
		for _, m := range i.mappings {
			code := "success"
			if s.imageOf(m.snapshot, c.now) != nil {
				code = "skipped"
			} else if snap := s.snapshots[m.snapshot]; snap != nil {
				snap.gone = c.now
			}
			results = append(results, obj{"snapshotId": m.snapshot, "returnCode": code})
		}
		o["deleteSnapshotResultSet"] = results
	}
	return o, nil
}

// imageOf is an image that a snapshot is in use by.
func (s *Server) imageOf(snapshot string, now time.Time) *image {
	for _, i := range s.images {
		if i.exists(now) && slices.ContainsFunc(i.mappings, func(m mapping) bool { return m.snapshot == snapshot }) {
			return i
		}
	}
	return nil
}

var snapshotFilters = func(now time.Time, account string) attrs[*snapshot] {
	return attrs[*snapshot]{
		"snapshot-id": one(func(n *snapshot) string { return n.id }),
		"description": one(func(n *snapshot) string { return n.description }),
		"status":      one(func(n *snapshot) string { return n.state(now) }),
		"owner-id":    one(func(*snapshot) string { return account }),
		"volume-size": one(func(n *snapshot) string { return itoa(n.gib) }),
		"progress":    one(func(n *snapshot) string { return n.progress(now) }),
		"encrypted":   one(func(n *snapshot) string { return map[bool]string{true: "true", false: "false"}[n.encrypted] }),
		"start-time":  one(func(n *snapshot) string { return timeText(n.created) }),
	}
}

func (s *Server) describeSnapshots(c *call) (obj, error) {
	items, err := pick(c, s.snapshots, "SnapshotId", "snap-", func(n *snapshot) *resource { return &n.resource }, snapshotFilters(c.now, s.cfg.Account))
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 5, 1000, items, func(n *snapshot) int { return n.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, n := range items {
		if o := c.strs("Owner"); len(o) > 0 && !slices.Contains(o, "self") && !slices.Contains(o, s.cfg.Account) {
			continue
		}
		set = append(set, obj{"snapshotId": n.id, "volumeId": "vol-ffffffff", "status": n.state(c.now), "startTime": n.created, "progress": n.progress(c.now),
			"ownerId": s.cfg.Account, "volumeSize": n.gib, "description": present(n.description), "tagSet": tagSet(n.tags), "encrypted": n.encrypted,
			"storageTier": "standard"})
	}
	return obj{"snapshotSet": set, "nextToken": next}, nil
}

func (s *Server) deleteSnapshot(c *call) (obj, error) {
	id := c.str("SnapshotId")
	if err := wellFormed("snap-", id); err != nil {
		return nil, err
	}
	n := s.snapshots[id]
	if n == nil || !n.seen(c.now) {
		return nil, unknownID("snap-", id)
	}
	if i := s.imageOf(id, c.now); i != nil {
		return nil, errorf(400, "InvalidSnapshot.InUse", "The snapshot %s is currently in use by %s", id, i.id)
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	n.gone = c.now
	return nil, nil
}
