// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
	"github.com/kata-remote/kata-remote/cloud/azure/fakearm"
)

// TestStates: what the API says of a VM (learn.microsoft.com, "States and billing status
// of Azure Virtual Machines").
func TestStates(t *testing.T) {
	for _, tc := range []struct {
		provisioning string
		statuses     []string // code or code=message
		want         cloud.State
		detail       string
	}{
		{"Creating", nil, cloud.StatePending, ""},
		{"Creating", []string{"PowerState/starting"}, cloud.StatePending, ""},
		{"Creating", []string{"ProvisioningState/creating/osProvisioningInProgress", "PowerState/running"}, cloud.StateRunning, ""},
		{"Succeeded", nil, cloud.StateRunning, ""},
		{"Succeeded", []string{"ProvisioningState/succeeded", "PowerState/running"}, cloud.StateRunning, ""},
		{"Updating", []string{"PowerState/running"}, cloud.StateRunning, ""},
		{"Succeeded", []string{"PowerState/deallocated"}, cloud.StateFailed, "deallocated"},
		{"Succeeded", []string{"PowerState/stopped"}, cloud.StateFailed, "stopped"},
		{"Failed", []string{"ProvisioningState/failed/AllocationFailed=There is no room."}, cloud.StateFailed, "AllocationFailed: There is no room."},
		{"Failed", nil, cloud.StateFailed, "ProvisioningFailed"},
		// The guest runs; only its report to Azure is missing.
		{"Failed", []string{"ProvisioningState/failed/OSProvisioningTimedOut=x", "PowerState/running"}, cloud.StateRunning, ""},
		{"Failed", []string{"ProvisioningState/failed/OSProvisioningTimedOut=x", "PowerState/stopped"}, cloud.StateFailed, "OSProvisioningTimedOut"},
		{"Canceled", nil, cloud.StateFailed, "ProvisioningFailed"},
		{"Deleting", []string{"PowerState/running"}, cloud.StateDeleting, ""},
		{"Dreaming", []string{"PowerState/running"}, cloud.StateUnknown, ""},
	} {
		var list []map[string]string
		for _, s := range tc.statuses {
			code, message, _ := strings.Cut(s, "=")
			list = append(list, map[string]string{"code": code, "message": message})
		}
		doc, err := json.Marshal(map[string]any{"properties": map[string]any{"provisioningState": tc.provisioning, "instanceView": map[string]any{"statuses": list}}})
		if err != nil {
			t.Fatal(err)
		}
		var vm vmView
		if err := json.Unmarshal(doc, &vm); err != nil {
			t.Fatal(err)
		}
		got, detail := stateOf(&vm)
		if got != tc.want || !strings.Contains(detail, tc.detail) || (detail == "") != (tc.detail == "") {
			t.Errorf("%s, %v: %v %q, want %v %q", tc.provisioning, tc.statuses, got, detail, tc.want, tc.detail)
		}
	}
}

// TestManyPages: lists come in pages, and an instance's parts on other pages than its VM.
func TestManyPages(t *testing.T) {
	inWorld(t, fakearm.Config{PageSize: 3, Timing: fakearm.Timing{ListLag: -1}}, func(w *world) {
		p := w.provider()
		want := map[cloud.InstanceID]bool{}
		for range 8 {
			want[w.create(p, request(p)).ID] = true
		}
		list, err := w.provider().List(w.Context(), owner)
		if err != nil || len(list) != len(want) {
			t.Fatalf("List: %v, %v", list, err)
		}
		for _, i := range list {
			if !want[i.ID] || i.State == cloud.StateUnknown || len(i.Addrs) != 1 || i.Owner != owner || i.Name != "podvm-web-1" {
				t.Errorf("listed: %+v", i)
			}
		}
	})
}

// TestNoGroup: what is not there holds nothing, so that what was never made can be
// forgotten; but a service that cannot be understood says nothing.
func TestNoGroup(t *testing.T) {
	inWorld(t, fakearm.Config{}, func(w *world) {
		p := w.provider(func(c *Config) { c.ResourceGroup = "nogroup" })
		req := request(p)
		if _, err := p.Create(w.Context(), req); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "AZURE_RESOURCE_GROUP") {
			t.Errorf("Create: %v", err)
		}
		if list, err := p.List(w.Context(), owner); err != nil || len(list) != 0 {
			t.Errorf("List: %v, %v", list, err)
		}
		gone := things{p.place, nameOf(req.Token)}.id()
		if _, err := p.Get(w.Context(), gone); !errdefs.IsNotFound(err) {
			t.Errorf("Get: %v", err)
		}
		if err := p.Delete(w.Context(), gone); !errdefs.IsNotFound(err) {
			t.Errorf("Delete: %v", err)
		}
		w.arm.Inject(fakearm.Fault{Status: 404, Code: "InvalidResourceType", Count: -1})
		q := w.provider()
		if list, err := q.List(w.Context(), owner); err == nil {
			t.Errorf("List: %v", list)
		}
		here := things{q.place, nameOf(req.Token)}.id()
		if _, err := q.Get(w.Context(), here); err == nil || errdefs.IsNotFound(err) {
			t.Errorf("Get: %v", err)
		}
		if err := q.Delete(w.Context(), here); err == nil || errdefs.IsNotFound(err) {
			t.Errorf("Delete: %v", err)
		}
	})
}

// TestNames: one token, one name; and no name of ours is anybody else's.
func TestNames(t *testing.T) {
	seen := map[string]bool{}
	for n := range 1000 {
		name := nameOf(fmt.Sprint(n))
		if seen[name] || nameRule.FindString(name) != name || len(name) > 64 {
			t.Fatalf("name %q", name)
		}
		seen[name] = true
		t1 := things{place{"11111111-2222-3333-4444-555555555555", "a.b-(c)_d"}, name}
		if back, err := parseID(t1.id()); err != nil || back != t1 {
			t.Fatalf("%s: %+v, %v", t1.id(), back, err)
		}
	}
	good := string(things{place{"11111111-2222-3333-4444-555555555555", "g"}, nameOf("x")}.id())
	for _, bad := range []string{"", good + "/", good + "x", "/" + good, strings.Replace(good, "/g/", "/g./", 1), strings.Replace(good, "/g/", "/../", 1),
		strings.Replace(good, "podvm", "other", 1), strings.Replace(good, "virtualMachines", "disks", 1), good + "?x=y", strings.Replace(good, "/g/", "/g%2f/", 1)} {
		if _, err := parseID(cloud.InstanceID(bad)); !errdefs.IsNotFound(err) {
			t.Errorf("parseID(%q): %v", bad, err)
		}
	}
}
