// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"maps"
	"time"
)

// spotNotice is how long before its end an instance hears of it ("Spot Instance
// interruption notices").
const spotNotice = 2 * time.Minute

// spotRequest is what a launch on the spot market leaves behind beside its instance.
type spotRequest struct {
	resource
	instance *instance
	status   string // its code
	state    string // active, closed, cancelled
	updated  time.Time
}

func (s *Server) makeSpot(c *call, l *plan, i *instance) *spotRequest {
	q := &spotRequest{resource: s.newResource("sir-", c.now, maps.Clone(l.tags["spot-instances-request"])), instance: i, state: "active",
		status: "fulfilled", updated: c.now}
	q.id = "sir-" + q.id[len(q.id)-8:]
	s.spots[q.id] = q
	return q
}

// end closes the request when its instance has ended.
func (q *spotRequest) end(now time.Time, code string) {
	q.updated = now
	if q.state == "active" {
		q.state = "closed"
	}
	q.status = "instance-terminated-by-user"
	if code == "Server.SpotInstanceTermination" {
		q.status = "instance-terminated-no-capacity"
	}
}

var spotMessages = map[string]string{
	"fulfilled":                             "Your Spot request is fulfilled.",
	"marked-for-termination":                "Your Spot instance was marked for termination.",
	"instance-terminated-by-user":           "Spot Instance terminated due to user-initiated termination.",
	"instance-terminated-no-capacity":       "Your Spot instance was terminated because there is no available Spot capacity.",
	"request-canceled-and-instance-running": "Your Spot request is canceled, but your instance is still running.",
}

// Interrupt gives a spot instance its notice: its metadata tells of it from now on,
// and it is terminated two minutes later.
func (s *Server) Interrupt(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	s.settle(now)
	i := s.instances[id]
	if i == nil {
		return unknownID("i-", id)
	}
	if i.market != "spot" || i.state(now) != running {
		return errorf(400, "IncorrectInstanceState", "The instance '%s' is no running spot instance", id)
	}
	i.reclaim, i.spot.status, i.spot.updated = now.Add(spotNotice), "marked-for-termination", now
	if i.machine != nil {
		s.after(spotNotice, func() { s.settle(s.cfg.Now()) })
	}
	return nil
}

func (s *Server) describeSpots(c *call) (obj, error) {
	items, err := pick(c, s.spots, "SpotInstanceRequestId", "sir-", func(q *spotRequest) *resource { return &q.resource }, attrs[*spotRequest]{
		"spot-instance-request-id": one(func(q *spotRequest) string { return q.id }),
		"instance-id":              one(func(q *spotRequest) string { return q.instance.id }),
		"state":                    one(func(q *spotRequest) string { return q.state }),
		"status-code":              one(func(q *spotRequest) string { return q.status }),
		"type":                     one(func(*spotRequest) string { return "one-time" }),
	})
	if err != nil {
		return nil, err
	}
	items, next, err := page(c, 5, 1000, items, func(q *spotRequest) int { return q.seq })
	if err != nil {
		return nil, err
	}
	set := []obj{}
	for _, q := range items {
		i := q.instance
		set = append(set, obj{"spotInstanceRequestId": q.id, "spotPrice": "1.000000", "type": i.launch.at("InstanceMarketOptions").at("SpotOptions").or("SpotInstanceType", "one-time"),
			"state": q.state, "status": obj{"code": q.status, "message": spotMessages[q.status], "updateTime": q.updated},
			"launchSpecification": obj{"imageId": i.image.id, "instanceType": i.typ.Name, "keyName": i.launch.str("KeyName"), "subnetId": i.subnet.ID,
				"placement": obj{"availabilityZone": i.subnet.Zone}},
			"instanceId": i.id, "createTime": q.created, "productDescription": "Linux/UNIX", "launchedAvailabilityZone": i.subnet.Zone,
			"instanceInterruptionBehavior": "terminate", "tagSet": tagSet(q.tags)})
	}
	return obj{"spotInstanceRequestSet": set, "nextToken": next}, nil
}

func (s *Server) cancelSpot(c *call) (obj, error) {
	set := []obj{}
	for _, id := range c.strs("SpotInstanceRequestId") {
		q := s.spots[id]
		if q == nil || !q.seen(c.now) {
			return nil, unknownID("sir-", id)
		}
	}
	if err := c.dryRun(); err != nil {
		return nil, err
	}
	for _, id := range c.strs("SpotInstanceRequestId") {
		q := s.spots[id]
		if q.state == "active" {
			q.state, q.status, q.updated = "cancelled", "request-canceled-and-instance-running", c.now
		}
		set = append(set, obj{"spotInstanceRequestId": id, "state": q.state})
	}
	return obj{"spotInstanceRequestSet": set}, nil
}
