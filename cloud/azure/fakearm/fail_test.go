// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestFailedCreate: what a creation leaves that fails at its end, and that it goes only
// as it does on the real service.
func TestFailedCreate(t *testing.T) {
	c := start(t, Config{})
	c.s.SetCapacity("Standard_D2as_v5", "1", false, 0)
	c.s.SetCapacity("Standard_D2as_v5", "", false, 1)
	a := c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a", with("zones", []any{"1"})))
	if st := c.finish(a); text(st, "status") != "Failed" || text(st, "error.code") != "ZonalAllocationFailed" {
		t.Fatalf("operation: %v", st)
	}
	vm := c.want(http.StatusOK, http.MethodGet, vmID("a")+"?$expand=instanceView", nil)
	if text(vm.body, "properties.provisioningState") != "Failed" ||
		text(list(vm.body, "properties.instanceView.statuses")[0], "code") != "ProvisioningState/failed/ZonalAllocationFailed" {
		t.Errorf("machine: %s", vm.raw)
	}
	nic := text(list(vm.body, "properties.networkProfile.networkInterfaces")[0], "id")
	if l := c.s.Leaks(map[string]string{"peerpod-cluster": "c1"}); len(l) != 3 {
		t.Errorf("a failed creation leaves %q, want machine, interface and disk", l)
	}
	c.refused(http.StatusBadRequest, "NicInUse", http.MethodDelete, nic, nil)
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil))
	if l := c.s.Leaks(nil); len(l) != 1 || l[0] != nic {
		t.Fatalf("after the DELETE there is %q, want the interface: it is reserved", l)
	}
	c.refused(http.StatusBadRequest, "NicReservedForAnotherVm", http.MethodDelete, nic, nil)
	c.refused(http.StatusBadRequest, "NicReservedForAnotherVm", http.MethodPut, vmID("b"), vmBody("a"))
	c.clock.Advance(180 * time.Second)
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, nic, nil))
	if l := c.s.Leaks(nil); len(l) != 0 {
		t.Errorf("left: %q", l)
	}

	// One place without a zone, and the next has none.
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("b"), vmBody("b")))
	if st := c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("c"), vmBody("c"))); text(st, "error.code") != "AllocationFailed" {
		t.Errorf("operation: %v", st)
	}
	// A PUT on a failed machine tries again; the deletion of another gave its place back.
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("b"), nil))
	if st := c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("c"), vmBody("c"))); text(st, "status") != "Succeeded" {
		t.Errorf("the second try: %v", st)
	}
}

// TestAtEnd: operations can be told what to end with.
func TestAtEnd(t *testing.T) {
	c := start(t, Config{})
	for _, code := range []string{"AllocationFailed", "ZonalAllocationFailed", "OverconstrainedAllocationRequest", "OverconstrainedZonalAllocationRequest",
		"SkuNotAvailable", "QuotaExceeded", "OperationNotAllowed", "VMStartTimedOut", provisioningTimedOut} {
		c.s.Inject(Fault{Method: "PUT", Type: "Microsoft.Compute/virtualMachines", AtEnd: true, Code: code, Spot: true})
		c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("regular"), vmBody("regular")))
		st := c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a", with("properties.priority", "Spot"))))
		if text(st, "status") != "Failed" || text(st, "error.code") != code || text(st, "error.message") == "" {
			t.Errorf("%s: %v", code, st)
		}
		if p := c.power("a"); p != map[bool]string{true: "running"}[code == provisioningTimedOut] {
			t.Errorf("%s leaves the machine %q", code, p)
		}
		if code == provisioningTimedOut { // a PUT does not start it twice
			c.finish(c.want(http.StatusOK, http.MethodPut, vmID("a"), vmBody("a", with("properties.priority", "Spot"))))
		}
		c.s.Inject(Fault{Method: "DELETE", Name: "a", AtEnd: true, Code: "InternalExecutionError"})
		if st := c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil)); text(st, "error.code") != "InternalExecutionError" {
			t.Errorf("a deletion that fails: %v", st)
		}
		if l := c.s.Leaks(nil); len(l) != 6 {
			t.Errorf("after a deletion that failed there is %q", l)
		}
		for _, n := range []string{"a", "regular"} {
			c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID(n), nil))
		}
		c.clock.Advance(3 * time.Minute)
		if l := c.s.Leaks(nil); len(l) == 1 {
			c.finish(c.want(http.StatusAccepted, http.MethodDelete, l[0], nil))
		}
		if l := c.s.Leaks(nil); len(l) != 0 {
			t.Fatalf("%s: left %q", code, l)
		}
		c.login()
	}
}

