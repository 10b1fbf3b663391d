// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// clock is one that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// client speaks to an emulation without the vendor's SDK.
type client struct {
	t     *testing.T
	s     *Server
	clock *clock
	token string
}

// answer is a reply, with its body as JSON if it is any.
type answer struct {
	status int
	header http.Header
	body   map[string]any
	raw    []byte
}

func (a answer) code() string { return text(a.body, "error.code") }

// start makes an emulation on a clock of its own and logs in.
func start(t *testing.T, cfg Config) *client {
	t.Helper()
	c := &client{t: t, clock: newClock()}
	cfg.Now = c.clock.Now
	if cfg.Images == nil {
		cfg.Images = []Image{{ID: cfg.ImageID("", "", "1.0.0"), Path: "/nowhere", SecurityType: "TrustedLaunchAndConfidentialVmSupported"}}
	}
	c.s = New(cfg)
	t.Cleanup(c.s.Close)
	c.login()
	return c
}

func (c *client) login() {
	c.t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {DefaultClient}, "client_secret": {DefaultSecret}, "scope": {"https://management.azure.com/.default"}}
	p := c.s.Config().Principals[0]
	if p.Client != DefaultClient {
		form.Set("client_id", p.Client)
		form.Set("client_secret", p.Secret)
	}
	a := c.form("/"+DefaultTenant+"/oauth2/v2.0/token", form)
	if a.status != http.StatusOK || text(a.body, "token_type") != "Bearer" {
		c.t.Fatalf("login: %d %s", a.status, a.raw)
	}
	c.token = text(a.body, "access_token")
}

func (c *client) form(path string, form url.Values) answer {
	c.t.Helper()
	r, err := http.NewRequest(http.MethodPost, "https://login.test"+path, strings.NewReader(form.Encode()))
	if err != nil {
		c.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return c.send(r)
}

func (c *client) send(r *http.Request) answer {
	c.t.Helper()
	a, err := c.try(r)
	if err != nil {
		c.t.Fatalf("%s %s: %v", r.Method, r.URL, err)
	}
	return a
}

func (c *client) try(r *http.Request) (answer, error) {
	rep, err := c.s.Transport().RoundTrip(r)
	if err != nil {
		return answer{}, err
	}
	defer rep.Body.Close()
	raw, err := io.ReadAll(rep.Body)
	a := answer{status: rep.StatusCode, header: rep.Header, raw: raw}
	json.Unmarshal(raw, &a.body)
	return a, err
}

// versions are what each provider's requests are sent with.
func versionFor(path string) string {
	p, _, _ := strings.Cut(strings.ToLower(path), "?")
	switch {
	case strings.Contains(p, "/galleries") || strings.Contains(p, "sharedgalleries") || strings.Contains(p, "communitygalleries"):
		return galleryVersions[0]
	case strings.Contains(p, "microsoft.compute/disks"):
		return diskVersions[0]
	case strings.Contains(p, "microsoft.compute/skus"):
		return skuVersions[0]
	case strings.Contains(p, "microsoft.compute"):
		return computeVersions[0]
	case strings.Contains(p, "microsoft.network"):
		return networkVersions[0]
	}
	return groupVersions[0]
}

func (c *client) request(method, path string, body any) *http.Request {
	c.t.Helper()
	var rd io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		rd = strings.NewReader(b)
	default:
		j, err := json.Marshal(b)
		if err != nil {
			c.t.Fatal(err)
		}
		rd = bytes.NewReader(j)
	}
	if !strings.HasPrefix(path, "https://") {
		if !strings.Contains(path, "api-version=") {
			sep := "?"
			if strings.Contains(path, "?") {
				sep = "&"
			}
			path += sep + "api-version=" + versionFor(path)
		}
		path = "https://management.test" + path
	}
	r, err := http.NewRequest(method, path, rd)
	if err != nil {
		c.t.Fatal(err)
	}
	if rd != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("Authorization", "Bearer "+c.token)
	return r
}

func (c *client) do(method, path string, body any) answer {
	c.t.Helper()
	return c.send(c.request(method, path, body))
}

