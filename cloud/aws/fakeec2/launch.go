// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"
)

// maxUserData is what user data may have before it is encoded: 16 KB in the User
// Guide ("Run commands when you launch an EC2 instance").
const maxUserData = 16 << 10

// tokenLife is how long after the end of its instance a token is remembered.
const tokenLife = 24 * time.Hour

// launchToken is a ClientToken that was used, in its scope: a zone, or the region.
type launchToken struct {
	fingerprint string
	reservation string
	instances   []*instance
}

// plan is a RunInstances request after all checks.
type plan struct {
	p        *params // with the launch template's parameters
	template *templateVersion
	n        int
	typ      InstanceType
	image    *image
	subnet   *subnet
	groups   []*group
	market   string
	userData []byte
	tags     map[string]map[string]string // by resource type
	meta     metadataOptions
	nics     []*params // NetworkInterface, at least one, perhaps nil
	blocks   []block
}

// block is a volume to be made.
type block struct {
	mapping
	iops, throughput int
	kms              string
	tags             map[string]string
}

func marketOf(p *params) string {
	if p.at("InstanceMarketOptions").str("MarketType") == "spot" {
		return "spot"
	}
	return "on-demand"
}

// zoneOf is the zone that a RunInstances names or implies, "" if none; s.mu is held.
func (s *Server) zoneOf(p *params) string {
	if z := p.at("Placement").str("AvailabilityZone"); z != "" {
		return z
	}
	id := p.str("SubnetId")
	for _, n := range p.all("NetworkInterface") {
		if n.has("SubnetId") {
			id = n.str("SubnetId")
		}
	}
	if n := s.subnets[id]; n != nil {
		return n.Zone
	}
	return ""
}

func (s *Server) runInstances(c *call) (obj, error) {
	p, version, err := s.withTemplate(c.params)
	if err != nil {
		return nil, err
	}
	token := c.str("ClientToken")
	if len(token) > 64 || strings.ContainsFunc(token, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
		return nil, errorf(400, "InvalidParameterValue", "Invalid client token: it is longer than 64 characters, or not ASCII")
	}
	scope := token + "\x00" + s.zoneOf(p)
	if t := s.tokens[scope]; token != "" && t != nil && !t.forgotten(c.now) {
		return s.replay(c, t)
	}
	l, err := s.check(c, p)
	if err != nil {
		return nil, err
	}
	l.template = version
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	if err := s.findRoom(c, l); err != nil {
		return nil, err
	}
	if c.fault.Partial != nil {
		s.makeRemains(c, l)
		return nil, c.fault.Partial
	}
	t := &launchToken{fingerprint: fingerprint(c), reservation: s.newID("r-")}
	for n := range l.n {
		t.instances = append(t.instances, s.makeInstance(c, l, t.reservation, n))
	}
	if token != "" {
		s.tokens[scope] = t
	}
	return s.reservationObj(c, t.instances, true), nil
}

// fingerprint is what must not change when a token is used again.
func fingerprint(c *call) string {
	var parts []string
	for k, v := range c.form {
		if k != "ClientToken" && k != "DryRun" {
			parts = append(parts, k+"="+strings.Join(v, ","))
		}
	}
	sort.Strings(parts)
	return strings.Join(parts, "\n")
}

func (t *launchToken) forgotten(now time.Time) bool {
	return !slices.ContainsFunc(t.instances, func(i *instance) bool {
		end := i.phases[len(i.phases)-1]
		return end.state != terminated || now.Before(end.at.Add(tokenLife))
	})
}