// TestRefusedCreate: what a PUT is refused with, and what that leaves.
func TestRefusedCreate(t *testing.T) {
	c := start(t, Config{Subnets: []Subnet{{CIDR: netip.MustParsePrefix("10.9.0.0/29")}}})
	c.s.Restrict("Standard_D4as_v5", "2")
	c.s.SetQuota("standardDASv5Family", 4)
	c.refused(http.StatusConflict, "SkuNotAvailable", http.MethodPut, vmID("z"), vmBody("z", with("properties.hardwareProfile.vmSize", "Standard_D4as_v5"), with("zones", []any{"2"})))
	c.refused(http.StatusConflict, "OperationNotAllowed", http.MethodPut, vmID("z"), vmBody("z", with("properties.hardwareProfile.vmSize", "Standard_D8as_v5")))
	c.s.Inject(Fault{Method: "PUT", Size: "standard_d2as_v5", Code: "SkuNotAvailable"})
	c.refused(http.StatusConflict, "SkuNotAvailable", http.MethodPut, vmID("z"), vmBody("z"))
	if l := c.s.Leaks(nil); len(l) != 0 {
		t.Fatalf("left: %q", l)
	}
	// /29: eight addresses, four of them Azure's, and the last.
	for _, n := range []string{"a", "b", "c"} {
		c.finish(c.want(http.StatusCreated, http.MethodPut, vmID(n), vmBody(n, with("properties.hardwareProfile.vmSize", "Standard_D2s_v5"))))
	}
	before := len(c.s.Leaks(nil))
	c.refused(http.StatusBadRequest, "SubnetIsFull", http.MethodPut, vmID("d"), vmBody("d", with("properties.hardwareProfile.vmSize", "Standard_D2s_v5"), publicAddress("Standard", "Static")))
	if l := c.s.Leaks(nil); len(l) != before {
		t.Errorf("a full subnet left %q", l)
	}
	// A PUT that is refused late leaves interface and disk without a machine.
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil))
	c.s.Inject(Fault{Method: "PUT", Type: "Microsoft.Compute/virtualMachines", Code: "InternalExecutionError", Leave: true})
	c.refused(http.StatusInternalServerError, "InternalExecutionError", http.MethodPut, vmID("e"), vmBody("e"))
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, vmID("e"), nil)
	disk, nic := id("Microsoft.Compute/disks", "e-disk"), id("Microsoft.Network/networkInterfaces", "e-nic")
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, disk, nil))
	c.refused(http.StatusBadRequest, "NicReservedForAnotherVm", http.MethodDelete, nic, nil)
	// The machine of the same name may have it.
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("e"), vmBody("e")))
}

// TestPreempt: a DELETE ends the creation it meets, and does not wait for it.
func TestPreempt(t *testing.T) {
	c := start(t, Config{})
	a := c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
	d := c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil)
	if again := c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil); again.header.Get("Azure-AsyncOperation") != d.header.Get("Azure-AsyncOperation") {
		t.Error("a second DELETE began another operation")
	}
	if st := c.finish(a); text(st, "status") != "Canceled" || text(st, "error.code") != "OperationPreempted" {
		t.Errorf("the creation: %v", st)
	}
	c.want(http.StatusAccepted, http.MethodGet, d.header.Get("Location"), nil)
	if st := c.finish(d); text(st, "status") != "Succeeded" {
		t.Errorf("the deletion: %v", st)
	}
	if l := c.s.Leaks(nil); len(l) != 0 {
		t.Errorf("left: %q", l)
	}
}

