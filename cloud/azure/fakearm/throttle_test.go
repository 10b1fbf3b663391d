// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"net/http"
	"net/url"
	"strconv"
	"testing"
	"time"
)

// TestThrottle: the real buckets, and that who comes back early is refused again.
func TestThrottle(t *testing.T) {
	c := start(t, Config{})
	a := c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
	for i := range 36 {
		if got := c.do(http.MethodGet, vmID("a"), nil); got.status != http.StatusOK {
			t.Fatalf("GET %d of 36: %d %s", i+1, got.status, got.raw)
		}
	}
	refused := c.do(http.MethodGet, vmID("a"), nil)
	if refused.status != http.StatusTooManyRequests || refused.header.Get("Retry-After") != "5" {
		t.Fatalf("GET 37: %d, Retry-After %q, want 429 and 5 (12 a minute)", refused.status, refused.header.Get("Retry-After"))
	}
	c.clock.Advance(4900 * time.Millisecond)
	if again := c.do(http.MethodGet, vmID("a"), nil); again.status != http.StatusTooManyRequests || again.header.Get("Retry-After") != "1" {
		t.Errorf("100 ms early: %d, Retry-After %q", again.status, again.header.Get("Retry-After"))
	}
	c.clock.Advance(100 * time.Millisecond)
	c.want(http.StatusOK, http.MethodGet, vmID("a"), nil)
	// Another machine has a bucket of its own.
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, vmID("b"), nil)
	if n := c.s.Throttled()["GetVMPerResource"]; n != 2 {
		t.Errorf("%d refusals were counted, want 2", n)
	}

	where := a.header.Get("Azure-AsyncOperation")
	for range 45 {
		c.want(http.StatusOK, http.MethodGet, where, nil)
	}
	if got := c.do(http.MethodGet, where, nil); got.status != http.StatusTooManyRequests || got.header.Get("Retry-After") != "4" {
		t.Errorf("status 46 of an operation: %d, Retry-After %q, want 429 and 4 (15 a minute)", got.status, got.header.Get("Retry-After"))
	}
}

// TestManyCreates: of 1600 machines at once 1500 are taken.
func TestManyCreates(t *testing.T) {
	c := start(t, Config{Limits: map[string]Limit{"PutVM": {Burst: 15, PerMinute: 500}}})
	if l := Limits()["PutVM"]; l != (Limit{Burst: 1500, PerMinute: 500}) {
		t.Errorf("the real limit is %v", l)
	}
	taken, refused := 0, 0
	for i := range 16 {
		n := "m" + strconv.Itoa(i)
		switch a := c.do(http.MethodPut, vmID(n), vmBody(n)); a.status {
		case http.StatusCreated:
			taken++
		case http.StatusTooManyRequests:
			refused++
		default:
			t.Fatalf("%d %s", a.status, a.raw)
		}
	}
	if taken != 15 || refused != 1 {
		t.Errorf("%d taken and %d refused, want 15 and 1", taken, refused)
	}
}

