// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/kata-remote/kata-remote/cloud/emulation"
)

// Versions of the instance metadata service that know userData, newest first.
var (
	imdsVersions = []string{"2025-04-07", "2023-11-15", "2023-07-01", "2021-12-13", "2021-11-15", "2021-11-01", "2021-10-01", "2021-08-01", "2021-05-01",
		"2021-03-01", "2021-02-01", "2021-01-01"}
	imdsOldVersions = []string{"2020-12-01", "2020-10-01", "2020-09-01", "2020-07-15", "2020-06-01", "2019-11-01", "2019-08-15", "2019-08-01", "2019-06-04",
		"2019-06-01", "2019-04-30", "2019-03-11", "2019-02-01", "2018-10-01", "2018-04-02", "2018-02-01", "2017-12-01", "2017-10-01", "2017-08-01", "2017-04-02"}
	eventVersions = []string{"2020-07-01", "2019-08-01", "2019-04-01", "2019-01-01", "2017-11-01"}
)

// scheduledEvent is one that a machine is told of.
type scheduledEvent struct {
	id, kind, status, words string
	at                      time.Time // not before
	do                      func(now time.Time)
}

// metadata is one machine's service.
type metadata struct {
	s    *Server
	vm   string // key
	rate *emulation.Bucket
}

// Metadata is the instance metadata service of a virtual machine, by resource id: what
// answers on 169.254.169.254 for it. It answers 404 to everything when the machine is
// gone. It takes five requests a second, as the real one. It is the wire server too, for
// requests to that host (WireServerAddr). Source: learn.microsoft.com,
// "Azure Instance Metadata Service for virtual machines", "Scheduled Events for Linux
// VMs".
func (s *Server) Metadata(vmID string) http.Handler {
	return &metadata{s, key(vmID), &emulation.Bucket{Max: 5, Refill: 5}}
}

func (m *metadata) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s := m.s
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	s.catchUp(now)
	if host, _, _ := strings.Cut(r.Host, ":"); host == WireServerAddr {
		m.wireServer(w, r, now)
		return
	}
	status, body := m.answer(r, now)
	if text, ok := body.(string); ok {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(status)
		fmt.Fprint(w, text)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body)
}

func imdsError(words string) map[string]any { return map[string]any{"error": words} }

func (m *metadata) answer(r *http.Request, now time.Time) (int, any) {
	s := m.s
	vm := s.resources[m.vm]
	p := strings.Trim(r.URL.Path, "/")
	switch {
	case vm == nil || vm.vm == nil || !strings.HasPrefix(p, "metadata"):
		return http.StatusNotFound, imdsError("Not found")
	case r.Header.Get("X-Forwarded-For") != "":
		return http.StatusBadRequest, imdsError("Bad request. Requests with an X-Forwarded-For header are not allowed")
	case r.Header.Get("Metadata") != "true":
		return http.StatusBadRequest, imdsError("Bad request. Required metadata header not specified")
	}
	if !s.cfg.Unthrottled {
		if ok, _ := m.rate.Take(now, 1); !ok {
			return http.StatusTooManyRequests, imdsError("Too many requests")
		}
	}
	switch {
	case p == "metadata/versions":
		return http.StatusOK, map[string]any{"apiVersions": append(slices.Clone(imdsOldVersions), imdsVersions...)}
	case p == "metadata/identity/oauth2/token":
		if object(vm.doc, "identity") == nil {
			return http.StatusBadRequest, map[string]any{"error": "invalid_request", "error_description": "Identity not found"}
		}
		rep, _ := s.identityToken(&call{s: s, r: r, now: now}, "")
		return rep.status, rep.body
	case p == "metadata/scheduledevents":
		return m.scheduledEvents(r, now, vm)
	case p == "metadata/instance" || strings.HasPrefix(p, "metadata/instance/"):
		return m.instance(r, vm, strings.Split(p, "/")[2:])
	}
	return http.StatusNotFound, imdsError("Not found")
}

func badVersion(v string, known []string) (int, any) {
	words := "Bad request. api-version was not specified in the request. For more information refer to aka.ms/azureimds"
	if v != "" {
		words = "Bad request. api-version is invalid or was not specified in the request. For more information refer to aka.ms/azureimds"
	}
	return http.StatusBadRequest, map[string]any{"error": words, "newest-versions": known[:min(3, len(known))]}
}