// TestChange: what a PUT on a machine may change, and conditions.
func TestChange(t *testing.T) {
	c := start(t, Config{})
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a")))
	c.finish(c.want(http.StatusOK, http.MethodPut, vmID("a"), vmBody("a"))) // the same again makes nothing
	if vms := c.s.VMs(); len(vms) != 1 {
		t.Fatalf("machines: %v", vms)
	}
	for _, change := range []func(map[string]any){
		with("properties.osProfile.customData", "aGVsbG8="), with("properties.osProfile.computerName", "b"), with("zones", []any{"1"}),
		with("properties.securityProfile", map[string]any{"securityType": "TrustedLaunch"}),
	} {
		c.refused(http.StatusConflict, "PropertyChangeNotAllowed", http.MethodPut, vmID("a"), vmBody("a", change))
	}
	c.finish(c.want(http.StatusOK, http.MethodPut, vmID("a"), vmBody("a", with("properties.userData", "Ym9v"), with("tags.new", "1"))))
	got := c.want(http.StatusOK, http.MethodGet, vmID("a")+"?$expand=userData", nil)
	if text(got.body, "properties.userData") != "Ym9v" || text(got.body, "tags.new") != "1" {
		t.Errorf("machine: %s", got.raw)
	}
	for header, want := range map[[2]string]int{
		{"If-None-Match", "*"}: http.StatusPreconditionFailed,
		{"If-Match", `"x"`}:    http.StatusPreconditionFailed,
		{"If-Match", "*"}:      http.StatusOK,
	} {
		r := c.request(http.MethodPut, vmID("a"), vmBody("a"))
		r.Header.Set(header[0], header[1])
		a := c.send(r)
		if a.status != want {
			t.Errorf("%v: %d, want %d", header, a.status, want)
		}
		if a.status == http.StatusOK {
			c.finish(a)
		}
	}
	c.finish(c.want(http.StatusOK, http.MethodPatch, vmID("a"), map[string]any{"tags": map[string]any{"only": "this"}}))
	if vms := c.s.VMs(); len(vms[0].Tags) != 1 || vms[0].Tags["only"] != "this" {
		t.Errorf("tags after PATCH: %v", vms[0].Tags)
	}
	c.refused(http.StatusConflict, "PropertyChangeNotAllowed", http.MethodPatch, vmID("a"), map[string]any{"properties": map[string]any{"priority": "Spot"}})
}

// TestDetach: without deleteOption Delete the parts outlive their machine.
func TestDetach(t *testing.T) {
	c := start(t, Config{})
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a", publicAddress("Standard", "Static"), func(b map[string]any) {
		drop(list(b, "properties.networkProfile.networkInterfaceConfigurations")[0].(map[string]any), "properties.deleteOption")
		drop(b, "properties.storageProfile.osDisk.deleteOption")
	})))
	nic, disk := id("Microsoft.Network/networkInterfaces", "a-nic"), id("Microsoft.Compute/disks", "a-disk")
	c.refused(http.StatusBadRequest, "PublicIPAddressCannotBeDeleted", http.MethodDelete, id("Microsoft.Network/publicIPAddresses", "pub"), nil)
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil))
	if l := c.s.Leaks(nil); len(l) != 3 {
		t.Errorf("left: %q, want disk, interface and address", l)
	}
	c.refused(http.StatusConflict, "ConflictingUserInput", http.MethodPut, vmID("a"), vmBody("a"))
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, nic, nil))
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, disk, nil))
	// deleteOption is for the machine's DELETE alone: the address stays when its
	// interface is deleted.
	if l := c.s.Leaks(nil); len(l) != 1 {
		t.Errorf("left: %q, want the address", l)
	}
	c.finish(c.want(http.StatusAccepted, http.MethodDelete, id("Microsoft.Network/publicIPAddresses", "pub"), nil))
}

