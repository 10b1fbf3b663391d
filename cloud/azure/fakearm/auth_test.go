// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// assertion makes a signed token as a cluster's issuer does.
func assertion(t *testing.T, key *rsa.PrivateKey, claims map[string]any) string {
	t.Helper()
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	text := part(map[string]any{"alg": "RS256", "typ": "JWT"}) + "." + part(claims)
	sum := sha256.Sum256([]byte(text))
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(sig)
}

// TestLogin: secrets, assertions and what is wrong with them.
func TestLogin(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	c := start(t, Config{Principals: []Principal{
		{Client: DefaultClient, Secret: DefaultSecret},
		{Client: "federated", Federated: &Federated{Issuer: "https://issuer.test", Subject: "system:serviceaccount:ns:adaptor", Key: &key.PublicKey}},
		{Client: "node", Managed: true},
	}})
	good := map[string]any{"iss": "https://issuer.test", "sub": "system:serviceaccount:ns:adaptor", "aud": "api://AzureADTokenExchange", "exp": c.clock.Now().Add(time.Hour).Unix()}
	claims := func(k string, v any) map[string]any {
		m := clone(good)
		m[k] = v
		return m
	}
	signed := assertion(t, key, good)
	scope := "https://management.azure.com/.default"
	for name, tc := range map[string]struct {
		tenant string
		form   map[string]string
		status int
		code   string // of AADSTS
	}{
		"secret":           {"", map[string]string{"client_id": DefaultClient, "client_secret": DefaultSecret}, 200, ""},
		"wrong secret":     {"", map[string]string{"client_id": DefaultClient, "client_secret": "x"}, 401, "7000215"},
		"unknown client":   {"", map[string]string{"client_id": "x", "client_secret": "x"}, 400, "700016"},
		"unknown tenant":   {"00000000-0000-0000-0000-000000000000", map[string]string{"client_id": DefaultClient, "client_secret": DefaultSecret}, 400, "90002"},
		"no secret at all": {"", map[string]string{"client_id": "federated", "client_secret": ""}, 401, "7000215"},
		"assertion":        {"", map[string]string{"client_id": "federated", "client_assertion": signed}, 200, ""},
		"of nobody":        {"", map[string]string{"client_id": DefaultClient, "client_assertion": signed}, 401, "700213"},
		"wrong subject":    {"", map[string]string{"client_id": "federated", "client_assertion": assertion(t, key, claims("sub", "x"))}, 401, "700213"},
		"wrong audience":   {"", map[string]string{"client_id": "federated", "client_assertion": assertion(t, key, claims("aud", "x"))}, 401, "700212"},
		"expired":          {"", map[string]string{"client_id": "federated", "client_assertion": assertion(t, key, claims("exp", c.clock.Now().Unix()))}, 401, "700024"},
		"changed":          {"", map[string]string{"client_id": "federated", "client_assertion": signed[:len(signed)-8] + "AAAAAAAA"}, 401, "700027"},
		"no token":         {"", map[string]string{"client_id": "federated", "client_assertion": "x"}, 401, "50027"},
	} {
		t.Run(name, func(t *testing.T) {
			c.t = t
			form := url.Values{"grant_type": {"client_credentials"}, "scope": {scope}}
			for k, v := range tc.form {
				form.Set(k, v)
			}
			if form.Get("client_assertion") != "" {
				form.Set("client_assertion_type", assertionType)
			}
			tenant := tc.tenant
			if tenant == "" {
				tenant = DefaultTenant
			}
			a := c.form("/"+tenant+"/oauth2/v2.0/token", form)
			if a.status != tc.status || !strings.HasPrefix(text(a.body, "error_description"), map[bool]string{true: "AADSTS" + tc.code + ":"}[tc.code != ""]) {
				t.Errorf("%d %s", a.status, a.raw)
			}
			if strings.Contains(string(a.raw), DefaultSecret) {
				t.Error("the secret is in the reply")
			}
		})
	}
	c.t = t
	if a := c.form("/"+DefaultTenant+"/oauth2/v2.0/token", url.Values{"grant_type": {"client_credentials"}, "scope": {"x"}}); a.status != 400 {
		t.Errorf("a wrong scope: %d", a.status)
	}

	node := c.request(http.MethodGet, "https://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://management.azure.com/", nil)
	if a := c.send(node); a.status != http.StatusBadRequest {
		t.Errorf("a managed identity without the header: %d", a.status)
	}
	node.Header.Set("Metadata", "true")
	a := c.send(node)
	if c.token = text(a.body, "access_token"); c.token == "" {
		t.Fatalf("a managed identity: %d %s", a.status, a.raw)
	}
	c.want(http.StatusOK, http.MethodGet, "/subscriptions/"+DefaultSubscription, nil)

	c.s.SetSecret(DefaultClient, "new")
	if a := c.form("/"+DefaultTenant+"/oauth2/v2.0/token", url.Values{"grant_type": {"client_credentials"}, "scope": {scope}, "client_id": {DefaultClient}, "client_secret": {DefaultSecret}}); a.status != 401 {
		t.Errorf("the old secret: %d", a.status)
	}
}