// replay answers a request whose token was used before.
func (s *Server) replay(c *call, t *launchToken) (obj, error) {
	if t.fingerprint != fingerprint(c) {
		return nil, errorf(400, "IdempotentParameterMismatch", "Arguments on this idempotent request are inconsistent with arguments used in previous request(s).")
	}
	for _, i := range t.instances {
		if s.cfg.ForgetTerminated && i.state(c.now) == terminated {
			return nil, errorf(400, "IdempotentInstanceTerminated", "The client token you have provided is associated with an instance that is already terminated. Please use a different client token.")
		}
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	return s.reservationObj(c, t.instances, true), nil
}

// check holds a request to what the service takes, and resolves its ids.
func (s *Server) check(c *call, p *params) (*plan, error) {
	l := &plan{p: p, n: p.num("MaxCount"), market: marketOf(p)}
	if p.num("MinCount") < 1 || p.num("MinCount") > l.n {
		return nil, errorf(400, "InvalidParameterValue", "The value of MinCount (%d) must be at least 1 and at most MaxCount (%d)", p.num("MinCount"), l.n)
	}
	for _, step := range []func(*call, *plan) error{
		s.checkHonoured, s.checkImage, s.checkType, s.checkNetwork, s.checkUserData, s.checkTags, s.checkMetadata, s.checkPlacement, s.checkBlocks, s.checkPermissions,
	} {
		if err := step(c, l); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// honoured are the parameters of a launch that this emulation acts on, by their path
// without the numbers of lists. Any other is refused: to take what it does not do would
// be to say that it was done.
var honoured = func() map[string]bool {
	all := map[string]bool{}
	for _, p := range strings.Fields(`
		BlockDeviceMapping.DeviceName BlockDeviceMapping.NoDevice BlockDeviceMapping.Ebs.DeleteOnTermination
		BlockDeviceMapping.Ebs.Encrypted BlockDeviceMapping.Ebs.Iops BlockDeviceMapping.Ebs.KmsKeyId
		BlockDeviceMapping.Ebs.SnapshotId BlockDeviceMapping.Ebs.Throughput BlockDeviceMapping.Ebs.VolumeSize
		BlockDeviceMapping.Ebs.VolumeType ClientToken CpuOptions.AmdSevSnp DisableApiTermination DryRun
		EbsOptimized EnclaveOptions.Enabled HibernationOptions.Configured IamInstanceProfile.Arn IamInstanceProfile.Name
		ImageId InstanceInitiatedShutdownBehavior InstanceMarketOptions.MarketType
		InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior InstanceMarketOptions.SpotOptions.MaxPrice
		InstanceMarketOptions.SpotOptions.SpotInstanceType InstanceType KeyName LaunchTemplate.LaunchTemplateId
		LaunchTemplate.LaunchTemplateName LaunchTemplate.Version MaxCount MetadataOptions.HttpEndpoint
		MetadataOptions.HttpPutResponseHopLimit MetadataOptions.HttpTokens MetadataOptions.InstanceMetadataTags
		MinCount Monitoring.Enabled NetworkInterface.AssociatePublicIpAddress NetworkInterface.DeleteOnTermination
		NetworkInterface.Description NetworkInterface.DeviceIndex NetworkInterface.NetworkInterfaceId
		NetworkInterface.PrivateIpAddress NetworkInterface.SecurityGroupId NetworkInterface.SubnetId
		Placement.AvailabilityZone Placement.GroupName Placement.Tenancy PrivateIpAddress SecurityGroup
		SecurityGroupId SubnetId TagSpecification.ResourceType TagSpecification.Tag.Key TagSpecification.Tag.Value UserData`) {
		all[p] = true
	}
	return all
}()

// checkHonoured refuses what the service does and this emulation does not.
func (s *Server) checkHonoured(_ *call, l *plan) error {
	for _, p := range l.p.paths("") {
		if !honoured[p] {
			return errorf(400, "UnsupportedOperation", "This emulation does not do what %s asks for", p)
		}
	}
	return nil
}

// checkPermissions asks for those that the parts of a launch need beside its own
// ("Grant permission to tag Amazon EC2 resources during creation", User Guide).
func (s *Server) checkPermissions(c *call, l *plan) error {
	if len(l.tags) > 0 && !c.key.may("ec2:CreateTags") {
		return s.unauthorized(c.key, "ec2:CreateTags")
	}
	if l.p.has("IamInstanceProfile") && !c.key.may("iam:PassRole") {
		return s.unauthorized(c.key, "iam:PassRole")
	}
	return nil
}

func (s *Server) checkImage(c *call, l *plan) error {
	id := l.p.str("ImageId")
	if id == "" {
		return errorf(400, "MissingParameter", "The request must contain the parameter ImageId")
	}
	if err := wellFormed("ami-", id); err != nil {
		return err
	}
	l.image = s.images[id]
	if l.image == nil || !l.image.seen(c.now) {
		return unknownID("ami-", id)
	}
	return nil
}

func (s *Server) checkType(_ *call, l *plan) error {
	name := l.p.or("InstanceType", "m1.small") // the service's default, which no image of today starts on
	t, ok := s.types[name]
	if !ok {
		return errorf(400, "InvalidParameterValue", "Invalid value '%s' for InstanceType.", name)
	}
	l.typ = t
	if t.arch() != l.image.Architecture {
		return errorf(400, "InvalidParameterValue", "The architecture '%s' of the specified instance type does not match the architecture "+
			"'%s' of the specified AMI. Specify an instance type and an AMI that have matching architectures, and try again. "+
			"You can use 'describe-instance-types' or 'describe-images' to discover the architecture of the instance type or AMI.",
			t.arch(), l.image.Architecture)
	}
	if b := l.image.BootMode; (b == "uefi" || b == "legacy-bios") && !slices.Contains(t.bootModes(), b) {
		return errorf(400, "InvalidParameterValue", "The instance type '%s' does not support the boot mode '%s' of the specified AMI", name, b)
	}
	if !l.image.ena {
		return errorf(400, "InvalidParameterCombination", "Enhanced networking with the Elastic Network Adapter (ENA) is required for the '%s' "+
			"instance type. Ensure that you are using an AMI that is enabled for ENA.", name)
	}
	if cpu := l.p.at("CpuOptions"); cpu.str("AmdSevSnp") == "enabled" {
		if !t.SEVSNP {
			return errorf(400, "InvalidParameterCombination", "The instance type '%s' does not support AMD SEV-SNP", name)
		}
		if l.image.BootMode != "uefi" && l.image.BootMode != "uefi-preferred" {
			return errorf(400, "InvalidParameterCombination", "AMD SEV-SNP needs an AMI with the boot mode uefi or uefi-preferred; '%s' has '%s'",
				l.image.id, l.image.BootMode)
		}
	}
	return nil
}

// checkNetwork resolves subnet, groups and interfaces.
func (s *Server) checkNetwork(_ *call, l *plan) error {
	p := l.p
	l.nics = p.all("NetworkInterface")
	subnetID, groupIDs := p.str("SubnetId"), p.strs("SecurityGroupId")
	if len(l.nics) > 0 {
		if p.has("SubnetId") {
			return errorf(400, "InvalidParameterCombination", "Network interfaces and an instance-level subnet ID may not be specified on the same request")
		}
		if p.has("SecurityGroupId") || p.has("SecurityGroup") {
			return errorf(400, "InvalidParameterCombination", "Network interfaces and an instance-level security groups may not be specified on the same request")
		}
		subnetID, groupIDs = l.nics[0].str("SubnetId"), l.nics[0].strs("SecurityGroupId")
		for i, n := range l.nics {
			if !n.has("DeviceIndex") || n.num("DeviceIndex") != i {
				return errorf(400, "InvalidParameterValue", "Each network interface requires a device index: 0, 1 and so on")
			}
			if n.has("NetworkInterfaceId") {
				return errorf(400, "UnsupportedOperation", "This emulation attaches no network interface that exists already")
			}
			if n.bool("AssociatePublicIpAddress") && len(l.nics) > 1 {
				return errorf(400, "InvalidParameterCombination", "The associatePublicIPAddress parameter cannot be specified when launching with multiple network interfaces.")
			}
		}
	} else {
		l.nics = []*params{nil}
	}
	if subnetID != "" {
		if err := wellFormed("subnet-", subnetID); err != nil {
			return err
		}
		if l.subnet = s.subnets[subnetID]; l.subnet == nil {
			return unknownID("subnet-", subnetID)
		}
	} else if !slices.ContainsFunc(s.vpcs, func(v VPC) bool { return v.Default }) {
		return errorf(400, "VPCIdNotSpecified", "No default VPC for this user. GroupName is only supported for EC2-Classic and default VPC.")
	}
	zone := p.at("Placement").str("AvailabilityZone")
	if zone != "" && !slices.Contains(s.zones(), zone) {
		return errorf(400, "InvalidParameterValue", "Invalid availability zone: [%s]", zone)
	}
	if zone != "" && l.subnet != nil && l.subnet.Zone != zone {
		return errorf(400, "InvalidParameterValue", "The availability zone '%s' of the request is not that of the subnet '%s'", zone, l.subnet.ID)
	}
	return s.checkGroups(l, groupIDs)
}

func (s *Server) checkGroups(l *plan, ids []string) error {
	vpc := ""
	if l.subnet != nil {
		vpc = l.subnet.VPC
	}
	for _, id := range ids {
		if err := wellFormed("sg-", id); err != nil {
			return err
		}
		g := s.groups[id]
		if g == nil {
			return unknownID("sg-", id)
		}
		if vpc != "" && g.VPC != vpc {
			return errorf(400, "InvalidParameter", "Security group %s and subnet %s belong to different networks.", id, l.subnet.ID)
		}
		l.groups = append(l.groups, g)
	}
	for _, name := range l.p.strs("SecurityGroup") {
		found := false
		for _, g := range s.groups {
			if g.Name == name {
				l.groups, found = append(l.groups, g), true
			}
		}
		if !found {
			return errorf(400, "InvalidGroup.NotFound", "The security group '%s' does not exist", name)
		}
	}
	return nil
}

func (s *Server) checkUserData(_ *call, l *plan) error {
	text := l.p.str("UserData")
	data, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if err != nil {
		return errorf(400, "InvalidUserData.Malformed", "Invalid BASE64 encoding of user data.")
	}
	if len(data) > maxUserData {
		return errorf(400, "InvalidParameterValue", "User data is limited to %d bytes", maxUserData)
	}
	l.userData = data
	return nil
}

// launchTaggable are the resource types that a launch can tag.
var launchTaggable = []string{"instance", "volume", "network-interface", "spot-instances-request", "elastic-gpu"}

func (s *Server) checkTags(_ *call, l *plan) error {
	l.tags = map[string]map[string]string{}
	for _, t := range l.p.all("TagSpecification") {
		kind := t.str("ResourceType")
		if !slices.Contains(launchTaggable, kind) {
			return errorf(400, "InvalidParameterValue", "'%s' is not a valid taggable resource type for this operation.", kind)
		}
		if l.tags[kind] != nil {
			return errorf(400, "InvalidParameterValue", "The same resource type '%s' is specified in more than one TagSpecification", kind)
		}
		if kind == "spot-instances-request" && l.market != "spot" {
			return errorf(400, "InvalidParameterCombination", "You cannot specify tags for Spot instances requests if you are creating an On-Demand instance")
		}
		tags, err := tagsOf(t)
		if err != nil {
			return err
		}
		if len(tags) == 0 {
			return errorf(400, "InvalidParameterValue", "Tag specification must have at least one tag")
		}
		l.tags[kind] = tags
	}
	return nil
}

// tagsOf reads the Tag list of p and holds it to "Tag restrictions", User Guide.
func tagsOf(p *params) (map[string]string, error) {
	tags := map[string]string{}
	for _, t := range p.all("Tag") {
		k, v := t.str("Key"), t.str("Value")
		switch {
		case k == "" || len([]rune(k)) > 128:
			return nil, errorf(400, "InvalidParameterValue", "Tag key exceeds the maximum length of 128 characters, or is empty: '%s'", k)
		case len([]rune(v)) > 256:
			return nil, errorf(400, "InvalidParameterValue", "Tag value exceeds the maximum length of 256 characters: '%s'", v)
		case strings.HasPrefix(strings.ToLower(k), "aws:"):
			return nil, errorf(400, "InvalidParameterValue", "Tag keys starting with 'aws:' are reserved for internal use")
		}
		if _, twice := tags[k]; twice {
			return nil, errorf(400, "InvalidParameterValue", "Duplicate tag key '%s' specified.", k)
		}
		tags[k] = v
	}
	if len(tags) > 50 {
		return nil, errorf(400, "TagLimitExceeded", "More than 50 tags specified")
	}
	return tags, nil
}

func (s *Server) checkMetadata(_ *call, l *plan) error {
	m := l.p.at("MetadataOptions")
	def := "optional"
	if l.image.imds == "v2.0" {
		def = "required"
	}
	l.meta = metadataOptions{tokens: m.or("HttpTokens", def), endpoint: m.or("HttpEndpoint", "enabled"),
		tags: m.or("InstanceMetadataTags", "disabled"), hops: 1}
	if l.image.imds == "v2.0" {
		l.meta.hops = 2
	}
	if m.has("HttpPutResponseHopLimit") {
		l.meta.hops = m.num("HttpPutResponseHopLimit")
	}
	if l.meta.hops < 1 || l.meta.hops > 64 {
		return errorf(400, "InvalidParameterValue", "Value (%d) for parameter HttpPutResponseHopLimit is invalid. Valid range: 1-64", l.meta.hops)
	}
	return nil
}

func (s *Server) checkPlacement(_ *call, l *plan) error {
	p := l.p
	if k := p.str("KeyName"); k != "" && !slices.Contains(s.cfg.KeyPairs, k) {
		return errorf(400, "InvalidKeyPair.NotFound", "The key pair '%s' does not exist", k)
	}
	if g := p.at("Placement").str("GroupName"); g != "" && !slices.Contains(s.cfg.PlacementGroups, g) {
		return errorf(400, "InvalidPlacementGroup.Unknown", "The Placement Group '%s' is unknown.", g)
	}
	if p.at("Placement").str("Tenancy") == "dedicated" && (l.typ.Burstable && strings.HasPrefix(l.typ.Name, "t2")) {
		return errorf(400, "Unsupported", "The requested configuration is currently not supported. Please check the documentation for supported configurations.")
	}
	spot := p.at("InstanceMarketOptions").at("SpotOptions")
	if p.at("InstanceMarketOptions").has("SpotOptions") && l.market != "spot" {
		return errorf(400, "InvalidParameterCombination", "SpotOptions need the MarketType spot")
	}
	if spot.str("SpotInstanceType") == "one-time" && spot.or("InstanceInterruptionBehavior", "terminate") != "terminate" {
		return errorf(400, "InvalidParameterCombination", "The interruption behavior of a one-time Spot request must be terminate")
	}
	if l.market == "spot" && p.has("InstanceInitiatedShutdownBehavior") && p.str("InstanceInitiatedShutdownBehavior") == "stop" &&
		spot.str("SpotInstanceType") != "persistent" {
		return errorf(400, "InvalidParameterCombination", "One-time Spot instances cannot be stopped")
	}
	if a := p.str("PrivateIpAddress"); a != "" {
		if _, err := netip.ParseAddr(a); err != nil {
			return errorf(400, "InvalidParameterValue", "Value (%s) for parameter address is invalid. Invalid IPv4 address", a)
		}
	}
	return nil
}

// volumeTypes and their sizes in GiB ("Amazon EBS volume types").
var volumeTypes = map[string][2]int{"gp3": {1, 65536}, "gp2": {1, 16384}, "io1": {4, 16384}, "io2": {4, 65536},
	"st1": {125, 16384}, "sc1": {125, 16384}, "standard": {1, 1024}}

// checkBlocks merges the image's block devices with the request's.
func (s *Server) checkBlocks(c *call, l *plan) error {
	for _, m := range l.image.mappings {
		l.blocks = append(l.blocks, block{mapping: m, tags: l.tags["volume"]})
	}
	for _, b := range l.p.all("BlockDeviceMapping") {
		device := b.str("DeviceName")
		if device == "" {
			return errorf(400, "MissingParameter", "The request must contain the parameter deviceName")
		}
		at := slices.IndexFunc(l.blocks, func(x block) bool { return x.device == device })
		if b.has("NoDevice") {
			if at >= 0 {
				l.blocks = slices.Delete(l.blocks, at, at+1)
			}
			continue
		}
		e := b.at("Ebs")
		if e == nil {
			return errorf(400, "InvalidBlockDeviceMapping", "The device '%s' has no volume; this emulation has no instance store", device)
		}
		if at < 0 {
			l.blocks = append(l.blocks, block{mapping: mapping{device: device, kind: "gp2", snapshot: e.str("SnapshotId"), deleteOnTermination: true},
				tags: l.tags["volume"]})
			at = len(l.blocks) - 1
		} else if e.has("SnapshotId") && e.str("SnapshotId") != l.blocks[at].snapshot {
			return errorf(400, "InvalidBlockDeviceMapping", "snapshotId can only be modified on EBS devices of the AMI that are not its root")
		}
		if err := s.checkVolume(c, &l.blocks[at], e); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) checkVolume(c *call, b *block, e *params) error {
	if e.has("Encrypted") {
		if !e.bool("Encrypted") && b.encrypted {
			return errorf(400, "InvalidParameterCombination", "The encrypted flag cannot be set to false since the device %s has an encrypted snapshot.", b.device)
		}
		b.encrypted = e.bool("Encrypted")
	}
	b.kind = e.or("VolumeType", b.kind)
	if e.has("DeleteOnTermination") {
		b.deleteOnTermination = e.bool("DeleteOnTermination")
	}
	if b.kms = e.str("KmsKeyId"); b.kms != "" && !b.encrypted {
		return errorf(400, "InvalidParameterCombination", "The parameter KmsKeyId requires the parameter Encrypted to be set.")
	}
	if snap := s.snapshots[b.snapshot]; snap != nil {
		b.gib = max(b.gib, snap.gib)
	} else if b.snapshot != "" {
		return unknownID("snap-", b.snapshot)
	}
	if e.has("VolumeSize") {
		size := e.num("VolumeSize")
		if size < b.gib {
			return errorf(400, "InvalidBlockDeviceMapping", "Volume of size %dGB is smaller than snapshot '%s', expect size >= %dGB", size, b.snapshot, b.gib)
		}
		b.gib = size
	}
	limits := volumeTypes[b.kind]
	if b.gib < limits[0] || b.gib > limits[1] {
		return errorf(400, "InvalidParameterValue", "Volume of %dGiB is invalid for the volume type %s: %d-%d GiB", b.gib, b.kind, limits[0], limits[1])
	}
	b.iops, b.throughput = e.num("Iops"), e.num("Throughput")
	if e.has("Throughput") && b.kind != "gp3" {
		return errorf(400, "InvalidParameterCombination", "The parameter Throughput is not supported for %s volumes", b.kind)
	}
	return nil
}

// zones are the region's, in order.
func (s *Server) zones() []string {
	var zones []string
	for _, n := range s.subnets {
		if !slices.Contains(zones, n.Zone) {
			zones = append(zones, n.Zone)
		}
	}
	sort.Strings(zones)
	return zones
}

func describeZonesText(zones []string) string {
	if len(zones) == 0 {
		return ""
	}
	return fmt.Sprintf(" or choosing %s", strings.Join(zones, ", "))
}
