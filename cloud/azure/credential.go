// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/containerd/errdefs"
)

// credential gets tokens with the credentials as they are now. The one who asks, the
// SDK's policy, keeps a token until five minutes before its end. Safe for concurrent
// use.
type credential struct {
	reload  func() (Credentials, error)
	options policy.ClientOptions
	// private: the authority is not one of Microsoft's, so that there is nothing to
	// be learnt about it from them.
	private bool

	mu   sync.Mutex
	from Credentials            // what cred was made of; guarded by mu
	cred azcore.TokenCredential // guarded by mu
}

// GetToken implements azcore.TokenCredential.
func (c *credential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	cred, err := c.current()
	if err != nil {
		return azcore.AccessToken{}, err
	}
	return cred.GetToken(ctx, o)
}

func (c *credential) current() (azcore.TokenCredential, error) {
	now, err := c.reload()
	if err != nil {
		return nil, fmt.Errorf("read the credentials: %w: %w", err, errdefs.ErrPermissionDenied)
	}
	if err := now.check(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cred != nil && now == c.from {
		return c.cred, nil
	}
	cred, err := c.make(now)
	if err != nil {
		return nil, fmt.Errorf("credentials (%s): %w: %w", now.kind(), err, errdefs.ErrInvalidArgument)
	}
	c.from, c.cred = now, cred
	return cred, nil
}

// make chooses the kind, see Credentials.
func (c *credential) make(from Credentials) (azcore.TokenCredential, error) {
	switch {
	case from.ClientSecret != "":
		return azidentity.NewClientSecretCredential(from.TenantID, from.ClientID, from.ClientSecret,
			&azidentity.ClientSecretCredentialOptions{ClientOptions: c.options, DisableInstanceDiscovery: c.private})
	case from.FederatedTokenFile != "":
		// The SDK reads the file again when its content is ten minutes old; the kubelet renews
		// it at 80 % of an hour.
		return azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: c.options, DisableInstanceDiscovery: c.private,
			TenantID: from.TenantID, ClientID: from.ClientID, TokenFilePath: from.FederatedTokenFile,
		})
	}
	o := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: c.options}
	if from.ClientID != "" {
		o.ID = azidentity.ClientID(from.ClientID)
	}
	return azidentity.NewManagedIdentityCredential(o)
}

// clouds are Microsoft's, by the host of their resource manager.
var clouds = map[string]cloud.Configuration{
	"management.azure.com":         cloud.AzurePublic,
	"management.usgovcloudapi.net": cloud.AzureGovernment,
	"management.chinacloudapi.cn":  cloud.AzureChina,
}

const publicEndpoint = "https://management.azure.com"

// cloudOf finds the cloud of a configuration. known: it is Microsoft's own.
func cloudOf(c Config) (conf cloud.Configuration, known bool, err error) {
	endpoint := strings.TrimRight(c.Endpoint, "/")
	if endpoint == "" {
		endpoint = publicEndpoint
	}
	u, err := url.Parse(endpoint)
	if err != nil {
		return conf, false, err
	}
	conf, known = clouds[u.Host]
	if !known {
		conf = cloud.Configuration{
			ActiveDirectoryAuthorityHost: cloud.AzurePublic.ActiveDirectoryAuthorityHost,
			Services: map[cloud.ServiceName]cloud.ServiceConfiguration{
				cloud.ResourceManager: {Endpoint: endpoint, Audience: publicEndpoint},
			},
		}
	}
	if c.AuthorityHost != "" {
		conf.ActiveDirectoryAuthorityHost = c.AuthorityHost
		_, known = clouds[u.Host]
		known = known && strings.HasPrefix(c.AuthorityHost, "https://login.")
	}
	return conf, known, nil
}

// plainHTTP sends what is meant for some hosts over HTTP. The SDK refuses to speak to
// an authority over HTTP even where checkURL has found it safe, and wants one to call
// itself as it is called.
type plainHTTP struct {
	next  policy.Transporter
	hosts map[string]bool
}

// Do implements policy.Transporter.
func (p plainHTTP) Do(req *http.Request) (*http.Response, error) {
	host := req.URL.Host
	if req.URL.Scheme != "https" || !p.hosts[host] {
		return p.next.Do(req)
	}
	req = req.Clone(req.Context())
	req.URL.Scheme = "http"
	resp, err := p.next.Do(req)
	if err != nil || !strings.HasSuffix(req.URL.Path, "/.well-known/openid-configuration") {
		return resp, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDiscovery))
	if err != nil {
		return nil, err
	}
	body = bytes.ReplaceAll(body, []byte("http://"+host), []byte("https://"+host))
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	resp.Header.Del("Content-Length")
	return resp, nil
}

// maxDiscovery is far more than an authority says of itself.
const maxDiscovery = 1 << 20

// overHTTP rewrites the URLs of a configuration to https and returns a transport that
// undoes it on the wire.
func overHTTP(next policy.Transporter, urls ...*string) policy.Transporter {
	p := plainHTTP{next, map[string]bool{}}
	for _, u := range urls {
		if host, ok := strings.CutPrefix(*u, "http://"); ok {
			host = strings.TrimRight(host, "/")
			*u = "https://" + host
			host, _, _ = strings.Cut(host, "/")
			p.hosts[host] = true
		}
	}
	if len(p.hosts) == 0 {
		return next
	}
	return p
}
