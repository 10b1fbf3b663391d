// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// Limit is one throttle.
type Limit struct {
	Burst     float64 // requests at once
	PerMinute float64 // requests a minute for ever
}

// Limits are the real throttles: of a subscription in a region, or of one resource
// where the name says so. Source: learn.microsoft.com, "Throttling of Azure compute
// resources" (limits per subscription and per resource, 2026).
func Limits() map[string]Limit {
	return map[string]Limit{
		"PutVM":                   {1500, 500},
		"PutVMPerResource":        {36, 12},
		"DeleteVM":                {1500, 500},
		"DeleteVMPerResource":     {36, 12},
		"GetVM":                   {24000, 8000},
		"GetVMPerResource":        {36, 12},
		"ListVM":                  {900, 300},
		"GetOperation":            {45000, 15000},
		"GetOperationPerResource": {45, 15},
		"ListDisk":                {900, 300},
		"ListNetwork":             {900, 300},
		"ListGroup":               {900, 300},
		"UpdateVM":                {1500, 500},
		"UpdateVMPerResource":     {36, 12},
		"ListSKU":                 {900, 300},
	}
}

// bucket is a throttle in use.
type bucket struct {
	emulation.Bucket
	closed time.Time // whoever was refused is refused again until then
}

// throttle takes from the buckets of these names, or refuses. It needs mu.
func (s *Server) throttle(now time.Time, names ...string) *apiError {
	if s.cfg.Unthrottled {
		return nil
	}
	for _, name := range names {
		b := s.buckets[name]
		if b == nil {
			limit, _, _ := strings.Cut(name, " ")
			l, ok := s.limits[limit]
			if !ok {
				panic("fakearm: there is no limit " + limit)
			}
			b = &bucket{Bucket: emulation.Bucket{Max: l.Burst, Refill: l.PerMinute / 60}}
			s.buckets[name] = b
		}
		wait := b.closed.Sub(now)
		if wait <= 0 {
			ok, w := b.Take(now, 1)
			if ok {
				continue
			}
			wait = w
			if w < 0 {
				wait = time.Hour
			}
			wait = time.Duration(math.Ceil(wait.Seconds())) * time.Second
			b.closed = now.Add(wait)
		}
		s.throttled[strings.Fields(name)[0]]++
		seconds := int(math.Ceil(wait.Seconds()))
		limit := strings.Fields(name)[0]
		return &apiError{status: http.StatusTooManyRequests, code: "OperationNotAllowed", retryAfter: seconds,
			message: "The server rejected the request because too many requests have been received for this subscription.",
			details: []map[string]any{{"code": "TooManyRequests", "target": limit, "message": fmt.Sprintf(
				`{"operationGroup":"%s","startTime":"%s","endTime":"%s","allowedRequestCount":%g,"measuredRequestCount":%g}`,
				limit, now.UTC().Format(time.RFC3339), now.Add(wait).UTC().Format(time.RFC3339), s.limits[limit].Burst, s.limits[limit].Burst+1)}}}
	}
	return nil
}

// Throttled tells how many requests each limit has refused.
func (s *Server) Throttled() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return clone(s.throttled)
}
