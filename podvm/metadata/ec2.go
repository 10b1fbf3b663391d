// SPDX-License-Identifier: Apache-2.0

package metadata

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// EC2 asks EC2's instance metadata service, version 2 only: with a token, which the
// service gives to no one behind a router (its answer's hop limit is 1). A token is got
// when there is none, and again when it is over. Not safe for concurrent use.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
type EC2 struct {
	Client *Client
	URL    string        // of the service; empty: the real one
	TTL    time.Duration // how long a token is to be good for, whole seconds

	token string
	until time.Time // when the token is not used any more
}

const (
	ec2TTLHeader   = "X-aws-ec2-metadata-token-ttl-seconds"
	ec2TokenHeader = "X-aws-ec2-metadata-token"
	// tokenCharacters may be in a token: base64 in either alphabet.
	tokenCharacters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_="
)

// Get gets a path, such as "/latest/user-data". The errors are those of Client.Do;
// NotFound is also a service that is not EC2's.
func (e *EC2) Get(ctx context.Context, path string) ([]byte, error) {
	if e.URL == "" {
		e.URL = URL
	}
	if e.token == "" || !time.Now().Before(e.until) {
		if err := e.renew(ctx); err != nil {
			return nil, err
		}
	}
	b, err := e.Client.Do(ctx, http.MethodGet, e.URL+path, http.Header{ec2TokenHeader: {e.token}}, nil)
	if IsStatus(err, http.StatusUnauthorized) {
		e.token = "" // the service does not know it any more
	}
	return b, err
}

// renew asks for a token.
func (e *EC2) renew(ctx context.Context) error {
	asked := time.Now()
	ttl := http.Header{ec2TTLHeader: {strconv.Itoa(int(e.TTL.Seconds()))}}
	b, err := e.Client.Do(ctx, http.MethodPut, e.URL+"/latest/api/token", ttl, nil)
	switch {
	case IsStatus(err, http.StatusForbidden):
		return fmt.Errorf("%w: the instance's metadata service is switched off: create it with MetadataOptions.HttpEndpoint enabled", err)
	case IsStatus(err, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotImplemented):
		return fmt.Errorf("%s: it is not EC2's: %w", err, errdefs.ErrNotFound)
	case err != nil:
		return err
	}
	token := string(b)
	if token == "" || strings.Trim(token, tokenCharacters) != "" {
		return fmt.Errorf("PUT /latest/api/token: the answer is no token: %w", errdefs.ErrUnavailable)
	}
	e.token, e.until = token, asked.Add(e.TTL*9/10)
	return nil
}
