// SPDX-License-Identifier: Apache-2.0

package fakearm

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// token is one that was given out.
type token struct {
	principal Principal
	expires   time.Time
}

const assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

// discovery answers what clients ask before they log in. It needs mu.
func (s *Server) discovery(c *call) (*reply, *apiError) {
	host := c.r.Host
	if c.r.URL.Path == "/common/discovery/instance" {
		return &reply{status: http.StatusOK, body: map[string]any{
			"tenant_discovery_endpoint": c.base() + "/" + s.cfg.Tenant + "/v2.0/.well-known/openid-configuration", "api-version": "1.1",
			"metadata": []map[string]any{{"preferred_network": host, "preferred_cache": host, "aliases": []string{host}}}}}, nil
	}
	tenant := strings.Split(strings.TrimPrefix(c.r.URL.Path, "/"), "/")[0]
	if !s.tenantKnown(tenant) {
		return oauthError(http.StatusBadRequest, "invalid_tenant", 90002, "Tenant '"+tenant+"' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud."), nil
	}
	root := c.base() + "/" + tenant
	return &reply{status: http.StatusOK, body: map[string]any{
		"token_endpoint": root + "/oauth2/v2.0/token", "authorization_endpoint": root + "/oauth2/v2.0/authorize", "issuer": root + "/v2.0",
		"jwks_uri": root + "/discovery/v2.0/keys", "response_types_supported": []string{"code", "id_token"}, "subject_types_supported": []string{"pairwise"},
		"token_endpoint_auth_methods_supported": []string{"client_secret_post", "private_key_jwt", "client_secret_basic"}}}, nil
}

func (s *Server) tenantKnown(tenant string) bool {
	return strings.EqualFold(tenant, s.cfg.Tenant) || slices.ContainsFunc(s.cfg.Principals, func(p Principal) bool {
		return strings.EqualFold(p.Tenant, tenant)
	})
}

func oauthError(status int, code string, number int, words string) *reply {
	return &reply{status: status, body: map[string]any{"error": code, "error_codes": []int{number}, "trace_id": newUUID(), "correlation_id": newUUID(),
		"error_description": fmt.Sprintf("AADSTS%d: %s", number, words)}}
}

// token answers /{tenant}/oauth2/v2.0/token. It needs mu.
func (s *Server) token(c *call) (*reply, *apiError) {
	c.fault = s.fault(c.r.Method, "token", "", nil)
	if c.fault != nil {
		if err := c.fault.err(); err != nil {
			return oauthError(err.status, err.code, 90033, err.message), nil
		}
	}
	if c.r.Method != http.MethodPost {
		return oauthError(http.StatusBadRequest, "invalid_request", 900561, "The endpoint only accepts POST requests. Received a "+c.r.Method+" request."), nil
	}
	tenant := strings.Split(strings.TrimPrefix(c.r.URL.Path, "/"), "/")[0]
	if !s.tenantKnown(tenant) {
		return oauthError(http.StatusBadRequest, "invalid_request", 90002, "Tenant '"+tenant+"' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud."), nil
	}
	form, err := url.ParseQuery(string(c.raw))
	if err != nil || form.Get("grant_type") != "client_credentials" {
		return oauthError(http.StatusBadRequest, "unsupported_grant_type", 70003, "The app requested an unsupported grant type '"+form.Get("grant_type")+"'."), nil
	}
	if scope := strings.Fields(form.Get("scope")); !slices.ContainsFunc(scope, func(s string) bool { return strings.HasSuffix(s, "/.default") }) {
		return oauthError(http.StatusBadRequest, "invalid_scope", 70011, "The provided value for the input parameter 'scope' is not valid. The scope "+form.Get("scope")+" is not valid."), nil
	}
	i := slices.IndexFunc(s.cfg.Principals, func(p Principal) bool {
		return strings.EqualFold(p.Client, form.Get("client_id")) && (p.Tenant == "" || strings.EqualFold(p.Tenant, tenant))
	})
	if i < 0 {
		return oauthError(http.StatusBadRequest, "unauthorized_client", 700016, "Application with identifier '"+form.Get("client_id")+"' was not found in the directory '"+tenant+"'."), nil
	}
	p := s.cfg.Principals[i]
	if a := form.Get("client_assertion"); a != "" {
		if form.Get("client_assertion_type") != assertionType {
			return oauthError(http.StatusBadRequest, "invalid_request", 900144, "The request body must contain the following parameter: 'client_assertion_type'."), nil
		}
		if bad := p.Federated.refuse(a, c.now); bad != nil {
			return bad, nil
		}
	} else if p.Secret == "" || subtle.ConstantTimeCompare([]byte(p.Secret), []byte(form.Get("client_secret"))) != 1 {
		return oauthError(http.StatusUnauthorized, "invalid_client", 7000215, "Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, "+
			"not the client secret ID, for a secret added to app '"+p.Client+"'."), nil
	}
	seconds := int(s.cfg.Timing.Token.Seconds())
	return &reply{status: http.StatusOK, header: http.Header{"Cache-Control": {"no-store, no-cache"}}, body: map[string]any{
		"token_type": "Bearer", "expires_in": seconds, "ext_expires_in": seconds, "access_token": s.mint(p, c.now)}}, nil
}