// instance answers for the document or a part of it. A part that is no object or list
// is plain text and must be asked for with format=text.
func (m *metadata) instance(r *http.Request, vm *resource, names []string) (int, any) {
	if r.Method != http.MethodGet {
		return http.StatusMethodNotAllowed, imdsError("Method not allowed")
	}
	v := r.URL.Query().Get("api-version")
	hasUserData := slices.Contains(imdsVersions, v)
	if !hasUserData && !slices.Contains(imdsOldVersions, v) {
		return badVersion(v, imdsVersions)
	}
	var doc any = m.s.instanceDocument(vm, hasUserData)
	for _, n := range names {
		switch d := doc.(type) {
		case map[string]any:
			sub, ok := d[n]
			if !ok {
				return http.StatusNotFound, imdsError("Not found")
			}
			doc = sub
		case []any:
			var i int
			if _, err := fmt.Sscanf(n, "%d", &i); err != nil || i < 0 || i >= len(d) {
				return http.StatusNotFound, imdsError("Not found")
			}
			doc = d[i]
		default:
			return http.StatusNotFound, imdsError("Not found")
		}
	}
	asText := r.URL.Query().Get("format") == "text"
	switch d := doc.(type) {
	case string:
		if !asText {
			return http.StatusBadRequest, imdsError("Bad request. Leaf nodes are available with format=text only")
		}
		return http.StatusOK, d
	case map[string]any:
		if asText {
			var out []string
			for _, k := range sortedKeys(d) {
				if _, leaf := d[k].(string); !leaf {
					k += "/"
				}
				out = append(out, k)
			}
			return http.StatusOK, strings.Join(out, "\n")
		}
	case []any:
		if asText {
			var out []string
			for i := range d {
				out = append(out, fmt.Sprintf("%d/", i))
			}
			return http.StatusOK, strings.Join(out, "\n")
		}
	}
	return http.StatusOK, doc
}

// instanceDocument is what /metadata/instance answers. It needs mu.
func (s *Server) instanceDocument(vm *resource, withUserData bool) map[string]any {
	m := vm.vm
	tags := object(vm.doc, "tags")
	var flat []string
	tagList := []any{}
	for _, k := range sortedKeys(tags) {
		v, _ := tags[k].(string)
		flat = append(flat, k+":"+v)
		tagList = append(tagList, map[string]any{"name": k, "value": v})
	}
	var keys []any = []any{}
	for _, k := range list(vm.doc, "properties.osProfile.linuxConfiguration.ssh.publicKeys") {
		keys = append(keys, map[string]any{"keyData": text(k, "keyData"), "path": text(k, "path")})
	}
	sec := object(vm.doc, "properties.securityProfile")
	yes := func(b bool) string { return map[bool]string{true: "true", false: "false"}[b] }
	compute := map[string]any{
		"azEnvironment": "AzurePublicCloud", "location": s.cfg.Region, "name": vm.name, "osType": "Linux", "provider": "Microsoft.Compute",
		"resourceGroupName": vm.group, "resourceId": vm.id, "subscriptionId": s.cfg.Subscription, "vmId": m.uuid, "vmSize": m.size.Name, "zone": m.zone,
		"priority": cmp.Or(text(vm.doc, "properties.priority"), ""), "evictionPolicy": text(vm.doc, "properties.evictionPolicy"),
		"tags": strings.Join(flat, ";"), "tagsList": tagList, "publicKeys": keys, "customData": "",
		"osProfile": map[string]any{"adminUsername": text(vm.doc, "properties.osProfile.adminUsername"), "computerName": text(vm.doc, "properties.osProfile.computerName"),
			"disablePasswordAuthentication": yes(flag(vm.doc, "properties.osProfile.linuxConfiguration.disablePasswordAuthentication"))},
		"securityProfile": map[string]any{"secureBootEnabled": yes(flag(sec, "uefiSettings.secureBootEnabled")), "virtualTpmEnabled": yes(flag(sec, "uefiSettings.vTpmEnabled")),
			"securityType": text(sec, "securityType"), "encryptionAtHost": yes(flag(sec, "encryptionAtHost"))},
		"storageProfile": map[string]any{"imageReference": map[string]any{"id": text(vm.doc, "properties.storageProfile.imageReference.id"), "offer": "", "publisher": "", "sku": "", "version": ""},
			"osDisk": map[string]any{"name": text(vm.doc, "properties.storageProfile.osDisk.name"), "caching": text(vm.doc, "properties.storageProfile.osDisk.caching"), "osType": "Linux",
				"createOption": text(vm.doc, "properties.storageProfile.osDisk.createOption"), "diskSizeGB": fmt.Sprint(number(vm.doc, "properties.storageProfile.osDisk.diskSizeGB"))},
			"dataDisks": []any{}},
		"isHostCompatibilityLayerVm": "false", "licenseType": "", "offer": "", "sku": "", "version": "", "publisher": "", "placementGroupId": "",
		"platformFaultDomain": "0", "platformUpdateDomain": "0", "vmScaleSetName": "", "virtualMachineScaleSet": map[string]any{"id": ""},
		"plan": map[string]any{"name": "", "product": "", "publisher": ""}, "extendedLocation": map[string]any{"name": "", "type": ""},
		"host": map[string]any{"id": ""}, "hostGroup": map[string]any{"id": ""},
		"additionalCapabilities": map[string]any{"hibernationEnabled": "false"}}
	if withUserData {
		compute["userData"] = m.userData
	}
	interfaces := []any{}
	for _, k := range m.nics {
		nic := s.resources[k]
		if nic == nil || nic.nic == nil {
			continue
		}
		public := ""
		for _, ip := range list(nic.doc, "properties.ipConfigurations") {
			if pip := s.resources[key(text(ip, "properties.publicIPAddress.id"))]; pip != nil {
				public = text(pip.doc, "properties.ipAddress")
			}
		}
		sn := nic.nic.subnet.CIDR
		interfaces = append(interfaces, map[string]any{"macAddress": strings.ToUpper(strings.ReplaceAll(nic.nic.mac, ":", "")), "ipv6": map[string]any{"ipAddress": []any{}},
			"ipv4": map[string]any{"ipAddress": []any{map[string]any{"privateIpAddress": nic.nic.addr.String(), "publicIpAddress": public}},
				"subnet": []any{map[string]any{"address": sn.Addr().String(), "prefix": fmt.Sprint(sn.Bits())}}}})
	}
	return map[string]any{"compute": compute, "network": map[string]any{"interface": interfaces}}
}

