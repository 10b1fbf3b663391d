// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/base64"
	"net/netip"
	"slices"
	"strings"
	"time"
)

func instanceResource(i *instance) *resource { return &i.resource }

// instanceFilters are DescribeInstances'; now is bound by the caller.
func (s *Server) instanceFilters(now time.Time) attrs[*instance] {
	return attrs[*instance]{
		"instance-id":                  one(func(i *instance) string { return i.id }),
		"client-token":                 one(func(i *instance) string { return i.token }),
		"instance-state-name":          one(func(i *instance) string { return i.described(now) }),
		"instance-state-code":          one(func(i *instance) string { return itoa(stateCodes[i.described(now)]) }),
		"instance-type":                one(func(i *instance) string { return i.typ.Name }),
		"instance-lifecycle":           one(func(i *instance) string { return strings.TrimPrefix(i.market, "on-demand") }),
		"image-id":                     one(func(i *instance) string { return i.image.id }),
		"availability-zone":            one(func(i *instance) string { return i.subnet.Zone }),
		"subnet-id":                    one(func(i *instance) string { return i.subnet.ID }),
		"vpc-id":                       one(func(i *instance) string { return i.subnet.VPC }),
		"key-name":                     one(func(i *instance) string { return i.launch.str("KeyName") }),
		"reservation-id":               one(func(i *instance) string { return i.reservation }),
		"owner-id":                     one(func(*instance) string { return s.cfg.Account }),
		"architecture":                 one(func(i *instance) string { return i.typ.arch() }),
		"tenancy":                      one(func(i *instance) string { return i.launch.at("Placement").or("Tenancy", "default") }),
		"placement-group-name":         one(func(i *instance) string { return i.launch.at("Placement").str("GroupName") }),
		"private-ip-address":           one(func(i *instance) string { return i.addr().String() }),
		"private-dns-name":             one(func(i *instance) string { return s.hostname(i.addr()) }),
		"metadata-options.http-tokens": one(func(i *instance) string { return i.meta.tokens }),
		"spot-instance-request-id": func(i *instance) []string {
			if i.spot == nil {
				return nil
			}
			return []string{i.spot.id}
		},
		"ip-address": func(i *instance) []string {
			if len(i.enis) == 0 || !i.enis[0].public.IsValid() {
				return nil
			}
			return []string{i.enis[0].public.String()}
		},
		"network-interface.network-interface-id": func(i *instance) (ids []string) {
			for _, e := range i.enis {
				ids = append(ids, e.id)
			}
			return ids
		},
		"instance.group-id": func(i *instance) (ids []string) {
			for _, e := range i.enis {
				for _, g := range e.groups {
					ids = append(ids, g.ID)
				}
			}
			return ids
		},
		"block-device-mapping.volume-id": func(i *instance) (ids []string) {
			for _, v := range i.volumes {
				ids = append(ids, v.id)
			}
			return ids
		},
	}
}

// addr is the instance's own address; it keeps it when it is terminated.
func (i *instance) addr() netip.Addr {
	if len(i.enis) == 0 {
		return netip.Addr{}
	}
	return i.enis[0].addr
}

func (s *Server) describeInstances(c *call) (obj, error) {
	if c.has("MaxResults") && c.has("InstanceId") {
		return nil, errorf(400, "InvalidParameterCombination", "The parameter instancesSet cannot be used with the parameter maxResults")
	}
	items, err := pick(c, s.instances, "InstanceId", "i-", instanceResource, s.instanceFilters(c.now))
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 5, 1000, items, func(i *instance) int { return i.seq })
	if err != nil {
		return nil, err
	}
	byReservation := map[string][]*instance{}
	var order []string
	for _, i := range items {
		if byReservation[i.reservation] == nil {
			order = append(order, i.reservation)
		}
		byReservation[i.reservation] = append(byReservation[i.reservation], i)
	}
	reservations := []obj{}
	for _, r := range order {
		reservations = append(reservations, s.reservationObj(c, byReservation[r], false))
	}
	return obj{"reservationSet": reservations, "nextToken": next}, nil
}

