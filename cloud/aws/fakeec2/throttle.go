// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"strings"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// The service's limits per account and region: the most a bucket of requests holds
// and what it gains a second. From "Request throttling for the Amazon EC2 API",
// November 2026.
var requestLimits = map[string][2]float64{
	"RunInstances":       {5, 2},
	"StartInstances":     {5, 2},
	"TerminateInstances": {100, 5},
	"CreateTags":         {100, 10},

	"describe":            {100, 20},
	"describe-unfiltered": {50, 10}, // instances, interfaces and volumes without filter or page
	"mutating":            {50, 5},
}

// Calls that make or end instances take one token more for each of them.
var resourceLimits = map[string][2]float64{
	"RunInstances":       {1000, 2},
	"StartInstances":     {1000, 2},
	"TerminateInstances": {1000, 20},
	"StopInstances":      {1000, 20},
}

// expensive are the calls that have a smaller bucket when they ask for everything.
var expensive = map[string]bool{
	"DescribeInstances": true, "DescribeInstanceStatus": true, "DescribeNetworkInterfaces": true, "DescribeVolumes": true,
}

// throttled takes the tokens of a call, or answers RequestLimitExceeded; s.mu is held.
func (s *Server) throttled(action string, p *params) error {
	if !s.cfg.Throttle {
		return nil
	}
	bucket := action
	if _, own := requestLimits[action]; !own {
		bucket = "mutating"
		if strings.HasPrefix(action, "Describe") || strings.HasPrefix(action, "Get") {
			bucket = "describe"
			if expensive[action] && !p.has("Filter") && !p.has("MaxResults") && !p.has("NextToken") && !hasIDs(p) {
				bucket = "describe-unfiltered"
			}
		}
	}
	now := s.cfg.Now()
	if ok, _ := s.bucket("request "+bucket, requestLimits[bucket]).Take(now, 1); !ok {
		return errorf(503, "RequestLimitExceeded", "Request limit exceeded.")
	}
	if limit, ok := resourceLimits[action]; ok {
		n := float64(max(1, len(p.strs("InstanceId")), p.num("MaxCount")))
		if ok, _ := s.bucket("resource "+action, limit).Take(now, n); !ok {
			return errorf(503, "RequestLimitExceeded", "Request limit exceeded.")
		}
	}
	return nil
}

// hasIDs tells whether a Describe call names what it wants to see.
func hasIDs(p *params) bool {
	return p.has("InstanceId") || p.has("NetworkInterfaceId") || p.has("VolumeId")
}

func (s *Server) bucket(name string, limit [2]float64) *emulation.Bucket {
	b := s.buckets[name]
	if b == nil {
		b = &emulation.Bucket{Max: limit[0], Refill: limit[1]}
		s.buckets[name] = b
	}
	return b
}