// TestLists: pages, lags and the index's ways with tags.
func TestLists(t *testing.T) {
	c := start(t, Config{PageSize: 2})
	all := id("Microsoft.Compute/virtualMachines", "")
	all = all[:len(all)-1]
	for _, n := range []string{"a", "b", "c"} {
		c.want(http.StatusCreated, http.MethodPut, vmID(n), vmBody(n))
	}
	if got := names(c.want(http.StatusOK, http.MethodGet, all, nil)); got != "[]" {
		t.Errorf("at once the list has %s", got)
	}
	c.want(http.StatusOK, http.MethodGet, vmID("a"), nil)
	c.clock.Advance(3 * time.Second)
	first := c.want(http.StatusOK, http.MethodGet, all, nil)
	second := c.want(http.StatusOK, http.MethodGet, text(first.body, "nextLink"), nil)
	if names(first) != "[a b]" || names(second) != "[c]" || text(second.body, "nextLink") != "" {
		t.Errorf("pages %s and %s", names(first), names(second))
	}
	sub := "/subscriptions/" + DefaultSubscription + "/providers/Microsoft.Compute/virtualMachines"
	if got := names(c.want(http.StatusOK, http.MethodGet, sub, nil)); got != "[a b]" {
		t.Errorf("the subscription's list has %s", got)
	}

	resources := "/subscriptions/" + DefaultSubscription + "/resourceGroups/pods/resources"
	byTag := resources + "?$top=20&$filter=" + url.QueryEscape("tagName eq 'peerpod-cluster' and tagValue eq 'c1'")
	c.s.cfg.PageSize = 50
	if got := names(c.want(http.StatusOK, http.MethodGet, byTag, nil)); got != "[]" {
		t.Errorf("the index lags more; it has %s", got)
	}
	c.clock.Advance(5 * time.Second)
	got := c.want(http.StatusOK, http.MethodGet, byTag+"&$expand=createdTime", nil)
	if n := len(list(got.body, "value")); n != 9 { // machine, disk and interface, thrice
		t.Errorf("%d resources with the tag: %s", n, got.raw)
	}
	one := list(got.body, "value")[0]
	if at(one, "tags") != nil || text(one, "createdTime") == "" {
		t.Errorf("a filter by tag shows no tags: %v", one)
	}
	byType := resources + "?$filter=" + url.QueryEscape("resourceType eq 'Microsoft.Compute/virtualMachines' or resourceType eq 'Microsoft.Compute/disks'")
	got = c.want(http.StatusOK, http.MethodGet, byType, nil)
	if n := len(list(got.body, "value")); n != 6 || at(list(got.body, "value")[0], "tags") == nil {
		t.Errorf("%d machines and disks: %s", n, got.raw)
	}
	c.refused(http.StatusBadRequest, "InvalidFilterInQueryString", http.MethodGet,
		resources+"?$filter="+url.QueryEscape("tagName eq 'a' and tagValue eq 'b' and resourceType eq 'c'"), nil)

	c.finish(c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil))
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, vmID("a"), nil)
	if got := names(c.want(http.StatusOK, http.MethodGet, all, nil)); got != "[a b c]" {
		t.Errorf("at once after the end the list has %s", got)
	}
	c.clock.Advance(3 * time.Second)
	if got := names(c.want(http.StatusOK, http.MethodGet, all, nil)); got != "[b c]" {
		t.Errorf("after its lag the list has %s", got)
	}
	if got := names(c.want(http.StatusOK, http.MethodGet, "/subscriptions/"+DefaultSubscription+"/resourceGroups", nil)); got != "[pods]" {
		t.Errorf("groups: %s", got)
	}
}

// TestSizes: what the SKU list says of sizes, and of what is kept from a subscription.
func TestSizes(t *testing.T) {
	c := start(t, Config{})
	c.s.Restrict("Standard_D4as_v5", "2", "3")
	c.s.Restrict("Standard_D8as_v5")
	skus := "/subscriptions/" + DefaultSubscription + "/providers/Microsoft.Compute/skus?$filter=" + url.QueryEscape("location eq 'westeurope'")
	got := c.want(http.StatusOK, http.MethodGet, skus, nil)
	found := map[string]any{}
	for _, s := range list(got.body, "value") {
		found[text(s, "name")] = s
	}
	capability := func(size, name string) string {
		for _, cp := range list(found[size], "capabilities") {
			if text(cp, "name") == name {
				return text(cp, "value")
			}
		}
		return ""
	}
	for _, tc := range [][3]string{
		{"Standard_D2as_v5", "vCPUs", "2"}, {"Standard_D2as_v5", "MemoryGB", "8"}, {"Standard_NC4as_T4_v3", "GPUs", "1"}, {"Standard_D2as_v5", "GPUs", ""},
		{"Standard_DC2es_v5", "ConfidentialComputingType", "TDX"}, {"Standard_D2ps_v5", "CpuArchitectureType", "Arm64"},
		{"Standard_D2ds_v5", "SupportedEphemeralOSDiskPlacements", "CacheDisk,ResourceDisk"}, {"Standard_B2s", "LowPriorityCapable", "False"},
	} {
		if v := capability(tc[0], tc[1]); v != tc[2] {
			t.Errorf("%s of %s: %q, want %q", tc[1], tc[0], v, tc[2])
		}
	}
	zone := list(found["Standard_D4as_v5"], "restrictions")[0]
	if text(zone, "type") != "Zone" || len(list(zone, "restrictionInfo.zones")) != 2 || text(zone, "reasonCode") != "NotAvailableForSubscription" {
		t.Errorf("restriction of zones: %v", zone)
	}
	if text(list(found["Standard_D8as_v5"], "restrictions")[0], "type") != "Location" {
		t.Errorf("restriction of the region: %v", found["Standard_D8as_v5"])
	}
	if got := names(c.want(http.StatusOK, http.MethodGet, skus[:len(skus)-len("westeurope%27")]+"eastus%27", nil)); got != "[]" {
		t.Errorf("elsewhere: %s", got)
	}
	c.refused(http.StatusBadRequest, "BadRequest", http.MethodGet, "/subscriptions/"+DefaultSubscription+"/providers/Microsoft.Compute/skus?$filter=name", nil)
}