// TestTokens: what becomes of a request with a bad one.
func TestTokens(t *testing.T) {
	c := start(t, Config{Principals: []Principal{{Client: DefaultClient, Secret: DefaultSecret}, {Tenant: "other", Client: "o", Secret: "s"}}})
	good := c.token
	c.want(http.StatusOK, http.MethodGet, "/subscriptions/"+DefaultSubscription+"/resourceGroups/pods", nil)
	c.token = "x"
	a := c.refused(http.StatusUnauthorized, "InvalidAuthenticationToken", http.MethodGet, vmID("a"), nil)
	if !strings.Contains(a.header.Get("Www-Authenticate"), "/"+DefaultTenant) {
		t.Errorf("headers: %v", a.header)
	}
	r := c.request(http.MethodGet, vmID("a"), nil)
	r.Header.Del("Authorization")
	if a := c.send(r); a.code() != "AuthenticationFailed" {
		t.Errorf("without a token: %s", a.raw)
	}
	other := c.form("/other/oauth2/v2.0/token", url.Values{"grant_type": {"client_credentials"}, "scope": {"a/.default"}, "client_id": {"o"}, "client_secret": {"s"}})
	c.token = text(other.body, "access_token")
	c.refused(http.StatusUnauthorized, "InvalidAuthenticationTokenTenant", http.MethodGet, vmID("a"), nil)
	c.token = good
	c.clock.Advance(time.Hour)
	c.refused(http.StatusUnauthorized, "ExpiredAuthenticationToken", http.MethodGet, vmID("a"), nil)
	c.token = c.s.Token()
	c.refused(http.StatusNotFound, "ResourceNotFound", http.MethodGet, vmID("a"), nil)
	c.s.ExpireTokens()
	c.refused(http.StatusUnauthorized, "ExpiredAuthenticationToken", http.MethodGet, vmID("a"), nil)
}

// TestRoles: what a role must allow for one machine, and what it says otherwise.
func TestRoles(t *testing.T) {
	role := []string{"Microsoft.Compute/virtualMachines/write", "Microsoft.Compute/disks/*", "Microsoft.Compute/galleries/images/versions/read",
		"Microsoft.Network/networkInterfaces/write", "Microsoft.Network/virtualNetworks/subnets/join/action", "Microsoft.Network/networkSecurityGroups/join/action"}
	for i, missing := range role {
		rest := append(append([]string{}, role[:i]...), role[i+1:]...)
		c := start(t, Config{Principals: []Principal{{Client: "c", Secret: "s", Actions: rest}}})
		a := c.do(http.MethodPut, vmID("a"), vmBody("a"))
		if a.status != http.StatusForbidden || !strings.HasSuffix(a.code(), "AuthorizationFailed") || !strings.Contains(text(a.body, "error.message"), strings.TrimSuffix(missing, "*")) {
			t.Errorf("without %s: %d %s", missing, a.status, a.raw)
		}
		if l := c.s.Leaks(nil); len(l) > 0 {
			t.Errorf("without %s there is left %q", missing, l)
		}
	}
	c := start(t, Config{Principals: []Principal{{Client: "c", Secret: "s", Actions: append(role, "Microsoft.Compute/locations/operations/read", "Microsoft.Compute/virtualMachines/delete")}}})
	c.finish(c.want(http.StatusCreated, http.MethodPut, vmID("a"), vmBody("a")))
	c.refused(http.StatusForbidden, "AuthorizationFailed", http.MethodGet, vmID("a"), nil)
	c.refused(http.StatusForbidden, "LinkedAuthorizationFailed", http.MethodDelete, vmID("a"), nil)
	if n := c.s.Actions()["Microsoft.Network/virtualNetworks/subnets/join/action"]; n != 1 {
		t.Errorf("actions: %v", c.s.Actions())
	}
	for _, tc := range []struct {
		pattern, action string
		want            bool
	}{
		{"*", "Microsoft.Compute/disks/read", true}, {"*/read", "Microsoft.Compute/disks/read", true}, {"*/read", "Microsoft.Compute/disks/write", false},
		{"microsoft.compute/*/READ", "Microsoft.Compute/disks/read", true}, {"Microsoft.Compute/disks", "Microsoft.Compute/disks/read", false},
	} {
		if got := matches([]string{tc.pattern}, tc.action); got != tc.want {
			t.Errorf("%s matches %s: %v", tc.pattern, tc.action, got)
		}
	}
}