// TestReport: a machine that does not tell that it is ready is not provisioned, and
// runs all the same.
func TestReport(t *testing.T) {
	c := start(t, Config{ReportTimeout: 20 * time.Minute, Unthrottled: true})
	silent := c.want(http.StatusCreated, http.MethodPut, vmID("silent"), vmBody("silent"))
	a := c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
	c.clock.Advance(time.Minute)
	for _, n := range []string{"silent", "a"} {
		if got := c.want(http.StatusOK, http.MethodGet, vmID(n), nil); text(got.body, "properties.provisioningState") != "Creating" || c.power(n) != "running" {
			t.Fatalf("%s before its report: %s", n, got.raw)
		}
	}
	report := func(state string) int {
		h := c.s.Metadata(vmID("a"))
		get := httptest.NewRequest(http.MethodGet, "http://"+WireServerAddr+"/machine/?comp=goalstate", nil)
		get.Header.Set("X-Ms-Version", "2012-11-30")
		goal := httptest.NewRecorder()
		h.ServeHTTP(goal, get)
		between := func(s, from, to string) string {
			_, s, _ = strings.Cut(s, from)
			s, _, _ = strings.Cut(s, to)
			return s
		}
		body := "<Health><GoalStateIncarnation>1</GoalStateIncarnation><Container><ContainerId>" + between(goal.Body.String(), "<ContainerId>", "<") +
			"</ContainerId><RoleInstanceList><Role><InstanceId>" + between(goal.Body.String(), "<InstanceId>", "<") + "</InstanceId><Health><State>" + state + "</State></Health></Role></RoleInstanceList></Container></Health>"
		post := httptest.NewRequest(http.MethodPost, "http://"+WireServerAddr+"/machine?comp=health", strings.NewReader(body))
		post.Header.Set("X-Ms-Version", "2012-11-30")
		post.Header.Set("Content-Type", "text/xml; charset=utf-8")
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, post)
		return rec.Code
	}
	if st := report("Ready"); st != http.StatusOK {
		t.Errorf("the report: %d", st)
	}
	if st := c.finish(a); text(st, "status") != "Succeeded" {
		t.Errorf("after the report: %v", st)
	}
	c.clock.Advance(20 * time.Minute)
	if st := c.finish(silent); text(st, "error.code") != "OSProvisioningTimedOut" {
		t.Errorf("without a report: %v", st)
	}
	if p := c.power("silent"); p != "running" {
		t.Errorf("power state %q: the machine runs", p)
	}
}

// TestReplies: what can become of a reply, in memory and over a network.
func TestReplies(t *testing.T) {
	c := start(t, Config{})
	c.s.Inject(Fault{Method: "PUT", Type: "Microsoft.Compute/virtualMachines", Lost: true})
	if _, err := c.try(c.request(http.MethodPut, vmID("a"), vmBody("a"))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a lost reply: %v", err)
	}
	if vms := c.s.VMs(); len(vms) != 1 || vms[0].State != "Creating" {
		t.Errorf("after the lost reply there is %v: it took effect", vms)
	}
	c.s.Inject(Fault{Method: "GET", Name: "a", Malformed: true, Skip: 1})
	c.want(http.StatusOK, http.MethodGet, vmID("a"), nil)
	if a := c.do(http.MethodGet, vmID("a"), nil); a.status != http.StatusOK || a.body != nil {
		t.Errorf("a malformed reply: %d %s", a.status, a.raw)
	}

	srv := httptest.NewServer(c.s)
	defer srv.Close()
	c.s.Inject(Fault{Lost: true})
	get := func(ctx context.Context) (*http.Response, error) {
		r := c.request(http.MethodGet, "https://x.test"+vmID("a")+"?api-version="+computeVersions[0], nil)
		r.URL.Scheme, r.URL.Host = "http", srv.Listener.Addr().String()
		return srv.Client().Transport.RoundTrip(r.WithContext(ctx))
	}
	if _, err := get(t.Context()); !errors.Is(err, io.EOF) {
		t.Errorf("a lost reply over the network: %v", err)
	}
	c.s.Inject(Fault{Never: true})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := get(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a reply that never comes: %v", err)
	}
	c.s.Inject(Fault{Code: "ServerBusy", RetryAfter: 7 * time.Second})
	if a := c.refused(http.StatusServiceUnavailable, "ServerBusy", http.MethodGet, vmID("a"), nil); a.header.Get("Retry-After") != "7" {
		t.Errorf("headers: %v", a.header)
	}
	c.s.Inject(Fault{Code: "ServerBusy", Count: -1})
	c.refused(http.StatusServiceUnavailable, "ServerBusy", http.MethodGet, vmID("a"), nil)
	c.s.Heal()
	c.want(http.StatusOK, http.MethodGet, vmID("a"), nil)
}

// TestSlow: a slow reply takes its time twice, before and in the middle.
func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := start(t, Config{})
		before := time.Now()
		c.s.Inject(Fault{Method: "PUT", Slow: 3 * time.Second})
		c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
		if d := time.Since(before); d != 6*time.Second {
			t.Errorf("a slow reply took %v, want 6 s", d)
		}
	})
}
