// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	armpolicy "github.com/Azure/azure-sdk-for-go/sdk/azcore/arm/policy"
	armruntime "github.com/Azure/azure-sdk-for-go/sdk/azcore/arm/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/containerd/errdefs"
)

// Versions of the APIs. Those of Microsoft.Compute are the ones that armcompute's
// types were generated from (v8.3.0); those of Microsoft.Network and
// Microsoft.Resources are old enough to be in every cloud.
const (
	apiVM        = "2026-04-01"
	apiDisk      = "2026-03-02"
	apiGallery   = "2025-12-03"
	apiSKU       = "2021-07-01"
	apiNetwork   = "2025-05-01"
	apiResources = "2021-04-01"
	apiOperation = apiVM
)

const (
	// tryTimeout bounds one exchange. A list of all sizes of a region is the largest
	// answer, some megabytes.
	tryTimeout = 30 * time.Second
	// maxBody is more than Resource Manager answers with.
	maxBody = 64 << 20
	// throttledTries is how often a request is sent that is answered with 429; each
	// time it waits for as long as the answer says.
	throttledTries = 4
	// throttledFor is waited after a 429 that does not say how long.
	throttledFor = 5 * time.Second
)

// client speaks with Resource Manager. Safe for concurrent use; made once, because
// its tokens and connections are worth keeping.
type client struct {
	endpoint string // without a slash at its end
	host     string
	throttle *throttle
	connect  func() (runtime.Pipeline, error)
	idle     func()     // closes idle connections
	observe  func(Call) // may be nil

	mu sync.Mutex
	pl *runtime.Pipeline // holds the token; guarded by mu
}

func newClient(c Config) (*client, error) {
	transport, idle := c.Transport, func() {}
	if transport == nil {
		own := newTransport()
		transport, idle = own, own.CloseIdleConnections
	}
	transport = overHTTP(transport, &c.Endpoint, &c.AuthorityHost)
	conf, known, err := cloudOf(c)
	if err != nil {
		return nil, err
	}
	reload := c.Reload
	if reload == nil {
		reload = func() (Credentials, error) { return c.Credentials, nil }
	}
	options := policy.ClientOptions{
		Cloud: conf, Transport: transport,
		Telemetry: policy.TelemetryOptions{ApplicationID: "peerpod"},
		// Of what is asked again at once 429 is no part: see send.
		Retry: policy.RetryOptions{
			MaxRetries: 3, RetryDelay: 200 * time.Millisecond, MaxRetryDelay: 10 * time.Second, TryTimeout: tryTimeout,
			StatusCodes: []int{http.StatusRequestTimeout, http.StatusInternalServerError, http.StatusBadGateway,
				http.StatusServiceUnavailable, http.StatusGatewayTimeout},
		},
	}
	arm := &client{throttle: newThrottle(), idle: idle, observe: c.Observe, connect: func() (runtime.Pipeline, error) {
		cred := &credential{reload: reload, options: options, private: !known} // with no token yet
		return armruntime.NewPipeline("peerpod", "v1", cred, runtime.PipelineOptions{}, &armpolicy.ClientOptions{
			ClientOptions: options,
			// Registering a resource provider is the subscription owner's to do; the
			// error says how.
			DisableRPRegistration: true,
		})
	}}
	arm.endpoint = strings.TrimRight(conf.Services[cloud.ResourceManager].Endpoint, "/")
	u, err := url.Parse(arm.endpoint)
	if err != nil {
		return nil, err
	}
	arm.host = u.Host
	_, err = arm.pipeline(nil)
	return arm, err
}

// pipeline returns the one in use; if that is old, a new one, whose first request
// gets a new token.
func (c *client) pipeline(old *runtime.Pipeline) (*runtime.Pipeline, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pl == old {
		pl, err := c.connect()
		if err != nil {
			return nil, err
		}
		c.pl = &pl
	}
	return c.pl, nil
}

// newTransport keeps enough connections for a burst of creates.
func newTransport() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy:       http.ProxyFromEnvironment,
			DialContext: (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			// As the SDK's own transport; 100 connections instead of two are kept.
			ForceAttemptHTTP2: true, MaxIdleConns: 100, MaxIdleConnsPerHost: 100, IdleConnTimeout: 90 * time.Second,
			TLSHandshakeTimeout: 10 * time.Second, ExpectContinueTimeout: time.Second,
		},
		// A redirect would carry the token to somewhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// call is one request to Resource Manager.
type call struct {
	method  string
	path    string // "/subscriptions/..."
	version string
	query   url.Values
	header  http.Header
	body    any
	counts  subject
}

// reply is an answer in the 200s.
type reply struct {
	status int
	header http.Header
	body   []byte
	after  time.Time // when to ask again; zero: it does not say
}

