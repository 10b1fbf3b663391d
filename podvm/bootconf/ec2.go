// SPDX-License-Identifier: Apache-2.0

package bootconf

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
)

// EC2 reads the seed from EC2's instance metadata service, version 2 only: a token
// first, which the service gives to no one behind a router (its answer's hop limit is 1).
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
type EC2 struct {
	URL string // of the service; empty: the real one
}

const (
	// ec2TokenTTL is how long a token is good for, seconds: the few requests of a start.
	ec2TokenTTL = "60"

	ec2TTLHeader   = "X-aws-ec2-metadata-token-ttl-seconds"
	ec2TokenHeader = "X-aws-ec2-metadata-token"
)

// Name says what the source is.
func (EC2) Name() string { return "EC2 metadata service" }

// Seed gets user data and host name. NotFound: there is no user data, or the service at
// that address is another cloud's.
func (e EC2) Seed(ctx context.Context) (*Seed, error) {
	if e.URL == "" {
		e.URL = metadataURL
	}
	c := newMetadataClient()
	defer c.CloseIdleConnections()
	token, err := e.token(ctx, c)
	if err != nil {
		return nil, err
	}
	get := func(path string) ([]byte, error) {
		return c.do(ctx, http.MethodGet, e.URL+path, http.Header{ec2TokenHeader: {token}}, nil)
	}
	var s Seed
	if s.UserData, err = get("/latest/user-data"); err != nil {
		return nil, err
	}
	if len(s.UserData) == 0 {
		return nil, fmt.Errorf("the user data is empty: %w", errdefs.ErrNotFound)
	}
	// A pod VM works as well without its name, and with a name that cannot be had now.
	if name, err := get("/latest/meta-data/local-hostname"); err == nil {
		s.Hostname = strings.TrimSpace(string(name))
	}
	return &s, nil
}

// token asks for a session token.
func (e EC2) token(ctx context.Context, c *metadataClient) (string, error) {
	b, err := c.do(ctx, http.MethodPut, e.URL+"/latest/api/token", http.Header{ec2TTLHeader: {ec2TokenTTL}}, nil)
	switch {
	case isStatus(err, http.StatusForbidden):
		return "", fmt.Errorf("%w: the instance's metadata service is switched off: create it with MetadataOptions.HttpEndpoint enabled", err)
	case isStatus(err, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotImplemented):
		return "", fmt.Errorf("%s: it is not EC2's: %w", err, errdefs.ErrNotFound)
	case err != nil:
		return "", err
	}
	token := string(b)
	if token == "" || strings.Trim(token, tokenCharacters) != "" {
		return "", fmt.Errorf("PUT /latest/api/token: the answer is no token: %w", errdefs.ErrUnavailable)
	}
	return token, nil
}

// tokenCharacters may be in a session token: base64 in either alphabet.
const tokenCharacters = letters + digits + "+/-_="