// refuse checks an assertion, and answers nil when it is good.
func (f *Federated) refuse(assertion string, now time.Time) *reply {
	bad := func(number int, words string) *reply {
		return oauthError(http.StatusUnauthorized, "invalid_client", number, words)
	}
	parts := strings.Split(assertion, ".")
	var claims struct {
		Iss, Sub string
		Aud      any
		Exp      int64
	}
	if len(parts) != 3 {
		return bad(50027, "JWT token is invalid or malformed.")
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(b, &claims) != nil {
		return bad(50027, "JWT token is invalid or malformed.")
	}
	aud, _ := claims.Aud.(string)
	if l, ok := claims.Aud.([]any); ok && len(l) == 1 {
		aud, _ = l[0].(string)
	}
	if f == nil || claims.Iss != f.Issuer || claims.Sub != f.Subject {
		return bad(700213, "No matching federated identity record found for presented assertion subject '"+claims.Sub+"', issuer '"+claims.Iss+"'.")
	}
	want := f.Audience
	if want == "" {
		want = "api://AzureADTokenExchange"
	}
	if aud != want {
		return bad(700212, "No matching federated identity record found for presented assertion audience '"+aud+"'. Expected '"+want+"'.")
	}
	if now.Unix() >= claims.Exp {
		return bad(700024, "Client assertion is not within its valid time range.")
	}
	if key, ok := f.Key.(*rsa.PublicKey); ok {
		sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
		sig, err := base64.RawURLEncoding.DecodeString(parts[2])
		if err != nil || rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], sig) != nil {
			return bad(700027, "The certificate with identifier used to sign the client assertion is not registered on application.")
		}
	}
	return nil
}

// identityToken answers a managed identity's request for a token; client is the
// identity that is assigned, "" any managed one. It needs mu. Source: "How managed
// identities for Azure resources work with virtual machines".
func (s *Server) identityToken(c *call, client string) (*reply, *apiError) {
	refuse := func(code, words string) (*reply, *apiError) {
		return &reply{status: http.StatusBadRequest, body: map[string]any{"error": code, "error_description": words}}, nil
	}
	if c.r.Header.Get("Metadata") != "true" {
		return refuse("invalid_request", "Required metadata header not specified")
	}
	if c.r.Header.Get("X-Forwarded-For") != "" {
		return refuse("invalid_request", "Requests with an X-Forwarded-For header are refused")
	}
	if c.query("api-version") == "" || c.query("resource") == "" {
		return refuse("invalid_request", "Required query variable 'resource' or 'api-version' is missing")
	}
	want := c.query("client_id")
	for _, p := range s.cfg.Principals {
		if p.Managed && (client == "" || strings.EqualFold(p.Client, client)) && (want == "" || strings.EqualFold(p.Client, want)) {
			expires := c.now.Add(s.cfg.Timing.Token)
			return &reply{status: http.StatusOK, body: map[string]any{"access_token": s.mint(p, c.now), "client_id": p.Client,
				"expires_in": fmt.Sprint(int(s.cfg.Timing.Token.Seconds())), "expires_on": fmt.Sprint(expires.Unix()),
				"ext_expires_in": fmt.Sprint(int(s.cfg.Timing.Token.Seconds())), "not_before": fmt.Sprint(c.now.Unix()),
				"resource": c.query("resource"), "token_type": "Bearer"}}, nil
		}
	}
	return refuse("invalid_request", "Identity not found")
}

