// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/kdomanski/iso9660"
)

// ask sends a request to a machine's metadata service.
func ask(h http.Handler, method, path, body string, header ...string) (int, string) {
	r := httptest.NewRequest(method, "http://169.254.169.254"+path, strings.NewReader(body))
	if header == nil {
		header = []string{"Metadata", "true"}
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// TestMetadata: what a guest is told, and what it must say to be told.
func TestMetadata(t *testing.T) {
	c := start(t, Config{Unthrottled: true, Principals: []Principal{{Client: DefaultClient, Secret: DefaultSecret}, {Client: "vm", Managed: true}}})
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a", with("identity", map[string]any{"type": "SystemAssigned"}))))
	h := c.s.Metadata(vmID("a"))
	for _, tc := range []struct {
		path   string
		status int
		body   string // a part of it
		header []string
	}{
		{"/metadata/instance/compute/userData?api-version=2021-01-01&format=text", 200, "aGVsbG8=", nil},
		{"/metadata/instance/compute/userData?api-version=2021-01-01", 400, "format=text", nil},
		{"/metadata/instance/compute/userData?api-version=2020-09-01&format=text", 404, "Not found", nil},
		{"/metadata/instance/compute/userData?format=text", 400, "api-version was not specified", nil},
		{"/metadata/instance/compute/userData?api-version=2021-01-01&format=text", 400, "metadata header", []string{"X", "y"}},
		{"/metadata/instance/compute/userData?api-version=2021-01-01&format=text", 400, "X-Forwarded-For", []string{"Metadata", "true", "X-Forwarded-For", "1.2.3.4"}},
		{"/metadata/instance?api-version=2017-04-01", 400, "newest-versions", nil},
		{"/metadata/instance/compute/nothing?api-version=2021-02-01&format=text", 404, "Not found", nil},
		{"/metadata/instance?api-version=2021-02-01&format=text", 200, "compute/\nnetwork/", nil},
		{"/metadata/instance/network/interface/0/ipv4/ipAddress/0/privateIpAddress?api-version=2021-02-01&format=text", 200, "10.0.0.4", nil},
		{"/metadata/instance/compute/vmSize?api-version=2021-02-01&format=text", 200, "Standard_D2as_v5", nil},
		{"/metadata/versions", 200, "2021-01-01", nil},
		{"/metadata/identity/oauth2/token?api-version=2018-02-01&resource=x", 200, "access_token", nil},
		{"/latest/user-data", 404, "Not found", nil},
	} {
		if st, body := ask(h, http.MethodGet, tc.path, "", tc.header...); st != tc.status || !strings.Contains(body, tc.body) {
			t.Errorf("%s %v: %d %s, want %d with %q", tc.path, tc.header, st, body, tc.status, tc.body)
		}
	}
	_, body := ask(h, http.MethodGet, "/metadata/instance?api-version=2021-02-01", "")
	var doc map[string]any
	if err := json.Unmarshal([]byte(body), &doc); err != nil || text(doc, "compute.resourceId") != vmID("a") || text(doc, "compute.name") != "a" {
		t.Errorf("the document: %v %s", err, body)
	}
	if st, _ := ask(c.s.Metadata(vmID("gone")), http.MethodGet, "/metadata/versions", ""); st != http.StatusNotFound {
		t.Errorf("of a machine that is not there: %d", st)
	}

	strict := start(t, Config{})
	strict.finish(strict.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a")))
	h = strict.s.Metadata(vmID("a"))
	for range 5 {
		ask(h, http.MethodGet, "/metadata/versions", "")
	}
	if st, _ := ask(h, http.MethodGet, "/metadata/versions", ""); st != http.StatusTooManyRequests {
		t.Errorf("the sixth request in a second: %d", st)
	}
}

// TestEviction: a spot machine is told, and goes as its policy says.
func TestEviction(t *testing.T) {
	spot := func(policy string) func(map[string]any) {
		return func(b map[string]any) {
			put(b, "properties.priority", "Spot")
			put(b, "properties.evictionPolicy", policy)
		}
	}
	c := start(t, Config{Unthrottled: true})
	for _, n := range []string{"del", "dealloc", "early", "plain"} {
		change := spot(map[bool]string{true: "Deallocate", false: "Delete"}[n == "dealloc"])
		if n == "plain" {
			change = func(map[string]any) {}
		}
		c.finish(c.want(http.StatusCreated, http.MethodPut, vmID(n), vmBody(n, change)))
	}
	events := func(n string) map[string]any {
		_, body := ask(c.s.Metadata(vmID(n)), http.MethodGet, "/metadata/scheduledevents?api-version=2020-07-01", "")
		var doc map[string]any
		if err := json.Unmarshal([]byte(body), &doc); err != nil {
			t.Fatalf("%v: %s", err, body)
		}
		return doc
	}
	if e := events("del"); len(list(e, "Events")) != 0 || number(e, "DocumentIncarnation") != 0 {
		t.Errorf("before: %v", e)
	}
	if err := c.s.Evict(vmID("plain")); err == nil {
		t.Error("a machine that is no spot machine was evicted")
	}
	for _, n := range []string{"del", "dealloc", "early"} {
		if err := c.s.Evict(vmID(n)); err != nil {
			t.Fatal(err)
		}
	}
	e := list(events("del"), "Events")[0]
	when, err := time.Parse(http.TimeFormat, text(e, "NotBefore"))
	if err != nil || when.Sub(c.clock.Now()) != 30*time.Second || text(e, "EventType") != "Preempt" || text(e, "EventStatus") != "Scheduled" {
		t.Errorf("event: %v %v", e, err)
	}
	start := `{"StartRequests":[{"EventId":"` + text(list(events("early"), "Events")[0], "EventId") + `"}]}`
	if st, body := ask(c.s.Metadata(vmID("early")), http.MethodPost, "/metadata/scheduledevents?api-version=2020-07-01", start); st != http.StatusOK {
		t.Errorf("the guest's leave: %d %s", st, body)
	}
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, vmID("early"), nil)
	c.clock.Advance(29 * time.Second)
	if p := c.power("del"); p != "running" {
		t.Errorf("a second early it is %s", p)
	}
	c.clock.Advance(time.Second)
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, vmID("del"), nil)
	if p := c.power("dealloc"); p != "deallocated" {
		t.Errorf("policy Deallocate: %s", p)
	}
	if e := events("dealloc"); len(list(e, "Events")) != 0 {
		t.Errorf("after: %v", e)
	}
}

// TestDisc reads the provisioning disc with somebody else's code.
func TestDisc(t *testing.T) {
	c := start(t, Config{})
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a", with("properties.osProfile.customData", "PGE+"))))
	c.s.mu.Lock()
	img := c.s.provisioningDisc(c.s.resources[key(vmID("a"))])
	c.s.mu.Unlock()
	iso, err := iso9660.OpenImage(bytes.NewReader(img))
	if err != nil {
		t.Fatal(err)
	}
	root, err := iso.RootDir()
	if err != nil {
		t.Fatal(err)
	}
	files, err := root.GetChildren()
	if err != nil || len(files) != 1 || files[0].Name() != "ovf-env.xml" {
		t.Fatalf("files %v, %v", files, err)
	}
	b, err := io.ReadAll(files[0].Reader())
	if err != nil {
		t.Fatal(err)
	}
	const wa = "http://schemas.microsoft.com/windowsazure "
	var env struct {
		Set struct {
			HostName, UserName, CustomData string
			Keys                           []string `xml:"SSH>PublicKeys>PublicKey>Value"`
		} `xml:"ProvisioningSection>LinuxProvisioningConfigurationSet"`
	}
	if err := xml.Unmarshal(b, &env); err != nil {
		t.Fatalf("%v:\n%s", err, b)
	}
	if env.Set.CustomData != "PGE+" || env.Set.HostName != "a" || env.Set.UserName != "peerpod" || len(env.Set.Keys) != 1 {
		t.Errorf("%+v in\n%s", env.Set, b)
	}
	if !strings.Contains(string(b), strings.TrimSpace(wa)) {
		t.Error("the namespace is missing")
	}
}
