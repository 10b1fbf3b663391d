// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestLife walks a machine from its PUT to the end of its DELETE.
func TestLife(t *testing.T) {
	c := start(t, Config{})
	a := c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a"))
	if text(a.body, "properties.provisioningState") != "Creating" || a.header.Get("Retry-After") != "10" {
		t.Errorf("reply: %s, Retry-After %q", a.raw, a.header.Get("Retry-After"))
	}
	if strings.Contains(string(a.raw), "aGVsbG8=") {
		t.Error("the reply shows the user data")
	}
	if p := c.power("a"); p != "starting" {
		t.Errorf("power state %q", p)
	}
	c.refused(http.StatusConflict, "Conflict", http.MethodPut, vmID("a"), vmBody("a"))
	c.clock.Advance(3 * time.Second)
	if p := c.power("a"); p != "running" {
		t.Errorf("power state %q after Timing.Start", p)
	}
	if st := c.finish(a); text(st, "status") != "Succeeded" {
		t.Fatalf("operation: %v", st)
	}
	got := c.want(http.StatusOK, http.MethodGet, vmID("a")+"?$expand=instanceView,userData", nil)
	if text(got.body, "properties.provisioningState") != "Succeeded" || text(got.body, "properties.userData") != "aGVsbG8=" || len(list(got.body, "properties.instanceView.statuses")) != 2 {
		t.Errorf("machine: %s", got.raw)
	}
	nicID := text(list(got.body, "properties.networkProfile.networkInterfaces")[0], "id")
	nic := c.want(http.StatusOK, http.MethodGet, nicID, nil)
	if ip := text(list(nic.body, "properties.ipConfigurations")[0], "properties.privateIPAddress"); ip != "10.0.0.4" {
		t.Errorf("address %q, want the subnet's first free one", ip)
	}
	disk := c.want(http.StatusOK, http.MethodGet, text(got.body, "properties.storageProfile.osDisk.managedDisk.id"), nil)
	if text(disk.body, "managedBy") != vmID("a") || text(disk.body, "tags.peerpod-cluster") != "c1" {
		t.Errorf("disk: %s", disk.raw)
	}
	c.refused(http.StatusBadRequest, "NicInUse", http.MethodDelete, nicID, nil)
	c.refused(http.StatusConflict, "OperationNotAllowed", http.MethodDelete, text(disk.body, "id"), nil)
	if l := c.s.Leaks(map[string]string{"peerpod-cluster": "c1"}); len(l) != 3 {
		t.Errorf("leaks: %q", l)
	}

	del := c.want(http.StatusAccepted, http.MethodDelete, vmID("a"), nil)
	if del.header.Get("Location") == "" || len(del.raw) != 0 {
		t.Errorf("DELETE: %v %s", del.header, del.raw)
	}
	c.refused(http.StatusConflict, "OperationNotAllowed", http.MethodPut, vmID("a"), vmBody("a"))
	if st := c.finish(del); text(st, "status") != "Succeeded" {
		t.Fatalf("operation: %v", st)
	}
	c.want(http.StatusNoContent, http.MethodGet, del.header.Get("Location"), nil)
	for _, id := range []string{vmID("a"), nicID, text(disk.body, "id")} {
		c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, id, nil)
	}
	c.want(http.StatusNoContent, http.MethodDelete, vmID("a"), nil)
	if l := c.s.Leaks(nil); len(l) != 0 {
		t.Errorf("leaks: %q", l)
	}
}
