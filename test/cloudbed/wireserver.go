// SPDX-License-Identifier: Apache-2.0

package cloudbed

import (
	"encoding/xml"
	"fmt"
	"net/http"
	"net/netip"
)

// WireServer is where Azure's hosts listen to their machines
// (learn.microsoft.com, "What is IP address 168.63.129.16?").
var WireServer = netip.MustParseAddr("168.63.129.16")

// wireServer is as much of it as a machine without Azure's agent needs: it reads the
// goal state and reports that it is ready (learn.microsoft.com, "Creating generalized
// images without a provisioning agent").
type wireServer struct {
	machine string
	ready   func()
}

// wireVersion is the one that the documentation uses.
const wireVersion = "2012-11-30"

func (s wireServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-Ms-Version") != wireVersion {
		http.Error(w, "x-ms-version is missing or unknown", http.StatusBadRequest)
		return
	}
	container, role := "container-"+s.machine, "_"+s.machine
	switch comp := r.URL.Query().Get("comp"); {
	case r.Method == http.MethodGet && comp == "goalstate":
		w.Header().Set("Content-Type", "text/xml; charset=utf-8")
		fmt.Fprintf(w, `<?xml version="1.0" encoding="utf-8"?><GoalState><Version>%s</Version><Incarnation>1</Incarnation><Machine><ExpectedState>Started</ExpectedState></Machine>`+
			`<Container><ContainerId>%s</ContainerId><RoleInstanceList><RoleInstance><InstanceId>%s</InstanceId><State>Started</State></RoleInstance></RoleInstanceList></Container></GoalState>`,
			wireVersion, container, role)
	case r.Method == http.MethodPost && comp == "health":
		var report struct {
			XMLName     xml.Name `xml:"Health"`
			Incarnation string   `xml:"GoalStateIncarnation"`
			Container   string   `xml:"Container>ContainerId"`
			Role        string   `xml:"Container>RoleInstanceList>Role>InstanceId"`
			State       string   `xml:"Container>RoleInstanceList>Role>Health>State"`
		}
		err := xml.NewDecoder(r.Body).Decode(&report)
		if err != nil || report.Incarnation != "1" || report.Container != container || report.Role != role {
			http.Error(w, "the report is of no machine here", http.StatusBadRequest)
			return
		}
		if report.State == "Ready" {
			s.ready()
		}
	default:
		http.NotFound(w, r)
	}
}
