// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
)

// API reads objects from the API server. What a user does, the checks do with
// kubectl; this is for looking on, many times a second and for nothing.
type API struct {
	http *http.Client
}

func newAPI(a *authority) (*API, error) {
	pair, err := tls.LoadX509KeyPair(a.path(adminName+".crt"), a.path(adminName+".key"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(a.path(caName + ".crt"))
	if err != nil {
		return nil, err
	}
	roots.AppendCertsFromPEM(ca)
	return &API{&http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
	}}}, nil
}

// Get reads path into v: the object as JSON, or the text where v is a *string.
func (a *API) Get(ctx context.Context, path string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, apiURL+path, nil)
	if err != nil {
		return err
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s: %s", path, resp.Status, strings.TrimSpace(string(b)))
	}
	if text, ok := v.(*string); ok {
		*text = string(b)
		return nil
	}
	return json.Unmarshal(b, v)
}