// scheduledEvents lists what is about to happen, and takes a guest's word that it may
// happen now.
func (m *metadata) scheduledEvents(r *http.Request, now time.Time, vm *resource) (int, any) {
	if v := r.URL.Query().Get("api-version"); !slices.Contains(eventVersions, v) {
		return badVersion(v, eventVersions)
	}
	if r.Method == http.MethodPost {
		var body struct {
			StartRequests []struct{ EventId string }
		}
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil || len(body.StartRequests) == 0 {
			return http.StatusBadRequest, imdsError("Bad request. StartRequests is missing")
		}
		for _, start := range body.StartRequests {
			i := slices.IndexFunc(vm.vm.events, func(e scheduledEvent) bool { return e.id == start.EventId })
			if i < 0 {
				return http.StatusBadRequest, imdsError("Bad request. There is no event " + start.EventId)
			}
			vm.vm.events[i].do(now)
		}
		return http.StatusOK, ""
	}
	events := []any{}
	for _, e := range vm.vm.events {
		before := ""
		if e.status == "Scheduled" {
			before = e.at.UTC().Format(http.TimeFormat)
		}
		events = append(events, map[string]any{"EventId": e.id, "EventType": e.kind, "ResourceType": "VirtualMachine", "Resources": []any{vm.name},
			"EventStatus": e.status, "NotBefore": before, "Description": e.words, "EventSource": "Platform", "DurationInSeconds": -1})
	}
	return http.StatusOK, map[string]any{"DocumentIncarnation": vm.vm.incarnation, "Events": events}
}

// Evict takes a spot machine's place away, with the notice that the real cloud gives:
// the guest sees a Preempt event, and after Timing.Notice the machine is deallocated or
// deleted, as its eviction policy says.
func (s *Server) Evict(vmID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	s.catchUp(now)
	vm := s.resources[key(vmID)]
	if vm == nil || vm.vm == nil {
		return fmt.Errorf("fakearm: there is no virtual machine %s", vmID)
	}
	if !vm.vm.spot {
		return fmt.Errorf("fakearm: virtual machine %s is no spot machine and cannot be evicted", vmID)
	}
	s.evict(now, vm)
	return nil
}

// evict needs mu.
func (s *Server) evict(now time.Time, vm *resource) {
	m := vm.vm
	id := newUUID()
	begun := false
	start := func(now time.Time) {
		if begun || s.resources[key(vm.id)] != vm {
			return
		}
		begun = true
		s.preempt(vm.op, now)
		vm.op = nil
		m.incarnation++
		m.events = slices.DeleteFunc(m.events, func(e scheduledEvent) bool { return e.id == id })
		if text(vm.doc, "properties.evictionPolicy") == "Delete" {
			put(vm.doc, "properties.provisioningState", "Deleting")
			s.switchOff(vm, nil, "stopping", "deallocated")
			s.removeVM(now, vm)
			return
		}
		s.switchOff(vm, nil, "deallocating", "deallocated")
		s.release(m)
	}
	m.incarnation++
	m.events = append(m.events, scheduledEvent{id: id, kind: "Preempt", status: "Scheduled", at: now.Add(s.cfg.Timing.Notice), do: start,
		words: "Virtual machine is being evicted as Azure needs the capacity back."})
	s.after(now.Add(s.cfg.Timing.Notice), start)
}