// want sends a request and holds the reply to a status.
func (c *client) want(status int, method, path string, body any) answer {
	c.t.Helper()
	a := c.do(method, path, body)
	if a.status != status {
		c.t.Fatalf("%s %s: %d, want %d: %s", method, path, a.status, status, a.raw)
	}
	return a
}

// refused sends a request and holds the refusal to a status and code.
func (c *client) refused(status int, code, method, path string, body any) answer {
	c.t.Helper()
	a := c.do(method, path, body)
	if a.status != status || a.code() != code {
		c.t.Fatalf("%s %s: %d %s, want %d %s: %s", method, path, a.status, a.code(), status, code, a.raw)
	}
	return a
}

// finish moves the clock until an operation is over, and returns its status document.
func (c *client) finish(a answer) map[string]any {
	c.t.Helper()
	where := a.header.Get("Azure-AsyncOperation")
	if where == "" {
		c.t.Fatalf("there is no Azure-AsyncOperation in %v", a.header)
	}
	for range 100 {
		st := c.want(http.StatusOK, http.MethodGet, where, nil)
		if text(st.body, "status") != "InProgress" {
			return st.body
		}
		c.clock.Advance(5 * time.Second)
	}
	c.t.Fatalf("operation %s does not end", where)
	return nil
}

// id is a resource's path in the default group.
func id(kind, name string) string { return Config{}.withDefaults().id(DefaultGroup, kind, name) }

func vmID(name string) string { return id("Microsoft.Compute/virtualMachines", name) }

const testKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f pods"

// vmBody is a request as the provider sends it.
func vmBody(name string, change ...func(map[string]any)) map[string]any {
	cfg := Config{}
	b := map[string]any{
		"location": DefaultRegion, "tags": map[string]any{"peerpod-cluster": "c1", "Name": name},
		"properties": map[string]any{
			"hardwareProfile": map[string]any{"vmSize": "Standard_D2as_v5"},
			"storageProfile": map[string]any{"imageReference": map[string]any{"id": cfg.ImageID("", "", "1.0.0")},
				"osDisk": map[string]any{"name": name + "-disk", "createOption": "FromImage", "deleteOption": "Delete", "caching": "ReadOnly",
					"managedDisk": map[string]any{"storageAccountType": "StandardSSD_LRS"}}},
			"osProfile": map[string]any{"computerName": name, "adminUsername": "peerpod", "linuxConfiguration": map[string]any{"disablePasswordAuthentication": true,
				"ssh": map[string]any{"publicKeys": []any{map[string]any{"path": "/home/peerpod/.ssh/authorized_keys", "keyData": testKey}}}}},
			"networkProfile": map[string]any{"networkApiVersion": "2022-11-01", "networkInterfaceConfigurations": []any{map[string]any{"name": name + "-nic",
				"tags": map[string]any{"peerpod-cluster": "c1"},
				"properties": map[string]any{"primary": true, "deleteOption": "Delete", "networkSecurityGroup": map[string]any{"id": cfg.SecurityGroupID("")},
					"ipConfigurations": []any{map[string]any{"name": "ip", "properties": map[string]any{"subnet": map[string]any{"id": cfg.SubnetID(Subnet{})}}}}}}}},
			"userData": "aGVsbG8=",
		},
	}
	b = clone(b)
	for _, f := range change {
		f(b)
	}
	return b
}

// with sets a property of a body.
func with(path string, v any) func(map[string]any) {
	return func(b map[string]any) {
		if v == nil {
			drop(b, path)
			return
		}
		put(b, path, v)
	}
}

// power is the PowerState of a machine.
func (c *client) power(vm string) string {
	c.t.Helper()
	a := c.want(http.StatusOK, http.MethodGet, vmID(vm)+"/instanceView", nil)
	for _, s := range list(a.body, "statuses") {
		if p, ok := strings.CutPrefix(text(s, "code"), "PowerState/"); ok {
			return p
		}
	}
	return ""
}

func names(a answer) string {
	var out []string
	for _, v := range list(a.body, "value") {
		out = append(out, text(v, "name"))
	}
	return fmt.Sprint(out)
}
