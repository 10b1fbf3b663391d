// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"net/http"
	"path"
	"strings"
	"time"
)

// Fault makes requests go wrong. The first part says which, the second how. Zero
// fields match everything.
type Fault struct {
	Method string // "PUT"
	// Type is a resource type, "Microsoft.Compute/virtualMachines"; "operations",
	// "token", "resources" or "blob" for what is none.
	Type string
	Name string // of the resource, with * and ?
	Size string // of the virtual machine in the body
	Zone string // of the resource in the body
	Spot bool   // only spot machines
	Skip int    // how many that match go through first
	// Count is how many requests; 0 is one, below 0 all until Heal.
	Count int

	// Status and Code refuse the request (Status 0 with a Code: the usual one of that
	// code).
	Status  int
	Code    string
	Message string // "": one that goes with the code
	// RetryAfter is in the reply. 0: none.
	RetryAfter time.Duration
	// AtEnd: the request is accepted, and its operation ends with Code.
	AtEnd bool
	// Leave: a PUT of a virtual machine that is refused leaves its interface and disk.
	Leave bool

	// Lost: the request takes effect and the connection ends without a reply.
	Lost bool
	// Malformed: the request takes effect; the reply's body is cut in the middle.
	Malformed bool
	// Slow: the reply starts after that time, and its body takes as long again.
	Slow time.Duration
	// Never: no reply comes until the client goes away. Nothing takes effect.
	Never bool
}

type armed struct {
	Fault
	hits int
}

// Inject adds a fault. Of the faults that match a request, the first added applies.
func (s *Server) Inject(f Fault) {
	if f.Count == 0 {
		f.Count = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &armed{Fault: f})
}

// Heal removes all faults.
func (s *Server) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// fault returns the fault that applies to a request, or nil. It needs mu.
func (s *Server) fault(method, typ, name string, body map[string]any) *Fault {
	zone := ""
	if z := list(body, "zones"); len(z) > 0 {
		zone, _ = z[0].(string)
	}
	for i, f := range s.faults {
		if f.Method != "" && f.Method != method || f.Type != "" && !strings.EqualFold(f.Type, typ) ||
			f.Size != "" && !strings.EqualFold(f.Size, text(body, "properties.hardwareProfile.vmSize")) ||
			f.Zone != "" && f.Zone != zone || f.Spot && text(body, "properties.priority") != "Spot" {
			continue
		}
		if f.Name != "" {
			if ok, _ := path.Match(strings.ToLower(f.Name), strings.ToLower(name)); !ok {
				continue
			}
		}
		f.hits++
		if f.hits <= f.Skip {
			continue
		}
		if f.Count > 0 && f.hits >= f.Skip+f.Count {
			s.faults = append(s.faults[:i:i], s.faults[i+1:]...)
		}
		return &f.Fault
	}
	return nil
}

// err is the error that a fault with a code or status stands for, or nil.
func (f *Fault) err() *apiError {
	if f.Code == "" && f.Status == 0 {
		return nil
	}
	e := &apiError{status: f.Status, code: f.Code, message: f.Message, retryAfter: int(f.RetryAfter.Seconds())}
	known := failures[f.Code]
	if e.status == 0 {
		if e.status = known.status; e.status == 0 {
			e.status = http.StatusBadRequest
		}
	}
	if e.code == "" {
		e.code = strings.ReplaceAll(http.StatusText(e.status), " ", "")
	}
	if e.message == "" {
		if e.message = known.message; e.message == "" {
			e.message = "The request failed: " + e.code + "."
		}
	}
	return e
}

// provisioningTimedOut is the one failure of a creation that leaves a running machine.
const provisioningTimedOut = "OSProvisioningTimedOut"

// failures are the codes that a creation is known to fail with, their status when the
// PUT itself is refused, and their words (published logs; learn.microsoft.com,
// "Troubleshoot allocation failures", "Resolve errors for SKU not available").
var failures = map[string]struct {
	status  int
	message string
}{
	"AllocationFailed": {http.StatusConflict, "Allocation failed. We do not have sufficient capacity for the requested VM size in this region. " +
		"Read more about improving likelihood of allocation success at https://aka.ms/allocation-guidance"},
	"ZonalAllocationFailed": {http.StatusConflict, "Allocation failed. We do not have sufficient capacity for the requested VM size in this zone. " +
		"Read more about improving likelihood of allocation success at https://aka.ms/allocation-guidance"},
	"OverconstrainedAllocationRequest": {http.StatusConflict, "Allocation failed. VM(s) with the following constraints cannot be allocated, because the condition is too restrictive. " +
		"Please remove some constraints and try again. Constraints applied are:\n  - Differencing (Ephemeral) Disks\n  - Networking Constraints (such as Accelerated Networking or IPv6)\n  - VM Size"},
	"OverconstrainedZonalAllocationRequest": {http.StatusConflict, "Allocation failed. VM(s) with the following constraints cannot be allocated, because the condition is too restrictive. " +
		"Please remove some constraints and try again. Constraints applied are:\n  - Availability Zone\n  - Networking Constraints (such as Accelerated Networking or IPv6)\n  - VM Size"},
	"SkuNotAvailable": {http.StatusConflict, "The requested VM size for resource is currently not available in this location. " +
		"Please try another size or deploy to a different location or different zone. See https://aka.ms/azureskunotavailable for details."},
	"QuotaExceeded": {http.StatusConflict, "Operation could not be completed as it results in exceeding approved Total Regional Cores quota."},
	"OperationNotAllowed": {http.StatusConflict, "Operation could not be completed as it results in exceeding approved standardDASv5Family Cores quota. " +
		"Submit a request for Quota increase at https://aka.ms/ProdportalCRP."},
	"SubnetIsFull":                     {http.StatusBadRequest, "Subnet with address prefix does not have enough capacity for 1 IP addresses."},
	provisioningTimedOut:               {http.StatusConflict, "OS Provisioning for VM did not finish in the allotted time. The VM may still finish provisioning successfully. Please check provisioning state later."},
	"VMStartTimedOut":                  {http.StatusConflict, "VM did not start in the allotted time. The VM may still start successfully. Please check the power state later."},
	"InternalExecutionError":           {http.StatusInternalServerError, "An internal execution error occurred. Please retry later."},
	"NetworkingInternalOperationError": {http.StatusConflict, "Unknown network allocation error."},
	"ServerBusy":                       {http.StatusServiceUnavailable, "The server is busy. Please retry later."},
	"ServerTimeout":                    {http.StatusServiceUnavailable, "The request timed out. Diagnostic information: timestamp, subscription id, tracking id."},
	"GatewayTimeout":                   {http.StatusGatewayTimeout, "The gateway did not receive a response from 'Microsoft.Compute' within the specified time period."},
	"SubscriptionNotFound":             {http.StatusNotFound, "The subscription could not be found."},
	"RequestDisallowedByPolicy":        {http.StatusForbidden, "Resource was disallowed by policy."},
}
