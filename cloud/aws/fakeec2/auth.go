// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"path"
	"slices"
	"sort"
	"strings"
	"time"
)

// authFailure is EC2's one answer to a credential that it cannot take.
func authFailure() *Error {
	return errorf(401, "AuthFailure", "AWS was not able to validate the provided access credentials")
}

// authenticate checks a request's signature (Signature Version 4, in the header
// Authorization) and returns whose it is.
func (s *Server) authenticate(r *http.Request, body []byte) (*Key, error) {
	auth, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	if !ok {
		return nil, errorf(401, "AuthFailure", "AWS was not able to validate the provided access credentials: "+
			"the request has no signature of version 4 in its header Authorization")
	}
	fields := map[string]string{}
	for f := range strings.SplitSeq(auth, ",") {
		k, v, _ := strings.Cut(strings.TrimSpace(f), "=")
		fields[k] = v
	}
	scope := strings.Split(fields["Credential"], "/") // key, date, region, service, aws4_request
	signed := strings.Split(fields["SignedHeaders"], ";")
	if len(scope) != 5 || scope[4] != "aws4_request" || !slices.Contains(signed, "host") || fields["Signature"] == "" {
		return nil, errorf(401, "AuthFailure", "AWS was not able to validate the provided access credentials: the header Authorization is malformed")
	}
	if scope[2] != s.cfg.Region {
		return nil, errorf(401, "AuthFailure", "AWS was not able to validate the provided access credentials: "+
			"Credential should be scoped to a valid region, not '%s'", scope[2])
	}
	key := s.key(scope[0])
	if key == nil {
		return nil, authFailure()
	}
	stamp := r.Header.Get("X-Amz-Date")
	at, err := time.Parse("20060102T150405Z", stamp)
	if err != nil || stamp[:8] != scope[1] {
		return nil, authFailure()
	}
	now := s.cfg.Now()
	if d := now.Sub(at); s.cfg.MaxSkew > 0 && (d > s.cfg.MaxSkew || d < -s.cfg.MaxSkew) {
		return nil, errorf(400, "RequestExpired", "Request has expired. Timestamp date is %s. Current date is %s",
			at.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	want := signature(r, body, key.Secret, stamp, scope[1:], signed)
	if !hmac.Equal([]byte(want), []byte(fields["Signature"])) {
		if scope[3] == "sts" {
			return nil, errorf(403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided. "+
				"Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
		}
		return nil, authFailure()
	}
	if got := r.Header.Get("X-Amz-Security-Token"); got != key.Session {
		return nil, authFailure()
	}
	if !key.Expires.IsZero() && !now.Before(key.Expires) {
		return nil, errorf(400, "RequestExpired", "Request has expired.")
	}
	return key, nil
}

// signature is what the request must be signed with. Form: "Create a signed AWS API
// request", IAM User Guide.
func signature(r *http.Request, body []byte, secret, stamp string, scope, signed []string) string {
	var b strings.Builder
	b.WriteString(r.Method + "\n" + r.URL.EscapedPath() + "\n")
	query := r.URL.Query()
	keys := make([]string, 0, len(query))
	for k := range query {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	var pairs []string
	for _, k := range keys {
		vs := slices.Sorted(slices.Values(query[k]))
		for _, v := range vs {
			pairs = append(pairs, escape(k)+"="+escape(v))
		}
	}
	b.WriteString(strings.Join(pairs, "&") + "\n")
	for _, h := range signed {
		v := strings.Join(r.Header.Values(h), ",")
		switch h {
		case "host":
			v = r.Host
		case "content-length":
			v = r.Header.Get("Content-Length")
			if v == "" {
				v = itoa(int(r.ContentLength))
			}
		}
		b.WriteString(h + ":" + strings.Join(strings.Fields(v), " ") + "\n")
	}
	payload := r.Header.Get("X-Amz-Content-Sha256")
	if payload != "UNSIGNED-PAYLOAD" {
		sum := sha256.Sum256(body)
		payload = hex.EncodeToString(sum[:])
	}
	b.WriteString("\n" + strings.Join(signed, ";") + "\n" + payload)

	sum := sha256.Sum256([]byte(b.String()))
	text := "AWS4-HMAC-SHA256\n" + stamp + "\n" + strings.Join(scope, "/") + "\n" + hex.EncodeToString(sum[:])
	k := []byte("AWS4" + secret)
	for _, part := range scope {
		k = mac(k, part)
	}
	return hex.EncodeToString(mac(k, text))
}

func mac(key []byte, text string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return m.Sum(nil)
}

// escape is URI encoding as signatures want it: a space is %20.
func escape(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }

// arn names the key's owner.
func (s *Server) arn(k *Key) string {
	if k.Role != "" {
		return "arn:aws:sts::" + s.cfg.Account + ":assumed-role/" + k.Role + "/" + k.User
	}
	return "arn:aws:iam::" + s.cfg.Account + ":user/" + k.User
}

// may tells whether the key's owner may call the action, such as "ec2:RunInstances".
func (k *Key) may(action string) bool {
	match := func(pattern string) bool { ok, err := path.Match(pattern, action); return ok && err == nil }
	return (k.Allow == nil || slices.ContainsFunc(k.Allow, match)) && !slices.ContainsFunc(k.Deny, match)
}

func (s *Server) unauthorized(k *Key, action string) *Error {
	return errorf(403, "UnauthorizedOperation", "You are not authorized to perform this operation. User: %s is not authorized to perform: %s "+
		"because no identity-based policy allows the %s action", s.arn(k), action, action)
}

func (s *Server) key(id string) *Key {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.keys[id]
	if k == nil {
		return nil
	}
	c := *k
	return &c
}

// SetKey adds a credential, or replaces the one with its ID.
func (s *Server) SetKey(k Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[k.ID] = &k
}

// RemoveKey makes a credential unknown.
func (s *Server) RemoveKey(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.keys, id)
}
