// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"fmt"
	"net/http"
	"sort"
	"time"
)

// event is something that happens when the clock passes it.
type event struct {
	at time.Time
	do func(now time.Time)
}

// after schedules. It needs mu.
func (s *Server) after(at time.Time, do func(now time.Time)) {
	i := sort.Search(len(s.events), func(i int) bool { return s.events[i].at.After(at) })
	s.events = append(s.events, event{})
	copy(s.events[i+1:], s.events[i:])
	s.events[i] = event{at, do}
	if i == 0 {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// catchUp does what was due until now. It needs mu.
func (s *Server) catchUp(now time.Time) {
	for len(s.events) > 0 && !s.events[0].at.After(now) {
		e := s.events[0]
		s.events = s.events[1:]
		e.do(e.at)
	}
}

// operation is one that takes long.
type operation struct {
	id       string
	provider string // "Microsoft.Compute"
	scope    string // whose throttle its status counts for: the resource
	start    time.Time
	end      time.Time
	status   string // InProgress, Succeeded, Failed, Canceled
	err      *apiError
	owner    string // client that started it
	// finish does what the operation does; an error fails it. Called once.
	finish func(now time.Time) *apiError
	// output is what the status and the final Location answer. nil: nothing.
	output func() any
	empty  int  // status of a final Location without output: 204 of a DELETE, else 200
	due    bool // its time is over
	waits  int  // what it waits for besides
}

// begin starts an operation on a resource that ends after d. It needs mu.
func (s *Server) begin(c *call, r *resource, d time.Duration, finish func(now time.Time) *apiError) *operation {
	op := &operation{id: newUUID(), provider: r.kind.provider(), scope: key(r.id), start: c.now, status: "InProgress", finish: finish, owner: c.principal.Client}
	if op.empty = http.StatusOK; c.r.Method == http.MethodDelete {
		op.empty = http.StatusNoContent
	}
	s.operations[op.id] = op
	r.op = op
	if f := c.fault; f != nil && f.AtEnd {
		err := f.err()
		op.finish = func(now time.Time) *apiError { return err }
		d = s.cfg.Timing.Fail
	}
	s.after(c.now.Add(d), func(now time.Time) {
		op.due = true
		s.settle(op, r, now)
	})
	return op
}

// settle ends an operation when nothing is left to wait for. It needs mu.
func (s *Server) settle(op *operation, r *resource, now time.Time) {
	if op.status != "InProgress" || !op.due || op.waits > 0 {
		return
	}
	err := op.finish(now)
	op.end, op.err, op.status = now, err, "Succeeded"
	if err != nil {
		op.status = "Failed"
	}
	if r.op == op {
		r.op = nil
	}
	if err != nil && r.failed != nil {
		r.failed(now, err)
	}
	s.cfg.Log.Debug("operation", "id", op.id, "resource", r.id, "status", op.status)
}

// preempt ends an operation that another overtakes. It needs mu.
func (s *Server) preempt(op *operation, now time.Time) {
	if op == nil || op.status != "InProgress" {
		return
	}
	op.status, op.end = "Canceled", now
	op.err = &apiError{status: http.StatusConflict, code: "OperationPreempted", message: "Operation execution has been preempted by a more recent operation."}
}

// accepted is the reply that an operation has begun: Azure-AsyncOperation always, and
// Location where there is no resource to come back to.
func (s *Server) accepted(c *call, status int, op *operation, location bool, body any) *reply {
	base := fmt.Sprintf("%s/subscriptions/%s/providers/%s/locations/%s/operations/%s?api-version=%s",
		c.base(), s.cfg.Subscription, op.provider, s.cfg.Region, op.id, c.version)
	h := http.Header{"Azure-Asyncoperation": {base}}
	if location {
		h.Set("Location", base+"&monitor=true")
	}
	s.askToWait(h)
	return &reply{status: status, header: h, body: body}
}

func (s *Server) askToWait(h http.Header) {
	if d := s.cfg.Timing.RetryAfter; d > 0 {
		h.Set("Retry-After", fmt.Sprint(int(d.Seconds())))
	}
}

// operationStatus answers locations/{region}/operations/{id}, in both forms.
func (s *Server) operationStatus(c *call, id string) (*reply, *apiError) {
	op := s.operations[id]
	if op == nil {
		return nil, &apiError{status: http.StatusNotFound, code: "NotFound", message: fmt.Sprintf("The operation '%s' could not be found.", id)}
	}
	if err := s.throttle(c.now, "GetOperation", "GetOperationPerResource "+op.scope); err != nil {
		return nil, err
	}
	h := http.Header{}
	if op.status == "InProgress" {
		s.askToWait(h)
	}
	if c.query("monitor") == "true" {
		switch {
		case op.status == "InProgress":
			h.Set("Location", c.base()+c.r.URL.RequestURI())
			return &reply{status: http.StatusAccepted, header: h}, nil
		case op.err != nil:
			return nil, op.err
		case op.output == nil:
			return &reply{status: op.empty}, nil
		}
		return &reply{status: http.StatusOK, body: op.output()}, nil
	}
	body := map[string]any{"startTime": op.start.UTC().Format(time.RFC3339Nano), "status": op.status, "name": op.id}
	if op.status != "InProgress" {
		body["endTime"] = op.end.UTC().Format(time.RFC3339Nano)
	}
	if op.err != nil {
		body["error"] = op.err.inner()
	}
	if op.status == "Succeeded" && op.output != nil {
		body["properties"] = map[string]any{"output": op.output()}
	}
	return &reply{status: http.StatusOK, header: h, body: body}, nil
}