func (c *client) get(ctx context.Context, path, version string, counts family, into any) error {
	_, err := c.read(ctx, call{path: path, version: version, counts: subject{counts, path}}, into)
	return err
}

func (c *client) read(ctx context.Context, r call, into any) (reply, error) {
	r.method = http.MethodGet
	rep, err := c.do(ctx, r)
	if err != nil {
		return rep, err
	}
	if err := json.Unmarshal(rep.body, into); err != nil {
		return rep, fmt.Errorf("the answer to GET %s cannot be read: %w: %w", r.path, err, errdefs.ErrUnavailable)
	}
	return rep, nil
}

// remove is DELETE. gone: there was nothing (any more).
func (c *client) remove(ctx context.Context, r call) (gone bool, err error) {
	r.method = http.MethodDelete
	rep, err := c.do(ctx, r)
	if missing(err) {
		return true, nil
	}
	return err == nil && rep.status == http.StatusNoContent, err
}

// list reads all pages. next links are followed only to the same service.
func list[T any](ctx context.Context, c *client, r call) ([]T, error) {
	var all []T
	for {
		var page struct {
			Value    []T    `json:"value"`
			NextLink string `json:"nextLink"`
		}
		if _, err := c.read(ctx, r, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Value...)
		if page.NextLink == "" {
			return all, nil
		}
		path, query, err := c.local(page.NextLink)
		if err != nil {
			return nil, fmt.Errorf("next page of %s: %w", r.path, err)
		}
		r.path, r.query, r.version = path, query, ""
	}
}

// local takes a URL that the service has given apart, if it leads to the service
// itself: requests carry the token.
func (c *client) local(link string) (path string, query url.Values, err error) {
	u, err := url.Parse(link)
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	if u.Host != "" && u.Host != c.host {
		return "", nil, fmt.Errorf("the service refers to %s, which is not %s: %w", u.Host, c.host, errdefs.ErrFailedPrecondition)
	}
	return u.EscapedPath(), u.Query(), nil
}

// do sends a request, as soon as it may be sent, and again when it is throttled or its
// token is not good any more. The error is an *apiError when the service has answered.
func (c *client) do(ctx context.Context, r call) (reply, error) {
	pl, err := c.pipeline(nil)
	if err != nil {
		return reply{}, err
	}
	for try, renewed := 1, false; ; try++ {
		if err := c.throttle.wait(ctx, r.counts); err != nil {
			return reply{}, err
		}
		begin := time.Now()
		rep, err := c.send(ctx, pl, r)
		c.tell(r, rep, err, time.Since(begin))
		var refused *apiError
		if !errors.As(err, &refused) {
			return rep, err
		}
		switch {
		case refused.status == http.StatusUnauthorized && !renewed:
			renewed = true
			if pl, err = c.pipeline(pl); err != nil {
				return rep, err
			}
		case refused.status == http.StatusTooManyRequests:
			if refused.after.IsZero() {
				refused.after = time.Now().Add(throttledFor)
			}
			c.throttle.refused(r.counts, refused.after)
			if try >= throttledTries || time.Until(refused.after) > r.counts.family.longestWait() {
				return rep, err
			}
		default:
			return rep, err
		}
	}
}

func (c *client) tell(r call, rep reply, err error, took time.Duration) {
	if c.observe == nil {
		return
	}
	told := Call{Method: r.method, Path: r.path, Status: rep.status, Took: took, Err: err}
	var refused *apiError
	if errors.As(err, &refused) {
		told.Code = refused.code
	}
	c.observe(told)
}

// send sends a request once, but for what the pipeline repeats: connections that
// break and errors of the service.
func (c *client) send(ctx context.Context, pl *runtime.Pipeline, r call) (reply, error) {
	req, err := runtime.NewRequest(ctx, r.method, c.endpoint+r.path)
	if err != nil {
		return reply{}, err
	}
	q := req.Raw().URL.Query()
	for k, v := range r.query {
		q[k] = v
	}
	if r.version != "" {
		q.Set("api-version", r.version)
	}
	req.Raw().URL.RawQuery = q.Encode()
	req.Raw().Header.Set("Accept", "application/json")
	for k, v := range r.header {
		req.Raw().Header[k] = v
	}
	if r.body != nil {
		b, err := json.Marshal(r.body)
		if err != nil {
			return reply{}, err
		}
		if err := req.SetBody(streaming.NopCloser(bytes.NewReader(b)), "application/json"); err != nil {
			return reply{}, err
		}
	}
	resp, err := pl.Do(req)
	if err != nil {
		return reply{}, sendError(ctx, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return reply{}, sendError(ctx, err)
	}
	after := retryAfter(resp, time.Now())
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return reply{status: resp.StatusCode}, replyError(resp, body, after)
	}
	return reply{status: resp.StatusCode, header: resp.Header, body: body, after: after}, nil
}
