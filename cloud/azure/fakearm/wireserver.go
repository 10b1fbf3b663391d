// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// WireServerAddr is where a machine reports to its host that it is ready.
const WireServerAddr = "168.63.129.16"

// awaitReport makes an operation wait for the guest. It needs mu.
func (s *Server) awaitReport(now time.Time, vm *resource, op *operation) {
	m := vm.vm
	if s.cfg.ReportTimeout <= 0 || object(vm.doc, "properties.osProfile") == nil {
		return
	}
	op.waits++
	over := false
	end := func(now time.Time) {
		if !over {
			over, m.reported = true, nil
			op.waits--
			s.settle(op, vm, now)
		}
	}
	m.reported = end
	s.after(now.Add(s.cfg.ReportTimeout), func(now time.Time) {
		if !over && op.status == "InProgress" {
			f := Fault{Code: provisioningTimedOut}
			m.failure = f.err()
			op.due = true
			end(now)
		}
	})
}

// wireServer answers for the wire server: the versions, the goal state that a report
// repeats, and the report. Source: learn.microsoft.com, "Creating generalized images
// without a provisioning agent". It needs mu.
func (m *metadata) wireServer(w http.ResponseWriter, r *http.Request, now time.Time) {
	vm := m.s.resources[m.vm]
	if vm == nil || vm.vm == nil {
		w.WriteHeader(http.StatusGone)
		return
	}
	comp := r.URL.Query().Get("comp")
	if comp != "versions" && r.Header.Get("X-Ms-Version") != "2012-11-30" {
		http.Error(w, `<Error><Code>InvalidVersion</Code><Details>x-ms-version must be 2012-11-30</Details></Error>`, http.StatusBadRequest)
		return
	}
	container, instance := "c-"+vm.vm.uuid, vm.vm.uuid+"._"+vm.name
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	switch {
	case r.Method == http.MethodGet && comp == "versions":
		fmt.Fprint(w, `<?xml version="1.0" encoding="utf-8"?><Versions><Preferred><Version>2015-04-05</Version></Preferred><Supported><Version>2015-04-05</Version><Version>2012-11-30</Version></Supported></Versions>`)
	case r.Method == http.MethodGet && comp == "goalstate":
		fmt.Fprintf(w, `<?xml version="1.0" encoding="utf-8"?><GoalState><Version>2012-11-30</Version><Incarnation>1</Incarnation><Machine><ExpectedState>Started</ExpectedState></Machine>`+
			`<Container><ContainerId>%s</ContainerId><RoleInstanceList><RoleInstance><InstanceId>%s</InstanceId><State>Started</State></RoleInstance></RoleInstanceList></Container></GoalState>`, container, instance)
	case r.Method == http.MethodPost && comp == "health":
		var h struct {
			XMLName     xml.Name `xml:"Health"`
			Incarnation string   `xml:"GoalStateIncarnation"`
			Container   string   `xml:"Container>ContainerId"`
			Instance    string   `xml:"Container>RoleInstanceList>Role>InstanceId"`
			State       string   `xml:"Container>RoleInstanceList>Role>Health>State"`
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<10))
		if err != nil || xml.Unmarshal(body, &h) != nil || h.Incarnation != "1" || h.Container != container || h.Instance != instance ||
			!strings.HasPrefix(r.Header.Get("Content-Type"), "text/xml") {
			http.Error(w, `<Error><Code>InvalidHealthReport</Code></Error>`, http.StatusBadRequest)
			return
		}
		if h.State == "Ready" && vm.vm.reported != nil {
			vm.vm.reported(now)
		}
	default:
		http.Error(w, `<Error><Code>ResourceNotAvailable</Code></Error>`, http.StatusNotFound)
	}
}
