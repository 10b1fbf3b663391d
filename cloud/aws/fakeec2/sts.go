// SPDX-License-Identifier: Apache-2.0

package fakeec2

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// callerIdentity is STS GetCallerIdentity.
func (s *Server) callerIdentity(c *call) (obj, error) {
	id := "AIDA" + strings.TrimPrefix(c.key.ID, "AKIA")
	if c.key.Role != "" {
		id = "AROAEXAMPLE:" + c.key.User
	}
	return obj{"Account": s.cfg.Account, "Arn": s.arn(c.key), "UserId": id}, nil
}

// assumeRole is STS AssumeRoleWithWebIdentity. The token is a JSON Web Token; its
// signature is not checked, its audience and expiry are.
func (s *Server) assumeRole(c *call) (obj, error) {
	arn := strings.SplitN(c.str("RoleArn"), ":", 6)
	if len(arn) != 6 || arn[2] != "iam" || !strings.HasPrefix(arn[5], "role/") {
		return nil, errorf(400, "ValidationError", "%s is invalid", c.str("RoleArn"))
	}
	if arn[4] != s.cfg.Account {
		return nil, errorf(403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity")
	}
	parts := strings.Split(c.str("WebIdentityToken"), ".")
	var claims struct {
		Sub string `json:"sub"`
		Exp int64  `json:"exp"`
		Aud any    `json:"aud"`
	}
	if len(parts) != 3 {
		return nil, errorf(400, "InvalidIdentityToken", "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)")
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(raw, &claims) != nil {
		return nil, errorf(400, "InvalidIdentityToken", "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)")
	}
	if !strings.Contains(fmt.Sprint(claims.Aud), "sts.amazonaws.com") {
		return nil, errorf(400, "InvalidIdentityToken", "Incorrect token audience")
	}
	if !time.Unix(claims.Exp, 0).After(c.now) {
		return nil, errorf(400, "ExpiredTokenException", "Token expired: current date/time %d must be before the expiration date/time %d", c.now.Unix(), claims.Exp)
	}
	seconds := 3600
	if c.has("DurationSeconds") {
		seconds = c.num("DurationSeconds")
	}
	if seconds < 900 || seconds > 43200 {
		return nil, errorf(400, "ValidationError", "1 validation error detected: Value '%d' at 'durationSeconds' failed to satisfy constraint: between 900 and 43200", seconds)
	}
	role, session := strings.TrimPrefix(arn[5], "role/"), c.str("RoleSessionName")
	key := &Key{ID: strings.ToUpper(fmt.Sprintf("ASIA%016x", s.random.Uint64())), Secret: fmt.Sprintf("%016x%016x", s.random.Uint64(), s.random.Uint64()),
		Session: fmt.Sprintf("token-%016x", s.random.Uint64()), User: session, Role: role, Expires: c.now.Add(time.Duration(seconds) * time.Second)}
	s.keys[key.ID] = key
	return obj{"SubjectFromWebIdentityToken": claims.Sub, "Audience": "sts.amazonaws.com",
		"AssumedRoleUser": obj{"Arn": s.arn(key), "AssumedRoleId": "AROAEXAMPLE:" + session},
		"Credentials":     obj{"AccessKeyId": key.ID, "SecretAccessKey": key.Secret, "SessionToken": key.Session, "Expiration": key.Expires}}, nil
}