// reservationObj is a reservation in a reply; launch is RunInstances', which knows the
// state as it is and nothing yet of volumes.
func (s *Server) reservationObj(c *call, items []*instance, launch bool) obj {
	set := []obj{}
	for _, i := range items {
		state := i.described(c.now)
		if launch {
			if state = i.state(c.now); i.created.Equal(c.now) {
				state = pending // however fast it is
			}
		}
		set = append(set, s.instanceObj(c, i, state))
	}
	return obj{"reservationId": items[0].reservation, "ownerId": s.cfg.Account, "groupSet": []obj{}, "instancesSet": set}
}

func stateObj(state string) obj { return obj{"code": stateCodes[state], "name": state} }

func (s *Server) instanceObj(c *call, i *instance, state string) obj {
	p := i.launch
	o := obj{
		"instanceId": i.id, "imageId": i.image.id, "instanceState": stateObj(state), "privateDnsName": "", "dnsName": present(""),
		"reason": present(i.transition), "keyName": p.str("KeyName"), "amiLaunchIndex": i.index, "productCodes": []obj{},
		"instanceType": i.typ.Name, "launchTime": i.launched,
		"placement": obj{"availabilityZone": i.subnet.Zone, "groupName": present(p.at("Placement").str("GroupName")),
			"tenancy": p.at("Placement").or("Tenancy", "default")},
		"monitoring":   obj{"state": map[bool]string{true: "enabled", false: "disabled"}[p.at("Monitoring").bool("Enabled")]},
		"architecture": i.typ.arch(), "rootDeviceType": "ebs", "rootDeviceName": i.image.RootDevice, "virtualizationType": "hvm",
		"clientToken": present(i.token), "hypervisor": "xen", "ebsOptimized": p.bool("EbsOptimized"), "enaSupport": true,
		"cpuOptions":                       obj{"coreCount": max(1, i.typ.VCPUs/2), "threadsPerCore": min(2, i.typ.VCPUs), "amdSevSnp": p.at("CpuOptions").str("AmdSevSnp")},
		"capacityReservationSpecification": obj{"capacityReservationPreference": "open"},
		"hibernationOptions":               obj{"configured": p.at("HibernationOptions").bool("Configured")},
		"enclaveOptions":                   obj{"enabled": p.at("EnclaveOptions").bool("Enabled")},
		"metadataOptions": obj{"state": "applied", "httpTokens": i.meta.tokens, "httpPutResponseHopLimit": i.meta.hops,
			"httpEndpoint": i.meta.endpoint, "httpProtocolIpv6": "disabled", "instanceMetadataTags": i.meta.tags},
		"maintenanceOptions":    obj{"autoRecovery": "default"},
		"privateDnsNameOptions": obj{"hostnameType": "ip-name", "enableResourceNameDnsARecord": false, "enableResourceNameDnsAAAARecord": false},
		"bootMode":              i.image.BootMode, "currentInstanceBootMode": i.bootMode(), "platformDetails": "Linux/UNIX",
		"usageOperation": "RunInstances", "usageOperationUpdateTime": i.launched, "tpmSupport": i.image.tpm,
		"tagSet": tagSet(i.tags), "blockDeviceMapping": []obj{}, "networkInterfaceSet": []obj{}, "groupSet": []obj{},
	}
	if i.market == "spot" {
		o["instanceLifecycle"], o["spotInstanceRequestId"] = "spot", i.spot.id
	}
	if i.reason[0] != "" && state != running && state != pending {
		o["stateReason"] = obj{"code": i.reason[0], "message": i.reason[1]}
	} else if state == pending {
		o["stateReason"] = obj{"code": "pending", "message": "pending"}
	}
	if profile := p.at("IamInstanceProfile"); profile != nil {
		o["iamInstanceProfile"] = obj{"arn": profile.or("Arn", "arn:aws:iam::"+s.cfg.Account+":instance-profile/"+profile.str("Name")), "id": "AIPAEXAMPLE"}
	}
	if state == terminated || i.released { // a terminated instance has lost network and disks
		return o
	}
	first := i.enis[0]
	o["subnetId"], o["vpcId"], o["privateIpAddress"], o["sourceDestCheck"] = i.subnet.ID, i.subnet.VPC, first.addr.String(), true
	o["privateDnsName"], o["groupSet"] = s.hostname(first.addr), groupSet(first.groups)
	if first.public.IsValid() && state != stopped {
		o["ipAddress"], o["dnsName"] = first.public.String(), s.publicName(first.public)
	}
	var nics, disks []obj
	for _, e := range i.enis {
		nics = append(nics, s.instanceENI(e))
	}
	for _, v := range i.volumes {
		disks = append(disks, obj{"deviceName": v.device, "ebs": obj{"volumeId": v.id, "status": "attached",
			"attachTime": v.attached, "deleteOnTermination": v.deleteOnTermination}})
	}
	o["networkInterfaceSet"] = append([]obj{}, nics...)
	if !(state == pending && c.form.Get("Action") == "RunInstances") { // the launch's own reply has no volumes yet
		o["blockDeviceMapping"] = append([]obj{}, disks...)
	}
	return o
}

