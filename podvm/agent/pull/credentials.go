// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// credentials are those of a docker configuration: auths, by registry or by registry
// and the beginning of a repository's name. Hosts may have * in them, as the kubelet
// allows.
type credentials map[string]authn.AuthConfig

// LogValue keeps them out of logs.
func (credentials) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// String keeps them out of messages.
func (credentials) String() string { return "[redacted]" }

// GoString keeps them out of %#v.
func (credentials) GoString() string { return "[redacted]" }

// readCredentials reads the file. Missing or empty, there are none. What is wrong
// with it is told without its words: they are secret.
func readCredentials(file string) (credentials, error) {
	if file == "" {
		return nil, nil
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(b) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the registries' credentials: %w", err)
	}
	var doc struct {
		Auths map[string]json.RawMessage `json:"auths"`
	}
	if json.Unmarshal(b, &doc) != nil {
		return nil, fmt.Errorf(`%s is not a docker configuration, {"auths": {"REGISTRY": {"auth": "..."}}}: %w`, file, errdefs.ErrFailedPrecondition)
	}
	creds := make(credentials, len(doc.Auths))
	for key, raw := range doc.Auths {
		var a authn.AuthConfig
		if json.Unmarshal(raw, &a) != nil {
			return nil, fmt.Errorf("%s: auths[%q] has an auth that is not base64 of user:password: %w", file, key, errdefs.ErrFailedPrecondition)
		}
		creds[credentialKey(key)] = a
	}
	return creds, nil
}

// dockerDomain is where docker's own registry has all its names.
var dockerDomain = strings.TrimPrefix(name.DefaultRegistry, "index.")

// credentialKey takes away what docker has written around a registry's name, the
// scheme and the API's version, and gives docker's own registry its one name.
func credentialKey(key string) string {
	for _, scheme := range []string{"https://", "http://"} {
		key = strings.TrimPrefix(key, scheme)
	}
	key = strings.TrimSuffix(key, "/")
	for _, version := range []string{"/v1", "/v2"} {
		key = strings.TrimSuffix(key, version)
	}
	host, rest, nested := strings.Cut(key, "/")
	if host == dockerDomain || strings.HasSuffix(host, "."+dockerDomain) {
		host = name.DefaultRegistry
	}
	if nested {
		return host + "/" + rest
	}
	return host
}

// Resolve finds those of the longest key that fits.
func (c credentials) Resolve(r authn.Resource) (authn.Authenticator, error) {
	best, found := "", false
	for key := range c {
		if fits(key, r.String()) && (!found || len(key) > len(best) || len(key) == len(best) && key < best) {
			best, found = key, true
		}
	}
	if !found {
		return authn.Anonymous, nil
	}
	return authn.FromConfig(c[best]), nil
}

// has tells whether there are any for a repository.
func (c credentials) has(repository string) bool {
	for key := range c {
		if fits(key, repository) {
			return true
		}
	}
	return false
}

// fits tells whether a key is meant for a repository: its host, and of the path as
// many elements as the key has.
func fits(key, repository string) bool {
	k, r := strings.Split(key, "/"), strings.Split(repository, "/")
	if len(k) > len(r) {
		return false
	}
	// As in the kubelet a * stands for something in one label of the host.
	kh, rh := strings.Split(k[0], "."), strings.Split(r[0], ".")
	if len(kh) != len(rh) {
		return false
	}
	for i := range kh {
		if ok, err := path.Match(kh[i], rh[i]); err != nil || !ok {
			return false
		}
	}
	for i := 1; i < len(k); i++ {
		if k[i] != r[i] {
			return false
		}
	}
	return true
}