// mint makes an access token. It needs mu.
func (s *Server) mint(p Principal, now time.Time) string {
	t := "fakearm." + newUUID() + newUUID()
	s.tokens[t] = token{p, now.Add(s.cfg.Timing.Token)}
	return t
}

// Token makes an access token of the first principal, for clients that do not log in.
func (s *Server) Token() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mint(s.cfg.Principals[0], s.cfg.Now())
}

// ExpireTokens ends the life of every access token that was given out.
func (s *Server) ExpireTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	for k, t := range s.tokens {
		t.expires = now
		s.tokens[k] = t
	}
}

// SetSecret replaces a client's secret, as a rotation does. Tokens stay good.
func (s *Server) SetSecret(client, secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.cfg.Principals {
		if s.cfg.Principals[i].Client == client {
			s.cfg.Principals[i].Secret = secret
		}
	}
}

// authenticate finds who is asking. It needs mu.
func (s *Server) authenticate(c *call) *apiError {
	fail := func(code, words string) *apiError {
		return &apiError{status: http.StatusUnauthorized, code: code, message: words}
	}
	h := c.r.Header.Get("Authorization")
	if h == "" {
		return fail("AuthenticationFailed", "Authentication failed. The 'Authorization' header is missing.")
	}
	text, ok := strings.CutPrefix(h, "Bearer ")
	t, known := s.tokens[text]
	switch {
	case !ok || !known:
		return fail("InvalidAuthenticationToken", "The access token is invalid.")
	case !c.now.Before(t.expires):
		return fail("ExpiredAuthenticationToken", fmt.Sprintf("The access token expiry UTC time '%s' is earlier than current UTC time '%s'.",
			t.expires.UTC().Format(time.RFC3339), c.now.UTC().Format(time.RFC3339)))
	case t.principal.Tenant != "" && !strings.EqualFold(t.principal.Tenant, s.cfg.Tenant):
		return fail("InvalidAuthenticationTokenTenant", "The access token is from the wrong issuer. It must match the tenant '"+s.cfg.Tenant+"' associated with this subscription.")
	}
	c.principal = t.principal
	return nil
}

// authorize tells whether the caller may do something, and writes it down.
func (c *call) authorize(action, scope string) *apiError {
	if c.principal.Actions != nil && !matches(c.principal.Actions, action) || matches(c.principal.NotActions, action) {
		return &apiError{status: http.StatusForbidden, code: "AuthorizationFailed", message: fmt.Sprintf(
			"The client '%s' with object id '%s' does not have authorization to perform action '%s' over scope '%s' or the scope is invalid. "+
				"If access was recently granted, please refresh your credentials.", c.principal.Client, c.principal.Client, action, scope)}
	}
	c.s.actions[action]++
	return nil
}

// linked is authorize for something that the request only refers to.
func (c *call) linked(action, scope, by string) *apiError {
	if c.authorize(action, scope) == nil {
		return nil
	}
	return &apiError{status: http.StatusForbidden, code: "LinkedAuthorizationFailed", message: fmt.Sprintf(
		"The client '%s' with object id '%s' has permission to perform action '%s' on the resource; however, it does not have permission to perform action(s) '%s' "+
			"on the linked scope(s) '%s' (respectively) or the linked scope(s) are invalid.", c.principal.Client, c.principal.Client, by, action, scope)}
}

// matches tells whether an action is one of the patterns, without case.
func matches(patterns []string, action string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		parts := strings.Split(strings.ToLower(p), "*")
		rest, ok := strings.CutPrefix(strings.ToLower(action), parts[0])
		if !ok {
			return false
		}
		if len(parts) == 1 {
			return rest == ""
		}
		for _, part := range parts[1 : len(parts)-1] {
			i := strings.Index(rest, part)
			if i < 0 {
				return false
			}
			rest = rest[i+len(part):]
		}
		return strings.HasSuffix(rest, parts[len(parts)-1])
	})
}

// Actions returns how often each action was done, for least-privilege roles.
func (s *Server) Actions() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return clone(s.actions)
}