func (i *instance) bootMode() string {
	if m := i.image.BootMode; m == "uefi" || m == "uefi-preferred" {
		return "uefi"
	}
	return i.typ.bootModes()[0]
}

func (s *Server) publicName(a netip.Addr) string {
	return "ec2-" + strings.ReplaceAll(a.String(), ".", "-") + ".compute-1.amazonaws.com"
}

func groupSet(groups []*group) []obj {
	out := []obj{}
	for _, g := range groups {
		out = append(out, obj{"groupId": g.ID, "groupName": g.Name})
	}
	return out
}

// instanceENI is an interface within an instance's description.
func (s *Server) instanceENI(e *eni) obj {
	o := obj{"networkInterfaceId": e.id, "subnetId": e.subnet.ID, "vpcId": e.subnet.VPC, "description": present(e.description),
		"ownerId": s.cfg.Account, "status": "in-use", "macAddress": e.mac, "privateIpAddress": e.addr.String(),
		"privateDnsName": s.hostname(e.addr), "sourceDestCheck": true, "groupSet": groupSet(e.groups), "interfaceType": "interface",
		"ipv6AddressesSet": []obj{},
		"attachment": obj{"attachmentId": e.attachment, "deviceIndex": e.index, "networkCardIndex": 0, "status": "attached",
			"attachTime": e.attached, "deleteOnTermination": e.deleteOnTermination},
		"privateIpAddressesSet": []obj{{"privateIpAddress": e.addr.String(), "privateDnsName": s.hostname(e.addr), "primary": true}}}
	if e.public.IsValid() {
		assoc := obj{"publicIp": e.public.String(), "publicDnsName": s.publicName(e.public), "ipOwnerId": "amazon"}
		o["association"] = assoc
		o["privateIpAddressesSet"].([]obj)[0]["association"] = assoc
	}
	return o
}

