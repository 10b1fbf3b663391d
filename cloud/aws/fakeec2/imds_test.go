// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestMetadata asks one instance's service for everything it has.
//
// Long: tables of what it must answer.
func TestMetadata(t *testing.T) {
	now := newClock()
	s := New(Config{Now: now.now})
	c := newClient(t, s)
	id := c.run("MetadataOptions.HttpTokens", "required", "MetadataOptions.HttpPutResponseHopLimit", "1", "MetadataOptions.InstanceMetadataTags", "enabled",
		"UserData", base64.StdEncoding.EncodeToString([]byte("hello\n")))
	h := s.Metadata(id)
	call := func(h http.Handler, method, path string, headers ...string) (int, string) {
		r := httptest.NewRequest(method, path, nil)
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	const tokens = "/latest/api/token"
	for _, tt := range []struct {
		want         int
		method, path string
		headers      []string
	}{
		{401, "GET", "/latest/user-data", nil},
		{401, "GET", "/latest/user-data", []string{tokenHeader, "made up"}},
		{400, "PUT", tokens, nil},
		{400, "PUT", tokens, []string{ttlHeader, "0"}},
		{400, "PUT", tokens, []string{ttlHeader, "21601"}},
		{403, "PUT", tokens, []string{ttlHeader, "60", "X-Forwarded-For", "10.0.0.1"}},
		{405, "GET", tokens, []string{ttlHeader, "60"}},
		{405, "POST", "/latest/user-data", nil},
	} {
		if code, _ := call(h, tt.method, tt.path, tt.headers...); code != tt.want {
			t.Errorf("%s %s %v: %d, want %d", tt.method, tt.path, tt.headers, code, tt.want)
		}
	}
	_, token := call(h, "PUT", tokens, ttlHeader, "60")
	i := s.Instances()[0]
	for path, want := range map[string]string{
		"/latest/user-data":                                                              "hello\n",
		"/latest/meta-data/instance-id":                                                  id,
		"/latest/meta-data/local-ipv4":                                                   i.Addr,
		"/latest/meta-data/local-hostname":                                               "ip-10-0-0-4.ec2.internal",
		"/latest/meta-data/mac":                                                          i.MAC,
		"/latest/meta-data/placement/availability-zone":                                  "us-east-1a",
		"/latest/meta-data/placement":                                                    "availability-zone\nregion",
		"/latest/meta-data/network/interfaces/macs/":                                     i.MAC + "/",
		"/latest/meta-data/network/interfaces/macs/" + i.MAC + "/mac":                    i.MAC,
		"/latest/meta-data/tags/instance/owner":                                          "test",
		"/2021-07-15/meta-data/instance-type":                                            "m6a.large",
		"/latest/meta-data/network/interfaces/macs/" + i.MAC + "/subnet-ipv4-cidr-block": "10.0.0.0/24",
	} {
		if code, got := call(h, "GET", path, tokenHeader, token); code != 200 || got != want {
			t.Errorf("%s: %d %q, want %q", path, code, got, want)
		}
	}
	for _, path := range []string{"/latest/meta-data/spot/instance-action", "/latest/meta-data/public-ipv4", "/latest/nothing", "/2001-01-01/meta-data/mac"} {
		if code, _ := call(h, "GET", path, tokenHeader, token); code != 404 {
			t.Errorf("%s: %d, want 404", path, code)
		}
	}
	_, text := call(h, "GET", "/latest/dynamic/instance-identity/document", tokenHeader, token)
	var doc map[string]string
	if err := json.Unmarshal([]byte(text), &doc); err != nil || doc["instanceId"] != id || doc["region"] != DefaultRegion {
		t.Errorf("document %s: %v", text, err)
	}
	// A token is the instance's own, and ends.
	other := s.Metadata(c.run("MetadataOptions.HttpTokens", "required"))
	if code, _ := call(other, "GET", "/latest/meta-data/", tokenHeader, token); code != 401 {
		t.Errorf("another instance's token: %d", code)
	}
	now.add(time.Minute)
	if code, _ := call(h, "GET", "/latest/user-data", tokenHeader, token); code != 401 {
		t.Errorf("an old token: %d", code)
	}
	v1 := s.Metadata(c.run())
	if code, _ := call(v1, "GET", "/latest/user-data"); code != 404 {
		t.Errorf("no user data: %d", code)
	}
	if code, _ := call(v1, "GET", "/latest/meta-data/mac"); code != 200 {
		t.Errorf("version 1: %d", code)
	}
	off := s.Metadata(c.run("MetadataOptions.HttpEndpoint", "disabled"))
	if code, _ := call(off, "PUT", tokens, ttlHeader, "60"); code != 403 {
		t.Errorf("a service that is off: %d", code)
	}
}
