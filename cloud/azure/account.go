// SPDX-License-Identifier: Apache-2.0

package azure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/containerd/errdefs"

	"github.com/kata-remote/kata-remote/cloud"
)

// Account makes requests for what a person does now and then (publish an image, open
// ports), with the provider's credentials and its table of errors. It is safe for
// concurrent use.
type Account struct {
	cfg Config
	arm *client
}

// Versions of the APIs that Account's callers use.
const (
	APIVM      = apiVM
	APIDisk    = apiDisk
	APIGallery = apiGallery
	APINetwork = apiNetwork
)

// NewAccount takes of c the endpoints, the credentials, the region, the subscription
// and the resource group, of which callers say with Need what they cannot do without.
// It asks nobody anything. InvalidArgument: all that is wrong, each with its key.
func NewAccount(c Config) (*Account, error) {
	err := errors.Join(c.Credentials.check(), checkURL("AZURE_ENDPOINT", c.Endpoint), checkURL("AZURE_AUTHORITY_HOST", c.AuthorityHost))
	if err != nil {
		return nil, err
	}
	if c.Transport == nil {
		c.Transport = newTransport()
	}
	arm, err := newClient(c)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &Account{cfg: c, arm: arm}, nil
}

// Close lets go of idle connections.
func (a *Account) Close() {
	if c, ok := a.cfg.Transport.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// Region is where the configuration wants things.
func (a *Account) Region() string { return a.cfg.Region }

// Subscription is the path of the configured subscription; InvalidArgument: there is none.
func (a *Account) Subscription() (string, error) {
	if a.cfg.SubscriptionID == "" {
		return "", badKey("AZURE_SUBSCRIPTION_ID", "is not set; `az account show --query id` prints it")
	}
	return "/subscriptions/" + a.cfg.SubscriptionID, nil
}

// Group is the path of the configured resource group, if a region is configured, too.
func (a *Account) Group() (string, error) {
	sub, err := a.Subscription()
	if a.cfg.Region == "" {
		err = errors.Join(err, badKey("AZURE_REGION", "is not set; name the region of the nodes, such as eastus"))
	}
	if a.cfg.ResourceGroup == "" {
		err = errors.Join(err, badKey("AZURE_RESOURCE_GROUP", "is not set; name the group that pod VMs and their images are made in"))
	}
	return sub + "/resourceGroups/" + a.cfg.ResourceGroup, err
}

// Waits between attempts and looks. A publication of an image takes minutes; its
// operations say themselves when to look again.
const (
	firstLook  = 100 * time.Millisecond
	firstPause = time.Second
	mostPause  = 20 * time.Second
	// patience outlasts what Azure calls a brief outage, and a throttle's minute.
	patience = 2 * time.Minute
)

// persist repeats what is unavailable; all requests of an Account are idempotent.
func (a *Account) persist(ctx context.Context, r call) (reply, error) {
	r.counts = subject{family: familyOther}
	end := time.Now().Add(patience)
	for pause := firstPause; ; pause = min(2*pause, mostPause) {
		rep, err := a.arm.do(ctx, r)
		if err == nil || !errdefs.IsUnavailable(err) {
			return rep, about(r, err)
		}
		var refused *apiError
		if errors.As(err, &refused) && refused.after.After(time.Now().Add(pause)) {
			pause = time.Until(refused.after)
		}
		if time.Now().Add(pause).After(end) {
			return rep, about(r, err)
		}
		if err := cloud.Pause(ctx, pause); err != nil {
			return rep, err
		}
	}
}

// about names what was asked for.
func about(r call, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", r.method, r.path[strings.LastIndex(r.path, "/providers/")+1:], err)
}

// Get reads a resource. NotFound: it does not exist.
func (a *Account) Get(ctx context.Context, path, version string, into any) error {
	rep, err := a.persist(ctx, call{method: http.MethodGet, path: path, version: version})
	if err != nil {
		return err
	}
	if err := json.Unmarshal(rep.body, into); err != nil {
		return fmt.Errorf("the answer to GET %s cannot be read: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	return nil
}

// List reads all pages of a list.
func List[T any](ctx context.Context, a *Account, path, version string) ([]T, error) {
	var all []T
	r := call{method: http.MethodGet, path: path, version: version}
	for {
		var page struct {
			Value    []T    `json:"value"`
			NextLink string `json:"nextLink"`
		}
		rep, err := a.persist(ctx, r)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(rep.body, &page); err != nil {
			return nil, fmt.Errorf("the list %s cannot be read: %w: %w", path, err, errdefs.ErrUnavailable)
		}
		all = append(all, page.Value...)
		if page.NextLink == "" {
			return all, nil
		}
		if r.path, r.query, err = a.arm.local(page.NextLink); err != nil {
			return nil, err
		}
		r.version = ""
	}
}

// Put makes a resource or changes it, and waits until that is done.
func (a *Account) Put(ctx context.Context, path, version string, body any) error {
	_, err := a.long(ctx, call{method: http.MethodPut, path: path, version: version, body: body})
	return err
}

// Post does something with a resource, waits until it is done, and reads its output.
// into may be nil.
func (a *Account) Post(ctx context.Context, path, version string, body, into any) error {
	out, err := a.long(ctx, call{method: http.MethodPost, path: path, version: version, body: body})
	if err != nil || into == nil {
		return err
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("the output of POST %s cannot be read: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	return nil
}

// Delete removes a resource and waits until it is gone. That there was none is no error.
func (a *Account) Delete(ctx context.Context, path, version string) error {
	_, err := a.long(ctx, call{method: http.MethodDelete, path: path, version: version})
	if missing(err) {
		return nil
	}
	return err
}

// long makes a request and follows the operation it starts.
func (a *Account) long(ctx context.Context, r call) (output []byte, err error) {
	rep, err := a.persist(ctx, r)
	if err != nil {
		return nil, err
	}
	link := rep.header.Get("Azure-AsyncOperation")
	if link == "" {
		return rep.body, nil
	}
	path, query, err := a.arm.local(link)
	if err != nil {
		return nil, err
	}
	next := rep.after
	for pause := firstLook; ; pause = min(2*pause, mostPause) {
		if err := cloud.Pause(ctx, max(pause, time.Until(next))); err != nil {
			return nil, err
		}
		look := call{method: http.MethodGet, path: path, query: query}
		if !query.Has("api-version") {
			look.version = r.version
		}
		var state struct {
			Status     string `json:"status"`
			Error      odata  `json:"error"`
			Properties struct {
				Output json.RawMessage `json:"output"`
			} `json:"properties"`
		}
		rep, err := a.persist(ctx, look)
		if err == nil {
			err = json.Unmarshal(rep.body, &state)
		}
		if err != nil {
			return nil, about(r, err)
		}
		next = rep.after
		switch strings.ToLower(state.Status) {
		case "succeeded":
			return state.Properties.Output, nil
		case "failed", "canceled":
			if state.Error.Code == "" {
				state.Error.Code = state.Status
			}
			return nil, about(r, newAPIError(0, state.Error, time.Time{}))
		}
	}
}

// Blob is a pipeline for the blob service, to which a URL itself is the credential: the
// requests carry no token. Its retries are the SDK's.
func (a *Account) Blob(link string) (runtime.Pipeline, error) {
	u, err := url.Parse(link)
	if err != nil || checkURL("the URL for the upload", u.Scheme+"://"+u.Host) != nil {
		return runtime.Pipeline{}, fmt.Errorf("the service gave a URL for the upload that is neither https nor near: %w", errdefs.ErrFailedPrecondition)
	}
	return runtime.NewPipeline("peerpod", "v1", runtime.PipelineOptions{}, &policy.ClientOptions{
		Transport: a.cfg.Transport, Telemetry: policy.TelemetryOptions{ApplicationID: "peerpod"},
		Retry: policy.RetryOptions{MaxRetries: 6, RetryDelay: time.Second, MaxRetryDelay: 30 * time.Second, TryTimeout: 2 * time.Minute},
	}), nil
}

// Missing tells whether an error says that a resource, or what it is in, does not exist.
func Missing(err error) bool { return missing(err) }

var providerIDRule = regexp.MustCompile(`(?i)^azure://(/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Compute/virtualMachines/[^/]+)$`)

// ParseProviderID takes the provider id of a node
// (azure:///subscriptions/.../virtualMachines/NAME; `kubectl get node -o
// jsonpath={.items[*].spec.providerID}` prints them) and returns its VM's resource id.
func ParseProviderID(s string) (vm string, err error) {
	if m := providerIDRule.FindStringSubmatch(s); m != nil {
		return m[1], nil
	}
	if strings.Contains(strings.ToLower(s), "/virtualmachinescalesets/") {
		return "", fmt.Errorf("provider id %q is of a scale set, whose network is that of its model; set AZURE_NSG_ID, or AZURE_SUBNET_ID, instead of giving it: %w", s, errdefs.ErrInvalidArgument)
	}
	return "", fmt.Errorf("provider id %q is not of the form azure:///subscriptions/<id>/resourceGroups/<group>/providers/Microsoft.Compute/virtualMachines/<name>: %w", s, errdefs.ErrInvalidArgument)
}