func (s *Server) describeStatus(c *call) (obj, error) {
	if c.has("MaxResults") && c.has("InstanceId") {
		return nil, errorf(400, "InvalidParameterCombination", "The parameter instancesSet cannot be used with the parameter maxResults")
	}
	items, err := pick(c, s.instances, "InstanceId", "i-", instanceResource, s.instanceFilters(c.now))
	if err != nil {
		return nil, err
	}
	if !c.bool("IncludeAllInstances") {
		items = slices.DeleteFunc(items, func(i *instance) bool { return i.described(c.now) != running })
	}
	items, next, err := page(c, 5, 1000, items, func(i *instance) int { return i.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, i := range items {
		status := "not-applicable"
		if i.described(c.now) == running {
			status = "ok"
		}
		summary := obj{"status": status, "details": []obj{}}
		if status == "ok" {
			summary["details"] = []obj{{"name": "reachability", "status": "passed"}}
		}
		set = append(set, obj{"instanceId": i.id, "availabilityZone": i.subnet.Zone, "instanceState": stateObj(i.described(c.now)),
			"systemStatus": summary, "instanceStatus": summary})
	}
	return obj{"instanceStatusSet": set, "nextToken": next}, nil
}

// change moves each of the instances that a request names. All of them must be there.
func (s *Server) change(c *call, act func(*instance) error) (obj, error) {
	ids := c.strs("InstanceId")
	if len(ids) == 0 {
		return nil, errorf(400, "MissingParameter", "The request must contain the parameter InstanceId")
	}
	if err := wellFormed("i-", ids...); err != nil {
		return nil, err
	}
	var missing []string
	for _, id := range ids {
		if i := s.instances[id]; i == nil || !i.seen(c.now) {
			missing = append(missing, id)
		}
	}
	if len(missing) > 0 {
		return nil, unknownID("i-", missing...)
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	set := []obj{}
	for _, id := range ids {
		i := s.instances[id]
		before := i.state(c.now)
		if err := act(i); err != nil {
			return nil, err
		}
		set = append(set, obj{"instanceId": id, "previousState": stateObj(before), "currentState": stateObj(i.state(c.now))})
	}
	return obj{"instancesSet": set}, nil
}

func (s *Server) terminateInstances(c *call) (obj, error) {
	for _, id := range c.strs("InstanceId") {
		if i := s.instances[id]; i != nil && i.protected {
			return nil, errorf(400, "OperationNotPermitted", "The instance '%s' may not be terminated. Modify its 'disableApiTermination' instance attribute and try again.", id)
		}
	}
	return s.change(c, func(i *instance) error {
		s.end(i, c.now, "Client.UserInitiatedShutdown", "Client.UserInitiatedShutdown: User initiated shutdown")
		return nil
	})
}

func (s *Server) stopInstances(c *call) (obj, error) {
	return s.change(c, func(i *instance) error {
		switch state := i.state(c.now); state {
		case stopping, stopped:
			return nil
		case running, pending:
		default:
			return errorf(400, "IncorrectInstanceState", "This instance '%s' is not in a state from which it can be stopped.", i.id)
		}
		if i.market == "spot" {
			return errorf(400, "UnsupportedOperation", "You can't stop the Spot Instance '%s' because it is associated with a one-time Spot Instance request. You can only stop Spot Instances associated with persistent Spot Instance requests.", i.id)
		}
		s.halt(i, c.now, "Client.UserInitiatedShutdown", "Client.UserInitiatedShutdown: User initiated shutdown")
		return nil
	})
}

// halt stops an instance, which keeps its volumes and interfaces.
func (s *Server) halt(i *instance, at time.Time, code, message string) {
	i.reason = [2]string{code, message}
	i.transition = "User initiated (" + at.UTC().Format("2006-01-02 15:04:05 MST") + ")"
	s.enter(i, at, stopping)
	if i.machine != nil {
		i.machine.stop(stopped)
		return
	}
	s.enter(i, at.Add(s.cfg.StopTime), stopped)
}

func (s *Server) startInstances(c *call) (obj, error) {
	return s.change(c, func(i *instance) error {
		switch i.state(c.now) {
		case running, pending:
			return nil
		case stopped:
		default:
			return errorf(400, "IncorrectInstanceState", "The instance '%s' is not in a state from which it can be started.", i.id)
		}
		i.launched, i.reason, i.transition = c.now, [2]string{}, ""
		s.enter(i, c.now, pending)
		s.begin(i, c.now)
		return nil
	})
}

func (s *Server) describeAttribute(c *call) (obj, error) {
	id := c.str("InstanceId")
	if err := wellFormed("i-", id); err != nil {
		return nil, err
	}
	i := s.instances[id]
	if i == nil || !i.seen(c.now) {
		return nil, unknownID("i-", id)
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	o := obj{"instanceId": id}
	switch a := c.str("Attribute"); a {
	case "userData":
		o[a] = obj{"value": base64.StdEncoding.EncodeToString(i.userData)}
	case "instanceInitiatedShutdownBehavior":
		o[a] = obj{"value": map[bool]string{true: "terminate", false: "stop"}[i.terminate]}
	case "disableApiTermination":
		o[a] = obj{"value": i.protected}
	case "instanceType":
		o[a] = obj{"value": i.typ.Name}
	default:
		return nil, errorf(400, "UnsupportedOperation", "This emulation does not describe the attribute %s", a)
	}
	return o, nil
}
